import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import Reject, SourceError, UsageError
from pipelines.sources.base import Origin, Rejected, Source, json_array, json_lines, label, parquet, parquet_rows
from pipelines.sources.registry import SOURCES, source_named
from pipelines.storage import Root

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def a_source(**changes):
    plain = {"name": "s", "hub_id": "o/s", "licence": "MIT", "non_commercial": False, "files": ("*.json",)}
    functions = {"expected": (), "fetch": (), "read": json_array, "convert": lambda record, origin: []}
    return Source(**(plain | functions | changes))


@pytest.fixture
def array_of(tmp_path):
    def read(content):
        (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(json_array(Root(str(tmp_path)), "x.json"))

    return read


def test_the_nine_sources_are_found():
    names = "allava evol_instruct llava15 longalign mantis sharegpt4v sharegpt4video videochat2 wildchat"
    assert list(SOURCES) == names.split()


def test_a_misspelt_source_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean mantis"):
        source_named("mantiss")


@pytest.mark.parametrize("name", SOURCES)
def test_every_fetch_command_stays_below_the_literal_data_folder(name):
    downloads = [command for command in SOURCES[name].fetch if "--local-dir" in command]
    assert downloads
    assert all(f" --local-dir DATA/{name}" in command for command in downloads)


def test_files_that_are_no_records_or_repeat_others_are_left_out(tmp_path):
    for name in ("a/train.json", "a/train_9k.json", "b/train_9k.json", "b/train_8k.json", "b/instructions.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    source = a_source(
        files=("*/*.json",), not_files=("*/instructions*.json",), repeats=((r"train_\d+k\.json$", "train.json"),)
    )
    assert source.annotation_files(Root(str(tmp_path))) == ["a/train.json", "b/train_8k.json", "b/train_9k.json"]


def test_a_record_that_is_no_object_costs_only_itself(ingest):
    (rejected,) = ingest(a_source(), {"x.json": [[], {}]})
    assert rejected == Rejected("s/x.json:0", "bad-record", "expected an object, found list")


DEEP = b'{"x": ["]}", "\\"]", ' * 100_000 + b"0" + b"]}" * 100_000


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_an_array_reads_as_json_reads_it(tmp_path_factory, values, indent, ascii_only):
    folder = tmp_path_factory.mktemp("arrays", numbered=True)
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    (folder / "x.json").write_bytes(text)
    assert list(json_array(Root(str(folder)), "x.json")) == json.loads(text)


def test_records_that_straddle_the_chunks_of_a_large_array_come_whole(array_of):
    values = [{"n": i, "text": "画é\U0001f600\n" * (i % 97)} for i in range(9000)]
    values += [{"long": "x" * 5_000_000}, 12, 345]
    assert array_of(json.dumps(values, ensure_ascii=False)) == values


def test_a_large_array_is_read_in_little_memory(tmp_path):
    record = json.dumps({"conversations": ["x" * 1000] * 10})
    (tmp_path / "x.json").write_text("[" + ",".join([record] * 3000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in json_array(Root(str(tmp_path)), "x.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 10_000_000 < (tmp_path / "x.json").stat().st_size


@pytest.mark.parametrize("content", ["[]", " [ ] \n", "\ufeff[]"])
def test_an_empty_array_has_no_records(array_of, content):
    assert array_of(content) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "asked for a login"),
        (b'{"caption": []}', "no JSON array"),
        (b'[{"a": 1}, {"a": ', "breaks off after 1 records"),
        (b'[{"a": 1} {"a": 2}]', "breaks off after 0 records"),
        (b'[{"a": 1}', "breaks off after 0 records"),
        (b'[{"a": 1},]', "breaks off after 1 records"),
        (b'[{"a": 1}][{"a": 2}]', "more follows its array of 1 records"),
        (b"[" * 100_000, "breaks off after 0 records"),
    ],
)
def test_a_file_that_is_no_whole_array_is_named_with_the_remedy(array_of, content, what):
    with pytest.raises(SourceError, match=what) as caught:
        array_of(content)
    assert "x.json" in str(caught.value)
    assert "download" in str(caught.value)


@pytest.mark.parametrize("broken", [b'"\\ud83d"', b'"\xff\xfe"', b"[[1]]", b"1e999", b"NaN", DEEP])
def test_one_strange_value_costs_only_its_own_record(tmp_path, broken):
    (tmp_path / "x.json").write_bytes(b'[{"id": "a"}, {"id": ' + broken + b'}, {"id": "c"}]')

    def convert(record, origin):
        label(record, "id")
        return []

    outcomes = list(a_source(convert=convert).samples(Root(str(tmp_path)), "x.json"))
    assert outcomes[::2] == [[], []]
    assert outcomes[1].reason == "bad-record"


def test_a_line_that_is_not_json_costs_only_itself(tmp_path):
    lines = [b'{"id":\r1}', b"", b'{"id": 2', b'{"id": "\xff"}', b"[" * 100_000, '{"id": "a\u2028b"}'.encode()]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = list(json_lines(Root(str(tmp_path)), "x.jsonl"))
    assert [isinstance(value, Reject) for value in found] == [False, True, False, True, False]
    assert found[-1] == {"id": "a\u2028b"}


def rows_of(folder, columns):
    with parquet(Root(str(folder)), "x.parquet") as table:
        return list(parquet_rows(table, columns))


@pytest.mark.parametrize("compliant", [True, False])
def test_only_the_named_fields_are_read_whatever_the_items_of_a_list_are_called(tmp_path, compliant):
    table = pa.Table.from_pylist([{"id": 1, "turns": [{"text": "a", "score": 0.5}], "other": 2}])
    pq.write_table(table, tmp_path / "x.parquet", use_compliant_nested_type=compliant)
    assert rows_of(tmp_path, ("id", "turns.text", "absent")) == [{"id": 1, "turns": [{"text": "a"}]}]


def test_a_string_that_is_not_utf8_costs_only_its_own_row(tmp_path):
    broken = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "x.parquet")
    first, second, third = rows_of(tmp_path, ("text",))
    assert (first, second.reason, third) == ({"text": "a"}, "bad-record", {"text": "c"})


def test_a_damaged_parquet_file_is_named_with_the_remedy(tmp_path):
    pq.write_table(pa.table({"text": ["x" * 999] * 999}), tmp_path / "x.parquet", compression="zstd")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    for damaged in (content[: len(content) // 2], content[:20] + b"\0" * 60 + content[80:]):
        (tmp_path / "x.parquet").write_bytes(damaged)
        with pytest.raises(SourceError, match=r"x\.parquet.*download it again"):
            rows_of(tmp_path, ("text",))


def test_a_uid_says_source_file_and_place():
    assert (
        Origin("mantis", "nlvr2/train-00000-of-00001.parquet", 7).uid == "mantis/nlvr2/train-00000-of-00001.parquet:7"
    )


@pytest.mark.parametrize(("record", "name"), [({"id": "a"}, "a"), ({"id": 7}, "7"), ({"id": None}, None), ({}, None)])
def test_a_record_is_called_by_a_string_a_number_or_nothing(record, name):
    assert label(record, "id") == name


@pytest.mark.parametrize("value", [True, 1.5, ["a"], "\ud800"])
def test_anything_else_is_no_name(value):
    with pytest.raises(Reject, match="bad-record: id"):
        label({"id": value}, "id")
