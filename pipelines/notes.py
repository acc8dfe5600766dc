"""What a worker leaves beside a finished shard, and whether it can still be believed.

.build/shards/000007.tar             the shard
.build/shards/000007.index.parquet   its rows of the index, without the shard's final name
.build/shards/000007.json            the note that it is done, written last
.build/shards/.000007.tar.*.tmp      left only by a worker that died over the shard
.build/names.json                    shards by final name, once they are moved to their place
.build/before/                       the finished build as it was, while records of it are tried again
"""

import json
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from formats.manifest import SHARDS, write_atomically
from formats.shard import INDEX_SCHEMA
from pipelines.curate import PICTURE_REASONS

BEFORE = "before"
_NAMES = "names.json"


@dataclass(frozen=True, slots=True)
class ShardNote:
    """What became of one shard's rows; without the rows, so that a driver can hold one for every shard.

    Attributes:
        sha256: of the shard; empty if none of its records could be used, and so no file was written.
        bytes, index_bytes: sizes of its files.
        kept, failed: samples and rejected records by component.
        reasons: rejected records by reason.
        dropped: those of them that a recipe's filters rejected, by "component/reason".
        plan: fingerprint of the rows that it was made of.
    """

    number: int
    sha256: str
    bytes: int
    index_bytes: int
    samples: int
    images: int
    tokens: int
    kept: Counter[str]
    failed: Counter[str]
    reasons: Counter[str]
    dropped: Counter[str]
    plan: str


def shard_file(work: Path, number: int) -> Path:
    """Where a shard lies until the build is finished."""
    return work / SHARDS / f"{number:06d}.tar"


def index_file(work: Path, number: int) -> Path:
    """A shard's rows of the index."""
    return work / SHARDS / f"{number:06d}.index.parquet"


def note_file(work: Path, number: int) -> Path:
    """The note that a shard is done."""
    return work / SHARDS / f"{number:06d}.json"


def leave_note(
    work: Path,
    number: int,
    sha256: str,
    size: int,
    rows: list[dict[str, Any]],
    rejects: list[dict[str, Any]],
    plan: str = "",
) -> ShardNote:
    """Writes down that a shard is done, its rows of the index first, the note itself last."""
    index = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), index, compression="zstd")
    data = index.getvalue().to_pybytes()
    note = ShardNote(
        number=number,
        sha256=sha256,
        bytes=size,
        index_bytes=len(data),
        samples=len(rows),
        images=sum(row["n_images"] for row in rows),
        tokens=sum(row["n_tokens"] for row in rows),
        kept=Counter(row["component"] for row in rows),
        failed=Counter(reject["component"] for reject in rejects),
        reasons=Counter(reject["reason"] for reject in rejects),
        dropped=Counter(f"{r['component']}/{r['reason']}" for r in rejects if r["reason"] in PICTURE_REASONS),
        plan=plan,
    )
    write_atomically(index_file(work, number), data)
    content = json.dumps(
        {**{f.name: getattr(note, f.name) for f in fields(note)}, "rejects": rejects}, ensure_ascii=False
    )
    write_atomically(note_file(work, number), content.encode())
    return note


def load_note(work: Path, number: int) -> ShardNote | None:
    """The note of a shard that is done; None if there is none, or if it, its shard or its rows are not whole."""
    try:
        content = _content(work, number)
        counters = {name: Counter(content[name]) for name in ("kept", "failed", "reasons", "dropped")}
        note = ShardNote(**{**content, **counters})
        whole = index_file(work, number).stat().st_size == note.index_bytes and (
            not note.sha256 or _size(work, number) == note.bytes
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return note if whole else None


def load_rejects(work: Path, number: int) -> list[dict[str, Any]]:
    """The records of a finished shard that could not be used: uid, component, reason, detail, rank."""
    rejects: list[dict[str, Any]] = json.loads(note_file(work, number).read_bytes())["rejects"]
    return rejects


def load_rows(work: Path, number: int) -> pa.Table:
    """A finished shard's rows of the index; column `shard` is empty."""
    return pq.read_table(index_file(work, number), schema=INDEX_SCHEMA)


def forget(work: Path, number: int) -> None:
    """Removes the note of a shard, so that it is built again."""
    note_file(work, number).unlink(missing_ok=True)


def remains(work: Path, number: int) -> list[Path]:
    """What workers that died over a shard have left of it."""
    return list((work / SHARDS).glob(f".{number:06d}.*.tmp"))


def published_as(work: Path, number: int) -> Path | None:
    """The final name that a shard was given, beside the work folder; None if it was given none."""
    try:
        names: dict[str, str] = json.loads((work / _NAMES).read_bytes())
        return work.parent / SHARDS / names[str(number)]
    except (FileNotFoundError, KeyError):
        return None


def write_names(work: Path, names: dict[int, str]) -> None:
    """Notes where shards will lie, before the first of them is moved there."""
    write_atomically(work / _NAMES, json.dumps(names).encode())


def _content(work: Path, number: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(note_file(work, number).read_bytes())
    del content["rejects"]
    return content


def _size(work: Path, number: int) -> int:
    """Bytes of a shard: still at work, or already under its final name."""
    own = shard_file(work, number)
    path = own if own.exists() else published_as(work, number) or own
    return path.stat().st_size
