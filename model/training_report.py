"""report.html of a training run: its curves and its last figures on a page that needs nothing else."""

import html
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.manifest import write_atomically
from model.metrics import read_metrics

REPORT = "report.html"
_POINTS = 600  # of a curve: more than a screen has columns for

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td {{ padding: .2rem 1.5rem .2rem 0 }} td + td {{ text-align: right }}
svg {{ max-width: 100%; height: auto }}</style></head>
<body><h1>{title}</h1><table>{rows}</table>{charts}</body></html>
"""


def write_report(out: Path) -> None:
    """Draws what metrics.jsonl says."""
    steps = read_metrics(out)
    if not steps:
        return
    last = steps[-1]
    figures = {
        "steps": f"{last['step']:,}",
        "loss": f"{last['loss']:.4f}",
        "tokens read": f"{sum(s['tokens'] for s in steps):,}",
        "target tokens": f"{sum(s['targets'] for s in steps):,}",
        "images": f"{sum(s['images'] for s in steps):,}",
        "tokens a second, median": f"{_median([s['tokens_per_second'] for s in steps]):,.0f}",
        "waiting for data, median": f"{_median([s['feed_wait'] for s in steps]):.1%}",
        "most memory of a process": f"{max(s['memory'] for s in steps) / 1e9:.2f} GB",
    }
    charts = [
        _curves("Loss, and that of each source", _losses(_thinned(steps)), "loss"),
        _curves("Norm of the gradients", _values(_thinned(steps), "norm"), "norm"),
        _curves("Learning rate", _values(_thinned(steps), "learning_rate"), "rate"),
        _curves("Tokens a second", _values(_thinned(steps), "tokens_per_second"), "tokens a second"),
    ]
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in figures.items())
    page = _PAGE.format(title=html.escape(f"Training: {out.name}"), rows=rows, charts="".join(charts))
    write_atomically(out / REPORT, page.encode())


def _losses(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    overall = _values(steps, "loss", "all")
    return overall + [
        {"step": s["step"], "value": value, "of": source}
        for s in steps
        for source, value in s["loss_by_source"].items()
    ]


def _values(steps: Sequence[Mapping[str, Any]], name: str, of: str = "") -> list[dict[str, Any]]:
    return [{"step": s["step"], "value": s[name], "of": of or name} for s in steps]


def _thinned(steps: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    every = -(-len(steps) // _POINTS)
    return [*steps[:-1:every], steps[-1]]


def _curves(title: str, points: list[dict[str, Any]], unit: str) -> str:
    """A line chart as SVG."""
    altair: Any = importlib.import_module("altair")
    import vl_convert

    many = len({point["of"] for point in points}) > 1
    chart = (
        altair.Chart(altair.Data(values=points))
        .mark_line(point=len(points) < 100)
        .encode(
            x=altair.X("step:Q"),
            y=altair.Y("value:Q", title=unit, scale=altair.Scale(zero=False)),
            color=altair.Color("of:N", title=None) if many else altair.value("#4c78a8"),
        )
        .properties(title=title, width=720, height=240)
    )
    svg: str = vl_convert.vegalite_to_svg(chart.to_dict())
    return f"<figure>{svg}</figure>"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
