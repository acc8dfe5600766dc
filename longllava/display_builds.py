"""Finished builds as tables: what is in them, and how they compare."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from longllava.commands.terminal import printable

Statistics = Mapping[str, Any]

_LISTED = 20  # samples that differ

_AMOUNTS = ("samples", "images", "frames", "tiles", "turns", "text_tokens", "image_tokens", "tokens", "target_tokens")
_LENGTHS = ("tokens_p50", "tokens_p90", "tokens_p99", "tokens_max")


def statistics_tables(statistics: Statistics) -> Iterator[Table | str]:
    """All that `longllava stats` says of one build."""
    for by in ("component", "source", "modality"):
        yield _figures(statistics, by)
    yield _lengths(statistics)
    yield _mix(statistics)
    yield _licences(statistics)
    packing = statistics["packing"]
    fill = "" if packing["fill_at_most"] is None else f", at most {packing['fill_at_most']:.1%} full"
    yield (
        f"packed to {packing['sequence_length']:,} tokens: at least {packing['sequences_at_least']:,} sequences{fill};"
        f" {packing['over_long']:,} samples are longer than that. `longllava pack` says what packing makes of it."
    )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in statistics["rejects"].items())
    yield f"rejected: {reasons or 'none'}"


def side_by_side(results: Sequence[Statistics]) -> Table:
    """Several builds, one a column."""
    table = Table("", title="side by side", title_justify="left")
    for result in results:
        table.add_column(result["recipe"], justify="right")
    for name in (*_AMOUNTS, *_LENGTHS):
        table.add_row(_heading(name), *(_number(result["total"][name]) for result in results))
    table.add_row("MB", *(f"{result['total']['bytes'] / 1e6:,.1f}" for result in results))
    table.add_row("rejected", *(f"{sum(result['rejects'].values()):,}" for result in results))
    table.add_row("sequences at least", *(f"{result['packing']['sequences_at_least']:,}" for result in results))
    return table


def _figures(statistics: Statistics, by: str) -> Table:
    """Amounts of each component, source or modality, and its share of the samples and of the tokens."""
    table = Table(title=f"{statistics['recipe']} by {by}", title_justify="left")
    table.add_column(by, no_wrap=True)
    for name in (*_AMOUNTS, "of samples", "of tokens", "MB"):
        table.add_column(_heading(name), justify="right")
    for name, row in statistics[f"by_{by}"].items():
        table.add_row(name, *_cells(row, row["share_samples"], row["share_tokens"]))
    total = statistics["total"]
    table.add_section()
    table.add_row("all", *_cells(total, float(total["samples"] > 0), float(total["tokens"] > 0)))
    return table


def _cells(row: Mapping[str, Any], of_samples: float, of_tokens: float) -> list[str]:
    amounts = [_number(row[name]) for name in _AMOUNTS]
    return [*amounts, f"{of_samples:.1%}", f"{of_tokens:.1%}", f"{row['bytes'] / 1e6:,.1f}"]


def _lengths(statistics: Statistics) -> Table:
    table = Table(title="tokens a sample", title_justify="left")
    table.add_column("component", no_wrap=True)
    for name in ("50 %", "90 %", "99 %", "longest"):
        table.add_column(name, justify="right")
    for name, row in {**statistics["by_component"], "all": statistics["total"]}.items():
        table.add_row(name, *(_number(row[length]) for length in _LENGTHS))
    return table


def _mix(statistics: Statistics) -> Table:
    """As asked and as realised, beside the paper's counts where the recipe is one of the paper's."""
    table = Table(title="mix", title_justify="left")
    table.add_column("component", no_wrap=True)
    for name in ("asked", "kept", "share", "paper", "paper's share"):
        table.add_column(name, justify="right")
    for name, row in statistics["against_paper"].items():
        paper = "" if row["paper_share"] is None else f"{row['paper_share']:.1%}"
        table.add_row(
            name, f"{row['asked']:,}", f"{row['kept']:,}", f"{row['share']:.1%}", _number(row["paper"]), paper
        )
    return table


def _licences(statistics: Statistics) -> Table:
    table = Table("source", "hub id", "licence", "non-commercial", title="licences", title_justify="left")
    table.add_column("samples", justify="right")
    for name, row in statistics["licences"].items():
        no_sale = "yes" if row["non_commercial"] else ""
        table.add_row(name, row["hub_id"], row["licence"], no_sale, f"{row['samples']:,}")
    return table


def _recipe_value(value: Any) -> str:
    """A value of a recipe; a whole component, which only one of them has, without what is in it."""
    return "" if value is None else "there" if isinstance(value, Mapping) else printable(str(value))


def _heading(name: str) -> str:
    return name.replace("_", " ").replace("p50", "50 %").replace("p90", "90 %").replace("p99", "99 %")


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def differences(found: Mapping[str, Any]) -> Iterator[Table | Text]:
    """What `longllava diff` says: recipe keys, counts by cause, and the first samples."""
    if found["same"]:
        yield Text("the same")
        return
    if found["recipe"]:
        table = Table("recipe", "first", "second")
        for key, values in found["recipe"].items():
            table.add_row(printable(key), *(Text(_recipe_value(value)) for value in values))
        yield table
    counts = Table("component", "change", "cause")
    counts.add_column("samples", justify="right")
    for component, changes in found["counts"].items():
        for change, causes in changes.items():
            for cause, number in causes.items():
                counts.add_row(component, change, cause, f"{number:,}")
    yield counts if found["counts"] else Text("every sample is the same; the shards' bytes are not")
    listed = found["differences"][:_LISTED]
    if listed:
        samples = Table("sample", "component", "change", "cause", title="samples", title_justify="left")
        for row in listed:
            samples.add_row(*(Text(printable(row[key])) for key in ("id", "component", "change", "cause")))
        yield samples
    if len(found["differences"]) > _LISTED:
        yield Text(f"and {len(found['differences']) - _LISTED:,} more; --json lists all")


def retried(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """What became of a build's rejected records when they were tried again."""
    for title, key in (("can be used now", "mended"), ("are rejected for something else now", "changed")):
        verdicts = result[key]
        if not verdicts:
            continue
        table = Table(title=f"{len(verdicts):,} of {result['tried']:,} {title}", title_justify="left")
        for name in ("record", "component", "was", "now"):
            table.add_column(name, overflow="fold")
        for verdict in verdicts[:_LISTED]:
            now = f"{verdict['now']}: {verdict['now_detail']}" if verdict["now"] else ""
            was = f"{verdict['reason']}: {verdict['detail']}"
            table.add_row(*(Text(printable(value)) for value in (verdict["uid"], verdict["component"], was, now)))
        if len(verdicts) > _LISTED:
            table.add_row(f"… {len(verdicts) - _LISTED:,} more; --json lists all", "", "", "")
        yield table
    failing = ", ".join(f"{count:,} {reason}" for reason, count in result["failing"].items())
    yield f"{result['tried']:,} records tried again; still rejected: {failing or 'none'}"
    if "shards" in result:
        shards = result["shards"]
        yield f"{shards['rewritten']:,} shards made anew, {shards['kept']:,} as they were"
