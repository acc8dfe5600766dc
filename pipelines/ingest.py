"""Upstream annotations to catalogs: one task a file, each file's part reused for as long as the file is the same."""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from formats.catalog import CATALOG_SCHEMA, CATALOG_VERSION, to_row
from formats.errors import BuildError, SourceError
from formats.manifest import fingerprint, temporary, write_atomically
from formats.sample import Sample
from pipelines.executor import Executor
from pipelines.locks import flock
from pipelines.progress import Progress
from pipelines.sources.base import Rejected, Source
from pipelines.sources.registry import source_named
from pipelines.storage import Root, absolute, refuse_odd_bytes
from recipes.schema import SourceLocation

MARKS = ("n_refusals", "n_emails", "n_phones", "n_cards", "language_mismatch")
"""Scores that give junk away at a glance."""

_GROUP_ROWS = 2_000
_GROUP_CHARS = 16 << 20  # LongAlign has half a million characters a record


@dataclass(frozen=True, slots=True)
class Location:
    """Where one source lies: folders or URLs of its annotations and its media."""

    source: str
    annotations: str
    media: str

    @classmethod
    def below(cls, data: str, source: str, override: SourceLocation | None = None) -> "Location":
        """A source's folder below `data`, unless a recipe says otherwise; absolute, for workers elsewhere.

        Raises:
            UsageError: if one is a path that is not UTF-8.
        """
        annotations = (override and override.annotations) or f"{data.rstrip('/')}/{source}"
        media = (override and override.media_root) or annotations
        place = cls(source, absolute(annotations), absolute(media))
        refuse_odd_bytes(place.annotations)
        refuse_odd_bytes(place.media)
        return place


@dataclass(frozen=True, slots=True)
class PartTask:
    """One annotation file to read into one part; the part's name changes when the file or the adapter does."""

    location: Location
    file: str
    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class Part:
    """What came of one annotation file.

    Attributes:
        version: the catalog's; empty before catalogs had one.
        marked: samples that a score gives away, by the score.
        stored: sizes of its table and its ledger in bytes, to know them whole after a machine has lost power.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    records: int
    usable: int
    rejected: int
    version: str = ""
    marked: Mapping[str, int] = field(default_factory=dict)
    stored: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Catalog:
    """The finished catalog of one source."""

    location: Location
    folder: Path
    parts: tuple[Part, ...]

    @property
    def files(self) -> list[str]:
        """Its Parquet files."""
        return [str(self.folder / f"{part.name}.parquet") for part in self.parts]

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of each annotation file."""
        return {part.file: part.sha256 for part in self.parts}

    @property
    def sha256(self) -> str:
        """Fingerprint of what was read, and by which versions of the adapter and the scores."""
        return fingerprint([CATALOG_VERSION, source_named(self.location.source).version, self.hashes])

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest; nothing in it depends on time or place."""
        keys = ("file", "sha256", "bytes", "records", "usable", "rejected")
        files = [{key: getattr(part, key) for key in keys} for part in self.parts]
        marked = {name: sum(part.marked.get(name, 0) for part in self.parts) for name in MARKS}
        source = source_named(self.location.source)
        totals = {key: sum(getattr(part, key) for part in self.parts) for key in ("records", "usable", "rejected")}
        return {"hub_id": source.hub_id, "licence": source.licence, **totals, "marked": marked, "files": files}


@contextmanager
def ingested(
    locations: Sequence[Location], catalog: Path, executor: Executor, progress: Progress
) -> Iterator[list[Catalog]]:
    """The up-to-date catalogs of some sources, by name; they stay as they are for as long as the context lasts.

    Parts are never changed once they have their names. One that is of no use any more is removed only while nobody
    else reads the catalog, so that builds with other data may share it.

    Raises:
        SourceError: if a source has no annotation files, or one of them is not what it should be.
        BuildError: if the catalog cannot be written.
    """
    catalog = catalog.resolve()
    # Each once, and in one order for all commands: they wait for one another's catalogs, but never in a circle.
    locations = sorted({*locations}, key=lambda place: place.source)
    with ExitStack() as held:
        try:
            alone = {place.source: held.enter_context(_held(catalog / place.source, progress)) for place in locations}
            tasks = {place: _tasks(place, catalog / place.source) for place in locations}
            for place in locations:
                _note_other_version(catalog / place.source, progress)
            _read(list(chain.from_iterable(tasks.values())), executor, progress)
            catalogs = [_finish(place, catalog / place.source, mine) for place, mine in tasks.items()]
            _refuse_changed(tasks, catalog)
            for done in catalogs:
                if lock := alone[done.location.source]:
                    _remove_stale(done)
                    flock(lock, fcntl.LOCK_SH, "--catalog")
        except OSError as error:
            raise BuildError(f"{catalog}: {error}; name another place for catalogs with --catalog") from error
        yield catalogs


@contextmanager
def _held(folder: Path, progress: Progress) -> Iterator[BinaryIO | None]:
    """Holds a catalog against changes; gives the lock if nobody else holds it too."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+b")  # NFS gives shared locks only on what can be read
    except OSError:  # a catalog that is only to be read cannot change either
        yield None
        return
    with lock:
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, "--catalog")
        except BlockingIOError:
            progress.note(f"{folder} is in use; waiting if somebody is writing it")
            flock(lock, fcntl.LOCK_SH, "--catalog")
            yield None
        else:
            yield lock


