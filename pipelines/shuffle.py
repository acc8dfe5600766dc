"""Records of catalogs to the order in which a plan has drawn them, in bounded memory, however long they are.

DuckDB sorts what tells the rows of a round apart; were it to carry the records along, a few thousand long documents
would be more than its memory: it works in vectors of 2,048 rows, and some of those are there at once. So records go
through a scratch file of their own: read as they lie, cut into blocks of neighbours to be, and put together block by
block.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_MEMORY = 64 << 20  # bytes of records that are sorted at once, on the way into the scratch file and out of it
_GROUP_ROWS, _GROUP_BYTES = 2048, 16 << 20  # of the file that comes out
_AT = "at"  # a record's row in the round
_CODEC = "lz4"


class _Piece(NamedTuple):
    """Records of one block in the scratch file: where they lie, and how large they are once unpacked."""

    offset: int
    packed: int
    size: int


class Block(NamedTuple):
    """The records of rows `start` … `stop`, null where a row has none."""

    start: int
    stop: int
    records: pa.StructArray


class Shuffle:
    """Puts records in order; only a few dozen megabytes of them are in memory at once.

    Args:
        scratch: an empty file, open for reading and writing.
        schema: of the records.
        rows: how many the round has.
        size: bytes that all records may come to; only an estimate.
    """

    def __init__(self, scratch: BinaryIO, schema: pa.Schema, rows: int, size: int) -> None:
        self._scratch = scratch
        self._schema = schema.insert(0, pa.field(_AT, pa.int64()))
        blocks = max(1, min(rows, -(-size // _MEMORY)))
        self._bounds = np.linspace(0, rows, blocks + 1).astype(np.int64)
        self._pieces: list[list[_Piece]] = [[] for _ in range(blocks)]
        self._waiting: list[pa.Table] = []
        self._bytes = self._end = 0

    def add(self, at: np.ndarray, records: pa.Table) -> None:
        """Takes records in, with the row of each."""
        self._waiting.append(records.add_column(0, _AT, pa.array(at, pa.int64())))
        self._bytes += records.nbytes
        if self._bytes >= _MEMORY:
            self._flush()

    def blocks(self) -> Iterator[Block]:
        """All records, in order; more blocks than expected if the records are larger than that."""
        self._flush()
        for number, pieces in enumerate(self._pieces):
            first, last = map(int, self._bounds[number : number + 2])
            parts = max(1, min(last - first, -(-sum(piece.size for piece in pieces) // _MEMORY // 2)))
            bounds = np.linspace(first, last, parts + 1).astype(np.int64)
            for start, stop in pairwise(bounds.tolist()):
                yield Block(start, stop, self._records(pieces, start, stop))

    def _flush(self) -> None:
        """Writes what waits, a piece for each block."""
        if not self._waiting:
            return
        waiting = _as_one(pa.concat_tables(self._waiting))
        self._waiting, self._bytes = [], 0
        at = waiting.column(_AT).to_numpy()
        order = np.argsort(at, kind="stable")
        waiting = waiting.take(pa.array(order))
        cuts = np.searchsorted(at[order], self._bounds)
        for pieces, start, stop in zip(self._pieces, cuts[:-1], cuts[1:], strict=True):
            if start < stop:
                raw = waiting.slice(start, stop - start).serialize()
                packed = pa.compress(raw, _CODEC)
                self._scratch.write(packed)
                pieces.append(_Piece(self._end, packed.size, raw.size))
                self._end += packed.size

    def _records(self, pieces: Sequence[_Piece], start: int, stop: int) -> pa.StructArray:
        """The records of some rows out of the pieces of a block."""
        found = []
        for piece in pieces:
            self._scratch.seek(piece.offset)
            raw = pa.decompress(self._scratch.read(piece.packed), piece.size, _CODEC)
            batch = pa.ipc.read_record_batch(raw, self._schema)
            low, high = np.searchsorted(batch.column(_AT).to_numpy(), (start, stop))
            found.append(batch.slice(low, high - low))
        table = _as_one(pa.Table.from_batches(found, self._schema))
        rows = np.full(stop - start, -1, np.int64)
        rows[table.column(_AT).to_numpy() - start] = np.arange(table.num_rows)
        return table.select(self._schema.names[1:]).to_struct_array().take(pa.array(rows, mask=rows < 0))


def write_round(file: Path, keys: Path, places: Path, catalog: Sequence[str], first: int, scratch: Path) -> None:
    """Writes the rows of a round with their records.

    Args:
        file: to be written: the columns of `keys`, and `record`.
        keys: the rows without records, by position, from `first` on without gaps.
        places: (file, row, position) of their records, by file and row: which file of the catalog, which row of it.
        catalog: Parquet files of records, all with the same columns.
        scratch: a file to be used meanwhile, and removed.
    """
    schema = pa.schema([field.with_nullable(True) for field in pq.read_schema(catalog[0])] if catalog else [])
    record = pa.field("record", pa.struct(list(schema)) if catalog else pa.null())
    columns = pq.read_schema(keys).remove_metadata().append(record)
    count = pq.read_metadata(keys).num_rows
    try:
        with (
            scratch.open("w+b") as opened,
            pq.ParquetFile(keys) as lines,
            pq.ParquetWriter(file, columns, compression="zstd") as out,
        ):
            shuffle = Shuffle(opened, schema, count, _size(places, catalog))
            for positions, table in _wanted(places, catalog, schema):
                shuffle.add(positions - first, table)
            left = _Lines(lines)
            for block in shuffle.blocks():
                found = block.records if catalog else pa.nulls(block.stop - block.start)
                table = left.take(block.stop - block.start).append_column(record, found)
                out.write_table(table, row_group_size=_group_rows(table))
    finally:
        scratch.unlink(missing_ok=True)


class _Lines:
    """The rows of a Parquet file, as many at a time as are asked for."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._batches = file.iter_batches(batch_size=4 * _GROUP_ROWS)
        self._waiting = file.schema_arrow.empty_table()

    def take(self, count: int) -> pa.Table:
        """The next rows."""
        held = [self._waiting]
        while sum(table.num_rows for table in held) < count:
            held.append(pa.Table.from_batches([next(self._batches)]))
        rows = pa.concat_tables(held)
        self._waiting = rows.slice(count)
        return rows.slice(0, count)


