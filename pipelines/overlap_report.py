"""`longllava duplicates`: what a recipe would pass over, found without building it."""

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb

from formats.tokens import ChatTokenizer
from pipelines import overlaps
from pipelines.build import Request, earlier_builds, locations, refuse_changed_origins
from pipelines.duplicates import Curator
from pipelines.executor import Executor
from pipelines.ingest import ingested
from pipelines.opened import fetched
from pipelines.plan import Planner
from pipelines.progress import Progress
from pipelines.sql import parquet


def overlap_report(request: Request, progress: Progress, groups: int = 10) -> dict[str, Any]:
    """Looks for duplicates and benchmark hits among all that a recipe can draw.

    Args:
        request: the recipe, with `duplicates` and `decontaminate` as they are to be looked for.
        progress: who hears of it.
        groups: how many groups of duplicates, and how many benchmark hits, to show.

    Returns:
        Of each component the records that it can draw and those of them to pass over, by reason; the groups, largest
        first, with every member; and the hits with both sides, and how many there are by benchmark.
    """
    tokenizer = ChatTokenizer.load(request.recipe.tokenizer, request.recipe_folder) if _draws_again(request) else None
    earlier = earlier_builds(request, tokenizer) if tokenizer else {}
    prints = overlaps.prints_of(request.recipe, request.recipe_folder)
    shared = request.catalog if request.address else None  # workers on other machines see no temporary folder of ours
    with (
        Executor(request.workers, request.address) as executor,
        ingested(locations(request, earlier), request.catalog, executor, progress) as catalogs,
        tempfile.TemporaryDirectory(prefix="longllava-", dir=shared) as name,
    ):
        folder = Path(name)
        refuse_changed_origins(request.recipe, catalogs, earlier)
        with closing(Planner(request.recipe, catalogs, earlier, folder / "plan")) as planner:
            curator = Curator(catalogs, folder, executor, progress)
            found = overlaps.find(request.recipe, planner, curator, earlier, prints, folder / "plan")
            pools = {name: pool.size for name, pool in planner.pools.items()}
        return {
            "recipe": request.recipe.name,
            "duplicates": request.recipe.duplicates,
            "components": _by_component(pools, found.passed_over),
            **(_groups(found.duplicates, groups) if found.duplicates.exists() else {"groups": 0, "largest": []}),
            **(_hits(found.hits, groups) if prints else {"benchmarks": {}, "hits": []}),
        }


def _draws_again(request: Request) -> bool:
    recipe = request.recipe
    return bool(recipe.apart_from) or any(not component.source for component in recipe.components.values())


def _by_component(pools: dict[str, int], passed_over: Path) -> dict[str, dict[str, int]]:
    rows = _rows(f"SELECT component, reason, count(*) AS n FROM {parquet([passed_over])} GROUP BY ALL ORDER BY ALL")
    found = {name: {"records": size} for name, size in pools.items()}
    for row in rows:
        found[row["component"]][row["reason"]] = row["n"]
    return found


def _groups(duplicates: Path, most: int) -> dict[str, Any]:
    table = parquet([duplicates])
    (total,) = _rows(f"SELECT count(DISTINCT grouped) AS groups FROM {table}")
    rows = _rows(
        f"""SELECT kept, kept_component, list({{'uid': uid, 'component': component, 'exact': exact}}
                   ORDER BY component, uid) FILTER (uid != kept OR component != kept_component) AS copies
            FROM {table} GROUP BY ALL ORDER BY len(copies) DESC, kept LIMIT {int(most)}"""
    )
    return {**total, "largest": rows}


def _hits(hits: Path, most: int) -> dict[str, Any]:
    table = parquet([hits])
    counts = _rows(
        f"""SELECT benchmark, count(DISTINCT item) AS items, count(DISTINCT uid) AS records
            FROM {table} GROUP BY benchmark ORDER BY benchmark"""
    )
    rows = _rows(f"FROM {table} ORDER BY benchmark, item, uid, how LIMIT {int(most)}")
    return {"benchmarks": {row.pop("benchmark"): row for row in counts}, "hits": rows}


def _rows(query: str) -> list[dict[str, Any]]:
    with duckdb.connect() as db:
        return fetched(db, query)
