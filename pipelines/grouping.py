"""Groups of duplicates, out of core: candidate pairs by DuckDB joins over bands, checked in numpy, joined by DuckDB.

A record is a duplicate of another if both their texts and their media collide; one without media, if its text does.
Only records whose texts collide with another's have their media looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa

from formats.likeness import ALIKE, BAND, HASHES, LOOK, distance, resemblance
from pipelines.sql import parquet, text

Mode = Literal["exact", "near"]

NEAR_TEXT = 0.8
"""Share of common three-word runs, as MinHash estimates it, from which texts count as one."""

_MEMORY = "1300MB"  # beyond it DuckDB spills
_CROWD = 32  # texts of a band up to which all pairs are tried; of more, each with the first and with its neighbour
_BATCH = 100_000
_LOOK_BAND = 2  # bytes


@dataclass(frozen=True, slots=True)
class Work:
    """A database for grouping.

    Args:
        db: where tables are made.
        mode: what collides: what is the same, or what is alike as well.
    """

    db: duckdb.DuckDBPyConnection
    mode: Mode


def opened(folder: Path, mode: Mode) -> Work:
    """A database that spills into a folder."""
    db = duckdb.connect()
    db.execute(f"SET memory_limit = '{_MEMORY}'")
    db.execute(f"SET temp_directory = {text(str(folder / 'spill'))}")
    db.execute("SET enable_progress_bar = false")
    db.execute("SET preserve_insertion_order = false")
    return Work(db, mode)


def group_texts(work: Work, texts: Sequence[str], among: str) -> None:
    """Makes the table `colliding` (uid, text, n_media): records that share a text, or nearly, with another.

    Args:
        work: the database.
        texts: Parquet files with columns uid, exact, minhash, n_media.
        among: SQL of a table with column `uid`, each once; others are left alone.
    """
    db, key = work.db, "minhash" if work.mode == "near" else "exact"
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE printed AS
            SELECT uid, {key} AS print, n_media FROM {parquet(texts)} WHERE uid IN (SELECT uid FROM {among})"""
    )
    db.execute(
        """CREATE OR REPLACE TEMP TABLE texts AS
           SELECT row_number() OVER (ORDER BY print) - 1 AS id, print, records
           FROM (SELECT print, count(*) AS records FROM printed GROUP BY print)"""
    )
    db.execute("CREATE OR REPLACE TEMP TABLE edges (a BIGINT, b BIGINT)")
    if work.mode == "near":
        _link_texts(work)
    _components(work)
    db.execute(
        """CREATE OR REPLACE TEMP TABLE colliding AS
           WITH placed AS (SELECT texts.*, coalesce(component, id) AS text FROM texts LEFT JOIN components USING (id)),
           shared AS (SELECT text FROM placed GROUP BY text HAVING sum(records) > 1)
           SELECT uid, text, n_media FROM printed JOIN placed USING (print) WHERE text IN (FROM shared)"""
    )
    db.execute("DROP TABLE printed")


def _link_texts(work: Work) -> None:
    """Fills `edges` with pairs of texts that are alike."""
    for at in range(1, HASHES, BAND):
        work.db.execute(
            f"""CREATE OR REPLACE TEMP TABLE banded AS
                SELECT id, array_slice(print, {at}, {at + BAND - 1}) AS band FROM texts"""
        )
        _link(
            work,
            table="texts",
            alike=lambda a, b: resemblance(_rows(a, HASHES), _rows(b, HASHES)) >= NEAR_TEXT,
        )