def _size(places: Path, catalog: Sequence[str]) -> int:
    """About how many bytes the records at some places have, by what a record has in its file."""
    counts = np.zeros(len(catalog), np.int64)
    with pq.ParquetFile(places) as parquet:
        for batch in parquet.iter_batches(columns=["file"]):
            counts += np.bincount(batch.column("file").to_numpy(), minlength=len(catalog))
    return sum(int(count * _row_bytes(file)) for file, count in zip(catalog, counts, strict=True) if count)


def _row_bytes(file: str) -> float:
    about = pq.read_metadata(file)
    size: int = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    return float(size / max(1, about.num_rows))


def _wanted(places: Path, catalog: Sequence[str], schema: pa.Schema) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Records as they lie in the catalog, with the positions that they go to."""
    with pq.ParquetFile(places) as parquet:
        for batch in parquet.iter_batches(batch_size=1 << 20):
            files, rows, positions = (batch.column(n).to_numpy() for n in ("file", "row", "position"))
            for number in np.unique(files).tolist():
                low, high = np.searchsorted(files, (number, number + 1))
                yield from _of_file(catalog[number], rows[low:high], positions[low:high], schema)


def _of_file(
    file: str, rows: np.ndarray, positions: np.ndarray, schema: pa.Schema
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Some rows of a file, ascending, a row group at a time."""
    with pq.ParquetFile(file) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        bounds = np.cumsum([0, *sizes])
        cuts = np.searchsorted(rows, bounds)
        for group, (low, high) in enumerate(pairwise(cuts.tolist())):
            if low < high:
                table = parquet.read_row_group(group).select(schema.names).cast(schema)
                chosen = _as_one(table).take(pa.array(rows[low:high] - bounds[group]))
                yield positions[low:high], pa.Table.from_batches([chosen])


def _as_one(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _group_rows(table: pa.Table) -> int:
    """Rows of a row group: a task that builds a shard has one or two of them in memory."""
    size: int = table.nbytes // max(1, table.num_rows)
    return max(1, min(_GROUP_ROWS, _GROUP_BYTES // max(1, size)))
