"""recipes.schema: what is accepted, and what a user is told about the rest."""

from pathlib import Path

import pytest

from formats.errors import RecipeError
from recipes.schema import Recipe, largest_remainder, load_recipe

GOOD = """\
name: mixed
tokenizer: ../tokenizer
components:
  pictures:
    source: llava15
    count: 10
    filters: {modality: [image]}
  talk:
    source: evol_instruct
    count: all
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def complaints(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_a_good_recipe_has_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.sequence_length == 40_960
    assert recipe.components["talk"].count == "all"
    assert recipe.components["pictures"].filters.modality == ("image",)


def test_all_mistakes_are_told_at_once_with_line_and_remedy(tmp_path: Path) -> None:
    bad = GOOD.replace("count: 10", "count: -3\n    max_tile: 4").replace("tokenizer: ../tokenizer", "sed: 1")
    assert complaints(tmp_path, bad) == [
        "r.yaml:1:1: tokenizer: is required",
        "r.yaml:6:5: components.pictures.count: Input should be greater than or equal to 1; found -3",
        "r.yaml:6:5: components.pictures.count: Input should be 'all'; found -3",
        "r.yaml:7:5: components.pictures.max_tile: unknown key; did you mean max_tiles?",
        "r.yaml:2:1: sed: unknown key; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("components.pictures.count", "true", "must be a number; found true"),
        ("image.quality", "yes", "must be a number; found true"),
        ("max_drop", "false", "must be a number; found false"),
        ("limits.seconds", ".inf", "Input should be a finite number; found inf"),
        ("filters.max_aspect", ".nan", "Input should be a finite number; found nan"),
        ("components.pictures.count", "010", "YAML takes 010 for 8; write 8 if that is meant, and '010' if it is text"),
        ("limits.seconds", "1:30", "YAML takes 1:30 for 90; write 90 if that is meant, and '1:30' if it is text"),
    ],
)
def test_what_is_no_number_of_peoples_is_refused_with_its_key(tmp_path: Path, key: str, value: str, what: str) -> None:
    found = complaints(tmp_path, GOOD, f"{key}={value}")[0]
    assert found.startswith(f"--set {key}={value}: ")
    assert found.endswith(what)
    parents, _, last = key.rpartition(".")
    if parents.startswith("components"):
        text = GOOD.replace("count: 10", f"{last}: {value}")
    else:
        text = GOOD + (f"{parents}: {{{last}: {value}}}\n" if parents else f"{last}: {value}\n")
    (line,) = complaints(tmp_path, text)
    assert line.endswith(f": {key}: {what}")


def test_words_that_look_like_numbers_may_stand_in_quotes(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD.replace("name: mixed", "name: '010'") + "description: 1:30 h\nduplicates: off\n")
    assert (recipe.name, recipe.description, recipe.duplicates) == ("010", "1:30 h", "off")
    assert load(tmp_path, GOOD, "image.passthrough=true").image.passthrough is True


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    assert complaints(tmp_path, GOOD + "name: again\n") == ["r.yaml:11:1: name: stands twice; remove one"]


def test_a_component_has_exactly_one_origin(tmp_path: Path) -> None:
    (line,) = complaints(tmp_path, GOOD.replace("source: evol_instruct", "source: a\n    replay: b"))
    assert "components.talk: give exactly one of source, replay and subimage; found source, replay" in line


@pytest.mark.parametrize(
    "text", ["", "- a\n", "{", "name: \x07", "name: 2024-13-45\n", "components: &x {a: *x}\n", "image: &y [*y]\n"]
)
def test_what_is_no_recipe_is_a_recipe_error(tmp_path: Path, text: str) -> None:
    assert complaints(tmp_path, text)[0].startswith("r.yaml")


def test_overrides_reach_any_depth_and_are_named_in_errors(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "image.quality=80", "components.pictures.filters.max_turns=2")
    assert (recipe.image.quality, recipe.components["pictures"].filters.max_turns) == (80, 2)
    assert complaints(tmp_path, GOOD, "image.quality=800")[0].startswith("--set image.quality=800: image.quality: ")
    assert complaints(tmp_path, GOOD, "image")[0].startswith("--set image: expected KEY=VALUE")


def test_fingerprint_ignores_spelling_but_not_meaning(tmp_path: Path) -> None:
    base = load(tmp_path, GOOD)
    assert load(tmp_path, GOOD + "seed: 0\nvideo: {fps: 1}\n").sha256 == base.sha256
    assert load(tmp_path, GOOD + "seed: 1\n").content_sha256 != base.content_sha256
    accepting = load(tmp_path, GOOD, "components.talk.on_short=accept")
    assert accepting.sha256 != base.sha256
    assert accepting.content_sha256 == base.content_sha256
    assert load(tmp_path, GOOD, "components.talk.on_short=repeat").content_sha256 != base.content_sha256


def test_scaling_keeps_the_mix(tmp_path: Path) -> None:
    paper = {"mantis": 200_000, "videochat2": 200_000, "sharegpt4video": 50_000, "single": 200_000, "text": 50_000}
    assert largest_remainder(paper, 0.001) == {k: v // 1000 for k, v in paper.items()}
    assert largest_remainder({"a": 1, "b": 1, "c": 1}, 0.5) == {"a": 1, "b": 1, "c": 1}
    assert sum(largest_remainder({"a": 333, "b": 333, "c": 334}, 0.1).values()) == 100


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan")])
def test_a_scale_is_a_positive_number(tmp_path: Path, factor: float) -> None:
    with pytest.raises(RecipeError, match="give a number above 0"):
        load(tmp_path, GOOD, "components.talk.count=5").scaled(factor)


def test_an_empty_filter_is_no_filter_but_a_mistake(tmp_path: Path) -> None:
    (line,) = complaints(tmp_path, GOOD, "components.pictures.filters.modality=[]")
    assert "components.pictures.filters.modality" in line


def test_what_only_others_know_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    with pytest.raises(RecipeError, match=r"r.yaml:5:5: components.pictures.source: no such"):
        load_recipe(path, check=lambda _: [(("components", "pictures", "source"), "no such")])


def test_all_cannot_be_scaled(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"components.talk.count is 'all'"):
        load(tmp_path, GOOD).scaled(0.5)


def test_filters_for_all_give_way_to_a_components_own(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "filters={max_refusals: 0, min_side: 64}", "components.pictures.filters.min_side=32")
    steps = recipe.steps("pictures")
    assert (steps.max_refusals, steps.min_side, steps.max_words) == (0, 32, None)
    assert (recipe.max_drop, recipe.budget("pictures")) == (0.2, 0.2)


def test_what_may_be_dropped_changes_no_byte_and_what_is_dropped_does(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    allowing = load(tmp_path, GOOD, "max_drop=0.5", "components.pictures.max_drop=1")
    assert allowing.content_sha256 == recipe.content_sha256
    assert allowing.budget("pictures") == 1
    assert load(tmp_path, GOOD, "filters.min_side=64").content_sha256 != recipe.content_sha256


def test_selecting_is_of_a_component_and_not_of_all(tmp_path: Path) -> None:
    (line,) = complaints(tmp_path, GOOD, "filters.modality=[image]")
    assert "filters.modality: unknown key" in line
    (line,) = complaints(tmp_path, GOOD, "filters.max_refusal=0")
    assert "did you mean max_refusals" in line
