"""Catalogs to plan: which records are drawn, and in which order they fill the shards. All in DuckDB, out of core.

Draw: a component takes the records with the smallest md5(seed/draw/origin/uid) among those that pass its filters,
where origin is the component itself, or the earlier build that it draws from. Components that draw from one earlier
build share one order; `replay` takes from its front and `subimage` from its back, so that they stay apart however
large either is; of two components of one kind with overlapping filters, the later one passes over what the earlier one
takes. Order: the drawn records are laid out by md5(seed/order/component/uid/copy).
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import RecipeError
from formats.manifest import INDEX
from formats.shard import SCORES
from pipelines.curate import Drops, conditions
from pipelines.ingest import Catalog
from pipelines.shuffle import write_round
from pipelines.sql import parquet as _parquet
from pipelines.sql import text as _text
from pipelines.sql import texts as _texts
from recipes.schema import Component, Filters, Recipe, Steps

_MEMORY = "1300MB"  # beyond it DuckDB spills; the process needs half as much again
_REPLAY_FILTERS = {"modality", "min_turns", "max_turns"}  # what an index can answer, besides steps


@dataclass(frozen=True, slots=True)
class EarlierBuild:
    """A finished build that replay and sub-images draw from."""

    name: str
    folder: Path
    manifest: Mapping[str, Any]


@dataclass(slots=True)
class Pool:
    """What one component can draw from.

    Attributes:
        size: records that pass the filters.
        filtered: records that are not selected, by the first condition that fails.
        dropped: records that are, but that a step calls junk, by the first step.
        asked: how many samples the recipe wants.
        drawn: how many ranks of the pool are used up; grows as failed records are replaced.
    """

    name: str
    component: Component
    size: int
    filtered: dict[str, int]
    dropped: dict[str, int]
    asked: int
    drawn: int = 0

    @property
    def repeats(self) -> bool:
        """Whether the pool is gone through again when it is used up."""
        return self.component.on_short == "repeat" and self.size > 0

    @property
    def left(self) -> int:
        """How many more can be drawn."""
        return max(0, self.size - self.drawn)


@dataclass(frozen=True, slots=True)
class Round:
    """Drawn records in shard order: rows `first` … `first + rows` of all positions, in one Parquet file."""

    file: Path
    first: int
    rows: int


@dataclass
class Planner:
    """Draws records for a recipe from catalogs and earlier builds; keeps its files in `folder`."""

    recipe: Recipe
    catalogs: Sequence[Catalog]
    builds: Mapping[str, EarlierBuild]
    folder: Path
    passed_over: Path | None = None
    """Parquet (component, uid, reason) of records that are left out, from `pipelines.overlaps`."""
    pools: dict[str, Pool] = field(default_factory=dict)
    made: Sequence[Path] = ()  # Parquet files of what need not be rendered again: component, uid, copy, made

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._db = duckdb.connect()
        self._db.execute(f"SET memory_limit = '{_MEMORY}'")
        self._db.execute(f"SET temp_directory = {_text(str(self.folder / 'spill'))}")
        self._db.execute("SET enable_progress_bar = false")
        self._db.execute("SET preserve_insertion_order = false")  # every order that matters is asked for
        for catalog in self.catalogs:
            name = catalog.location.source
            self._db.execute(f'CREATE VIEW "catalog {name}" AS FROM {_parquet(catalog.files)}')
        # Replay first: what it takes, later components that draw from the same build leave alone.
        by_kind = sorted(self.recipe.components.items(), key=lambda item: item[1].subimage is not None)
        for name, component in by_kind:
            self.pools[name] = self._pool(name, component)
        self.pools = {name: self.pools[name] for name in self.recipe.components}

    def close(self) -> None:
        """Lets go of the database."""
        self._db.close()

    def short(self) -> list[Pool]:
        """The components whose pool is too small for what they are asked."""
        return [pool for pool in self.pools.values() if pool.size < pool.asked and not pool.repeats]

    def drops(self) -> Drops:
        """What steps drop before the draw."""
        return {name: (pool.size, pool.dropped) for name, pool in self.pools.items()}

    def uids(self, name: str, start: int, stop: int) -> pa.ChunkedArray:
        """The records at ranks `start` … `stop` of a component's pool; ranks past its end start over."""
        pool = self.pools[name]
        size = max(pool.size, 1)
        ranks = f"SELECT unnest(range({start}, {stop})) AS drawn_rank"
        table = self._db.sql(
            f"""SELECT uid FROM ({ranks}) JOIN {self._pool_table(name)} AS pool
                ON pool.rank = drawn_rank % {size} ORDER BY drawn_rank"""
        ).to_arrow_table()
        return table["uid"]

    def records(self, uids: Collection[str]) -> dict[str, dict[str, Any]]:
        """Lines of the catalogs by uid."""
        if not uids:
            return {}
        found = self._db.execute(f"FROM ({self._records()}) WHERE uid IN {_texts(uids)}").fetchall()
        return dict(found)

    def draw(self, number: int, wanted: Mapping[str, int], first: int) -> Round:
        """Draws the next records of each component and lays them out.

        Args:
            number: of this round; 0 is the first draw, later ones replace what failed.
            wanted: how many records each component needs.
            first: position of the first sample of this round in the whole build.
        """
        slices = []
        for name, count in wanted.items():
            pool = self.pools[name]
            stop = pool.drawn + (count if pool.repeats else min(count, pool.left))
            slices.append(self._slice(pool, stop))
            pool.drawn = stop
        file = self.folder / f"round-{number}.parquet"
        self._lay_out(slices, first, file)
        return Round(file, first, pq.read_metadata(file).num_rows)

    def rewind(self) -> None:
        """Begins to draw anew."""
        for pool in self.pools.values():
            pool.drawn = 0

    # Pools ----------------------------------------------------------------------------------------------------------

    def _pool(self, name: str, component: Component) -> Pool:
        steps = self.recipe.steps(name)
        if component.source:
            candidates = self._source_candidates(component, steps)
        else:
            candidates = self._build_candidates(name, component, steps)
        candidates = self._less_passed_over(name, candidates)
        origin = name if component.source else component.origin
        direction = "DESC" if component.subimage else "ASC"
        self._db.execute(
            f"""CREATE TEMP TABLE candidates AS
                SELECT uid, stored, reason, step, md5({_text(f"{self.recipe.seed}/draw/{origin}/")} || uid) AS draw
                FROM ({candidates})"""
        )
        self._db.execute(
            f"""COPY (
                SELECT row_number() OVER (ORDER BY draw {direction}, stored.key) - 1 AS rank, uid, stored
                FROM candidates WHERE reason IS NULL AND step IS NULL ORDER BY rank
            ) TO {_text(str(self.pool_file(name)))} (FORMAT parquet)"""
        )
        filtered = self._counts("SELECT reason, count(*) FROM candidates WHERE reason IS NOT NULL")
        dropped = self._counts("SELECT step, count(*) FROM candidates WHERE reason IS NULL AND step IS NOT NULL")
        size = self._count("FROM candidates WHERE reason IS NULL AND step IS NULL")
        self._db.execute("DROP TABLE candidates")
        return Pool(name, component, size, filtered, dropped, size if component.count == "all" else component.count)

    def _source_candidates(self, component: Component, steps: Steps) -> str:
        reason, step = _reason(component.filters), _step(conditions(steps, of_index=False))
        catalog = f'"catalog {component.source}"'
        return f"SELECT uid, {_NOT_STORED} AS stored, {reason} AS reason, {step} AS step FROM {catalog}"

    def _build_candidates(self, name: str, component: Component, steps: Steps) -> str:
        unanswerable = component.filters.model_fields_set - _REPLAY_FILTERS - Steps.model_fields.keys()
        if unanswerable:
            raise RecipeError(
                f"components.{name}.filters.{min(unanswerable)}: an earlier build's index cannot answer it;"
                f" {', '.join(sorted(_REPLAY_FILTERS))} can be used with replay and subimage"
            )
        build = self.builds[component.origin]
        reason, junk = _reason(component.filters), conditions(steps, of_index=True)
        scored = {name for name, _ in SCORES} & set(pq.read_schema(build.folder / INDEX).names)
        if junk and not scored:
            raise RecipeError(
                f"components.{name}: {min(junk)} cannot be told of the build {build.name!r}, which was made before"
                " indexes had scores; rebuild it, or leave filters out"
            )
        # A build that went through its pool again holds a record more than once; here it counts once.
        table = f"(SELECT DISTINCT ON (id) * FROM {_parquet([build.folder / INDEX])} ORDER BY id, key)"
        taken = self._taken(component.origin)
        table = f"(FROM {table} WHERE id NOT IN ({taken}))" if taken else table
        if component.replay:
            reason = f"CASE WHEN n_tokens > {self.recipe.sequence_length} THEN 'too-long' ELSE {reason} END"
        else:
            reason = f"CASE WHEN modality NOT IN ('image', 'multi_image') THEN 'no-picture' ELSE {reason} END"
        return (
            f"SELECT id AS uid, {as_stored(scored)} AS stored, {reason} AS reason, {_step(junk)} AS step FROM {table}"
        )

    def _less_passed_over(self, name: str, candidates: str) -> str:
        if self.passed_over is None:
            return candidates
        mine = f"(SELECT uid, reason AS overlap FROM {_parquet([self.passed_over])} WHERE component = {_text(name)})"
        return (
            "SELECT uid, stored, coalesce(reason, overlap) AS reason, step"
            f" FROM ({candidates}) LEFT JOIN {mine} USING (uid)"
        )

    def _taken(self, build: str) -> str:
        """Records of an earlier build that components so far take, as SQL; empty if there are none."""
        pools = [pool for pool in self.pools.values() if pool.component.origin == build and not pool.component.source]
        return " UNION ALL ".join(f"SELECT uid FROM {self._pool_table(p.name)} WHERE rank < {p.asked}" for p in pools)

    # Draws ----------------------------------------------------------------------------------------------------------

    def _slice(self, pool: Pool, stop: int) -> str:
        """Ranks `pool.drawn` … `stop` of a pool as SQL; ranks past its end start over as further copies."""
        ranks = f"SELECT unnest(range({pool.drawn}, {stop})) AS drawn_rank"
        return f"""
            SELECT {_text(pool.name)} AS component, {pool.component.replay is not None} AS replayed,
                   drawn_rank AS rank, drawn_rank // {max(pool.size, 1)} AS copy, pool.uid, pool.stored
            FROM ({ranks}) JOIN {self._pool_table(pool.name)} AS pool
                ON pool.rank = drawn_rank % {max(pool.size, 1)}"""

    def _lay_out(self, slices: Sequence[str], first: int, file: Path) -> None:
        """Writes drawn rows in their order, with their records, which no sort has to carry along."""
        keys, places = self.folder / "keys.parquet", self.folder / "places.parquet"
        self._db.execute(
            f"""COPY (
                WITH drawn AS (
                    SELECT *, md5({_text(f"{self.recipe.seed}/order/")} || component || '/' || uid || '/' || copy) AS o
                    FROM ({" UNION ALL ".join(slices)})
                ), laid AS (SELECT * EXCLUDE o, {first} - 1 + row_number() OVER (ORDER BY o) AS position FROM drawn)
                SELECT laid.*{", made" if self.made else ""} FROM laid {self._made()} ORDER BY position
            ) TO {_text(str(keys))} (FORMAT parquet, COMPRESSION zstd)"""
        )
        catalog = [file for catalog in self.catalogs for file in catalog.files]
        self._db.execute(
            f"""COPY (
                SELECT places.file, row, position
                FROM {_parquet([keys])} JOIN ({_places_of(catalog)}) AS places USING (uid)
                WHERE NOT replayed ORDER BY ALL
            ) TO {_text(str(places))} (FORMAT parquet)"""
        )
        write_round(file, keys, places, catalog, first, self.folder / "records.tmp")
        keys.unlink()
        places.unlink()

    def _records(self) -> str:
        """All catalog rows as (uid, record)."""
        if not self.catalogs:
            return "SELECT NULL::VARCHAR AS uid, NULL AS record WHERE false"
        names = [catalog.location.source for catalog in self.catalogs]
        return " UNION ALL ".join(f'SELECT uid, c AS record FROM "catalog {name}" AS c' for name in names)

    def _made(self) -> str:
        """Joins what need not be rendered again to the rows that are laid out."""
        if not self.made:
            return ""
        same = " AND ".join(f"before.{column} = laid.{column}" for column in ("component", "uid", "copy"))
        return f"LEFT JOIN {_parquet(self.made)} AS before ON {same}"

    def _pool_table(self, name: str) -> str:
        return _parquet([self.pool_file(name)])

    def pool_file(self, name: str) -> Path:
        """Parquet (rank, uid, stored) of what a component can draw, in the order in which it does."""
        return self.folder / f"pool-{name}.parquet"

    def _counts(self, query: str) -> dict[str, int]:
        return dict(self._db.execute(f"{query} GROUP BY 1 ORDER BY 1").fetchall())

    def _count(self, query: str) -> int:
        (count,) = self._db.execute(f"SELECT count(*) {query}").fetchone() or (0,)
        return int(count)


