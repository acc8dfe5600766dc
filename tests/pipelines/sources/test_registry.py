"""pipelines.sources.registry: what a recipe may name."""

from typing import Any

import pytest

from pipelines.sources.registry import SOURCES, unknown_names
from recipes.schema import Recipe


def problems(**changes: Any) -> list[tuple[str, str]]:
    content = {"name": "r", "tokenizer": "t", "components": {"a": {"source": "wildchat", "count": 1}}, **changes}
    return [(".".join(key), what) for key, what in unknown_names(Recipe.model_validate(content))]


def test_the_paper_has_nine_sources() -> None:
    assert len(SOURCES) == 9


def test_names_that_exist_are_fine() -> None:
    component = {"source": "wildchat", "count": 1, "filters": {"without": ["toxic", "dropped-empty-round"]}}
    assert problems(components={"a": component, "b": {"replay": "x", "count": 1}}, builds={"x": "y"}) == []


@pytest.mark.parametrize(
    ("changes", "key", "what"),
    [
        (
            {"components": {"a": {"source": "llava_15", "count": 1}}},
            "components.a.source",
            "unknown source 'llava_15'; did you mean llava15",
        ),
        (
            {"components": {"a": {"source": "wildchat", "count": 1, "filters": {"without": ["toxc"]}}}},
            "components.a.filters.without",
            "wildchat sets no flag 'toxc'; it sets toxic, redacted, moderated",
        ),
        (
            {"filters": {"drop_flags": ["toxc"]}},
            "filters.drop_flags",
            "no source has a flag 'toxc'; there is toxic, redacted, moderated",
        ),
        (
            {"components": {"a": {"source": "llava15", "count": 1, "filters": {"drop_flags": ["toxic"]}}}},
            "components.a.filters.drop_flags",
            "llava15 has no flag 'toxic'",
        ),
        ({"sources": {"lava15": {}}}, "sources.lava15", "unknown source; did you mean llava15"),
        ({"builds": {"text": "x"}}, "builds.text", "no component draws from it"),
    ],
)
def test_names_that_do_not_are_told(changes: dict[str, Any], key: str, what: str) -> None:
    ((found, message),) = problems(**changes)
    assert found == key
    assert message.startswith(what)
