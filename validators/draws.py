"""Were the records drawn, and laid out, in the order that the recipe's seed gives?

A component draws its records by md5("SEED/draw/ORIGIN/UID"), ORIGIN being its own name or that of the build that it
draws from (sub-images from the back), and those that took the place of rejected ones come next in that order. All that
were drawn at first are laid out by md5("SEED/order/COMPONENT/UID/0"). Records that were never drawn are not known here,
so that a draw which left some out from the start is not found by this.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from heapq import nlargest, nsmallest
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from validators.findings import Check, Finding, error
from validators.index import Index
from validators.ledger import Reject
from validators.manifest import Manifest, RecipeComponent

_ROWS = 1 << 16  # that are Python objects at once


def check(index: Index, manifest: Manifest, rejects: Sequence[Reject]) -> Check[None]:
    """Holds the index and a ledger in which no fault was found against the recipe's seed.

    Components that go through their pool again are left out: the index does not say which copy a row is.
    """
    table = index.columns("key", "component", "id")
    component = table["component"].cast(pa.string())
    once = [name for name, recipe in manifest.recipe.components.items() if recipe.on_short != "repeat"]
    by_component: dict[str, list[Reject]] = defaultdict(list)
    for reject in rejects:
        by_component[reject.component].append(reject)
    for name in sorted(by_component.keys() & manifest.components.keys() & {*once}):
        kept = table.filter(pc.equal(component, name))
        yield from _check_replacements(name, kept, by_component[name], manifest)
    replacements = {(reject.component, reject.replaced_by) for reject in rejects}
    rows = table.filter(pc.is_in(component, pa.array(once, pa.string()))).sort_by("key")
    yield from _check_order(rows, replacements, manifest.recipe.seed, index.file)


def _rows(table: pa.Table) -> Iterator[tuple[str, str, str]]:
    """Key, component and id of each row."""
    for at in range(0, table.num_rows, _ROWS):
        some = table.slice(at, _ROWS)
        yield from zip(*(some[name].to_pylist() for name in ("key", "component", "id")), strict=True)


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _check_replacements(name: str, kept: pa.Table, rejects: Sequence[Reject], manifest: Manifest) -> Iterator[Finding]:
    """What took the place of rejected records is what the seed puts behind those that were drawn at first."""
    component, recipe = manifest.components[name], manifest.recipe.components[name]
    late = max(0, kept.num_rows + len(rejects) - min(component.asked, component.pool))
    drawn = chain((uid for _, _, uid in _rows(kept)), (reject.uid for reject in rejects))
    last = nsmallest if recipe.subimage else nlargest
    expected = last(late, drawn, key=_draw_of(name, recipe, manifest.recipe.seed))[::-1]
    stated = [reject.replaced_by for reject in rejects if reject.replaced_by is not None]
    if stated == expected:
        return
    detail = f"{len(stated)} replacements are stated, {len(expected)} records were drawn as such"
    for number, (one, other) in enumerate(zip(stated, expected, strict=False)):
        if one != other:
            detail = f"replacement {number} is {one!r}; the next that the seed draws is {other!r}"
            break
    yield error("mixture-draw", f"components.{name}: {detail}", file=manifest.rejects.file)


def _draw_of(name: str, recipe: RecipeComponent, seed: int) -> Callable[[str], str]:
    """Where the seed puts a record."""
    origin = recipe.replay or recipe.subimage or name
    return lambda uid: _md5(f"{seed}/draw/{origin}/{uid}")


def _check_order(table: pa.Table, replacements: set[tuple[str, str | None]], seed: int, file: str) -> Iterator[Finding]:
    """Records that replaced others lie behind the rest, round by round, and are passed over here."""
    last = ""
    for key, component, uid in _rows(table):
        if (component, uid) in replacements:
            continue
        place = _md5(f"{seed}/order/{component}/{uid}/0")
        if place < last:
            yield error("mixture-order", "the seed puts it before the sample that it follows", file=file, key=key)
        last = place
