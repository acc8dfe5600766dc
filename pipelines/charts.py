"""The report's plots, as Vega-Lite specifications made by Altair, and the scripts that draw them without a network.

Altair, because its plots answer to the pointer and the keyboard, are SVG with labels that screen readers can read,
cost 0.9 MB in a page (plotly 4.9 MB) and give the same bytes each time.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipelines.opened import OpenBuild

QUERIES: Mapping[str, str] = {
    "mix": """SELECT component, count(*) AS samples, sum(n_tokens)::BIGINT AS tokens
              FROM {index} GROUP BY component ORDER BY component""",
    "lengths": """SELECT component, floor(2 * log2(n_tokens))::INT AS bin, count(*) AS samples
                  FROM {index} GROUP BY component, bin ORDER BY component, bin""",
    "images": """SELECT modality, n_images AS images, count(*) AS samples
                 FROM {index} WHERE n_images > 0 GROUP BY modality, n_images ORDER BY modality, n_images""",
    "tokens": """SELECT source, sum(n_tokens - n_text_tokens)::BIGINT AS image,
                        sum(n_target_tokens)::BIGINT AS trained_on,
                        sum(n_text_tokens - n_target_tokens)::BIGINT AS other_text
                 FROM {index} GROUP BY source ORDER BY source""",
    "sizes": """SELECT component, floor(4 * log2(width))::INT AS across, floor(4 * log2(height))::INT AS down,
                       count(*) AS samples
                FROM {index} WHERE width IS NOT NULL
                GROUP BY component, across, down ORDER BY component, across, down""",
    "aspects": """SELECT component, round(4 * log2(width / height))::INT AS bin, count(*) AS samples
                  FROM {index} WHERE width IS NOT NULL GROUP BY component, bin ORDER BY component, bin""",
    "rejects": """SELECT component, reason, count(*) AS records
                  FROM {ledger} GROUP BY component, reason ORDER BY component, reason""",
}
"""What each plot shows, as SQL over index.parquet, or over rejects.jsonl."""

LEDGER = "read_json('rejects.jsonl', columns = {component: 'VARCHAR', reason: 'VARCHAR'})"
"""rejects.jsonl as a table, also if it is empty."""

_OF_PICTURES = frozenset({"sizes", "aspects"})  # which indexes of before have no columns for

_ROW = 28  # pixels a bar


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot on the page; `query` recomputes what it shows."""

    name: str
    title: str
    about: str
    spec: Mapping[str, Any]
    query: str


