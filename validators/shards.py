"""Are the shards there, all of them, with the bytes they should have, and do their members form samples?"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from validators.findings import Check, Finding, error, warning
from validators.folder import Folder
from validators.manifest import Manifest, Shard
from validators.tar import Member, Tape, members

_MEMBER = re.compile(r"[^./]+\.(?:json|\d{4}\.jpg)")
_KNOWN = re.compile(
    r"manifest\.json|index\.parquet|rejects\.jsonl|overlaps\.jsonl|report\.html|README\.md|(?:tokenizer|\.nv-meta)/.*"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A sample's bytes as they lie in a shard.

    Attributes:
        file: the shard, relative to the build.
        offset: where its first tar header starts.
        size: up to the end of its last member's padding.
        sha256: of those bytes.
        parts: what follows the key in each member's name ("json", "0000.jpg"), and the member's content, in order.
    """

    key: str
    file: str
    offset: int
    size: int
    sha256: str
    parts: tuple[tuple[str, bytes], ...]


def check_names(folder: Folder, manifest: Manifest) -> Check[None]:
    """Which files are there, and which should be."""
    listed = [shard.file for shard in manifest.shards]
    for number, file in enumerate(listed):
        if file != f"shards/train-{number:06d}.tar":
            detail = f"shard {number} of the manifest should be shards/train-{number:06d}.tar"
            yield error("shard-gap", detail, file=file)
    beside = {f"{file}.idx" for file in listed}
    for file in folder.files:
        if file in listed or file in beside or _KNOWN.fullmatch(file):
            continue
        if file.endswith(".tar"):
            yield error("shard-stray", "the manifest does not list this shard", file=file)
        else:
            yield warning("file-stray", "this file belongs to no build; remove it", file=file)


def read(folder: Folder, shard: Shard) -> Iterator[Finding | Stored]:
    """Reads one shard once: its samples, and what is wrong with it as a file."""
    size = folder.size(shard.file)
    if size is None:
        yield error("shard-missing", f"{shard.samples} samples are lost; build again", file=shard.file)
        return
    if size != shard.bytes:
        yield error("shard-size", f"{size} bytes; the manifest says {shard.bytes}", file=shard.file)
    samples = 0
    with folder.open(shard.file) as file:
        tape = Tape(file, size)
        for event in _group(members(tape, shard.file), shard.file):
            samples += isinstance(event, Stored)
            yield event
        digest = tape.finish()
    if digest != shard.sha256:
        yield error("shard-hash", f"sha256 is {digest}; the manifest says {shard.sha256}", file=shard.file)
    if samples != shard.samples:
        yield error("shard-samples", f"{samples} samples; the manifest says {shard.samples}", file=shard.file)


def read_one(folder: Folder, file: str, offset: int, size: int) -> Stored | None:
    """Reads one sample by its place in the index; None if there is none, which other checks report."""
    length = folder.size(file)
    if length is None or not 0 <= offset < offset + size <= length:
        return None
    with folder.open(file) as opened:
        opened.seek(offset)
        found = _group(members(Tape(opened, size), file), file)
        return next((event for event in found if isinstance(event, Stored)), None)


def _group(events: Iterable[Finding | Member], file: str) -> Iterator[Finding | Stored]:
    """Gathers neighbouring members of one key."""
    group: list[Member] = []
    for event in events:
        if isinstance(event, Finding):
            yield event
            continue
        if not _MEMBER.fullmatch(event.name):
            yield error("member-name", f"{event.name!r} is neither <key>.json nor <key>.NNNN.jpg", file=file)
        if group and _key(group[0]) != _key(event):
            yield from _sample(group, file)
            group = []
        group.append(event)
    if group:
        yield from _sample(group, file)


def _key(member: Member) -> str:
    return member.name.partition(".")[0]


def _sample(group: list[Member], file: str) -> Iterator[Finding | Stored]:
    key = _key(group[0])
    parts = tuple((member.name.partition(".")[2], member.data) for member in group)
    expected = ["json", *(f"{number:04d}.jpg" for number in range(len(parts) - 1))]
    if [part for part, _ in parts] != expected:
        shown = ", ".join(part for part, _ in parts[:8])
        yield error("member-order", f"members are {shown}; expected json, 0000.jpg, 0001.jpg, …", file=file, key=key)
    digest = hashlib.sha256()
    for member in group:
        digest.update(member.raw)
    size = sum(len(member.raw) for member in group)
    yield Stored(key, file, group[0].offset, size, digest.hexdigest(), parts)


class KeyOrder:
    """Do keys ascend over the whole build? Remembers one shard's keys, and of the others the last."""

    def __init__(self) -> None:
        self._file = ""
        self._last = ""
        self._seen: set[str] = set()

    def check(self, sample: Stored) -> Iterator[Finding]:
        """To be called for every sample, in order."""
        if sample.file != self._file:
            self._file, self._seen = sample.file, {self._last}
        if sample.key in self._seen:
            yield error("key-duplicate", "stands more than once", file=sample.file, key=sample.key)
        elif sample.key < self._last:
            yield error("key-order", f"comes after {self._last!r}", file=sample.file, key=sample.key)
        self._seen.add(sample.key)
        self._last = max(self._last, sample.key)
