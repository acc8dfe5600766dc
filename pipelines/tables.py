"""The report's tables, each with the line of DuckDB that computes it again from the files of the build."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.report import figures_query

_AMOUNTS = ("samples", "images", "frames", "tiles", "turns", "text_tokens", "image_tokens", "tokens", "target_tokens")
_LENGTHS = ("tokens_p50", "tokens_p90", "tokens_p99", "tokens_max")
_INDEX = "'index.parquet'"
_NUMBER = re.compile(r"[\d,.%]*")


@dataclass(frozen=True, slots=True)
class Table:
    """A table on the page; `query` gives the numbers in its columns, those that it names or all of them, row by row."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    query: str
    about: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Of each column, whether it holds numbers."""
        cells = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        return tuple(all(_NUMBER.fullmatch(cell) for cell in column) for column in cells)


def headline_query(sequence_length: int) -> str:
    """Computes the numbers at the top of the page again."""
    return (
        "SELECT count(*) AS samples, sum(n_images) AS images, sum(n_tokens) AS tokens,"
        " sum(n_target_tokens) AS target_tokens, round(sum(size) / 1e6, 1) AS megabytes,"
        f" ceil(sum(n_tokens) / {int(sequence_length)})::BIGINT AS sequences_at_least,"
        f" (SELECT count(*) FROM {_ledger('uid')}) AS rejected FROM {_INDEX}"
    )


def tables(manifest: Mapping[str, Any], found: Mapping[str, Any]) -> list[Table]:
    """All tables of a build.

    Args:
        manifest: of the build.
        found: its statistics.
    """
    figures = [_figures(found, by) for by in ("component", "source")]
    left_out = [*_passed_over(manifest), *_dropped(manifest)]
    return [_read(manifest), *left_out, *_drawn(manifest), *figures, _mix(found), _licences(found)]


def _in_manifest(part: str, names: tuple[str, ...]) -> str:
    """A query of the manifest's numbers for each source or component."""
    values = ", ".join(f"(value->>'{name}')::BIGINT AS {name}" for name in names)
    return f"SELECT key, {values} FROM read_text('manifest.json') AS m, json_each(m.content, '$.{part}')"


def _ledger(column: str) -> str:
    """rejects.jsonl as a table, also if it is empty."""
    return f"read_json('rejects.jsonl', columns = {{{column}: 'VARCHAR'}})"


def _read(manifest: Mapping[str, Any]) -> Table:
    """Nothing vanishes: what was read …"""
    names = ("records", "usable", "rejected")
    rows = [[name, *(number(source[key]) for key in names)] for name, source in manifest["sources"].items()]
    query = _in_manifest("sources", names)
    return Table("sources", "Read", ("source", *names), rows, query, "records = usable + rejected")


def _drawn(manifest: Mapping[str, Any]) -> list[Table]:
    """… drawn, kept and rejected."""
    components = manifest["components"]
    names = ("pool", "asked", "drawn", "kept", "rejected", "short")
    rows = [[name, *(number(c[key]) for key in names)] for name, c in components.items()]
    query = (
        "SELECT key, pool, asked, coalesce(kept, 0) + coalesce(rejected, 0) AS drawn, coalesce(kept, 0) AS kept,"
        " coalesce(rejected, 0) AS rejected, asked - coalesce(kept, 0) AS short"
        f" FROM ({_in_manifest('components', ('pool', 'asked'))})"
        f" LEFT JOIN (SELECT component AS key, count(*) AS kept FROM {_INDEX} GROUP BY 1) USING (key)"
        f" LEFT JOIN (SELECT component AS key, count(*) AS rejected FROM {_ledger('component')} GROUP BY 1) USING (key)"
    )
    drawn = Table(
        "components", "Drawn", ("component", *names), rows, query, "asked = kept + short, drawn = kept + rejected"
    )
    reasons = sorted((reason, name, n) for name, c in components.items() for reason, n in c["rejects"].items())
    query = (
        "SELECT reason, component, count(*) AS records FROM"
        " read_json('rejects.jsonl', columns = {reason: 'VARCHAR', component: 'VARCHAR'})"
        " GROUP BY reason, component ORDER BY reason, component"
    )
    rows = [[reason, name, number(n)] for reason, name, n in reasons]
    rejected = Table("reasons", "Rejected", ("reason", "component", "records"), rows, query)
    return [drawn, rejected] if rows else [drawn]


