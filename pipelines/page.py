"""report.html: one self-contained page with what a build holds, what it lost, and samples as the model sees them.

No byte of it comes from the network, time or place, and none can make a script run: every text is escaped, and the
page's policy lets only its own two scripts run, by their hashes.
"""

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.charts import Chart, charts, scripts
from pipelines.gallery import Exhibit, draw, exhibit_of
from pipelines.opened import OpenBuild, Stored
from pipelines.report import fair_share, non_commercial, statistics
from pipelines.tables import Table, headline_query, number, tables, words
from pipelines.templating import FOLDER, fill

REPORT = "report.html"
# Bytes; the scripts, plots and tables take 1.1 MB, and a page must stay below 5.
_SAMPLES_SIZE = 2_700_000
_REJECTS_SIZE = 900_000
_MOST_REJECTS = 500
_MOST_DETAIL = 600
_MOST_THUMBNAIL = 12_000
_REJECT_COLUMNS = ("uid", "component", "reason", "detail", "replaced_by")


@dataclass(frozen=True, slots=True)
class View:
    """What the page says of one build."""

    name: str
    description: str
    headline: list[tuple[str, str]]
    query: str
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
        for exhibit in draw(build, _SAMPLES_SIZE // len(builds))
    ]
    rejects = [
        (view.name, reject)
        for view, build in zip(views, builds, strict=True)
        for reject in _some_rejects(build, _MOST_REJECTS // len(builds), _REJECTS_SIZE // len(builds))
    ]
    total = sum(sum(view.statistics["rejects"].values()) for view in views)
    return _page(
        title="Build report: " + ", ".join(view.name for view in views),
        views=views,
        exhibits=exhibits,
        rejects=rejects,
        rejects_note="Every record that was drawn and could not be used, and what took its place."
        " Pictures that can be seen all the same are shown for a few of each reason."
        + (f" These are {len(rejects):,} of {total:,}; rejects.jsonl has all." if total > len(rejects) else ""),
    )


def _some_rejects(build: OpenBuild, most: int, budget: int) -> Iterator[dict[str, Any]]:
    """Rejected records of each component and reason, the first of each, as many as fit into `budget` bytes."""
    counts = {
        (name, reason): count
        for name, component in build.manifest["components"].items()
        for reason, count in component["rejects"].items()
    }
    share = fair_share(counts.values(), most)
    wanted = Counter({kind: min(share, count) for kind, count in counts.items()})
    for reject in build.rejects() if counts else ():
        kind = reject["component"], reject["reason"]
        if not wanted[kind]:
            continue
        wanted[kind] -= 1
        shown = {name: str(reject[name] or "")[:_MOST_DETAIL] for name in _REJECT_COLUMNS}
        thumbnail = str(reject.get("thumbnail") or "")
        shown["thumbnail"] = thumbnail if len(thumbnail) <= _MOST_THUMBNAIL else ""
        budget -= sum(len(html.escape(text).encode("utf-8", "replace")) for text in shown.values())
        if budget < 0:
            return
        yield shown
        if not any(wanted.values()):
            return


def samples_page(build: OpenBuild, samples: Sequence[Stored]) -> bytes:
    """A page of just some samples."""
    licences = statistics(build)
    exhibits = [exhibit_of(sample) for sample in samples]
    return _page(
        title=f"Samples of {build.name}",
        views=[],
        exhibits=[(build.name, exhibit, _licence(licences, exhibit)) for exhibit in exhibits],
        rejects=[],
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
        thumbnails=any(reject["thumbnail"] for _, reject in values["rejects"]),
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
    headline = [(words(name), number(total[name])) for name in ("samples", "images", "tokens", "target_tokens")]
    headline += [
        ("megabytes", f"{total['bytes'] / 1e6:,.1f}"),
        (f"sequences of {packing['sequence_length']:,}", f"≥ {packing['sequences_at_least']:,}"),
        ("rejected", number(sum(found["rejects"].values()))),
    ]
    return View(
        name=build.name,
        description=build.manifest["recipe"].get("description", ""),
        headline=headline,
        query=headline_query(packing["sequence_length"]),
        non_commercial=non_commercial(found),
        tables=tables(build.manifest, found),
        charts=charts(build),
        statistics=found,
    )
