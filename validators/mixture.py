"""Do the counts add up: within the manifest, and between the manifest and the index?"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from validators.findings import Check, Finding, error
from validators.index import Index
from validators.manifest import FILE, Component, Manifest, Tally

COUNTED = {
    "kept": "key_count",
    "images": "n_images_sum",
    "tokens": "n_tokens_sum",
    "target_tokens": "n_target_tokens_sum",
}
"""Counts of a component in the manifest, and the index's aggregates that they have to equal."""


def check_manifest(manifest: Manifest) -> Check[None]:
    """Nothing read may vanish: every record is in exactly one of the counts."""
    for name, source in manifest.sources.items():
        yield from _check_source(f"sources.{name}", source)
        for file in source.files:
            yield from _check_source(f"sources.{name} {file.file}", file)
        for count in ("records", "usable", "rejected"):
            total = sum(getattr(file, count) for file in source.files)
            yield from _same(f"sources.{name}.{count}", getattr(source, count), "its files' sum", total)
    for name, component in manifest.components.items():
        yield from _check_component(f"components.{name}", component)
        yield from _check_draw(name, component, manifest)
    if manifest.components.keys() != manifest.recipe.components.keys():
        detail = f"recipe has {sorted(manifest.recipe.components)}, manifest {sorted(manifest.components)}"
        yield error("mixture-components", detail, file=FILE)
    yield from _check_totals(manifest)


def _same(what: str, value: int, other: str, expected: int, code: str = "mixture-conservation") -> Iterator[Finding]:
    if value != expected:
        yield error(code, f"{what} is {value}, {other} {expected}", file=FILE)


def _check_source(where: str, tally: Tally) -> Iterator[Finding]:
    yield from _same(f"{where}: records", tally.records, "usable + rejected", tally.usable + tally.rejected)


def _check_component(where: str, c: Component) -> Iterator[Finding]:
    yield from _same(f"{where}.asked", c.asked, "kept + short", c.kept + c.short)
    yield from _same(f"{where}.drawn", c.drawn, "kept + rejected", c.kept + c.rejected)
    yield from _same(f"{where}.rejected", c.rejected, "the sum of its rejects", sum(c.rejects.values()))


def _check_draw(name: str, component: Component, manifest: Manifest) -> Iterator[Finding]:
    """What was drawn, against what the recipe asks for and what there was to draw from."""
    recipe = manifest.recipe.components.get(name)
    if recipe is None:
        return
    if isinstance(recipe.count, int):
        yield from _same(f"components.{name}.asked", component.asked, "the recipe's count", recipe.count)
    if recipe.on_short != "repeat" and component.drawn > component.pool:
        detail = f"components.{name}.drawn is {component.drawn}, more than the pool of {component.pool}"
        yield error("mixture-conservation", detail, file=FILE)


def _check_totals(manifest: Manifest) -> Iterator[Finding]:
    components = manifest.components.values()
    sums = {
        "samples": sum(c.kept for c in components),
        "images": sum(c.images for c in components),
        "tokens": sum(c.tokens for c in components),
        "target_tokens": sum(c.target_tokens for c in components),
        "rejected": sum(c.rejected for c in components),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
    for name, expected in sums.items():
        value = getattr(manifest.totals, name)
        yield from _same(f"totals.{name}", value, "the sum of its parts", expected, "mixture-totals")
    others = {
        "the shards' sum": sum(shard.samples for shard in manifest.shards),
        "index.rows": manifest.index.rows,
    }
    for other, expected in others.items():
        yield from _same("totals.samples", manifest.totals.samples, other, expected, "mixture-totals")
    yield from _same(
        "rejects.rows", manifest.rejects.rows, "totals.rejected", manifest.totals.rejected, "mixture-totals"
    )


def check_index(index: Index, manifest: Manifest) -> Check[None]:
    """What the index holds of each component, against the manifest."""
    table = index.columns("component", "key", "n_images", "n_tokens", "n_target_tokens")
    sums = [(name, "sum") for name in ("n_images", "n_tokens", "n_target_tokens")]
    found = {row["component"]: row for row in _grouped(table, ["component"], [("key", "count"), *sums])}
    for name, component in manifest.components.items():
        held = found.pop(name, {})
        for count, aggregate in COUNTED.items():
            value, expected = getattr(component, count), held.get(aggregate, 0)
            yield from _same(f"components.{name}.{count}", value, "the index holds", expected, "mixture-count")
    for name in found:
        yield error("mixture-components", f"the index has {name!r}, which is not in the manifest", file=index.file)


def check_records(index: Index, manifest: Manifest) -> Check[None]:
    """A component draws from its own source, and no record twice; replays and sub-images share none."""
    recipes = manifest.recipe.components
    table = index.columns("component", "source", "id")
    for row in _grouped(table, ["component", "source"], [("id", "count")]):
        recipe = recipes.get(row["component"])
        if recipe and recipe.source and recipe.source != row["source"]:
            detail = (
                f"{row['component']} draws from {recipe.source}, but {row['id_count']} samples are of {row['source']}"
            )
            yield error("mixture-source", detail, file=index.file)
    once = _of(table, [name for name, recipe in recipes.items() if recipe.on_short != "repeat"])
    for row in _grouped(once, ["component", "id"], [("id", "count")], at_least=2):
        detail = f"{row['component']} holds {row['id']!r} {row['id_count']} times"
        yield error("mixture-duplicate", detail, file=index.file)
    for build in sorted({recipe.replay for recipe in recipes.values() if recipe.replay}):
        replayed = pc.unique(_of(table, [name for name, recipe in recipes.items() if recipe.replay == build])["id"])
        split = _of(table, [name for name, recipe in recipes.items() if recipe.subimage == build])["id"]
        for uid in replayed.filter(pc.is_in(replayed, pc.unique(split))).to_pylist():
            detail = f"{uid!r} of {build} is both replayed and split into sub-images"
            yield error("mixture-overlap", detail, file=index.file)


def _of(table: pa.Table, components: list[str]) -> pa.Table:
    """The rows of some components."""
    return table.filter(pc.is_in(table["component"].cast(pa.string()), pa.array(components, pa.string())))


def _grouped(table: pa.Table, keys: list[str], sums: list[tuple[str, str]], at_least: int = 1) -> list[dict[str, Any]]:
    """Aggregates as rows; only groups of some size, by the first aggregate, become Python objects."""
    groups = table.group_by(keys).aggregate(sums)
    rows: list[dict[str, Any]] = groups.filter(pc.greater_equal(groups["_".join(sums[0])], at_least)).to_pylist()
    return rows
