"""Do samples come out the same, byte by byte, when they are made once more from the upstream files?

What makes them is handed in (`Rebuild`), since no check here may know how builds are written. So this finds builds that
are not what their sources give: edited, made of other files, by other versions, or by chance; and no mistake that the
writer makes every time. Which samples are rebuilt, how they are read from the shards and how they are compared is this
package's own code.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from validators import samples
from validators.findings import Check, Finding, error, warning
from validators.folder import Folder
from validators.index import Index
from validators.shards import Stored, read_one

LEAST = 8
"""Samples of each component, if it has so many."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A sample made once more, or why it cannot be.

    Attributes:
        key: of the sample.
        of: "upstream" if it was made of upstream files, "origin" if it is the sample that this one should copy.
        record: its JSON; None if it cannot be made.
        images: its JPEG files, in order.
        problem: if it cannot be made, the code of the finding; else empty.
        detail: what is wrong.
    """

    key: str
    of: str
    record: bytes | None
    images: Sequence[bytes]
    problem: str
    detail: str


Rebuild = Callable[[Sequence[Mapping[str, Any]]], Iterable[Rebuilt]]
"""Makes samples once more, given their rows of the index, with their JSON as "record"; in any order."""


@dataclass(frozen=True, slots=True)
class Against:
    """How to go back upstream.

    Attributes:
        rebuild: what makes samples once more.
        share: of each component, but at least `LEAST` samples.
        seed: of the draw.
    """

    rebuild: Rebuild
    share: float = 0.01
    seed: int = 0


def check(folder: Folder, index: Index, against: Against) -> Check[None]:
    """Rebuilds a draw of samples and compares them with what is stored."""
    rows = {row["key"]: row for row in _drawn(index, against)}
    wanted = [{**row, "record": record} for row in rows.values() if (record := _record(folder, row)) is not None]
    problems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for rebuilt in against.rebuild(wanted):
        row = rows[rebuilt.key]
        if rebuilt.record is None:
            problems[rebuilt.problem, rebuilt.detail].append(rebuilt.key)
            continue
        stored = read_one(folder, _file(row), row["offset"], row["size"])
        if stored is not None:
            yield from _compare(stored, rebuilt, rebuilt.record)
    for (code, detail), keys in problems.items():
        others = f" (and {len(keys) - 1} more samples)" if len(keys) > 1 else ""
        tell = warning if code == "tools-changed" else error
        yield tell(code, detail + others, file=_file(rows[keys[0]]), key=keys[0])


def _drawn(index: Index, against: Against) -> list[dict[str, Any]]:
    """Rows of the index: of each component those with the smallest hash of seed and key."""

    def place(key: str) -> str:
        return hashlib.sha256(f"{against.seed}/against/{key}".encode()).hexdigest()

    table = index.columns("component", "key")
    chosen: list[str] = []
    components = table["component"].cast(pa.string())
    for component in pc.unique(components):
        keys = table["key"].filter(pc.equal(components, component))
        count = max(LEAST, math.ceil(against.share * len(keys)))
        chosen += nsmallest(count, (key.as_py() for key in keys), key=place)
    wanted = pa.array(chosen, pa.string())
    return [row for _, rows in index.runs() for row in rows.filter(pc.is_in(rows["key"], wanted)).to_pylist()]


def _file(row: Mapping[str, Any]) -> str:
    return f"shards/{row['shard']}"


def _record(folder: Folder, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sample's JSON; None if it is not one, which the checks of samples report."""
    stored = read_one(folder, _file(row), row["offset"], row["size"])
    if stored is None or any(isinstance(found, Finding) for found in samples.read(stored)):
        return None
    record: dict[str, Any] = json.loads(dict(stored.parts)["json"])
    return record


def _compare(stored: Stored, rebuilt: Rebuilt, record: bytes) -> Iterator[Finding]:
    copied = rebuilt.of == "origin"
    parts = dict(stored.parts)
    if parts.get("json") != record:
        what = "that of the build it is a copy of" if copied else "what its upstream record gives"
        detail = f"the JSON is not {what}: {_difference(parts.get('json', b''), record)}"
        yield error("replay-origin" if copied else "rebuilt-json", detail, file=stored.file, key=stored.key)
    images = [data for part, data in stored.parts if part != "json"]
    other = [i for i, (one, two) in enumerate(zip(images, rebuilt.images, strict=False)) if one != two]
    if other or len(images) != len(rebuilt.images):
        what = "the build it is a copy of has" if copied else "its upstream media give"
        shown = ", ".join(f"{i:04d}.jpg" for i in other[:8]) or "none of those that both have"
        detail = f"{len(images)} images, {what} {len(rebuilt.images)}; with other bytes: {shown}"
        yield error("replay-origin" if copied else "rebuilt-image", detail, file=stored.file, key=stored.key)


def _difference(one: bytes, other: bytes) -> str:
    """Which fields differ."""
    try:
        first, second = json.loads(one), json.loads(other)
    except ValueError:
        return "it is not readable"
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return ", ".join(names) + " differ" if names else "the same fields, written in another way"