def _places_of(catalog: Sequence[str]) -> str:
    """Where the records of a catalog's files lie, as SQL: uid, number of the file, row in it."""
    if not catalog:
        return "SELECT NULL::VARCHAR AS uid, 0 AS file, 0 AS row WHERE false"
    numbers = f"SELECT unnest({_texts(catalog)}) AS filename, unnest(range({len(catalog)})) AS number"
    rows = _parquet(catalog, "filename = true, file_row_number = true")
    return f"SELECT uid, number AS file, file_row_number AS row FROM {rows} AS rows JOIN ({numbers}) USING (filename)"


_INDEX_COLUMNS = ("key", "shard", "offset", "size", "sha256", "source", "modality")
_INDEX_COUNTS = ("n_images", "n_text_tokens", "n_tokens", "n_target_tokens", "n_turns")
_SQL_TYPES = {
    **{pa.string(): "VARCHAR", pa.list_(pa.string()): "VARCHAR[]", pa.bool_(): "BOOLEAN"},
    **{pa.int32(): "INTEGER", pa.int64(): "BIGINT", pa.float64(): "DOUBLE"},
}
_SCORES = {name: _SQL_TYPES[kind] for name, kind in SCORES}
_NOT_STORED = (
    'NULL::STRUCT(key VARCHAR, shard VARCHAR, "offset" BIGINT, size BIGINT, sha256 VARCHAR, source VARCHAR,'
    " modality VARCHAR, n_images INTEGER, n_text_tokens INTEGER, n_tokens INTEGER, n_target_tokens INTEGER,"
    f" n_turns INTEGER, {', '.join(f'{name} {kind}' for name, kind in _SCORES.items())})"
)