def _read(tasks: Sequence[PartTask], executor: Executor, progress: Progress) -> None:
    stale = [task for task in tasks if _part(task) is None]
    progress.stage("ingest", len(tasks), "files")
    progress.advance(len(tasks) - len(stale), new=False)
    for part in executor.map(ingest_file, stale):
        progress.advance(1, rejected={"annotations": part.rejected})


def _tasks(location: Location, folder: Path) -> list[PartTask]:
    source = source_named(location.source)
    root = Root(location.annotations)
    files = source.annotation_files(root)
    if not files:
        raise SourceError(
            f"{location.source}: no annotations at {location.annotations}; expected {' or '.join(source.files)}."
            f" To get them: {source.fetch[0]}"
        )
    return [PartTask(location, file, str(folder), _part_name(source, root, file)) for file in files]


def _refuse_changed(tasks: Mapping[Location, list[PartTask]], catalog: Path) -> None:
    """Stops if annotations are others than before they were read: what was read may be half of each."""
    for place, before in tasks.items():
        changed = {task.file for task in {*before} ^ {*_tasks(place, catalog / place.source)}}
        if changed:
            raise SourceError(
                f"{place.annotations}: {', '.join(sorted(changed))} changed while it was read; run the command again"
                " when it is whole"
            )


def _part_name(source: Source, root: Root, file: str) -> str:
    """A name that stands for a file as it is now: its place, size and time (or entity tag), and the adapter."""
    info = root.info(file)
    changed = info.get("mtime") or info.get("ETag") or info.get("LastModified")
    return "part-" + fingerprint([CATALOG_VERSION, source.version, root.url, file, info["size"], str(changed)])[:16]


def _part(task: PartTask) -> Part | None:
    """What an earlier run has read, if all of it is still there."""
    part = _summary(Path(task.folder) / f"{task.name}.json")
    try:
        return part if part and list(part.stored) == _sizes(task) else None
    except FileNotFoundError:
        return None


def _stored(task: PartTask) -> tuple[Path, Path]:
    """A part's table, and its ledger of rejects."""
    return Path(task.folder) / f"{task.name}.parquet", Path(task.folder) / f"{task.name}.rejects.jsonl"


def _sizes(task: PartTask) -> list[int]:
    return [path.stat().st_size for path in _stored(task)]


def _summary(file: Path) -> Part | None:
    try:
        return Part(**json.loads(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _note_other_version(folder: Path, progress: Progress) -> None:
    """Says why files are read again although they have not changed."""
    versions = {part.version for file in folder.glob("part-*.json") if (part := _summary(file))}
    if versions and CATALOG_VERSION not in versions:
        progress.note(
            f"{folder} is of another version ({min(versions) or '1'}, not {CATALOG_VERSION}); its files are read again"
        )


def ingest_file(task: PartTask) -> Part:
    """Reads one annotation file into one part of a catalog; its JSON summary, written last, says that it is whole.

    Raises:
        SourceError: if the file is not what its name says.
    """
    source, root = source_named(task.location.source), Root(task.location.annotations)
    table, ledger = _stored(task)
    records = usable = rejected = 0
    with (
        temporary(table) as new_table,
        temporary(ledger) as new_ledger,
        _PartWriter(new_table) as writer,
        new_ledger.open("w", encoding="utf-8") as rejects,
    ):
        for outcome in source.samples(root, task.file):
            records += 1
            if isinstance(outcome, Rejected):
                rejected += 1
                rejects.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
                continue
            usable += 1
            for sample in outcome:
                writer.add(sample)
    sha256, size = root.sha256(task.file), root.info(task.file)["size"]
    read = Part(task.name, task.file, sha256, size, records, usable, rejected)
    part = replace(read, version=CATALOG_VERSION, marked=writer.marked, stored=_sizes(task))
    write_atomically(Path(task.folder) / f"{task.name}.json", json.dumps(asdict(part), indent=2).encode())
    return part


class _PartWriter:
    """A Parquet writer whose row groups stay small in rows and in bytes."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, CATALOG_SCHEMA, compression="zstd")
        self._buffer: list[dict[str, Any]] = []
        self._chars = 0
        self.marked = dict.fromkeys(MARKS, 0)

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, sample: Sample) -> None:
        row = to_row(sample)
        self._buffer.append(row)
        self._chars += row["n_chars"]
        for mark in MARKS:
            self.marked[mark] += bool(row[mark])
        if len(self._buffer) >= _GROUP_ROWS or self._chars >= _GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            self._writer.write_table(pa.Table.from_pylist(self._buffer, schema=CATALOG_SCHEMA))
        self._buffer, self._chars = [], 0


def _finish(location: Location, folder: Path, tasks: Sequence[PartTask]) -> Catalog:
    """The catalog of a source, with the ledgers of its parts joined."""
    parts = tuple(part for task in tasks if (part := _part(task)) is not None)
    if len(parts) != len(tasks):
        raise BuildError(f"{folder} changed while it was used; run the command again")
    ledger = folder / "rejects.jsonl"
    rejects = b"".join((folder / f"{part.name}.rejects.jsonl").read_bytes() for part in parts)
    if not ledger.exists() or ledger.read_bytes() != rejects:
        write_atomically(ledger, rejects)
    return Catalog(location, folder, parts)


def _remove_stale(catalog: Catalog) -> None:
    """Removes the parts of files that are gone or have changed, and what a killed ingest has left."""
    names = {part.name for part in catalog.parts}
    for path in catalog.folder.glob("part-*"):
        if path.name.split(".")[0] not in names:
            path.unlink(missing_ok=True)
    for path in catalog.folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
