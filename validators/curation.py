"""Did the recipe's filters drop no more than they may, and does the build hold nothing that they would have dropped?"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from validators.findings import Check, Finding, error
from validators.index import SCORES, Index
from validators.manifest import FILE, Component, Manifest

AT_LEAST = {
    **{"min_words": "n_words", "min_answer_words": "shortest_answer", "min_side": "min_side"},
    **{"min_contrast": "contrast", "min_bytes": "min_bytes"},
}
AT_MOST = {
    **{"max_words": "n_words", "max_turn_words": "longest_turn", "max_repetition": "repetition"},
    **{"max_refusals": "n_refusals", "max_emails": "n_emails", "max_phones": "n_phones", "max_cards": "n_cards"},
    **{"max_side": "max_side", "max_aspect": "max_aspect", "max_bytes": "max_bytes"},
}
OTHERS = ("drop_flags", "answer_languages", "same_language")
"""Steps of a recipe's filters, and the index's columns that they bound."""

ON_PICTURES = {"min-side", "max-side", "max-aspect", "min-contrast", "min-bytes", "max-bytes"}
"""Reasons of rejects that are drops."""

SIGNS = {name: (0, None) for name, kind in SCORES.items() if kind == "count"} | {
    **{"repetition": (0, 1), "max_aspect": (1, None), "contrast": (0, 255)},
    **dict.fromkeys(("min_side", "max_side", "width", "height"), (1, None)),
}
"""Least and greatest values that columns of scores can have."""


def steps_of(name: str, manifest: Manifest) -> dict[str, Any]:
    """What the recipe says is junk in a component: its own word, else the word for all."""
    known = (*AT_LEAST, *AT_MOST, *OTHERS)
    own, all_ = manifest.recipe.components[name].filters, manifest.recipe.filters
    found = {step: all_.get(step) if own.get(step) is None else own[step] for step in known}
    return {step: value for step, value in found.items() if value is not None}


def check_manifest(manifest: Manifest) -> Check[None]:
    """Every drop is by a step of the recipe, and all drops of a component are within its budget."""
    for name, component in manifest.components.items():
        if name not in manifest.recipe.components:
            continue  # which is found elsewhere
        steps = steps_of(name, manifest)
        stated = {*steps, *steps.get("drop_flags", ())}
        rejected = {reason for reason in component.rejects if reason in ON_PICTURES}
        for step in sorted({*component.dropped, *(reason.replace("-", "_") for reason in rejected)} - stated):
            detail = f"components.{name}: records dropped by {step!r}, which is no filter of the recipe"
            yield error("curation-step", detail, file=FILE)
        yield from _check_budget(name, component, manifest)


def _check_budget(name: str, component: Component, manifest: Manifest) -> Iterator[Finding]:
    own = manifest.recipe.components[name].max_drop
    budget = manifest.recipe.max_drop if own is None else own
    total = sum(component.dropped.values())
    pictures = sum(count for reason, count in component.rejects.items() if reason in ON_PICTURES)
    before = total / (component.pool + total) if total else 0.0
    share = before + (1 - before) * (pictures / component.drawn if pictures else 0.0)
    if budget is not None and share > budget + 1e-6:
        detail = f"components.{name}: filters dropped {share:.2%}; the recipe allows {budget:.2%}"
        yield error("curation-budget", detail, file=FILE)


def check_index(index: Index, manifest: Manifest) -> Check[None]:
    """Scores are possible, and none breaks a filter of its component's recipe."""
    if not index.has_scores:
        return
    table = index.columns("key", "component", *SCORES)
    for column, (least, most) in SIGNS.items():
        for key in _outside(table, column, least, most):
            yield error("index-score", f"{column} is impossible", file=index.file, key=key)
    for name in manifest.components.keys() & manifest.recipe.components.keys():
        steps = steps_of(name, manifest)
        if steps:
            rows = table.filter(pc.equal(table["component"].cast(pa.string()), name))
            yield from _check_rows(rows, steps, index.file)


def _check_rows(rows: pa.Table, steps: dict[str, Any], file: str) -> Iterator[Finding]:
    broken = {
        **{step: _outside(rows, column, steps[step], None) for step, column in AT_LEAST.items() if step in steps},
        **{step: _outside(rows, column, None, steps[step]) for step, column in AT_MOST.items() if step in steps},
    }
    if steps.get("same_language"):
        broken["same_language"] = _keys(rows, rows["language_mismatch"])
    if languages := steps.get("answer_languages"):
        other = pc.invert(pc.is_in(rows["answer_language"], pa.array(languages, pa.string())))
        broken["answer_languages"] = _keys(rows, pc.and_(other, pc.is_valid(rows["answer_language"])))
    if flags := set(steps.get("drop_flags", ())):
        marked = [bool(flags & set(row or ())) for row in rows["flags"].to_pylist()]
        broken["drop_flags"] = _keys(rows, pa.array(marked, pa.bool_()))
    for step, keys in broken.items():
        for key in keys:
            yield error("curation-kept", f"breaks {step}: {steps[step]}", file=file, key=key)


def _outside(rows: pa.Table, column: str, least: float | None, most: float | None) -> list[str]:
    """Keys of rows whose value is known and below or above a bound."""
    values = rows[column].cast(pa.float64())
    found = [] if least is None else _keys(rows, pc.less(values, float(least)))
    return found + ([] if most is None else _keys(rows, pc.greater(values, float(most))))


def _keys(rows: pa.Table, where: Any) -> list[str]:
    keys: list[str] = rows["key"].filter(where).to_pylist()
    return keys