def as_stored(scored: Collection[str]) -> str:
    """What replay copies of an index's row, as SQL; `scored` are the columns of scores that the index has."""
    columns = [f"'{name}': \"{name}\"" for name in (*_INDEX_COLUMNS, *_INDEX_COUNTS)]
    columns += [f"'{name}': {name if name in scored else 'NULL'}::{kind}" for name, kind in _SCORES.items()]
    return "{" + ", ".join(columns) + "}"


def read_rows(file: Path, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Rows `start` … `stop` of a round's file, touching only the row groups that hold them, a few rows at a time."""
    with pq.ParquetFile(file) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        firsts = [0, *accumulate(sizes)]
        groups = [i for i, size in enumerate(sizes) if firsts[i] < stop and firsts[i] + size > start]
        at = firsts[groups[0]] if groups else 0
        for batch in parquet.iter_batches(batch_size=64, row_groups=groups):
            yield from batch.slice(max(0, start - at), max(0, stop - max(start, at))).to_pylist()
            at += batch.num_rows


def fingerprints(file: Path, size: int) -> list[str]:
    """What `size` rows after `size` rows of a round's file are: for each, the fingerprint of its records in order."""
    found = []
    digest, count = hashlib.sha256(), 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=["position", "component", "uid", "copy"]):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                digest.update(repr(row).encode())
                count += 1
                if count % size == 0:
                    found.append(digest.hexdigest())
                    digest = hashlib.sha256()
    return found if count % size == 0 else [*found, digest.hexdigest()]


