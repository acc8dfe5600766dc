"""A finished build, opened for reading: a local folder or any fsspec URL."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.dataset as ds

from formats.errors import BuildError, UsageError
from formats.manifest import INDEX, MANIFEST, REJECTS, SHARDS, TOKENIZER, parse_manifest
from formats.shard import read_record, read_sample, safe_shard_name
from formats.tokens import ChatTokenizer
from pipelines.storage import Root

_MEMORY = "1GB"
_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Stored:
    """A sample out of a shard: its line of the index, its JSON and its images' JPEG bytes."""

    row: dict[str, Any]
    record: dict[str, Any]
    images: list[bytes]


class OpenBuild:
    """A finished build.

    Args:
        url: its folder, or an fsspec URL such as "s3://bucket/builds/multi_image".
        manifest: what its manifest.json will say, while a build is about to be finished; read from there by default.

    Raises:
        BuildError: if it is no finished build, or its URL cannot be opened.
    """

    def __init__(self, url: str | Path, manifest: Mapping[str, Any] | None = None) -> None:
        self.url = str(url).rstrip("/")
        self.root = Root(self.url)
        self.manifest = dict(manifest) if manifest is not None else self._read_manifest()

    def _read_manifest(self) -> dict[str, Any]:
        try:
            content = self.root.read(MANIFEST) if self.root.is_file(MANIFEST) else None
            begun = content is None and self.root.exists(SHARDS)
        except (ValueError, ImportError, OSError) as error:  # an unknown scheme, an absent driver, no access
            raise BuildError(f"{self.url} cannot be opened: {error}") from error
        return parse_manifest(content, self.url, begun=begun)

    @contextmanager
    def samples(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A database with the index as the table `samples`; only the columns that a query names are read."""
        # A folder of its own: in a shared one a second user could not write.
        with (
            tempfile.TemporaryDirectory(prefix="longllava-", ignore_cleanup_errors=True) as folder,
            duckdb.connect() as db,
        ):
            db.execute(f"SET memory_limit = '{_MEMORY}'")
            db.execute("SET enable_progress_bar = false")
            db.execute("SET temp_directory = $1", [f"{folder}/spill"])
            self.register(db, "samples")
            yield db

    def register(self, db: duckdb.DuckDBPyConnection, name: str) -> None:
        """Makes the index a table of a database."""
        db.register(name, self._index())

    def _index(self) -> ds.Dataset:
        return ds.dataset(self.root.full(INDEX), filesystem=self.root.filesystem)

    @cached_property
    def columns(self) -> frozenset[str]:
        """Columns that the index has; those of scores came later than the others."""
        return frozenset(self._index().schema.names)

    def in_order(self) -> Iterator[dict[str, Any]]:
        """All lines of the index, in its order, a few thousand in memory at a time."""
        for batch in self._index().to_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """What a query over `samples` gives."""
        with self.samples() as db:
            return fetched(db, query, values)

    def rejects(self) -> Iterator[dict[str, Any]]:
        """The records that were drawn and not written."""
        with self.root.open(REJECTS) as file:
            for line in file:
                yield json.loads(line)

    def stored(self, row: Mapping[str, Any]) -> Stored:
        """The sample of a line of the index."""
        with self.root.open(f"{SHARDS}/{safe_shard_name(row['shard'])}") as file:
            _, record, images = read_sample(file, row["offset"], row["size"])
        return Stored(dict(row), record, images)

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON of a sample, without reading its images."""
        with self.root.open(f"{SHARDS}/{safe_shard_name(row['shard'])}") as file:
            return read_record(file, row["offset"])

    @contextmanager
    def tokenizer(self) -> Iterator[ChatTokenizer]:
        """What the build's tokens were counted with."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_bytes(self.root.read(f"{TOKENIZER}/tokenizer.json"))
            yield ChatTokenizer(file)

    def by_key(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Lines of the index by key or id, in the order of the keys.

        Raises:
            UsageError: if one is not in the build.
        """
        rows = self.rows("FROM samples WHERE key IN $1 OR id IN $1 ORDER BY key", [list(keys)])
        missing = set(keys) - {row["key"] for row in rows} - {row["id"] for row in rows}
        if missing:
            names = ", ".join(sorted(missing))
            raise UsageError(f"{self.url} has no sample {names}; `longllava show {self.url}` lists some")
        return rows

    def refuse_unknown_component(self, component: str | None) -> None:
        """Raises `UsageError` if the build has no such component."""
        if component is not None and component not in self.manifest["components"]:
            known = ", ".join(self.manifest["components"])
            raise UsageError(f"{self.url} has no component {component!r}; it has {known}")

    @cached_property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.manifest["recipe"]["name"])


def fetched(db: duckdb.DuckDBPyConnection, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The rows of a query as dicts."""
    result = db.execute(query, list(values))
    names = [column[0] for column in result.description or []]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