def _passed_over(manifest: Mapping[str, Any]) -> list[Table]:
    """What components do not select, and copies and what benchmarks hold, if anything."""
    components = manifest["components"].items()
    found = sorted((reason, name, n) for name, c in components for reason, n in c["filtered"].items())
    if not found:
        return []
    rows = [[reason, name, number(n)] for reason, name, n in found]
    query = (
        "SELECT r.key AS reason, c.key AS component, r.value::BIGINT AS records FROM read_text('manifest.json') AS m,"
        " json_each(m.content, '$.components') AS c, json_each(c.value, '$.filtered') AS r ORDER BY reason, component"
    )
    about = "each by the first that applies; overlaps.jsonl names both sides of what is contaminated or a duplicate"
    return [Table("filtered", "Passed over before the draw", ("reason", "component", "records"), rows, query, about)]


def _dropped(manifest: Mapping[str, Any]) -> list[Table]:
    """What the recipe's filters took out before the draw, if anything."""
    found = {name: c.get("dropped", {}) for name, c in manifest["components"].items()}
    steps = sorted({step for dropped in found.values() for step in dropped})
    if not steps:
        return []
    rows = []
    for name, dropped in found.items():
        pool, total = manifest["components"][name]["pool"], sum(dropped.values())
        share = f"{total / (pool + total):.1%}" if total else "0.0%"
        counts = [number(n) for n in (pool + total, *(dropped.get(step, 0) for step in steps), pool)]
        rows.append([name, *counts, share])
    columns = ("component", "selected", *steps, "pool", "dropped")
    about = "selected = pool + the sum of what each step drops; filters of pictures are among the rejects below"
    query = (
        "SELECT key, pool + dropped AS selected, pool, printf('%.1f%%', 100 * dropped / (pool + dropped)) AS dropped"
        " FROM (SELECT key, (value->>'pool')::BIGINT AS pool, list_sum(map_values((value->'dropped')"
        "::MAP(VARCHAR, BIGINT)))::BIGINT AS dropped"
        " FROM read_text('manifest.json') AS m, json_each(m.content, '$.components'))"
    )
    return [Table("dropped", "Dropped by filters", columns, rows, query, about)]


def _figures(found: Mapping[str, Any], by: str) -> Table:
    names = (*_AMOUNTS, *_LENGTHS)
    rows = [[name, *(number(row[key]) for key in names)] for name, row in found[f"by_{by}"].items()]
    rows.append(["all", *(number(found["total"][key]) for key in names)])
    query = figures_query(_INDEX, by)
    return Table(by, f"Kept, by {by}", (by, *map(words, names)), rows, query, "percentiles are tokens a sample")


def _mix(found: Mapping[str, Any]) -> Table:
    rows = []
    for name, row in found["against_paper"].items():
        paper_share = "" if row["paper_share"] is None else f"{row['paper_share']:.1%}"
        counts = [number(row["asked"]), number(row["kept"]), f"{row['share']:.1%}", number(row["paper"])]
        rows.append([name, *counts, paper_share])
    query = (
        "SELECT component, count(*) AS kept, printf('%.1f%%', 100 * count(*) / sum(count(*)) OVER ()) AS share"
        f" FROM {_INDEX} GROUP BY component ORDER BY component"
    )
    columns = ("component", "asked", "kept", "share", "paper", "paper's share")
    return Table("mix", "Mix, asked and realised", columns, rows, query, "the paper's from its recipe in this package")


def _licences(found: Mapping[str, Any]) -> Table:
    rows = [
        [name, row["hub_id"], row["licence"], "yes" if row["non_commercial"] else "", number(row["samples"])]
        for name, row in found["licences"].items()
    ]
    query = f"SELECT source, count(*) AS samples FROM {_INDEX} GROUP BY source ORDER BY source"
    return Table("licences", "Licences", ("source", "hub id", "licence", "non-commercial", "samples"), rows, query)


def words(name: str) -> str:
    """A figure's name as people say it."""
    return name.replace("tokens_p", "p").replace("tokens_max", "longest").replace("_", " ")


def number(value: int | None) -> str:
    """A number with its thousands apart; nothing for None."""
    return "" if value is None else f"{value:,}"
