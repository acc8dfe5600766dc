"""pipelines.ingest on a real Ray: nothing vanishes, and nothing is read twice."""

import errno
import fcntl
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, ClassVar

import pyarrow.parquet as pq
import pytest

from formats.catalog import CATALOG_SCHEMA, from_row, to_row
from formats.errors import BuildError, SourceError, UsageError
from formats.sample import Media, Sample, Turn
from pipelines.build import Request, alone
from pipelines.executor import Executor
from pipelines.ingest import Catalog, Location, ingested
from pipelines.progress import Progress
from recipes.schema import Recipe
from validators.folder import Folder

FILE = "llava_v1_5_mix665k.json"
GOOD = {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
BAD = [
    {"id": "x", "image": "../up.jpg", "conversations": GOOD["conversations"]},
    {"id": "y"},
    "no object",
]


def run(data: Path, executor: Executor, catalog: Path | None = None) -> Catalog:
    location = Location.below(str(data), "llava15")
    with ingested([location], catalog or data / "catalog", executor, Progress()) as (done,):
        return done


def write(data: Path, records: list) -> None:
    (data / "llava15").mkdir(parents=True, exist_ok=True)
    (data / "llava15" / FILE).write_text(json.dumps(records))


def test_records_are_usable_or_in_the_ledger(tmp_path: Path, executor: Executor) -> None:
    write(tmp_path, [GOOD, *BAD, GOOD])
    catalog = run(tmp_path, executor)
    summary = catalog.summary()
    assert (summary["records"], summary["usable"], summary["rejected"]) == (5, 2, 3)
    ledger = [json.loads(line) for line in (catalog.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(r["uid"], r["reason"]) for r in ledger] == [
        (f"llava15/{FILE}:1", "unsafe-path"),
        (f"llava15/{FILE}:2", "bad-record"),
        (f"llava15/{FILE}:3", "bad-record"),
    ]
    assert set(summary["marked"].values()) == {0}
    table = pq.read_table(catalog.files[0])
    assert table.schema == CATALOG_SCHEMA
    assert table["uid"].to_pylist() == [f"llava15/{FILE}:0", f"llava15/{FILE}:4"]


def test_records_that_give_themselves_away_are_counted(tmp_path: Path, executor: Executor) -> None:
    turns = [{"from": "human", "value": "My address is anna@uni-koeln.de"}, {"from": "gpt", "value": "Thank you."}]
    write(tmp_path, [GOOD, {"id": 2, "conversations": turns}])
    assert run(tmp_path, executor).summary()["marked"]["n_emails"] == 1


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path: Path, executor: Executor) -> None:
    write(tmp_path, [GOOD])
    first = run(tmp_path, executor)
    written = Path(first.files[0]).stat().st_mtime_ns
    assert run(tmp_path, executor) == first
    assert Path(first.files[0]).stat().st_mtime_ns == written
    write(tmp_path, [GOOD, GOOD])
    assert run(tmp_path, executor).summary()["records"] == 2
    assert not Path(first.files[0]).exists()


def test_a_catalog_of_another_version_is_read_again_and_says_so(tmp_path: Path, executor: Executor) -> None:
    class Heard(Progress):
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    write(tmp_path, [GOOD])
    location = Location.below(str(tmp_path), "llava15")
    first = run(tmp_path, executor)
    summary = first.folder / f"{first.parts[0].name}.json"
    old = first.folder / "part-0123456789abcdef.json"
    content = json.loads(summary.read_text())
    old.write_text(json.dumps({key: value for key, value in content.items() if key != "version"}))
    summary.unlink()
    with ingested([location], tmp_path / "catalog", executor, Heard()) as (again,):
        assert again.summary() == first.summary()
    assert any("is of another version (1, not 2/" in note for note in Heard.notes), Heard.notes
    assert not old.exists()
    Heard.notes.clear()
    with ingested([location], tmp_path / "catalog", executor, Heard()):
        assert Heard.notes == []


@pytest.mark.parametrize("suffix", ["parquet", "rejects.jsonl"])
def test_a_part_that_lost_its_end_is_read_again(tmp_path: Path, executor: Executor, suffix: str) -> None:
    write(tmp_path, [GOOD, {"id": "nothing else"}])
    catalog = run(tmp_path, executor)
    stored = catalog.folder / f"{catalog.parts[0].name}.{suffix}"
    whole = stored.read_bytes()
    stored.write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path, executor).sha256 == catalog.sha256
    assert stored.read_bytes() == whole


