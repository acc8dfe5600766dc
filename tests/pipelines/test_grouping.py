"""pipelines.grouping: which records become one group."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.likeness import LOOK, minhash, text_key, words
from pipelines.fingerprints import MEDIA, TEXTS
from pipelines.grouping import Mode, _components, group_records, group_texts, opened
from pipelines.sql import parquet

RANDOM = np.random.default_rng(5)
STORY = "It was the best of times and the worst of times in a town by the sea where nobody knew what time it was"


def flipped(looks: bytes, bits: int) -> bytes:
    """Hashes with some bits of each turned over."""
    values = np.unpackbits(np.frombuffer(looks, np.uint8).reshape(-1, LOOK), axis=1)
    for row in values:
        row[RANDOM.permutation(LOOK * 8)[:bits]] ^= 1
    return np.packbits(values, axis=1).tobytes()


A, B = (RANDOM.integers(0, 256, LOOK, dtype=np.uint8).tobytes() for _ in range(2))


def groups(folder: Path, mode: Mode, records: Sequence[tuple[str, Sequence[tuple[str, bytes]]]]) -> set[frozenset[int]]:
    """The groups of records of (text, [(pixels, looks) of each medium]), as sets of their numbers."""
    texts, refs, media = [], [], []
    for i, (text, pictures) in enumerate(records):
        found = {"exact": text_key([text]), "minhash": minhash(words(text), text.encode()), "n_media": len(pictures)}
        texts.append({"uid": f"r{i:04d}", **found})
        for place, (pixels, looks) in enumerate(pictures):
            ref = f"r{i:04d}-{place}"
            refs.append({"uid": f"r{i:04d}", "place": place, "ref": ref})
            media.append({"ref": ref, "exact": pixels.encode() or None, "looks": looks or None})
    pq.write_table(pa.Table.from_pylist(texts, schema=TEXTS), folder / "texts.parquet")
    pq.write_table(pa.Table.from_pylist(media, schema=MEDIA), folder / "media.parquet")
    work = opened(folder, mode)
    with closing(work.db) as db:
        types = {"uid": pa.string(), "place": pa.int64(), "ref": pa.string()}
        db.register("refs", pa.Table.from_pylist(refs, schema=pa.schema(list(types.items()))))
        group_texts(work, [str(folder / "texts.parquet")], parquet([folder / "texts.parquet"]))
        group_records(work, [str(folder / "media.parquet")], "refs")
        found_groups: dict[int, set[int]] = {}
        for uid, number in db.execute("SELECT uid, grouped FROM groups").fetchall():
            found_groups.setdefault(number, set()).add(int(uid[1:]))
    return {frozenset(group) for group in found_groups.values()}


def test_texts_without_media_are_duplicates_by_text_alone(tmp_path: Path) -> None:
    records: list[Any] = [(STORY, []), ("Another tale", []), (STORY.replace(" ", "  "), []), (STORY.upper() + "!", [])]
    assert groups(tmp_path, "exact", records) == {frozenset({0, 2})}
    assert groups(tmp_path, "near", records) == {frozenset({0, 2, 3})}


def test_one_picture_serves_many_questions(tmp_path: Path) -> None:
    picture = [("a", A)]
    records = [
        ("What colour is the cat? Black.", picture),
        ("How many cats are there? One.", picture),
        (STORY, picture),
    ]
    assert groups(tmp_path, "near", records) == set()


def test_one_question_serves_many_pictures(tmp_path: Path) -> None:
    records = [("Describe this. A cat.", [("a", A)]), ("Describe this. A cat.", [("b", B)])]
    assert groups(tmp_path, "near", records) == set()


def test_text_and_picture_together_make_a_duplicate(tmp_path: Path) -> None:
    near = (STORY + " again", [("a, encoded anew", flipped(A, 12))])
    records = [(STORY, [("a", A)]), (STORY, [("a", A)]), near, (STORY, [("b", B)]), (STORY, [])]
    assert groups(tmp_path, "exact", records) == {frozenset({0, 1})}
    assert groups(tmp_path, "near", records) == {frozenset({0, 1, 2})}


def test_every_picture_of_a_record_has_to_collide(tmp_path: Path) -> None:
    both, other = [("a", A), ("b", B)], [("a", A), ("c", flipped(B, 100))]
    assert groups(tmp_path, "near", [(STORY, both), (STORY, other), (STORY, both[:1])]) == set()
    assert groups(tmp_path, "near", [(STORY, both), (STORY, [*reversed(both)])]) == set()
    anew = [("x", flipped(A, 12)), ("y", flipped(B, 12))]
    assert groups(tmp_path, "near", [(STORY, both), (STORY, anew)]) == {frozenset({0, 1})}


def test_clips_are_alike_by_all_their_frames(tmp_path: Path) -> None:
    frames = A + B + flipped(A, 120) + flipped(B, 120) + flipped(A, 110)
    records = [(STORY, [("clip", frames)]), (STORY, [("anew", flipped(frames, 12))]), (STORY, [("cut", frames[:LOOK])])]
    assert groups(tmp_path, "near", records) == {frozenset({0, 1})}


def test_a_record_whose_media_cannot_be_read_is_nobodys_duplicate(tmp_path: Path) -> None:
    records = [(STORY, [("", b"")]), (STORY, [("", b"")]), (STORY, [("a", A), ("", b"")]), (STORY, [("a", A)])]
    assert groups(tmp_path, "near", records) == set()


def test_a_crowd_that_shares_a_beginning_is_still_searched(tmp_path: Path) -> None:
    template = STORY + " and " + STORY.replace("town", "village") + " and the number of the day was "
    crowd: list[Any] = [(template + f"n{i} of {i * 7}", []) for i in range(200)]
    copies: list[Any] = [(STORY + " " + " ".join(f"x{i}y{j}" for j in range(60)), []) for i in range(50)]
    found = groups(tmp_path, "near", [*crowd, *copies, *copies])
    assert frozenset(range(200)) in found
    assert {frozenset({200 + i, 250 + i}) for i in range(50)} <= found


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
@settings(max_examples=25, deadline=None)
def test_components_are_those_of_the_graph(edges: list[tuple[int, int]]) -> None:
    parents = {node: node for edge in edges for node in edge}

    def root(node: int) -> int:
        return node if parents[node] == node else root(parents[node])

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parents[high] = low
    work = opened(Path("unused"), "exact")
    with closing(work.db) as db:
        db.execute("CREATE TEMP TABLE edges (a BIGINT, b BIGINT)")
        for edge in edges:
            db.execute("INSERT INTO edges VALUES ($1, $2)", list(edge))
        _components(work)
        assert dict(db.execute("FROM components").fetchall()) == {node: root(node) for node in parents}


@pytest.mark.parametrize("chain", [300])
def test_a_long_chain_is_one_component_named_by_its_least(chain: int) -> None:
    work = opened(Path("unused"), "exact")
    with closing(work.db) as db:
        db.execute(f"CREATE TEMP TABLE edges AS SELECT i AS a, i + 1 AS b FROM range({chain}) t(i)")
        _components(work)
        assert db.execute("SELECT min(component), max(component), count(*) FROM components").fetchall() == [
            (0, 0, chain + 1)
        ]
