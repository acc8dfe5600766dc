"""Does index.parquet have the columns it should have, and does each row say what its sample is?"""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from validators.findings import Check, Finding, error
from validators.folder import Folder
from validators.manifest import Manifest, Table
from validators.samples import Record
from validators.shards import Stored

TEXT = ("key", "id", "shard", "sha256", "source", "component", "modality")
COLUMNS = (
    *("key", "id", "shard", "offset", "size", "sha256", "source", "component", "modality"),
    *("n_images", "n_text_tokens", "n_tokens", "n_target_tokens", "n_turns"),
)
SCORES = {
    **dict.fromkeys(("question_language", "answer_language"), "text"),
    **dict.fromkeys(("n_words", "shortest_answer", "longest_turn"), "count"),
    **dict.fromkeys(("n_refusals", "n_emails", "n_phones", "n_cards"), "count"),
    **dict.fromkeys(("min_side", "max_side", "contrast", "min_bytes", "max_bytes", "width", "height"), "count"),
    **dict.fromkeys(("repetition", "max_aspect"), "number"),
    **{"flags": "texts", "language_mismatch": "truth"},
}
"""Columns that follow those, in any order, all or none; null where there is nothing to score."""

Row = dict[str, Any]


class Index:
    """An index that can be read; made by `open_index`."""

    def __init__(self, folder: Folder, file: str) -> None:
        self._folder = folder
        self.file = file

    def columns(self, *names: str) -> pa.Table:
        """Some columns of all rows."""
        with self._folder.open(self.file) as file:
            return pq.read_table(file, columns=list(names))

    @cached_property
    def has_scores(self) -> bool:
        """Whether it has the columns of scores."""
        with self._folder.open(self.file) as file:
            return SCORES.keys() <= set(pq.read_schema(file).names)

    def runs(self) -> Iterator[tuple[str, pa.Table]]:
        """Neighbouring rows of one shard, in the order of the file, without reading ahead of them."""
        with self._folder.open(self.file) as file:
            batches = pq.ParquetFile(file).iter_batches(batch_size=8192)
            pieces = (piece for batch in batches for piece in _pieces(batch))
            for shard, same in groupby(pieces, key=itemgetter(0)):
                yield shard, pa.Table.from_batches([rows for _, rows in same])


