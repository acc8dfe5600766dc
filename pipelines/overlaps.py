"""What a recipe passes over before it draws: records that stand in benchmarks, and duplicates of other records.

Contaminated records go first, so that no copy is dropped in favour of one. The ledger of a build, overlaps.jsonl, has
both sides of each: the record and what is kept instead of it, or the benchmark's item.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from formats.manifest import INDEX, file_sha256, temporary
from pipelines.benchmark_prints import read_prints
from pipelines.contamination import write_hits
from pipelines.duplicates import Curator, members, write_duplicates
from pipelines.plan import EarlierBuild, Planner
from pipelines.sql import parquet, text
from recipes.schema import Recipe

LEDGER = "overlaps.jsonl"
_FILE = "overlaps.parquet"


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Parquet files of what was found: members of groups of duplicates, benchmark hits, and what is passed over."""

    duplicates: Path
    hits: Path
    passed_over: Path


def wanted(recipe: Recipe) -> bool:
    """Whether a recipe passes over anything."""
    return recipe.duplicates != "off" or recipe.decontaminate is not None


def prints_of(recipe: Recipe, folder: Path) -> Path | None:
    """Where a recipe's benchmark fingerprints are: named from here or from the recipe's folder.

    Raises:
        UsageError: if they cannot be used.
    """
    if recipe.decontaminate is None:
        return None
    named = Path(recipe.decontaminate)
    path = named if named.exists() else folder / named
    read_prints(str(path))
    return path.resolve()


def planned(
    recipe: Recipe,
    curator: Curator,
    earlier: Mapping[str, EarlierBuild],
    prints: Path | None,
    folder: Path,
) -> Planner:
    """A planner that passes over what the recipe says.

    What was passed over is kept in `folder`, so that a build goes on as it began.

    Args:
        recipe: what to plan.
        curator: who looks; its catalogs are all that the recipe's records are in.
        earlier: builds that it draws from or keeps apart from.
        prints: benchmark fingerprints.
        folder: of the planner.
    """
    if not wanted(recipe):
        return Planner(recipe, curator.catalogs, earlier, folder)
    file = folder / _FILE
    if not file.exists():
        with closing(Planner(recipe, curator.catalogs, earlier, folder / "before")) as before:
            find(recipe, before, curator, earlier, prints, folder)
    return Planner(recipe, curator.catalogs, earlier, folder, file)


def sources_of(recipe: Recipe, earlier: Mapping[str, EarlierBuild]) -> set[str]:
    """The sources that a recipe needs, those that its sub-images go back to and its copies are looked for in, too."""
    names = {component.source for component in recipe.components.values() if component.source}
    origins = {component.subimage for component in recipe.components.values() if component.subimage}
    if wanted(recipe):
        origins |= {*recipe.apart_from} | {c.replay for c in recipe.components.values() if c.replay}
    for name in origins:
        index = pq.read_table(earlier[name].folder / INDEX, columns=["source"])
        names |= set(index["source"].unique().to_pylist())
    return names


def find(
    recipe: Recipe,
    planner: Planner,
    curator: Curator,
    earlier: Mapping[str, EarlierBuild],
    prints: Path | None,
    folder: Path,
) -> Overlaps:
    """Looks for duplicates and benchmark hits among what a planner can draw, and writes them below `folder`."""
    found = Overlaps(folder / "duplicates.parquet", folder / "hits.parquet", folder / _FILE)
    drawn = f"({members(planner)})"
    parts = []
    clean = f"(FROM {drawn})"
    if prints is not None:
        write_hits(prints, curator.catalogs, drawn, curator.folder, curator.executor, curator.progress, found.hits)
        parts.append(_contaminated(found.hits, drawn))
        clean = f"(FROM {drawn} ANTI JOIN {parquet([found.hits])} USING (uid))"
    if recipe.duplicates != "off":
        exempt = [name for name, c in recipe.components.items() if not c.source and c.origin in recipe.apart_from]
        among = f"SELECT * FROM {clean} WHERE component NOT IN ({', '.join(map(text, ['', *exempt]))})"
        kept = [among, *(_built(earlier[name]) for name in recipe.apart_from)]
        write_duplicates(curator, recipe.duplicates, " UNION ALL ".join(kept), found.duplicates)
        parts.append(_copies(found.duplicates, recipe))
    with duckdb.connect() as db, temporary(found.passed_over) as name:
        db.execute(
            f"""COPY (SELECT component, uid, reason, detail FROM ({" UNION ALL ".join(parts)})
                ORDER BY component, uid) TO {text(str(name))} (FORMAT parquet, COMPRESSION zstd)"""
        )
    return found


def _built(build: EarlierBuild) -> str:
    """The samples of an earlier build as members that were drawn before all others."""
    return f"""SELECT DISTINCT id AS uid, {text("build " + build.name)} AS component, -1 AS position, -1.0 AS draw
               FROM {parquet([build.folder / INDEX])}"""


def _contaminated(hits: Path, drawn: str) -> str:
    columns = ("benchmark", "item", "how", "matched", "path", "other", "bits")
    detail = "{" + ", ".join(f"'{column}': {column}" for column in columns) + "}"
    return f"""SELECT component, uid, 'contaminated' AS reason, detail FROM {drawn} JOIN (
                   SELECT uid, to_json(first({detail} ORDER BY how, bits, benchmark, item)) AS detail
                   FROM {parquet([hits])} GROUP BY uid) USING (uid)"""


def _copies(duplicates: Path, recipe: Recipe) -> str:
    own = ", ".join(map(text, recipe.components))
    detail = "{'kept': kept, 'kept_component': kept_component, 'exact': exact}"
    return f"""SELECT component, uid, 'duplicate' AS reason, to_json({detail}) AS detail FROM {parquet([duplicates])}
               WHERE component IN ({own}) AND (component != kept_component OR uid != kept)"""


def ledger_lines(passed_over: Path) -> Iterator[bytes]:
    """A line of JSON for each record that a build passes over: uid, component, reason, and the other side."""
    with pq.ParquetFile(passed_over) as file:
        for batch in file.iter_batches(1_000):
            for row in batch.to_pylist():
                line = {"uid": row["uid"], "component": row["component"], "reason": row["reason"]}
                yield json.dumps({**line, **json.loads(row["detail"])}, ensure_ascii=False).encode() + b"\n"


def write_ledger(passed_over: Path, out: Path) -> dict[str, Any]:
    """Writes the ledger; returns its name, sha256 and rows for the manifest."""
    rows = 0
    with temporary(out) as name, name.open("wb") as file:
        for line in ledger_lines(passed_over):
            file.write(line)
            rows += 1
    return {"file": out.name, "sha256": file_sha256(out), "rows": rows}
