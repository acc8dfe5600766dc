"""All sources, found by looking through this folder: adding one is adding a file with a `SOURCE` in it."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

import pipelines.sources
from formats.errors import UsageError
from formats.sample import DIALOGUE_FLAGS
from pipelines.sources.base import Source
from recipes.schema import Problem, Recipe


def _discover() -> dict[str, Source]:
    names = sorted(module.name for module in pkgutil.iter_modules(pipelines.sources.__path__))
    modules = [importlib.import_module(f"pipelines.sources.{name}") for name in names]
    return {m.SOURCE.name: m.SOURCE for m in modules if hasattr(m, "SOURCE")}


SOURCES: Mapping[str, Source] = _discover()


def unknown_names(recipe: Recipe) -> Iterator[Problem]:
    """What a recipe names that does not exist: sources, flags of theirs, earlier builds that it does not draw from."""
    for name, component in recipe.components.items():
        key = ("components", name)
        if component.source is None:
            continue
        if component.source not in SOURCES:
            yield (*key, "source"), f"unknown source {component.source!r}{_did_you_mean(component.source, SOURCES)}"
            continue
        known = (*SOURCES[component.source].flags, *DIALOGUE_FLAGS)
        for flag in component.filters.without:
            if flag not in known:
                message = f"{component.source} sets no flag {flag!r}; it sets {', '.join(known)}"
                yield (*key, "filters", "without"), message
    yield from _unknown_dropped(recipe)
    for name in recipe.sources:
        if name not in SOURCES:
            yield ("sources", name), f"unknown source{_did_you_mean(name, SOURCES)}"
    drawn_from = [c.origin for c in recipe.components.values() if not c.source]
    for name in recipe.builds:
        if name not in drawn_from:
            yield ("builds", name), f"no component draws from it{_did_you_mean(name, drawn_from)}"


def _unknown_dropped(recipe: Recipe) -> Iterator[Problem]:
    """Flags to be dropped that no source of the recipe sets; an earlier build may hold any source's."""
    names = [component.source for component in recipe.components.values()]
    read = [name for name in names if name in SOURCES] if None not in names else list(SOURCES)
    for name, component in recipe.components.items():
        own = [component.source] if component.source in SOURCES else list(SOURCES)
        for flag in component.filters.drop_flags or ():
            if flag not in _flags(own):
                message = f"{component.origin} has no flag {flag!r}; there is {', '.join(_flags(own))}"
                yield ("components", name, "filters", "drop_flags"), message
    for flag in recipe.filters.drop_flags or ():
        if flag not in _flags(read):
            yield ("filters", "drop_flags"), f"no source has a flag {flag!r}; there is {', '.join(_flags(read))}"


def _flags(sources: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys((*(flag for name in sources if name for flag in SOURCES[name].flags), *DIALOGUE_FLAGS)))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def source_named(name: str) -> Source:
    """The source of that name.

    Raises:
        UsageError: if there is none; the message lists the nearest names.
    """
    if name not in SOURCES:
        near = get_close_matches(name, SOURCES) or list(SOURCES)
        raise UsageError(f"there is no source {name!r}; did you mean {', '.join(near)}?")
    return SOURCES[name]