def _pieces(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    names = enumerate(batch.column("shard").to_pylist())
    for shard, same in groupby(names, key=itemgetter(1)):
        positions = [position for position, _ in same]
        yield shard, batch.slice(positions[0], len(positions))


def open_index(folder: Folder, manifest: Manifest) -> Check[Index | None]:
    """Checks the index as a file; None if rows cannot be held against samples."""
    table = manifest.index
    if folder.size(table.file) is None:
        yield error("index-missing", "no such file", file=table.file)
        return None
    digest = folder.sha256(table.file)
    if digest != table.sha256:
        yield error("index-hash", f"sha256 is {digest}; the manifest says {table.sha256}", file=table.file)
    problems = list(_check_content(folder, table))
    yield from problems
    readable = not any(problem.code in ("index-unreadable", "index-schema") for problem in problems)
    return Index(folder, table.file) if readable else None


def _check_content(folder: Folder, table: Table) -> Iterator[Finding]:
    nulls: dict[str, int] = {}
    rows = 0
    try:
        with folder.open(table.file) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            for batch in parquet.iter_batches():
                rows += batch.num_rows
                for name, column in zip(schema.names, batch.columns, strict=True):
                    nulls[name] = nulls.get(name, 0) + column.null_count
    except (pa.ArrowException, OSError) as problem:
        yield error("index-unreadable", f"{problem}", file=table.file)
        return
    more = schema.names[len(COLUMNS) :]
    if tuple(schema.names[: len(COLUMNS)]) != COLUMNS or (more and sorted(more) != sorted(SCORES)):
        yield error("index-schema", f"columns are {', '.join(schema.names)}", file=table.file)
    for field in schema:
        if field.name in (*COLUMNS, *SCORES) and not _fits(field):
            yield error("index-schema", f"{field.name} is of type {field.type}", file=table.file)
    for name in (name for name, count in nulls.items() if count and name not in SCORES):
        yield error("index-schema", f"{name} is null in {nulls[name]} rows", file=table.file)
    if rows != table.rows:
        yield error("index-rows", f"{rows} rows; the manifest says {table.rows}", file=table.file)


def _fits(field: pa.Field) -> bool:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if field.name in TEXT:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    match SCORES.get(field.name):
        case "text":
            return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
        case "texts":
            return bool(pa.types.is_list(kind) and pa.types.is_string(kind.value_type))
        case "number":
            return bool(pa.types.is_floating(kind))
        case "truth":
            return bool(pa.types.is_boolean(kind))
    return bool(pa.types.is_integer(kind))


class Rows:
    """The index's rows, handed out shard by shard; holds no more than one shard of a well-ordered index."""

    def __init__(self, index: Index) -> None:
        self._file = index.file
        self._runs = index.runs()
        self._held: dict[str, pa.Table] = {}

    def take(self, shard: str) -> Check[list[Row]]:
        """The rows of one shard."""
        while shard not in self._held and (run := next(self._runs, None)):
            name, rows = run
            if name != shard:
                yield error("index-order", f"rows of {name} stand before those of {shard}", file=self._file)
            self._held[name] = pa.concat_tables([self._held[name], rows]) if name in self._held else rows
        found = self._held.pop(shard, None)
        return found.to_pylist() if found is not None else []

    def rest(self) -> Check[None]:
        """What no shard of the manifest has asked for."""
        counts = {name: rows.num_rows for name, rows in self._held.items()}
        for name, rows in self._runs:
            counts[name] = counts.get(name, 0) + rows.num_rows
        for name, count in counts.items():
            yield error("index-rows", f"{count} rows for {name!r} are of no sample there", file=self._file)


class ShardRows:
    """The rows of one shard, each held against the sample of its key."""

    def __init__(self, file: str, rows: list[Row]) -> None:
        self._file = file
        # Of two rows with one key the first counts; the second sample of that key has no row then.
        self._rows = {row["key"]: (position, row) for position, row in reversed([*enumerate(rows)])}
        self._last = -1

    def match(self, sample: Stored) -> Check[Row | None]:
        """The row of the next sample; checks that it stands in the same order and points at the sample's bytes."""
        position, row = self._rows.pop(sample.key, (-1, None))
        if row is None:
            yield error("index-rows", "the sample has no row", file=self._file, key=sample.key)
            return None
        if position < self._last:
            yield error("index-order", "the row stands before the last sample's", file=self._file, key=sample.key)
        self._last = position
        if (row["offset"], row["size"]) != (sample.offset, sample.size):
            detail = f"offset {row['offset']}, size {row['size']}; the sample has {sample.offset}, {sample.size}"
            yield error("index-offset", detail, file=self._file, key=sample.key)
        if row["sha256"] != sample.sha256:
            detail = f"sha256 {row['sha256']}; the sample's is {sample.sha256}"
            yield error("index-sample-hash", detail, file=self._file, key=sample.key)
        return row

    def compare(self, row: Row, record: Record, key: str, *, copied: bool) -> Iterator[Finding]:
        """Holds a row's other columns against the sample's JSON.

        Args:
            row, record, key: of the same sample.
            copied: whether its bytes come from an earlier build, where its component may have had another name.
        """
        expected: Row = {
            "id": record.id,
            "source": record.source,
            "component": row["component"] if copied else record.component,
            "modality": record.modality,
            "n_images": len(record.images),
            "n_turns": len(record.conversations),
        }
        scored = row.get("min_side") is not None or (record.images and "min_side" in row and not copied)
        if scored and not record.cut:  # what was cut off had a shape, too
            expected |= _shapes(record)
        for name, value in expected.items():
            if row[name] != value:
                yield error(
                    "index-column", f"{name} is {row[name]!r}; the sample's is {value!r}", file=self._file, key=key
                )

    def rest(self) -> Check[None]:
        """Rows whose samples did not come."""
        for key in self._rows:
            yield error("index-rows", "no such sample in the row's shard", file=self._file, key=key)


def _shapes(record: Record) -> Row:
    """What the JSON says of the shapes of a sample's pictures before they were scaled."""
    sizes = [image.source_size for image in record.images]
    largest = max(sizes, key=lambda size: size[0] * size[1], default=(None, None))
    return {
        "min_side": min((min(size) for size in sizes), default=None),
        "max_side": max((max(size) for size in sizes), default=None),
        "max_aspect": max((round(max(size) / min(size), 4) for size in sizes), default=None),
        "width": largest[0],
        "height": largest[1],
    }