@cache
def scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed as one piece of JavaScript, with `vegaEmbed` set on the window."""
    import vl_convert

    code: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")  # neither may stand in a script element


def charts(build: OpenBuild) -> list[Chart]:
    """All plots of a build that have something to show."""
    wanted = QUERIES.keys() - {"rejects"} - (_OF_PICTURES if "width" not in build.columns else set())
    data = {name: build.rows(QUERIES[name].format(index="samples")) for name in wanted}
    made = [
        _mix(data["mix"]),
        _lengths(data["lengths"]),
        _images(data["images"]),
        _tokens(data["tokens"]),
        _sizes(data.get("sizes", [])),
        _aspects(data.get("aspects", [])),
        _rejects(build.manifest["components"]),
    ]
    return [chart for chart in made if chart is not None]


def _altair() -> Any:
    """Altair, imported late: it takes half a second."""
    import altair

    return altair


def _chart(name: str, title: str, about: str, figure: Any, height: int = 260) -> Chart:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own parts' coming versions; none is about the plot
        spec = figure.properties(name=name, height=height).to_dict()  # a name, for Altair's own count up
    spec.pop("$schema", None)
    spec.pop("config", None)  # the page sets colours for light and dark
    query = " ".join(QUERIES[name].split()).replace("{index}", "'index.parquet'").replace("{ledger}", LEDGER)
    return Chart(name, title, about, json.loads(json.dumps(spec, sort_keys=True)), query)


def _values(rows: Sequence[Mapping[str, Any]]) -> Any:
    return _altair().Data(values=list(rows))


def _mix(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    if not rows:
        return None
    alt = _altair()
    sums = {unit: sum(row[unit] for row in rows) for unit in ("samples", "tokens")}
    long = [
        {"component": row["component"], "of": unit, "share": row[unit] / max(sums[unit], 1), "count": row[unit]}
        for row in rows
        for unit in ("samples", "tokens")
    ]
    figure = (
        alt.Chart(_values(long), width="container")
        .mark_bar()
        .encode(
            x=alt.X("share:Q", axis=alt.Axis(format="%"), title="share"),
            y=alt.Y("component:N", title=None, sort=None),
            yOffset=alt.YOffset("of:N"),
            color=alt.Color("of:N", title="share of", legend=alt.Legend(orient="bottom")),
            tooltip=["component:N", "of:N", alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("count:Q", format=",")],
        )
    )
    return _chart("mix", "Mix", "Each component's share of the samples and of the tokens.", figure)


def _lengths(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    if not rows:
        return None
    alt = _altair()
    bins = range(min(row["bin"] for row in rows), max(row["bin"] for row in rows) + 1)
    spans = [{**row, "from": _edge(row["bin"]), "to": _edge(row["bin"] + 1) - 1} for row in rows]
    picked = alt.selection_point(fields=["component"], bind="legend", name="picked")
    edges = alt.Scale(domain=[_edge(bin_) for bin_ in bins], paddingInner=0.05)
    figure = (
        alt.Chart(_values(spans), width="container")
        .mark_bar()
        .encode(
            x=alt.X("from:O", scale=edges, axis=alt.Axis(labelAngle=0, labelOverlap=True), title="tokens, from"),
            y=alt.Y("samples:Q", stack="zero", title="samples"),
            color=alt.Color("component:N", legend=alt.Legend(orient="bottom", columns=3)),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
            tooltip=[
                "component:N",
                alt.Tooltip("samples:Q", format=","),
                alt.Tooltip("from:Q", format=",.0f"),
                alt.Tooltip("to:Q", format=",.0f"),
            ],
        )
        .add_params(picked)
    )
    about = "Tokens a sample, images included, in steps of half a power of two. The legend picks a component."
    return _chart("lengths", "Lengths", about, figure)


def _edge(bin_: int) -> int:
    """The least number of tokens in a bin."""
    return math.ceil(2 ** (bin_ / 2) - 1e-9)


def _images(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    if not rows:
        return None
    alt = _altair()
    picked = alt.selection_point(fields=["modality"], bind="legend", name="picked")
    figure = (
        alt.Chart(_values(rows), width="container")
        .mark_bar()
        .encode(
            x=alt.X("images:O", title="images a sample", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("samples:Q", stack="zero"),
            color=alt.Color("modality:N", legend=alt.Legend(orient="bottom")),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
            tooltip=["modality:N", "images:Q", alt.Tooltip("samples:Q", format=",")],
        )
        .add_params(picked)
    )
    about = "Images a sample, frames and tiles included; samples of text alone are left out."
    return _chart("images", "Images a sample", about, figure)


def _tokens(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    if not rows:
        return None
    alt = _altair()
    names = {"image": "images", "trained_on": "text, trained on", "other_text": "other text"}
    long = [{"source": row["source"], "kind": names[kind], "tokens": row[kind]} for row in rows for kind in names]
    figure = (
        alt.Chart(_values(long), width="container")
        .mark_bar()
        .encode(
            x=alt.X("tokens:Q", axis=alt.Axis(format="~s")),
            y=alt.Y("source:N", title=None),
            color=alt.Color("kind:N", title=None, sort=list(names.values()), legend=alt.Legend(orient="bottom")),
            tooltip=["source:N", "kind:N", alt.Tooltip("tokens:Q", format=",")],
        )
    )
    return _chart(
        "tokens",
        "Tokens by source",
        "What the model reads of each source, and what it learns.",
        figure,
        _ROW * len(rows) + _ROW,
    )


def _sizes(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    if not rows:
        return None
    alt = _altair()
    values = [
        {
            "component": row["component"],
            "width": _middle(row["across"]),
            "height": _middle(row["down"]),
            "widths": _span(row["across"]),
            "heights": _span(row["down"]),
            "samples": row["samples"],
        }
        for row in rows
    ]
    picked = alt.selection_point(fields=["component"], bind="legend", name="picked")
    scale = alt.Scale(type="log", base=2, nice=False, padding=16)
    ticks = alt.Axis(values=[2**power for power in range(16)], format=",")
    figure = (
        alt.Chart(_values(values), width="container")
        .mark_circle()
        .encode(
            x=alt.X("width:Q", scale=scale, axis=ticks, title="width, pixels"),
            y=alt.Y("height:Q", scale=scale, axis=ticks, title="height, pixels"),
            order=alt.Order("samples:Q", sort="descending"),
            size=alt.Size("samples:Q", legend=None, scale=alt.Scale(range=[16, 400])),
            color=alt.Color("component:N", legend=alt.Legend(orient="bottom", columns=3)),
            opacity=alt.condition(picked, alt.value(0.7), alt.value(0.05)),
            tooltip=["component:N", "widths:N", "heights:N", alt.Tooltip("samples:Q", format=",")],
        )
        .add_params(picked)
    )
    about = "The largest picture or clip of each sample before resizing, in steps of a quarter of a power of two."
    return _chart("sizes", "Picture sizes", about, figure)


def _middle(bin_: int) -> int:
    return round(2 ** ((bin_ + 0.5) / 4))


def _span(bin_: int) -> str:
    """The whole numbers of pixels in a bin."""
    first, last = (math.ceil(2 ** (edge / 4) - 1e-9) for edge in (bin_, bin_ + 1))
    return f"{first:,} to {last - 1:,}" if last - 1 > first else f"{first:,}"


def _aspects(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    if not rows:
        return None
    alt = _altair()
    bins = range(min(row["bin"] for row in rows), max(row["bin"] for row in rows) + 1)
    picked = alt.selection_point(fields=["component"], bind="legend", name="picked")
    order = alt.Scale(domain=[_aspect(bin_) for bin_ in bins], paddingInner=0.05)
    figure = (
        alt.Chart(_values([{**row, "aspect": _aspect(row["bin"])} for row in rows]), width="container")
        .mark_bar()
        .encode(
            x=alt.X("aspect:O", scale=order, axis=alt.Axis(labelAngle=0, labelOverlap=True), title="width : height"),
            y=alt.Y("samples:Q", stack="zero", title="samples"),
            color=alt.Color("component:N", legend=alt.Legend(orient="bottom", columns=3)),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
            tooltip=["component:N", "aspect:O", alt.Tooltip("samples:Q", format=",")],
        )
        .add_params(picked)
    )
    about = "Width to height of the same pictures, from upright to wide, to the nearest quarter of a power of two."
    return _chart("aspects", "Picture aspects", about, figure)


def _aspect(bin_: int) -> str:
    """About what one side is to the other: "1.4 : 1", "1 : 2"."""
    times = f"{2 ** (abs(bin_) / 4):.3g}"
    return f"1 : {times}" if bin_ < 0 else f"{times} : 1"


def _rejects(components: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    rows = [
        {"component": name, "reason": reason, "records": count}
        for name, component in components.items()
        for reason, count in component["rejects"].items()
    ]
    if not rows:
        return None
    alt = _altair()
    figure = (
        alt.Chart(_values(rows), width="container")
        .mark_bar()
        .encode(
            x=alt.X("records:Q", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("reason:N", title=None, sort="-x"),
            color=alt.Color("component:N", legend=alt.Legend(orient="bottom", columns=3)),
            tooltip=["reason:N", "component:N", alt.Tooltip("records:Q", format=",")],
        )
    )
    about = "Records that were drawn and could not be used, by reason."
    return _chart("rejects", "Rejects", about, figure, _ROW * len({row["reason"] for row in rows}) + _ROW)
