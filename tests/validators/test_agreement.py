"""What the writers' own code makes is sound to the checks, which share no code with it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.protocol import Clip, Escaper, Patched, Picture, render, roles_of
from formats.shard import ShardWriter, encode_record
from formats.tokens import ChatTokenizer
from validators.folder import Folder
from validators.manifest import Shard
from validators.protocol import Protocol
from validators.samples import Record
from validators.shards import Stored, read
from validators.tokens import Recount

PIECES = ["\n", " ", "  ", "\t", "\r\n", "▁", "a", "word", ".", "Café", "你好", "🙂", "<", "|>", "<t", "<|User|>"]
CONTROL = ["<image>", "<img>", "</img>", "<vid>", "</vid>", "<t>", "<|pad|>", "<|Assistant|>", "<<img>", "image>"]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
hostile = st.lists(st.sampled_from(PIECES + CONTROL), max_size=8).map("".join)
visuals = st.one_of(
    st.just(Picture()),
    st.builds(Clip, st.integers(1, 4)),
    st.builds(Patched, st.integers(1, 3), st.integers(1, 3)),
)


@pytest.fixture(scope="module")
def jamba(shared):
    path = shared / "data/tokenizers/jamba/tokenizer.json"
    return ChatTokenizer(path), Recount(path.read_bytes(), "<|reserved_0|>")


@settings(max_examples=150, deadline=None)
@given(questions=st.lists(texts, min_size=1, max_size=3), answers=st.lists(texts, min_size=3, max_size=3))
def test_both_count_the_same_tokens(jamba, questions, answers):
    writer, checker = jamba
    image = "<img><image></img>"
    rounds = [("human", image + q, "gpt", a) for q, a in zip(questions, answers, strict=False)]
    turns = [(role, text) for q, question, a, answer in rounds for role, text in ((q, question), (a, answer))]
    stated = writer.count([{"from": role, "value": text} for role, text in turns])
    (counted,) = checker.count([turns], decode=True)
    assert (counted.text, counted.target, counted.misspelt) == (stated.text, stated.targets, None)


def images_of(visual):
    for number, role in enumerate(roles_of(visual)):
        place = {"tile": divmod(number - 1, visual.columns)} if role == "tile" else {}
        time = {"time": float(number)} if role == "frame" else {}
        size = (336 * visual.columns, 336 * visual.rows) if isinstance(visual, Patched) else (640, 480)
        yield {"role": role, "source_size": size, **place, **time}


@settings(max_examples=300, deadline=None)
@given(first=hostile, rest=st.lists(st.tuples(visuals, hostile), max_size=4))
def test_whatever_is_escaped_and_rendered_follows_the_protocol(first, rest):
    parts = [first, *(part for pair in rest for part in pair)]
    escaper = Escaper(["<|pad|>"])
    texts = {i: escaper(part) for i, part in enumerate(parts) if isinstance(part, str)}
    value = render([texts[i][0] if i in texts else part for i, part in enumerate(parts)])
    images = [image for part in parts if not isinstance(part, str) for image in images_of(part)]
    record = Record.model_validate(
        {
            **{
                "id": "a",
                "source": "b",
                "component": "c",
                "modality": "text",
                "escaped": sum(n for _, n in texts.values()),
            },
            "conversations": [{"from": "human", "value": value}],
            "images": [
                {"file": f"{i:04d}.jpg", "width": 336, "height": 336, **image} for i, image in enumerate(images)
            ],
            "provenance": {"file": "d", "ordinal": 0},
        }
    )
    assert list(Protocol(["<|pad|>"]).check(record, file="", key="", max_tiles=9)) == []


def test_a_shard_that_was_written_is_read_without_findings(tmp_path):
    samples = {f"{i:09d}": (encode_record({"id": str(i)}), [bytes([i]) * i * 300] * i) for i in range(5)}
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        places = [writer.add(key, record, images) for key, (record, images) in samples.items()]
        summary = writer.finish()
    shard = Shard(file=summary.file, sha256=summary.sha256, bytes=summary.bytes, samples=summary.samples)
    found = list(read(Folder(str(tmp_path)), shard))
    assert all(isinstance(sample, Stored) for sample in found)
    assert [(s.offset, s.size, s.sha256) for s in found] == [(p.offset, p.size, p.sha256) for p in places]
    assert [[data for _, data in s.parts] for s in found] == [[record, *images] for record, images in samples.values()]
