"""All checks of a finished build, in one pass over its shards."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from validators import against as upstream
from validators import curation, draws, energon, ledger, mixture, overlaps, samples, shards, tokens
from validators.against import Against
from validators.findings import Check, Finding, T, guarded
from validators.folder import Folder
from validators.index import Index, Rows, ShardRows, open_index
from validators.manifest import FILE, Manifest, Shard, read
from validators.protocol import Protocol
from validators.provenance import Origins
from validators.shards import KeyOrder, Stored
from validators.tokens import Counted, Recount

Progress = Callable[[str, int, int], None]
"""Called with the shard that is being read, the samples that are checked, and all that there should be."""

_BATCH = 64  # samples that are tokenised together


def validate(
    build: str, *, deep: bool = False, against: Against | None = None, progress: Progress | None = None
) -> list[Finding]:
    """Checks a build.

    Memory holds one shard's index rows, or a few of the index's columns, and one sample's images at a time.

    Args:
        build: a local folder or any fsspec URL.
        deep: decode every image, too.
        against: make some samples once more from the upstream files, too.
        progress: called after every sample.

    Returns:
        What is wrong; nothing for a sound build. A check that cannot run is a finding ("not-run"), never an exception.
    """
    return list(findings(build, deep=deep, against=against, progress=progress))


def findings(
    build: str, *, deep: bool = False, against: Against | None = None, progress: Progress | None = None
) -> Iterator[Finding]:
    """As `validate`, but each fault as soon as it is found."""
    folder = yield from guarded("build", _open(build))
    if folder is None:
        return
    manifest = yield from guarded("manifest", read(folder), file=FILE)
    if manifest is None:
        return
    index = yield from guarded("index", open_index(folder, manifest), file=manifest.index.file)
    yield from guarded("files", shards.check_names(folder, manifest))
    yield from guarded("mixture", mixture.check_manifest(manifest))
    yield from guarded("curation", curation.check_manifest(manifest))
    yield from guarded("energon", energon.check_info(folder, manifest), file=energon.INFO)
    yield from guarded("energon", energon.check_split(folder, manifest), file=energon.SPLIT)
    yield from guarded("overlaps", overlaps.check(folder, manifest, index), file=overlaps.NAME)
    wrong: list[Finding] = []
    read_ledger = guarded("ledger", ledger.check(folder, manifest, index), file=manifest.rejects.file)
    rejects = yield from _noting(wrong, read_ledger)
    if index is not None:
        yield from guarded("mixture", mixture.check_index(index, manifest), file=index.file)
        yield from guarded("curation", curation.check_index(index, manifest), file=index.file)
        yield from guarded("records", mixture.check_records(index, manifest), file=index.file)
        if rejects is not None and not wrong:  # a ledger that is wrong cannot tell what was drawn
            yield from guarded("draws", draws.check(index, manifest, rejects), file=index.file)
    recount = yield from guarded("tokens", tokens.open_recount(folder, manifest), file=tokens.FILE)
    yield from _Pass(folder, manifest, index, recount, deep, progress or _unheard).run()
    if against is not None and index is not None:
        yield from guarded("against", upstream.check(folder, index, against))


def summary(found: Iterable[Finding]) -> dict[str, int]:
    """How often each code was found, sorted by code."""
    return dict(sorted(Counter(finding.code for finding in found).items()))


def _noting(noted: list[Finding], check: Check[T]) -> Check[T]:
    """Runs a check and keeps what it finds, too."""
    try:
        while True:
            finding = next(check)
            noted.append(finding)
            yield finding
    except StopIteration as end:
        result: T = end.value
        return result


def _open(build: str) -> Check[Folder]:
    yield from ()
    return Folder(build)


def _unheard(what: str, done: int, total: int) -> None:
    pass


@dataclass
class _Pass:
    """The pass over all shards; `index` and `recount` are None if they cannot be read, which was reported."""

    folder: Folder
    manifest: Manifest
    index: Index | None
    recount: Recount | None
    deep: bool
    progress: Progress

    def __post_init__(self) -> None:
        self._rows = Rows(self.index) if self.index else None
        self._order = KeyOrder()
        specials = self.recount.special_tokens if self.recount else []
        self._protocol = Protocol([*specials, self.manifest.tokenizer.image_token])
        self._origins = Origins(self.manifest)
        self._done = 0
        self._waiting: list[Counted] = []

    def run(self) -> Iterator[Finding]:
        for shard in self.manifest.shards:
            yield from guarded("shard", self._shard(shard), file=shard.file)
            yield from self._count()
        if self._rows is not None:
            yield from guarded("index", self._rows.rest(), file=self.manifest.index.file)

    def _shard(self, shard: Shard) -> Check[None]:
        rows = None
        if self._rows is not None:
            rows = ShardRows(self.manifest.index.file, (yield from self._rows.take(shard.file.rpartition("/")[2])))
        offsets = [0]
        for event in shards.read(self.folder, shard):
            if isinstance(event, Finding):
                yield event
                continue
            offsets[-1:] = [event.offset, event.offset + event.size]
            yield from guarded("sample", self._sample(event, rows), file=shard.file, key=event.key)
            self._done += 1
            self.progress(shard.file, self._done, self.manifest.totals.samples)
        if rows is not None:
            yield from rows.rest()
        yield from energon.check_offsets(self.folder, shard.file, offsets)

    def _sample(self, sample: Stored, rows: ShardRows | None) -> Check[None]:
        yield from self._order.check(sample)
        row = (yield from rows.match(sample)) if rows is not None else None
        record = yield from samples.read(sample)
        if record is None:
            return
        yield from samples.check(record, sample, deep=self.deep)
        component = self.manifest.recipe.components.get(row["component"] if row else record.component)
        max_tiles = component.max_tiles if component and component.subimage else None
        yield from self._protocol.check(record, file=sample.file, key=sample.key, max_tiles=max_tiles)
        yield from self._origins.check(record, file=sample.file, key=sample.key)
        if rows is not None and row is not None:
            yield from rows.compare(row, record, sample.key, copied=bool(component and component.replay))
        self._waiting.append(Counted(sample.key, sample.file, record, row))
        if len(self._waiting) >= _BATCH:
            yield from self._count()

    def _count(self) -> Iterator[Finding]:
        """Counts the tokens of the samples that wait for it."""
        waiting, self._waiting = self._waiting, []
        if self.recount is not None:
            yield from guarded("tokens", tokens.check(self.recount, waiting, self.manifest, deep=self.deep))
