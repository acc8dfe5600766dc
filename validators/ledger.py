"""Does the ledger of rejects say of every record that was drawn and not written why, and agree with the manifest?"""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from formats.errors import REASONS
from validators.findings import Check, Finding, error
from validators.folder import Folder
from validators.index import Index
from validators.lines import read_lines
from validators.manifest import Block, Manifest


class Reject(Block):
    """One line of rejects.jsonl; `thumbnail` is a small JPEG in base64, if it is there."""

    uid: Annotated[str, Field(min_length=1)]
    component: str
    reason: str
    detail: str
    replaced_by: str | None
    thumbnail: Annotated[str, Field(max_length=12_000, pattern="^(/9j/[A-Za-z0-9+/]+=*)?$")] = ""


def check(folder: Folder, manifest: Manifest, index: Index | None) -> Check[list[Reject]]:
    """Reads the ledger and holds it against the manifest and, if it can be read, the index; returns its lines."""
    table = manifest.rejects
    if folder.size(table.file) is None:
        yield error("ledger-missing", "no such file", file=table.file)
        return []
    digest = folder.sha256(table.file)
    if digest != table.sha256:
        yield error("ledger-hash", f"sha256 is {digest}; the manifest says {table.sha256}", file=table.file)
    rejects, rows = yield from _read(folder, manifest)
    if rows != table.rows:
        yield error("reject-ledger", f"{rows} lines; the manifest says {table.rows}", file=table.file)
    found = Counter((reject.component, reject.reason) for reject in rejects)
    stated = Counter({(name, r): n for name, c in manifest.components.items() for r, n in c.rejects.items()})
    for component, reason in sorted(found.keys() | stated.keys()):
        counts = found[component, reason], stated[component, reason]
        if counts[0] != counts[1]:
            detail = f"{component}: {counts[0]} records rejected for {reason!r}; the manifest says {counts[1]}"
            yield error("reject-ledger", detail, file=table.file)
    if index is not None:
        yield from _check_uids(rejects, manifest, index)
    return rejects


def _read(folder: Folder, manifest: Manifest) -> Check[tuple[list[Reject], int]]:
    """The well-formed lines, and the number of all lines."""
    name = manifest.rejects.file
    lines, rows = yield from read_lines(folder, name, Reject, "ledger-row")
    for number, reject in lines:
        if reject.reason not in REASONS:
            yield error("ledger-row", f"line {number}: unknown reason {reject.reason!r}", file=name)
        if reject.component not in manifest.components:
            yield error("ledger-row", f"line {number}: unknown component {reject.component!r}", file=name)
    return [reject for _, reject in lines], rows


def _check_uids(rejects: list[Reject], manifest: Manifest, index: Index) -> Iterator[Finding]:
    """A rejected record is not in the build; what replaced it is, unless it was rejected in its turn.

    Where records are repeated, another copy of a rejected one may have been kept.
    """
    file = manifest.rejects.file
    repeated = {name for name, recipe in manifest.recipe.components.items() if recipe.on_short == "repeat"}
    named = {reject.uid for reject in rejects} | {reject.replaced_by for reject in rejects if reject.replaced_by}
    table = index.columns("component", "id")
    rows = table.filter(pc.is_in(table["id"], pa.array(sorted(named), pa.string()))).to_pylist()
    kept = {(row["component"], row["id"]) for row in rows}
    rejected = {(reject.component, reject.uid) for reject in rejects}
    for reject in rejects:
        if (reject.component, reject.uid) in kept and reject.component not in repeated:
            yield error("reject-kept", f"{reject.uid!r} was rejected, but {reject.component} holds it", file=file)
        replacement = (reject.component, reject.replaced_by)
        if reject.replaced_by is not None and replacement not in kept | rejected:
            detail = f"{reject.replaced_by!r} should replace {reject.uid!r} in {reject.component}"
            yield error("reject-replacement", detail, file=file)
