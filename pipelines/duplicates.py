"""Which records of a recipe are duplicates, over all its components, and which of them is kept.

Every group of duplicates keeps one record: the one that some component comes to first, its rank counted in what the
component asks for; of several, that of the first component in the recipe. So the record that stays is one that the
build is likely to use, and components that want the same records share them by their need.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.manifest import temporary
from pipelines.executor import Executor
from pipelines.fingerprints import media_prints, text_prints
from pipelines.grouping import Mode, group_records, group_texts, opened
from pipelines.ingest import Catalog
from pipelines.plan import Planner, Pool
from pipelines.progress import Progress
from pipelines.sql import parquet, text


@dataclass(frozen=True, slots=True)
class Curator:
    """Who looks for records to pass over.

    Args:
        catalogs: of all sources that are drawn from.
        folder: for what is of no use afterwards.
        executor, progress: who does it, and who hears of it.
    """

    catalogs: Sequence[Catalog]
    folder: Path
    executor: Executor
    progress: Progress


def members(planner: Planner) -> str:
    """All that the components of a recipe can draw, as SQL: uid, component, position, draw."""
    pools = enumerate(planner.pools.values())
    return " UNION ALL ".join(_members_of(planner, pool, position) for position, pool in pools)


def _members_of(planner: Planner, pool: Pool, position: int) -> str:
    return f"""SELECT uid, {text(pool.name)} AS component, {position} AS position,
               rank / {max(pool.asked, 1)} AS draw FROM {parquet([planner.pool_file(pool.name)])}"""


def write_duplicates(curator: Curator, mode: Mode, among: str, out: Path) -> None:
    """Writes the groups of duplicates as Parquet: grouped, uid, component, kept, kept_component, exact.

    One row a member; that which is kept has itself as `kept`. `exact` says whether text and media are the kept one's to
    the byte or pixel.

    Args:
        curator: who looks.
        mode: what collides.
        among: SQL of what to look at, as `members` gives it.
        out: the file.
    """
    texts = text_prints(curator.catalogs, curator.executor, curator.progress)
    work = opened(curator.folder, mode)
    with closing(work.db) as db:
        db.execute(f"CREATE TEMP TABLE members AS {among}")
        db.execute("CREATE TEMP TABLE uids AS SELECT DISTINCT uid FROM members")
        group_texts(work, texts, "uids")
        pictured = "(FROM colliding WHERE n_media > 0)"
        media = media_prints(db, curator.catalogs, pictured, curator.folder, curator.executor, curator.progress)
        group_records(work, media, "refs")
        same = f"(SELECT uid, text_exact, exact FROM records JOIN {_exact_texts(texts)} USING (uid))"
        with temporary(out) as name:
            db.execute(
                f"""COPY (
                    WITH numbered AS (
                        SELECT members.*, coalesce('group ' || grouped, uid) AS grouped
                        FROM members LEFT JOIN groups USING (uid)),
                    ranked AS (
                        SELECT *, count(*) OVER w AS size, first(uid) OVER w AS kept,
                               first(component) OVER w AS kept_component
                        FROM numbered WINDOW w AS (PARTITION BY grouped ORDER BY draw, position, uid
                            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
                        QUALIFY size > 1)
                    SELECT dense_rank() OVER (ORDER BY kept, kept_component) - 1 AS grouped,
                           ranked.uid, component, kept, kept_component, ranked.uid = kept OR coalesce(
                               one.text_exact = other.text_exact AND one.exact = other.exact, false) AS exact
                    FROM ranked LEFT JOIN {same} AS one ON one.uid = ranked.uid
                                LEFT JOIN {same} AS other ON other.uid = kept
                    ORDER BY kept, kept_component, position, uid
                ) TO {text(str(name))} (FORMAT parquet, COMPRESSION zstd)"""
            )


def _exact_texts(texts: Sequence[str]) -> str:
    return f"(SELECT uid, exact AS text_exact FROM {parquet(texts)})"


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What duplicates come to, by component and by where the kept record is."""
    dropped = [row for row in rows if (row["uid"], row["component"]) != (row["kept"], row["kept_component"])]
    by_component: dict[str, int] = {}
    for row in dropped:
        by_component[row["component"]] = by_component.get(row["component"], 0) + 1
    return {
        "groups": len({row["grouped"] for row in rows}),
        "dropped": len(dropped),
        "exact": sum(row["exact"] for row in dropped),
        "across_components": sum(row["component"] != row["kept_component"] for row in dropped),
        "by_component": dict(sorted(by_component.items())),
    }
