"""What of a recipe's records stands in benchmarks too, by the fingerprints of `pipelines.benchmark_prints`.

A record is contaminated if
- it has a run of 13 words of a question (as in GPT-3's report), or a line that is a whole question of 8 words or more;
  not if more than 3 items share that run or question, nor if more than 20 records have it: those are templates;
- a line of it is a whole question, however short, and one of its media has the file name of that item's;
- one of its pictures looks like one of a benchmark's pictures or frames; of two clips, half of their frames do; not if
  more than 20 files look like it.
So "What is in the image?" alone is no hit, however many benchmarks ask it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.likeness import ALIKE, LOOK, distance, grams, words
from formats.manifest import file_sha256, temporary
from pipelines.benchmark_prints import GRAM, Prints, question_key, read_prints, stem_of
from pipelines.executor import Executor
from pipelines.fingerprints import media_prints
from pipelines.ingest import Catalog
from pipelines.progress import Progress
from pipelines.sql import parquet, text

GENERIC = 20
"""Records, or files, that may hit one item by text, or by looks, before it counts as a template."""

HITS = pa.schema([("uid", pa.string()), ("row", pa.int64()), ("how", pa.string()), ("matched", pa.string())])


@cache
def _prints(path: str) -> Prints:
    return read_prints(path)


@dataclass(frozen=True, slots=True)
class _TextTask:
    prints: str
    part: str
    out: str


@dataclass(frozen=True, slots=True)
class _LookTask:
    prints: str
    media: str


def write_hits(
    prints: Path,
    catalogs: Sequence[Catalog],
    among: str,
    folder: Path,
    executor: Executor,
    progress: Progress,
    out: Path,
) -> None:
    """Writes, as Parquet, what of a benchmark each record has: uid, benchmark, item, how, matched, path, other, bits.

    Args:
        prints: the fingerprint file.
        catalogs: where the records are.
        among: SQL of a table with a column `uid`.
        folder: for what is of no use afterwards.
        executor, progress: who does it, and who hears of it.
        out: the file. `how` is "words", "question", "file" or "looks"; `path` is the record's medium, `other` the
            benchmark's, `bits` in how many bits of 256 they differ.
    """
    with duckdb.connect() as db:
        db.execute(f"SET temp_directory = {text(str(folder / 'spill'))}")
        db.execute("SET enable_progress_bar = false")
        db.execute(f"CREATE TEMP TABLE among AS SELECT DISTINCT uid FROM {among}")
        texts = _text_hits(prints, catalogs, executor, progress)
        db.execute(f"CREATE TEMP TABLE text_hits AS SELECT * FROM {parquet(texts)} SEMI JOIN among USING (uid)")
        pictured = catalogs if len(_prints(str(prints)).looks) else []  # nothing is decoded for questions alone
        media = media_prints(db, pictured, "among", folder, executor, progress)
        db.register("look_hits", _look_hits(prints, media, executor, progress))
        db.execute(
            f"""CREATE TEMP TABLE items AS SELECT file_row_number AS row, benchmark, item, path
                FROM read_parquet({text(str(prints))}, file_row_number = true)"""
        )
        with temporary(out) as name:
            db.execute(f"COPY ({_HITS_QUERY}) TO {text(str(name))} (FORMAT parquet, COMPRESSION zstd)")


_HITS_QUERY = f"""
    WITH frequent_texts AS (
        SELECT row FROM text_hits WHERE how != 'file' GROUP BY row HAVING count(DISTINCT uid) > {GENERIC}),
    frequent_looks AS (SELECT row FROM look_hits GROUP BY row HAVING count(DISTINCT ref) > {GENERIC}),
    hits AS (
        SELECT uid, row, how, matched, NULL AS path, NULL AS bits FROM text_hits
        WHERE how = 'file' OR row NOT IN (FROM frequent_texts)
        UNION ALL
        SELECT uid, row, 'looks', NULL, refs.path, bits FROM look_hits JOIN refs USING (ref)
        SEMI JOIN among ON among.uid = refs.uid WHERE row NOT IN (FROM frequent_looks))
    SELECT DISTINCT uid, benchmark, item, how, coalesce(matched, '') AS matched, coalesce(hits.path, '') AS path,
           coalesce(items.path, '') AS other, coalesce(bits, 0) AS bits
    FROM hits JOIN items USING (row) ORDER BY ALL"""


def _text_hits(prints: Path, catalogs: Sequence[Catalog], executor: Executor, progress: Progress) -> list[str]:
    mark = file_sha256(prints)[:16]
    tasks = [
        _TextTask(str(prints), file, file.removesuffix(".parquet") + f".hits-{mark}.parquet")
        for catalog in catalogs
        for file in catalog.files
    ]
    missing = [task for task in tasks if not Path(task.out).exists()]
    progress.stage("look for benchmarks", len(tasks), "files")
    progress.advance(len(tasks) - len(missing), new=False)
    for _ in executor.map(_find_texts, missing):
        progress.advance(1)
    return [task.out for task in tasks]


def _find_texts(task: _TextTask) -> str:
    """Writes what the texts of one part have of the benchmarks' questions."""
    known = _prints(task.prints)
    with temporary(Path(task.out)) as name, pq.ParquetWriter(name, HITS, compression="zstd") as writer:
        for batch in pq.ParquetFile(task.part).iter_batches(batch_size=1_000, columns=["uid", "turns", "media"]):
            rows = [
                {"uid": record["uid"], "row": row, "how": how, "matched": matched}
                for record in batch.to_pylist()
                for row, (how, matched) in sorted(text_hits(record, known).items())
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=HITS))
    return task.out


