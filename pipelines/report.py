"""What a finished build holds, from its manifest and index alone; and single samples out of its shards.

Every figure is one aggregate over index.parquet; `FIGURES` has them as SQL, so that anybody can compute them again.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import recipes
from pipelines.opened import OpenBuild, Stored, fetched
from pipelines.sources.registry import SOURCES
from recipes.schema import load_recipe

FIGURES: Mapping[str, str] = {
    "samples": "count(*)",
    "images": "coalesce(sum(n_images), 0)::BIGINT",
    "frames": "coalesce(sum(n_images) FILTER (modality = 'video'), 0)::BIGINT",
    "tiles": "coalesce(sum(n_images - 1) FILTER (modality = 'subimage'), 0)::BIGINT",
    "turns": "coalesce(sum(n_turns), 0)::BIGINT",
    "text_tokens": "coalesce(sum(n_text_tokens), 0)::BIGINT",
    "image_tokens": "coalesce(sum(n_tokens - n_text_tokens), 0)::BIGINT",
    "tokens": "coalesce(sum(n_tokens), 0)::BIGINT",
    "target_tokens": "coalesce(sum(n_target_tokens), 0)::BIGINT",
    "bytes": "coalesce(sum(size), 0)::BIGINT",
    "tokens_p50": "quantile_disc(n_tokens, 0.5)",
    "tokens_p90": "quantile_disc(n_tokens, 0.9)",
    "tokens_p99": "quantile_disc(n_tokens, 0.99)",
    "tokens_max": "max(n_tokens)",
}
"""Figures of any set of samples, as SQL over index.parquet. `tiles` leaves out each sub-image sample's whole picture;
percentiles are lengths of samples that exist, null where there are none."""

GROUPINGS = ("component", "source", "modality")
_SELECT = ", ".join(f"{sql} AS {name}" for name, sql in FIGURES.items())


def figures_query(index: str, by: str | None = None) -> str:
    """The DuckDB line that computes all figures of a build's index, or of each group of its rows."""
    if by is None:
        return f"SELECT {_SELECT} FROM {index}"
    return f"SELECT {by}, {_SELECT} FROM {index} GROUP BY {by} ORDER BY {by}"


def statistics(build: str | Path | OpenBuild) -> dict[str, Any]:
    """Counts, shares and length percentiles of a build, in all and by component, source and modality.

    Reads the manifest and, of the index, the columns that it needs.

    Args:
        build: a folder, an fsspec URL or an opened build.

    Raises:
        BuildError: if it is no finished build.
    """
    opened = build if isinstance(build, OpenBuild) else OpenBuild(build)
    manifest = opened.manifest
    length = manifest["recipe"]["sequence_length"]
    with opened.samples() as db:
        (total,) = fetched(db, figures_query("samples"))
        grouped = {by: _shared(fetched(db, figures_query("samples", by)), by, total) for by in GROUPINGS}
        (over_long,) = fetched(db, f"SELECT count(*) AS samples FROM samples WHERE n_tokens > {int(length)}")
    return {
        "build": opened.url,
        "recipe": manifest["recipe"]["name"],
        "sequence_length": length,
        "total": total,
        **{f"by_{by}": rows for by, rows in grouped.items()},
        "packing": _packing(total["tokens"], length, over_long["samples"]),
        "components": manifest["components"],
        "against_paper": against_paper(manifest, grouped["component"]),
        "sources": {
            name: {key: source[key] for key in ("hub_id", "licence", "records", "usable", "rejected")}
            for name, source in manifest["sources"].items()
        },
        "licences": licences(manifest, grouped["source"]),
        "rejects": _rejects_by_reason(manifest),
    }


def _shared(rows: list[dict[str, Any]], by: str, total: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by their group, each with its share of all samples and of all tokens."""
    for row in rows:
        row["share_samples"] = row["samples"] / max(total["samples"], 1)
        row["share_tokens"] = row["tokens"] / max(total["tokens"], 1)
    return {row.pop(by): row for row in rows}


def _packing(tokens: int, length: int, over_long: int) -> dict[str, Any]:
    """Bounds that no packer can beat; `longllava pack` says what one really makes of the build."""
    sequences = -(-tokens // length)
    return {
        "sequence_length": length,
        "sequences_at_least": sequences,
        "fill_at_most": tokens / (sequences * length) if sequences else None,
        "over_long": over_long,
    }


def against_paper(manifest: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each component as asked and as realised, beside what the shipped recipe of that name takes from the paper."""
    shipped = Path(recipes.__path__[0]) / f"{manifest['recipe']['name']}.yaml"
    stated = load_recipe(shipped).components if shipped.is_file() else {}
    counts = {name: c.count for name, c in stated.items() if isinstance(c.count, int)}
    return {
        name: {
            "asked": component["asked"],
            "kept": component["kept"],
            "share": found.get(name, {}).get("share_samples", 0.0),
            "paper": counts.get(name),
            "paper_share": counts[name] / sum(counts.values()) if name in counts else None,
        }
        for name, component in manifest["components"].items()
    }


def licences(manifest: Mapping[str, Any], by_source: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The licence of every source that a sample of the build comes from, replayed ones too, and what it covers.

    As the manifest states it or, for a source that only earlier builds have read, as its adapter does.
    """
    found = {}
    for name, row in by_source.items():
        stated, adapter = manifest["sources"].get(name, {}), SOURCES.get(name)
        licence = stated.get("licence") or (adapter.licence if adapter else "not stated")
        found[name] = {
            "hub_id": stated.get("hub_id") or (adapter.hub_id if adapter else ""),
            "licence": licence,
            "non_commercial": adapter.non_commercial if adapter else "-NC" in licence.upper(),
            "samples": row["samples"],
            "images": row["images"],
            "tokens": row["tokens"],
        }
    return found


def non_commercial(found: Mapping[str, Any]) -> str:
    """How much of a build its sources forbid to sell, in words; empty if nothing."""
    names = [name for name, row in found["licences"].items() if row["non_commercial"]]
    samples = sum(found["licences"][name]["samples"] for name in names)
    if not samples:
        return ""
    share = samples / found["total"]["samples"]
    return (
        f"{samples:,} samples ({share:.1%}) come from sets whose licence excludes commercial use: {', '.join(names)}."
    )


def _rejects_by_reason(manifest: Mapping[str, Any]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for component in manifest["components"].values():
        counts.update(component["rejects"])
    return dict(sorted(counts.items()))


def fair_share(counts: Iterable[int], most: int) -> int:
    """How many of each kind can be taken, all of it where there are fewer, so that `most` are taken in all."""
    known = list(counts)
    return max((n for n in range(1, most + 1) if sum(min(n, count) for count in known) <= most), default=1)


def rejects(build: str | Path) -> Iterator[dict[str, Any]]:
    """The records that were drawn and not written."""
    yield from OpenBuild(build).rejects()


def stored_samples(
    build: str | Path, keys: Sequence[str] = (), *, component: str | None = None, limit: int = 5
) -> Iterator[Stored]:
    """Samples by key or id; without keys the first few, of one component if given (shards are shuffled anyway).

    Raises:
        UsageError: if a key, or the component, is not in the build.
    """
    opened = OpenBuild(build)
    opened.refuse_unknown_component(component)
    if keys:
        rows = opened.by_key(keys)
    else:
        where = "component = $1" if component else "$1 IS NULL"
        rows = opened.rows(f"FROM samples WHERE {where} ORDER BY key LIMIT {int(limit)}", [component])
    for row in rows:
        yield opened.stored(row)
