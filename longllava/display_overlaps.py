"""What `duplicates` and `decontaminate` show."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table


def overlap_tables(found: Mapping[str, Any]) -> Iterator[Table | str]:
    """What a recipe would pass over: by component, then groups, then benchmark hits."""
    table = Table(title=f"{found['recipe']}: {found['duplicates']} duplicates")
    for column in ("component", "can be drawn", "duplicate", "contaminated"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for name, counts in found["components"].items():
        table.add_row(name, *(f"{counts.get(key, 0):,}" for key in ("records", "duplicate", "contaminated")))
    yield table
    if found["largest"]:
        yield _groups(found)
    for benchmark, counts in found["benchmarks"].items():
        yield f"{benchmark}: {counts['records']:,} records have {counts['items']:,} of its items"
    if found["hits"]:
        yield _hits(found["hits"])


def _groups(found: Mapping[str, Any]) -> Table:
    table = Table(title=f"the {len(found['largest'])} largest of {found['groups']:,} groups")
    for column in ("kept", "copies", "such as"):
        table.add_column(column, justify="right" if column == "copies" else "left", overflow="fold")
    for group in found["largest"]:
        copy = group["copies"][0]
        kind = "exact" if copy["exact"] else "near"
        table.add_row(
            f"{group['kept_component']}: {group['kept']}",
            f"{len(group['copies']):,}",
            f"{copy['component']}: {copy['uid']} ({kind})",
        )
    return table


def _hits(hits: list[dict[str, Any]]) -> Table:
    table = Table(title="benchmark items and records that have them")
    for column in ("item", "record", "by", "what"):
        table.add_column(column, overflow="fold")
    for hit in hits:
        looks = f"{hit['path']} like {hit['other']} ({hit['bits']} of 256 bits differ)"
        what = looks if hit["how"] == "looks" else hit["matched"]
        table.add_row(f"{hit['benchmark']} {hit['item']}", hit["uid"], hit["how"], what)
    return table


def benchmarks_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What a fingerprint file holds of each benchmark."""
    table = Table(title="benchmarks")
    for column in ("benchmark", "questions", "hits by themselves", "pictures and clips", "could not be read"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for name, row in found.items():
        missing = ", ".join(f"{count:,} {reason}" for reason, count in row["missing"].items())
        table.add_row(name, f"{row['questions']:,}", f"{row['alone']:,}", f"{row['media']:,}", missing or "0")
    return table