def _reason(filters: Filters) -> str:
    """SQL for the name of the first condition that a record fails, NULL if it passes."""
    conditions = {
        "modality": filters.modality and f"modality IN {_texts(filters.modality)}",
        "files": filters.files and " OR ".join(f"file GLOB {_text(pattern)}" for pattern in filters.files),
        "language": filters.languages and f"lower(language) IN {_texts(x.lower() for x in filters.languages)}",
        **{flag: f"NOT list_contains(flags, {_text(flag)})" for flag in filters.without},
        "min_turns": filters.min_turns and f"n_turns >= {filters.min_turns}",
        "max_turns": filters.max_turns and f"n_turns <= {filters.max_turns}",
        "min_chars": filters.min_chars and f"n_chars >= {filters.min_chars}",
        "max_chars": filters.max_chars and f"n_chars <= {filters.max_chars}",
    }
    cases = [f"WHEN ({sql}) IS NOT TRUE THEN {_text(name)}" for name, sql in conditions.items() if sql]
    return f"CASE {' '.join(cases)} END" if cases else "NULL::VARCHAR"


def _step(junk: Mapping[str, str]) -> str:
    """SQL for the name of the first step that calls a record junk, NULL if none does; what is unknown is no junk."""
    cases = [f"WHEN ({sql}) IS FALSE THEN {_text(name)}" for name, sql in junk.items()]
    return f"CASE {' '.join(cases)} END" if cases else "NULL::VARCHAR"
