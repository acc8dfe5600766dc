"""pipelines.plan: what is drawn, from what, in which order."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from formats.errors import RecipeError
from pipelines.ingest import Catalog, Location, PartTask, ingest_file
from pipelines.plan import Planner, read_rows
from recipes.schema import Recipe

RECORDS = 50


def write_catalog(folder: Path, source: str = "evol_instruct", records: int = RECORDS) -> Catalog:
    """A real catalog of short conversations, every fifth with a second round."""
    data = folder / "data" / source / "allava_text"
    data.mkdir(parents=True, exist_ok=True)
    rounds = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
    rows = [{"idx": str(i), "conversations": rounds * (2 if i % 5 == 0 else 1)} for i in range(records)]
    (data / "Evol-Instruct-GPT4-Turbo-143K.json").write_text(json.dumps(rows))
    location = Location(source, str(data.parent), str(data.parent))
    catalog = folder / "catalog" / source
    catalog.mkdir(parents=True, exist_ok=True)
    file = "allava_text/Evol-Instruct-GPT4-Turbo-143K.json"
    return Catalog(location, catalog, (ingest_file(PartTask(location, file, str(catalog), "part-00000")),))


def recipe(**components: dict[str, Any]) -> Recipe:
    filled = {name: {"source": "evol_instruct", **c} for name, c in components.items()}
    return Recipe.model_validate({"name": "r", "tokenizer": "t", "components": filled})


@contextmanager
def planner(tmp_path: Path, wanted: Recipe) -> Iterator[Planner]:
    catalog = write_catalog(tmp_path)
    with closing(Planner(wanted, [catalog], {}, tmp_path / "plan")) as made:
        yield made


def draw(made: Planner, **wanted: int) -> list[dict[str, Any]]:
    drawn = made.draw(0, wanted, 0)
    return list(read_rows(drawn.file, 0, drawn.rows))


def uids(rows: list[dict[str, Any]], component: str) -> set[str]:
    return {row["uid"] for row in rows if row["component"] == component}


def test_a_component_takes_the_records_with_the_smallest_hashes(tmp_path: Path) -> None:
    with planner(tmp_path, recipe(a={"count": 7})) as made:
        rows = draw(made, a=7)
    everyone = [f"evol_instruct/allava_text/Evol-Instruct-GPT4-Turbo-143K.json:{i}" for i in range(RECORDS)]
    by_hash = sorted(everyone, key=lambda uid: hashlib.md5(f"0/draw/a/{uid}".encode()).hexdigest())
    assert uids(rows, "a") == set(by_hash[:7])


def test_rows_stand_in_keyed_hash_order_with_their_records(tmp_path: Path) -> None:
    with planner(tmp_path, recipe(a={"count": 20})) as made:
        rows = draw(made, a=20)
    keys = [hashlib.md5(f"0/order/a/{row['uid']}/0".encode()).hexdigest() for row in rows]
    assert keys == sorted(keys)
    assert [row["position"] for row in rows] == list(range(20))
    assert all(row["record"]["uid"] == row["uid"] for row in rows)


def test_components_do_not_disturb_one_another(tmp_path: Path) -> None:
    with planner(tmp_path / "1", recipe(a={"count": 7}, b={"count": 5})) as made:
        before = draw(made, a=7, b=5)
    with planner(tmp_path / "2", recipe(a={"count": 7}, b={"count": 9}, c={"count": 4})) as made:
        after = draw(made, a=7, b=9, c=4)
    assert uids(before, "a") == uids(after, "a")
    assert uids(before, "b") < uids(after, "b")


def test_replacements_are_the_next_in_line(tmp_path: Path) -> None:
    with planner(tmp_path, recipe(a={"count": 7})) as made:
        first = made.draw(0, {"a": 7}, 0)
        second = made.draw(1, {"a": 2}, 7)
        rows = list(read_rows(second.file, 0, second.rows))
        assert {row["uid"] for row in rows} == set(made.uids("a", 7, 9).to_pylist())
    assert (first.rows, second.rows) == (7, 2)
    assert [row["position"] for row in rows] == [7, 8]


def test_filters_count_what_they_drop_by_the_first_reason(tmp_path: Path) -> None:
    filters = {"max_turns": 2, "modality": ["text"], "files": ["allava_text/*"], "max_chars": 100}
    with planner(tmp_path, recipe(a={"count": 1, "filters": filters})) as made:
        assert made.pools["a"].filtered == {"max_turns": RECORDS // 5}
        assert made.pools["a"].size == RECORDS - RECORDS // 5
    with planner(tmp_path, recipe(a={"count": 1, "filters": {"files": ["other/*"], "languages": ["English"]}})) as made:
        assert made.pools["a"].filtered == {"files": RECORDS}
        assert [pool.name for pool in made.short()] == ["a"]


def test_a_draw_of_nothing_is_a_round_without_rows(tmp_path: Path) -> None:
    with planner(tmp_path, recipe(a={"count": 7})) as made:
        assert draw(made, a=0) == []
        assert made.draw(1, {"a": 7}, 0).rows == 7


def test_repeat_goes_through_the_pool_again(tmp_path: Path) -> None:
    with planner(tmp_path, recipe(a={"count": 120, "on_short": "repeat"})) as made:
        assert made.short() == []
        rows = draw(made, a=120)
    assert sorted(row["rank"] for row in rows) == list(range(120))
    assert [sum(row["copy"] == n for row in rows) for n in (0, 1, 2)] == [50, 50, 20]


def test_all_means_the_whole_pool(tmp_path: Path) -> None:
    with planner(tmp_path, recipe(a={"count": "all"})) as made:
        assert made.pools["a"].asked == RECORDS


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (63, 66), (100, 150), (149, 150), (5, 5)])
def test_read_rows_gives_exactly_the_range(tmp_path: Path, start: int, stop: int) -> None:
    with planner(tmp_path, recipe(a={"count": 150, "on_short": "repeat"})) as made:
        drawn = made.draw(0, {"a": 150}, 1000)
        assert [row["position"] - 1000 for row in read_rows(drawn.file, start, stop)] == list(range(start, stop))


def test_a_filter_that_an_index_cannot_answer_is_refused(tmp_path: Path) -> None:
    wanted = Recipe.model_validate(
        {
            "name": "r",
            "tokenizer": "t",
            "components": {"a": {"replay": "b", "count": 1, "filters": {"languages": ["English"]}}},
        }
    )
    with pytest.raises(RecipeError, match=r"components.a.filters.languages: an earlier build's index"):
        Planner(wanted, [], {}, tmp_path)
