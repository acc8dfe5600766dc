"""Were the records drawn, and laid out, in the order that the recipe's seed gives?

A component draws its records by md5("SEED/draw/ORIGIN/UID"), ORIGIN being its own name or that of the build that it
draws from (sub-images from the back), and those that took the place of rejected ones come next in that order. All that
were drawn at first are laid out by md5("SEED/order/COMPONENT/UID/0"). Records that were never drawn are not known here,
so that a draw which left some out from the start is not found by this.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from validators.findings import Check, Finding, error
from validators.index import Index
from validators.ledger import Reject
from validators.manifest import FILE, Manifest, RecipeComponent


def check(index: Index, manifest: Manifest, rejects: Sequence[Reject]) -> Check[None]:
    """Holds the index and a ledger in which no fault was found against the recipe's seed.

    Components that go through their pool again are left out: the index does not say which copy a row is.
    """
    table = index.columns("key", "component", "id").sort_by("key")
    rows = list(zip(*(table[name].to_pylist() for name in ("key", "component", "id")), strict=True))
    once = {name for name, recipe in manifest.recipe.components.items() if recipe.on_short != "repeat"}
    by_component: dict[str, list[Reject]] = defaultdict(list)
    for reject in rejects:
        by_component[reject.component].append(reject)
    for name in sorted(by_component.keys() & manifest.components.keys() & once):
        kept = [uid for _, component, uid in rows if component == name]
        yield from _check_replacements(name, kept, by_component[name], manifest)
    replacements = {(reject.component, reject.replaced_by) for reject in rejects}
    first = [row for row in rows if row[1] in once and row[1:] not in replacements]
    yield from _check_order(first, manifest.recipe.seed, index.file)


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _check_replacements(
    name: str, kept: Sequence[str], rejects: Sequence[Reject], manifest: Manifest
) -> Iterator[Finding]:
    """What took the place of rejected records is what the seed puts behind those that were drawn at first."""
    component, recipe = manifest.components[name], manifest.recipe.components[name]
    drawn = sorted({*kept, *(reject.uid for reject in rejects)}, key=_draw_of(name, recipe, manifest.recipe.seed))
    if recipe.subimage:
        drawn.reverse()
    expected = drawn[min(component.asked, component.pool) :]
    stated = [reject.replaced_by for reject in rejects if reject.replaced_by is not None]
    if stated != expected:
        wrong = next((i for i, pair in enumerate(zip(stated, expected, strict=False)) if pair[0] != pair[1]), None)
        at = f"replacement {wrong} is {stated[wrong]!r}, not {expected[wrong]!r}" if wrong is not None else ""
        detail = at or f"{len(stated)} replacements are stated, {len(expected)} records were drawn as such"
        yield error("mixture-draw", f"components.{name}: {detail}", file=FILE)


def _draw_of(name: str, recipe: RecipeComponent, seed: int) -> Callable[[str], str]:
    """Where the seed puts a record."""
    origin = recipe.replay or recipe.subimage or name
    return lambda uid: _md5(f"{seed}/draw/{origin}/{uid}")


def _check_order(rows: Sequence[tuple[str, str, str]], seed: int, file: str) -> Iterator[Finding]:
    places = [(_md5(f"{seed}/order/{component}/{uid}/0"), key) for key, component, uid in rows]
    for (one, _), (other, key) in pairwise(places):
        if other < one:
            yield error("mixture-order", "the seed puts it before the sample that it follows", file=file, key=key)