def text_hits(record: Mapping[str, Any], known: Prints) -> dict[int, tuple[str, str]]:
    """The items that a catalog row's text hits: how, and with which words."""
    stems = {stem_of(media["path"]) for media in record["media"]}
    hits: dict[int, tuple[str, str]] = {}
    for turn in record["turns"]:
        found = words(turn["text"])
        if len(found) >= GRAM and len(known.grams):
            runs = grams(found, GRAM)
            at = np.searchsorted(known.grams, runs)
            for i in np.flatnonzero(known.grams[np.minimum(at, len(known.grams) - 1)] == runs).tolist():
                for row in _all_of(known, int(at[i])):
                    hits.setdefault(row, ("words", " ".join(found[i : i + GRAM])))
        for line in {turn["text"], *turn["text"].split("\n")} if turn["role"] == "human" else ():
            spoken = words(line)
            key = question_key(spoken)
            if (row := known.whole.get(key, -1)) >= 0:
                hits.setdefault(row, ("question", " ".join(spoken)))
            for stem in stems:
                if (row := known.by_file.get((key, stem), -1)) >= 0:
                    hits[row] = ("file", f"{stem}: {' '.join(spoken)}")
    return hits


def _all_of(known: Prints, at: int) -> Iterator[int]:
    """Rows that have the run at a place of the sorted runs, and at the places after it that are the same."""
    gram = known.grams[at]
    while at < len(known.grams) and known.grams[at] == gram:
        yield int(known.gram_rows[at])
        at += 1


def _look_hits(prints: Path, media: Sequence[str], executor: Executor, progress: Progress) -> pa.Table:
    """Which media look like which of the benchmarks' : ref, row, bits."""
    progress.stage("compare media", len(media), "files")
    found: list[tuple[str, int, int]] = []
    for hits in executor.map(_find_looks, [_LookTask(str(prints), file) for file in media]):
        found += hits
        progress.advance(1)
    columns = list(zip(*sorted(found), strict=True)) or [(), (), ()]
    types = {"ref": pa.string(), "row": pa.int64(), "bits": pa.int64()}
    return pa.table({name: pa.array(column, kind) for (name, kind), column in zip(types.items(), columns, strict=True)})


def _find_looks(task: _LookTask) -> list[tuple[str, int, int]]:
    known = _prints(task.prints)
    rows = pq.read_table(task.media, columns=["ref", "looks"]).to_pylist()
    return [(row["ref"], *hit) for row in rows if row["looks"] for hit in look_hits(row["looks"], known)]


def look_hits(looks: bytes, known: Prints) -> list[tuple[int, int]]:
    """The benchmarks' media that a picture or clip looks like, each with the bits between their closest frames."""
    mine = np.frombuffer(looks, np.uint8).reshape(-1, LOOK)
    bits = np.stack([distance(look[None], known.looks) for look in mine])  # a row a frame of mine
    hits = []
    for row in np.unique(known.look_rows[(bits <= ALIKE).any(axis=0)]).tolist():
        between = bits[:, known.look_rows == row]
        alike = int((between <= ALIKE).any(axis=1).sum())
        least = min(between.shape)
        if least == 1 or 2 * alike >= least:
            hits.append((row, int(between.min())))
    return hits
