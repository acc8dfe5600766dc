"""report.html: one self-contained page with what a build holds, what it lost, and samples as the model sees them.

No byte of it comes from the network, time or place, and none can make a script run: every text is escaped, and the
page's policy lets only its own two scripts run, by their hashes.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipelines.charts import Chart, charts, scripts
from pipelines.gallery import Exhibit, draw, exhibit_of, source_sizes
from pipelines.opened import OpenBuild, Stored
from pipelines.report import figures_query, non_commercial, statistics
from pipelines.templating import FOLDER, fill

REPORT = "report.html"
_PICTURES = 2_800_000  # characters of data URIs; the rest of a page is 1.1 MB
_MOST_REJECTS = 500
_MOST_DETAIL = 600
_AMOUNTS = ("samples", "images", "frames", "tiles", "turns", "text_tokens", "image_tokens", "tokens", "target_tokens")
_LENGTHS = ("tokens_p50", "tokens_p90", "tokens_p99", "tokens_max")


@dataclass(frozen=True, slots=True)
class Table:
    """A table on the page; `query` computes it again."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    about: str = ""
    query: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """What the page says of one build."""

    name: str
    description: str
    headline: list[tuple[str, str]]
    non_commercial: str
    tables: list[Table]
    charts: list[Chart]
    statistics: Mapping[str, Any]