def group_records(work: Work, media: Sequence[str], refs: str) -> None:
    """Makes the table `groups` (uid, grouped): records that are duplicates of one another have one number.

    Args:
        work: the database, after `group_texts`.
        media: Parquet files with columns ref, exact, looks.
        refs: SQL of a table with columns uid, place, ref: the media of the colliding records.
    """
    db = work.db
    prints = parquet(media) if media else "(SELECT '' AS ref, ''::BLOB AS exact, ''::BLOB AS looks WHERE false)"
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE seen AS
            WITH prints AS (SELECT ref, any_value(exact) AS exact, any_value(looks) AS looks FROM {prints} GROUP BY ref)
            SELECT uid, md5(string_agg(hex(exact), ' ' ORDER BY place)) AS exact,
                   unhex(string_agg(hex(looks), '' ORDER BY place)) AS looks
            FROM {refs} AS refs LEFT JOIN prints USING (ref)
            GROUP BY uid HAVING count(*) = count(exact)"""
    )
    db.execute(
        """CREATE OR REPLACE TEMP TABLE records AS
           SELECT row_number() OVER (ORDER BY uid) - 1 AS id, uid, text, n_media, coalesce(exact, '') AS exact,
                  coalesce(looks, ''::BLOB) AS print
           FROM colliding LEFT JOIN seen USING (uid) WHERE n_media = 0 OR exact IS NOT NULL"""
    )
    db.execute(
        """CREATE OR REPLACE TEMP TABLE edges AS
           SELECT DISTINCT a, id AS b FROM (
               SELECT min(id) OVER (PARTITION BY text, n_media, exact) AS a, id FROM records) WHERE a < id"""
    )
    if work.mode == "near":
        _link_looks(work)
    _components(work)
    db.execute(
        """CREATE OR REPLACE TEMP TABLE groups AS
           SELECT uid, component AS grouped FROM records JOIN components USING (id)"""
    )


def _link_looks(work: Work) -> None:
    """Fills `edges` with pairs of records of one text whose media look alike, one by one."""
    # One record of those with the same media is enough.
    work.db.execute(
        """CREATE OR REPLACE TEMP TABLE pictured AS
           SELECT DISTINCT ON (text, n_media, exact) * FROM records WHERE n_media > 0
           ORDER BY text, n_media, exact, id"""
    )
    middle = f"({LOOK} * (octet_length(print) // {LOOK} // 2))"
    for at in range(1, LOOK, _LOOK_BAND):
        work.db.execute(
            f"""CREATE OR REPLACE TEMP TABLE banded AS
                SELECT id, hash(text, n_media, octet_length(print),
                                array_slice(print, {middle} + {at}, {middle} + {at + _LOOK_BAND - 1})) AS band
                FROM pictured"""
        )
        _link(work, table="pictured", alike=looks_alike, same="x.text = y.text AND x.n_media = y.n_media")


def looks_alike(one: pa.Array, other: pa.Array) -> np.ndarray:
    """Whether the media of two records look alike, for many pairs: on average, and none much less than the others."""
    found = np.zeros(len(one), bool)
    sizes = np.array([len(value) for value in one.to_pylist()])
    others = np.array([len(value) for value in other.to_pylist()])
    for size in np.unique(sizes[sizes == others]):
        at = np.flatnonzero((sizes == size) & (others == size))
        shape = (len(at), size // LOOK, LOOK)
        bits = distance(*(_rows(column.take(at), size).reshape(shape) for column in (one, other)))
        found[at] = (bits.mean(axis=1) <= ALIKE) & (bits.max(axis=1) <= 2 * ALIKE)
    return found


def _link(work: Work, *, table: str, alike: Callable[[pa.Array, pa.Array], np.ndarray], same: str = "true") -> None:
    """Adds to `edges` the pairs of `banded` that share a band and are alike by their prints in `table`."""
    work.db.execute(
        """CREATE OR REPLACE TEMP TABLE crowds AS
           SELECT band, count(*) AS size, min(id) AS first FROM banded GROUP BY band HAVING size > 1"""
    )
    pairs = f"""
        SELECT x.id AS a, y.id AS b FROM (FROM crowds WHERE size <= {_CROWD}) JOIN banded AS x USING (band)
            JOIN banded AS y USING (band) WHERE x.id < y.id
        UNION ALL
        SELECT unnest([first, before]), id FROM (
            SELECT first, id, lag(id) OVER (PARTITION BY band ORDER BY id) AS before
            FROM (FROM crowds WHERE size > {_CROWD}) JOIN banded USING (band)) WHERE before IS NOT NULL"""
    result = work.db.sql(
        f"""SELECT a, b, x.print, y.print FROM (SELECT DISTINCT a, b FROM ({pairs}) ANTI JOIN edges USING (a, b))
            JOIN {table} AS x ON x.id = a JOIN {table} AS y ON y.id = b WHERE {same}"""
    )
    found = []
    for batch in result.to_arrow_reader(_BATCH):
        a, b, one, other = batch.columns
        near = pa.array(alike(one, other))
        found.append(pa.table({"a": a.filter(near), "b": b.filter(near)}))
    if found:
        new = pa.concat_tables(found)
        work.db.register("new_edges", new)
        work.db.execute("INSERT INTO edges SELECT a, b FROM new_edges")
        work.db.unregister("new_edges")


def _components(work: Work) -> None:
    """Makes the table `components` (id, component) of all ends of `edges`; a component is named by its least id."""
    work.db.execute("CREATE OR REPLACE TEMP TABLE ways AS SELECT a, b FROM edges UNION SELECT b, a FROM edges")
    work.db.execute(
        """CREATE OR REPLACE TEMP TABLE components AS
           WITH RECURSIVE reached(id, component) USING KEY (id) AS (
               SELECT a, least(a, min(b)) FROM ways GROUP BY a
               UNION
               SELECT ways.b, min(reached.component) FROM reached JOIN ways ON ways.a = reached.id
               JOIN recurring.reached AS known ON known.id = ways.b
               WHERE reached.component < known.component GROUP BY ways.b
           ) FROM reached"""
    )


def _rows(column: pa.Array, size: int) -> np.ndarray:
    """A column of binary values of one size as (n, size) uint8."""
    values = column.cast(pa.binary(int(size)))
    buffer = values.buffers()[1]
    data = np.frombuffer(buffer, np.uint8) if buffer is not None else np.zeros(0, np.uint8)
    return data[values.offset * size : (values.offset + len(values)) * size].reshape(len(values), int(size))
