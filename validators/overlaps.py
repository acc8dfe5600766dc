"""Does overlaps.jsonl name every record that was passed over as a copy or for a benchmark, and none that was used?"""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from validators.findings import Check, Finding, error, warning
from validators.folder import Folder
from validators.index import Index
from validators.lines import read_lines
from validators.manifest import FILE, Block, Manifest

NAME = "overlaps.jsonl"

Name = Annotated[str, Field(min_length=1)]


class Overlap(Block):
    """One line: a record, and the other side of it: what is kept instead, or the benchmark's item."""

    uid: Name
    component: str
    reason: Literal["duplicate", "contaminated"]
    kept: Name | None = None
    kept_component: str | None = None
    benchmark: str | None = None

    @property
    def other_side(self) -> str | None:
        """What it collides with, if the line says so."""
        return self.kept if self.reason == "duplicate" else self.benchmark


def check(folder: Folder, manifest: Manifest, index: Index | None) -> Check[None]:
    """Reads the ledger and holds it against the manifest and, if it can be read, the index."""
    table, size = manifest.overlaps, folder.size(NAME)
    if table is None:
        if manifest.recipe.passes_over:
            yield error("overlaps-missing", "the recipe passes records over, but states no ledger of them", file=FILE)
        if size is not None:
            yield warning("file-stray", "the manifest states no such file", file=NAME)
        return
    if size is None:
        yield error("overlaps-missing", "no such file", file=NAME)
        return
    digest = folder.sha256(NAME)
    if digest != table.sha256:
        yield error("overlaps-hash", f"sha256 is {digest}; the manifest says {table.sha256}", file=NAME)
    overlaps, rows = yield from _read(folder, manifest)
    if rows != table.rows:
        yield error("overlaps-count", f"{rows} lines; the manifest says {table.rows}", file=NAME)
    yield from _check_counts(overlaps, manifest)
    yield from _check_sides(overlaps, manifest, index)


def _read(folder: Folder, manifest: Manifest) -> Check[tuple[list[Overlap], int]]:
    """The well-formed lines, and the number of all lines."""
    lines, rows = yield from read_lines(folder, NAME, Overlap, "overlaps-row")
    for number, overlap in lines:
        if overlap.component not in manifest.components:
            yield error("overlaps-row", f"line {number}: unknown component {overlap.component!r}", file=NAME)
        if overlap.other_side is None:
            yield error("overlaps-row", f"line {number}: it does not say with what it collides", file=NAME)
    return [overlap for _, overlap in lines], rows


def _check_counts(overlaps: list[Overlap], manifest: Manifest) -> Iterator[Finding]:
    """What the manifest counts as filtered out for it; draws from one earlier build may take such records otherwise."""
    found = Counter((overlap.component, overlap.reason) for overlap in overlaps)
    for name, component in manifest.components.items():
        recipe = manifest.recipe.components.get(name)
        exact = recipe is not None and recipe.source is not None
        for reason in ("duplicate", "contaminated"):
            lines, stated = found[name, reason], component.filtered.get(reason, 0)
            if lines < stated or (exact and lines != stated):
                detail = f"components.{name}: {lines} records passed over as {reason}; the manifest says {stated}"
                yield error("overlaps-count", detail, file=NAME)


def _check_sides(overlaps: list[Overlap], manifest: Manifest, index: Index | None) -> Iterator[Finding]:
    """A record that was passed over is not in the build, and nothing was passed over for it."""
    gone = {(overlap.component, overlap.uid) for overlap in overlaps}
    for overlap in overlaps:
        if overlap.reason == "duplicate" and (overlap.kept_component, overlap.kept) in gone:
            detail = f"{overlap.uid!r} gives way to {overlap.kept!r}, which {overlap.kept_component} passes over, too"
            yield error("overlaps-kept", detail, file=NAME)
    if index is None:
        return
    table = index.columns("key", "component", "id")
    held = table.filter(pc.is_in(table["id"], pa.array(sorted({uid for _, uid in gone}), pa.string())))
    for row in held.to_pylist():
        if (row["component"], row["id"]) in gone:
            detail = f"{row['id']!r} was passed over, but {row['component']} holds it"
            yield error("overlaps-kept", detail, file=NAME, key=row["key"])