def report_page(builds: Sequence[OpenBuild]) -> bytes:
    """The page of one build, or of several one below the other."""
    views = [_view(build) for build in builds]
    exhibits = [
        (view.name, exhibit, _licence(view.statistics, exhibit))
        for view, build in zip(views, builds, strict=True)
        for exhibit in draw(build, _PICTURES // len(builds))
    ]
    rejects = [
        (view.name, {**reject, "detail": reject["detail"][:_MOST_DETAIL]})
        for view, build in zip(views, builds, strict=True)
        for reject in islice(build.rejects(), _MOST_REJECTS)
    ]
    total = sum(sum(view.statistics["rejects"].values()) for view in views)
    return _page(
        title="Build report: " + ", ".join(view.name for view in views),
        views=views,
        exhibits=exhibits,
        rejects=rejects,
        samples_note="The same few of each component each time, drawn by the recipe's seed. Pictures are smaller here"
        " than in the shards, and long clips and texts are cut; `longllava show KEY --extract` gives all of a sample.",
        rejects_note="Every record that was drawn and could not be used, and what took its place."
        + (f" The first {len(rejects):,} of {total:,}; rejects.jsonl has all." if total > len(rejects) else ""),
    )


def samples_page(build: OpenBuild, samples: Sequence[Stored]) -> bytes:
    """A page of just some samples."""
    licences = statistics(build)
    exhibits = [exhibit_of(sample) for sample in samples]
    return _page(
        title=f"Samples of {build.name}",
        views=[],
        exhibits=[(build.name, exhibit, _licence(licences, exhibit)) for exhibit in exhibits],
        rejects=[],
        samples_note="Pictures are smaller here than in the shards.",
        rejects_note="",
    )


def _page(**values: Any) -> bytes:
    """Fills the page; the policy names the scripts by their hashes."""
    plots = any(view.charts for view in values["views"])
    javascript = (FOLDER / "report.js").read_text(encoding="utf-8")
    vega = scripts() if plots else ""
    hashes = [f"'sha256-{_hash(script)}'" for script in (vega, javascript) if script]
    return fill(
        "report.html.j2",
        **values,
        groups=_groups(values["exhibits"], values["rejects"]),
        css=(FOLDER / "report.css").read_text(encoding="utf-8"),
        javascript=javascript,
        vega=vega,
        plots=plots,
        script_hashes=" ".join(hashes),
        footer="Made by longllava. This file needs no network and no other file.",
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _groups(
    exhibits: Sequence[tuple[str, Exhibit, str]], rejects: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, list[str]]:
    """What the filters offer, in the order of the page."""
    return {
        "builds": _distinct([*(name for name, *_ in exhibits), *(name for name, _ in rejects)]),
        "components": _distinct([exhibit.row["component"] for _, exhibit, _ in exhibits]),
        "modalities": _distinct([exhibit.row["modality"] for _, exhibit, _ in exhibits]),
        "reject_components": _distinct([reject["component"] for _, reject in rejects]),
        "reasons": sorted({reject["reason"] for _, reject in rejects}),
    }


def _distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _licence(found: Mapping[str, Any], exhibit: Exhibit) -> str:
    licence = found["licences"][exhibit.row["source"]]
    return str(licence["licence"]) + (" (non-commercial)" if licence["non_commercial"] else "")


def _view(build: OpenBuild) -> View:
    found = statistics(build)
    total, packing = found["total"], found["packing"]
    headline = [(_words(name), _number(total[name])) for name in ("samples", "images", "tokens", "target_tokens")]
    headline += [
        ("rejected", _number(sum(found["rejects"].values()))),
        ("megabytes", f"{total['bytes'] / 1e6:,.1f}"),
        (f"sequences of {packing['sequence_length']:,}", f"≥ {packing['sequences_at_least']:,}"),
    ]
    return View(
        name=build.name,
        description=build.manifest["recipe"].get("description", ""),
        headline=headline,
        non_commercial=non_commercial(found),
        tables=[*_conservation(build.manifest), *(_figures(found, by) for by in ("component", "source")), *_mix(found)],
        charts=charts(build, source_sizes(build)),
        statistics=found,
    )


def _conservation(manifest: Mapping[str, Any]) -> list[Table]:
    """Nothing vanishes: what was read, drawn, kept and rejected."""
    sources = [
        [name, *(_number(source[key]) for key in ("records", "usable", "rejected"))]
        for name, source in manifest["sources"].items()
    ]
    reasons = sorted({reason for component in manifest["components"].values() for reason in component["rejects"]})
    keys = ("pool", "asked", "drawn", "kept", "rejected", "short")
    components = [
        [name, *(_number(c[key]) for key in keys), *(_number(c["rejects"].get(reason, 0)) for reason in reasons)]
        for name, c in manifest["components"].items()
    ]
    return [
        Table("sources", "Read", ("source", "records", "usable", "rejected"), sources, "records = usable + rejected"),
        *_dropped(manifest),
        Table(
            "components",
            "Drawn",
            ("component", *keys, *reasons),
            components,
            "asked = kept + short, drawn = kept + rejected, rejected = the sum of its reasons",
        ),
    ]


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
        counts = [_number(n) for n in (pool + total, *(dropped.get(step, 0) for step in steps), pool)]
        rows.append([name, *counts, share])
    columns = ("component", "selected", *steps, "pool", "dropped")
    about = "selected = pool + the sum of what each step drops; filters of pictures are among the rejects below"
    return [Table("dropped", "Dropped by filters", columns, rows, about)]


def _figures(found: Mapping[str, Any], by: str) -> Table:
    names = (*_AMOUNTS, *_LENGTHS)
    rows = [[name, *(_number(row[key]) for key in names)] for name, row in found[f"by_{by}"].items()]
    rows.append(["all", *(_number(found["total"][key]) for key in names)])
    query = figures_query("'index.parquet'", by)
    return Table(by, f"Kept, by {by}", (by, *map(_words, names)), rows, "percentiles are tokens a sample", query)


def _mix(found: Mapping[str, Any]) -> list[Table]:
    mix = []
    for name, row in found["against_paper"].items():
        paper_share = "" if row["paper_share"] is None else f"{row['paper_share']:.1%}"
        counts = [_number(row["asked"]), _number(row["kept"]), f"{row['share']:.1%}", _number(row["paper"])]
        mix.append([name, *counts, paper_share])
    licences = [
        [name, row["hub_id"], row["licence"], "yes" if row["non_commercial"] else "", _number(row["samples"])]
        for name, row in found["licences"].items()
    ]
    return [
        Table("mix", "Mix, asked and realised", ("component", "asked", "kept", "share", "paper", "paper's share"), mix),
        Table("licences", "Licences", ("source", "hub id", "licence", "non-commercial", "samples"), licences),
    ]


def _words(name: str) -> str:
    return name.replace("tokens_p", "p").replace("tokens_max", "longest").replace("_", " ")


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