class Meddler(Progress):
    """Writes another file after it was looked at and before it is read."""

    def __init__(self, data: Path) -> None:
        self._data = data

    def stage(self, name: str, total: int | None, unit: str) -> None:
        write(self._data, [GOOD, GOOD])


def test_a_file_that_changes_while_it_is_read_is_not_taken(tmp_path: Path, executor: Executor) -> None:
    write(tmp_path, [GOOD])
    location = Location.below(str(tmp_path), "llava15")
    with (
        pytest.raises(SourceError, match=f"{FILE} changed while it was read"),
        ingested([location], tmp_path / "catalog", executor, Meddler(tmp_path)),
    ):
        pass
    assert run(tmp_path, executor).summary()["records"] == 2


def test_a_touched_file_has_the_same_fingerprint(tmp_path: Path, executor: Executor) -> None:
    write(tmp_path, [GOOD])
    first = run(tmp_path, executor)
    os.utime(tmp_path / "llava15" / FILE, (1, 1))
    again = run(tmp_path, executor)
    assert again.sha256 == first.sha256
    assert again.hashes == {FILE: hashlib.sha256((tmp_path / "llava15" / FILE).read_bytes()).hexdigest()}


def test_a_catalog_that_is_being_read_stays_as_it_is(tmp_path: Path, executor: Executor) -> None:
    for name, answer in (("one", "first"), ("two", "second")):
        record = {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}]}
        write(tmp_path / name, [record])
    shared = tmp_path / "catalog"
    with ingested([Location.below(str(tmp_path / "one"), "llava15")], shared, executor, Progress()) as (first,):
        second = run(tmp_path / "two", executor, shared)
        texts = [pq.read_table(c.files[0])["turns"].to_pylist()[0][1]["text"] for c in (first, second)]
        assert texts == ["first", "second"]
    assert run(tmp_path / "two", executor, shared) == second
    assert not Path(first.files[0]).exists()


def test_a_source_that_is_named_twice_is_taken_once(tmp_path: Path, executor: Executor) -> None:
    write(tmp_path, [GOOD])
    place = Location.below(str(tmp_path), "llava15")
    with ingested([place, place], tmp_path / "catalog", executor, Progress()) as catalogs:
        assert [catalog.location for catalog in catalogs] == [place]


def test_commands_that_name_sources_in_other_orders_do_not_wait_in_a_circle(tmp_path: Path) -> None:
    """Another command holds the source in the middle, until both have what they want before it."""
    places = [Location.below(str(tmp_path), name) for name in ("allava", "llava15", "mantis")]
    for source in ("allava", "mantis"):
        (tmp_path / source).mkdir()
    write(tmp_path, [GOOD])
    catalog = tmp_path / "catalog"
    (catalog / "llava15").mkdir(parents=True)
    code = """
import pickle, sys
from formats.errors import SourceError
from pipelines.executor import Executor
from pipelines.ingest import ingested
from pipelines.progress import Progress

class Told(Progress):
    def note(self, text):
        print("waiting", flush=True)

try:
    with ingested(*pickle.load(sys.stdin.buffer), Executor(), Told()):
        pass
except SourceError:
    print("had them all", flush=True)
"""
    commands = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    with (catalog / "llava15" / ".lock").open("a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command, order in zip(commands, (places, places[::-1]), strict=True):
            assert command.stdin is not None
            assert command.stdout is not None
            command.stdin.write(pickle.dumps((order, catalog)))
            command.stdin.close()
            assert command.stdout.readline() == b"waiting\n"
    try:
        assert {command.wait(timeout=20) for command in commands} == {0}
    finally:
        for command in commands:
            command.kill()
            command.stdout.close()


def nfs_flock(file: BinaryIO, operation: int) -> None:
    """`flock` as NFS version 4 has it: a shared lock needs a file open for reading, an exclusive one for writing."""
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if (operation & fcntl.LOCK_SH and mode == os.O_WRONLY) or (operation & fcntl.LOCK_EX and mode == os.O_RDONLY):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _flock(file, operation)


_flock = fcntl.flock


def test_a_catalog_may_lie_on_nfs(tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [GOOD])
    monkeypatch.setattr(fcntl, "flock", nfs_flock)
    first = run(tmp_path, executor)
    with ingested([first.location], tmp_path / "catalog", executor, Progress()):
        assert run(tmp_path, executor) == first


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_remedy(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(tmp_path, [GOOD])

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BuildError, match=r"catalog/llava15 is on a file system that gives no locks .*-o flock.*--cat"):
        run(tmp_path, executor)
    with (
        pytest.raises(BuildError, match=r"out/.build is on a file system that gives no locks .*-o flock.*--out"),
        alone(tmp_path / "out"),
    ):
        pass


def test_a_fresh_catalog_may_be_read_only(tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [GOOD])
    first = run(tmp_path, executor)

    def refuse(path: Path, _: bytes) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("pipelines.ingest.write_atomically", refuse)  # root may write into a read-only folder
    assert run(tmp_path, executor) == first


@pytest.mark.parametrize("name", ["da[1]ta*", "a::b", "file::zip"])
def test_brackets_and_colons_in_a_path_are_just_characters(tmp_path: Path, executor: Executor, name: str) -> None:
    write(tmp_path / name, [GOOD])
    assert run(tmp_path / name, executor).summary()["usable"] == 1
    assert Folder(str(tmp_path / name)).size(f"llava15/{FILE}")


def test_a_path_that_is_not_utf8_is_refused_in_words(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"d\xe9")
    for given in ({"data": odd}, {"out": odd}, {"catalog": odd}):
        places = {"data": tmp_path, "out": tmp_path, "catalog": tmp_path, **given}
        with pytest.raises(UsageError, match=r"/d\\udce9: this path is not UTF-8") as caught:
            Request(Recipe.model_construct(), tmp_path, str(places["data"]), places["out"], places["catalog"])
        assert str(caught.value).isascii()
    with pytest.raises(UsageError, match="this path is not UTF-8"):
        Location.below(str(odd), "llava15")


def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path: Path, executor: Executor) -> None:
    with pytest.raises(SourceError, match=rf"llava15: no annotations at .*{FILE}. To get them: .*hf download"):
        run(tmp_path, executor)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
        ("<!DOCTYPE html><html>", "web page"),
        ("", "is empty"),
        ('[{"id": 1}, {"id"', "download it again"),
        ('{"id": 1}', "no JSON array"),
    ],
)
def test_a_failed_download_is_named(tmp_path: Path, executor: Executor, content: str, message: str) -> None:
    write(tmp_path, [])
    (tmp_path / "llava15" / FILE).write_text(content)
    with pytest.raises(SourceError, match=message):
        run(tmp_path, executor)


def test_a_catalog_row_keeps_the_whole_sample() -> None:
    sample = Sample(
        uid="u",
        source="s",
        turns=(Turn("human", "a b", (1, 3)), Turn("gpt", "c")),
        media=(Media(kind="image", path="x.jpg"), Media(kind="video", path="y", roots=("a.zip",), start=1.0, end=2.5)),
        file="f",
        ordinal=3,
        language="English",
        flags=("toxic",),
    )
    assert from_row(to_row(sample)) == sample
