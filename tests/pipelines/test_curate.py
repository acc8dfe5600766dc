"""pipelines.curate: each step drops what it names and nothing else, every drop is counted, and no filter is greedy."""

import io
import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from formats.errors import BuildError, RecipeError, Reject
from formats.imaging import ImageSettings, patched, picture
from formats.manifest import file_sha256, read_manifest
from formats.shard import SCORES
from pipelines.build import Request, build
from pipelines.curate import PictureBudget, picture_scores, refuse_junk
from pipelines.executor import Executor
from pipelines.ingest import Catalog, Location, PartTask, ingest_file
from pipelines.plan import EarlierBuild, Planner
from pipelines.preview import preview
from pipelines.progress import Progress
from pipelines.report import rejects
from recipes.schema import Recipe, Steps
from validators.run import validate

SENTENCE = "The bus stops at the corner, where two people with umbrellas wait for it."
FRENCH = "Le bus s'arrête au coin de la rue, où deux personnes l'attendent sous la pluie."

# What each record is called is its id; the first of a pair is junk to the step, the second only looks like it.
TALKS: Mapping[str, list[str]] = {
    "short": ["Caption it.", "A bus."],
    "terse": ["Is it red? Answer with yes or no, please, and with nothing more than that.", "Yes."],
    "plain": ["What is in the picture?", SENTENCE],
    "loop": ["What is in the picture?", "a bus and a tree and " * 40],
    "refusal": ["Who is this person?", "I'm sorry, but I can't help with identifying people in pictures."],
    "sorry": ["I lost my keys.", "I'm sorry to hear that! A locksmith can help you to get in again."],
    "address": ["Where do I send it?", "Please send your letter to anna.schmidt@uni-koeln.de by Friday."],
    "placeholder": ["Where do I send it?", "Please send your letter to name@example.com by Friday."],
    "phone": ["How do I reach you?", "You can reach me during the day at +44 20 7946 0958, ask for Anna."],
    "years": ["When was it built?", "It was built 1999-2004, and rebuilt in 2010 2011 2012 and 2013."],
    "card": ["How do you pay?", "I always pay with my card, it is number 4111 1111 1111 1111, from a bank."],
    "serial": ["Which one is it?", "It is the one with number 4111 1111 1111 1112 on its back, from a box."],
    "french": [SENTENCE, FRENCH],
    "translated": [f"Translate into French: {SENTENCE}", FRENCH],
}


def talks(folder: Path) -> Catalog:
    """A real catalog of WildChat's shape, one record for each talk; "short" is flagged as toxic."""
    data = folder / "data/wildchat/data"
    data.mkdir(parents=True)
    rows = [
        {
            "conversation_hash": name,
            "language": "English",
            "toxic": name == "short",
            "redacted": False,
            "conversation": [
                {"role": role, "content": text, "toxic": False, "redacted": False}
                for role, text in zip(("user", "assistant"), turns, strict=True)
            ],
        }
        for name, turns in TALKS.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), data / "train-0.parquet")
    location = Location("wildchat", str(data.parent), str(data.parent))
    catalog = folder / "catalog"
    catalog.mkdir()
    return Catalog(location, catalog, (ingest_file(PartTask(location, "data/train-0.parquet", str(catalog), "p")),))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return talks(tmp_path_factory.mktemp("talks"))


def recipe(steps: Mapping[str, Any], own: Mapping[str, Any] = {}, **changes: Any) -> Recipe:
    component = {"source": "wildchat", "count": 1, "filters": own}
    return Recipe.model_validate(
        {"name": "r", "tokenizer": "t", "filters": steps, "components": {"a": component}, **changes}
    )


def left(tmp_path: Path, catalog: Catalog, wanted: Recipe) -> tuple[set[str], dict[str, int], dict[str, int]]:
    """The talks that a component may draw, and what was dropped and filtered."""
    with closing(Planner(wanted, [catalog], {}, tmp_path / "plan")) as planner:
        pool = planner.pools["a"]
        uids = planner.uids("a", 0, pool.size).to_pylist()
    names = list(TALKS)
    return {names[int(uid.rpartition(":")[2])] for uid in uids}, pool.dropped, pool.filtered


@pytest.mark.parametrize(
    ("step", "value", "junk", "fine"),
    [
        ("drop_flags", ["toxic"], {"short"}, "plain"),
        ("min_words", 5, {"short"}, "terse"),
        ("max_words", 100, {"loop"}, "translated"),
        ("min_answer_words", 3, {"short", "terse"}, "plain"),
        ("max_turn_words", 100, {"loop"}, "translated"),
        ("max_repetition", 0.3, {"loop"}, "plain"),
        ("max_refusals", 0, {"refusal"}, "sorry"),
        ("max_emails", 0, {"address"}, "placeholder"),
        ("max_phones", 0, {"phone"}, "years"),
        ("max_cards", 0, {"card"}, "serial"),
        ("same_language", True, {"french"}, "translated"),
        ("answer_languages", ["en"], {"french", "translated"}, "short"),
    ],
)
def test_a_step_drops_what_it_names_and_nothing_that_only_looks_like_it(
    tmp_path: Path, catalog: Catalog, step: str, value: Any, junk: set[str], fine: str
) -> None:
    names, dropped, filtered = left(tmp_path, catalog, recipe({step: value}))
    assert TALKS.keys() - names == junk
    assert fine in names
    assert (dropped, filtered) == ({"toxic" if step == "drop_flags" else step: len(junk)}, {})


def test_a_drop_counts_for_the_first_step_and_a_selection_is_no_drop(tmp_path: Path, catalog: Catalog) -> None:
    steps = {"max_words": 100, "max_repetition": 0.3, "max_refusals": 0}
    _, dropped, filtered = left(tmp_path, catalog, recipe(steps, own={"max_chars": 200, "without": ["toxic"]}))
    assert filtered == {"toxic": 1, "max_chars": 1}
    assert dropped == {"max_refusals": 1}


def test_a_components_own_value_goes_before_the_value_for_all(tmp_path: Path, catalog: Catalog) -> None:
    wanted = recipe({"max_refusals": 0, "same_language": True, "min_words": 5}, own={"same_language": False})
    names, dropped, _ = left(tmp_path, catalog, wanted)
    assert dropped == {"max_refusals": 1, "min_words": 1}
    assert "french" in names


# Pictures -----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(size: tuple[int, int], level: int) -> Image.Image:
    grain = np.random.default_rng(1).integers(50, 50 + level, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(grain)


def page() -> Image.Image:
    image = Image.new("RGB", (1000, 1400), "white")
    ImageDraw.Draw(image).text((100, 100), "page 7", fill="black", font_size=30)
    return image


def contrast(image: Image.Image) -> int | None:
    (stored,) = picture(encoded(image), ImageSettings())
    return stored.contrast


def test_a_blank_picture_has_no_contrast_and_a_nearly_empty_page_has() -> None:
    assert contrast(Image.new("RGB", (640, 480), (10, 200, 30))) == 0
    assert (contrast(noise((640, 480), 12)) or 0) < 8, "grain evens out"
    assert (contrast(page()) or 0) > 60
    assert (contrast(noise((640, 480), 150)) or 0) > 8
    half = Image.new("RGB", (640, 480), (120, 120, 120))
    half.paste((120, 120, 140), (0, 0, 320, 480))
    assert contrast(half) == pytest.approx(20, abs=2), "one colour is enough"


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (2000, 100), (333, 1000), (336, 336), (40, 30)])
def test_padding_is_no_contrast(size: tuple[int, int]) -> None:
    assert contrast(Image.new("RGB", size, "white")) == 0


@pytest.mark.parametrize("size", [(3000, 10), (1, 7)])
def test_a_line_that_is_nearly_all_padding_has_no_known_contrast(size: tuple[int, int]) -> None:
    assert contrast(Image.new("RGB", size, "white")) is None


def test_the_worst_picture_of_a_record_decides() -> None:
    settings = ImageSettings()
    small, large = noise((40, 30), 200), noise((900, 300), 200)
    groups = [picture(encoded(small), settings), patched(encoded(large), settings, 4)]
    found = picture_scores(groups, [700, 90_000])
    assert (found.min_side, found.max_side, found.max_aspect) == (30, 900, 3.0)
    assert (found.min_bytes, found.max_bytes) == (700, 90_000)
    assert (found.width, found.height) == (900, 300), "the largest picture's"
    assert asdict(picture_scores([], [])) == dict.fromkeys(asdict(found))


@pytest.mark.parametrize(
    ("step", "breaks", "holds", "reason"),
    [
        ("min_side", 31, 30, "min-side"),
        ("max_side", 39, 40, "max-side"),
        ("max_aspect", 1.3, 1.34, "max-aspect"),
        ("min_contrast", 255, 20, "min-contrast"),
        ("min_bytes", 701, 700, "min-bytes"),
        ("max_bytes", 699, 700, "max-bytes"),
    ],
)
def test_a_picture_is_junk_only_beyond_the_limit(step: str, breaks: Any, holds: Any, reason: str) -> None:
    scores = picture_scores([picture(encoded(noise((40, 30), 200)), ImageSettings())], [700])
    refuse_junk(scores, Steps.model_validate({step: holds}))
    with pytest.raises(Reject, match=f"{step} is ") as caught:
        refuse_junk(scores, Steps.model_validate({step: breaks}))
    assert caught.value.reason == reason
    refuse_junk(picture_scores([], []), Steps.model_validate({step: breaks}))


# The budget ---------------------------------------------------------------------------------------------------------


def budget(drawn: int, texts: tuple[int, dict[str, int]] = (10_000, {}), max_drop: float = 0.2) -> PictureBudget:
    made = PictureBudget(recipe({}, max_drop=max_drop), {"a": texts})
    made.expect({"a": drawn})
    return made


def test_pictures_may_use_the_whole_budget_and_no_more() -> None:
    made = budget(100)
    made.saw({"a": 100}, {"a/min-side": 12, "a/max-aspect": 8})
    with pytest.raises(BuildError, match=r"components\.a: filters drop 20\.8%; max_drop is 20\.0%") as caught:
        made.saw({"a": 1}, {"a/min-side": 1})
    table = str(caught.value).splitlines()
    assert table[1].split() == ["min_side", "13", "12.9%"]
    assert table[2].split() == ["max_aspect", "8", "7.9%"]
    assert table[-1].endswith("--set components.a.max_drop=1")


def test_a_build_stops_as_soon_as_there_is_no_doubt_and_not_before() -> None:
    budget(100_000).saw({"a": 200}, {"a/min-side": 65})
    budget(100_000).saw({"a": 100}, {"a/min-side": 90})
    with pytest.raises(BuildError, match="max_drop"):
        budget(100_000).saw({"a": 200}, {"a/min-side": 80})


def test_texts_and_pictures_share_one_budget() -> None:
    texts = (900, {"max_words": 100})
    budget(90, texts).saw({"a": 90}, {"a/min-side": 10})
    with pytest.raises(BuildError, match=r"filters drop 21\.0%") as caught:
        budget(90, texts).saw({"a": 90}, {"a/min-side": 11})
    assert "max_words" in str(caught.value)
    budget(90, (0, {}), max_drop=0).saw({"a": 90}, {})


# Builds -------------------------------------------------------------------------------------------------------------

LLAVA = "llava_v1_5_mix665k.json"


def corpus(data: Path) -> Path:
    """Thirty pictures, of which four are small, three blank and two long; ten captions of two words."""
    folder = data / "llava15"
    (folder / "coco").mkdir(parents=True)
    rows = []
    for i in range(30):
        size = (60, 50) if i < 4 else (900, 200) if i < 6 else (400 + i, 300)
        image = Image.new("RGB", size, "white") if 6 <= i < 9 else noise(size, 150)
        image.save(folder / f"coco/{i}.png")
        answer = "A bus." if i >= 20 else SENTENCE
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": i, "image": f"coco/{i}.png", "conversations": turns})
    (folder / LLAVA).write_text(json.dumps(rows))
    return data


def request(out: Path, data: Path, tokenizer: Path, **changes: Any) -> Request:
    content = {
        "name": "curated",
        "tokenizer": str(tokenizer),
        "samples_per_shard": 6,
        "components": {"pictures": {"source": "llava15", "count": 12}},
        **changes,
    }
    return Request(Recipe.model_validate(content), Path(), str(data), out, data / "catalog")


STEPS = {"min_side": 100, "max_aspect": 3, "min_contrast": 8, "min_answer_words": 3}


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, executor: Executor) -> Path:
    data = corpus(tmp_path_factory.mktemp("corpus"))
    out = data / "builds/curated"
    wanted = {"pictures": {"source": "llava15", "count": 11, "max_drop": 0.8}}
    build(request(out, data, tokenizer_folder, filters=STEPS, components=wanted), Progress())
    return out


def test_a_curated_build_holds_no_junk_and_counts_every_drop(curated: Path) -> None:
    manifest = read_manifest(curated)
    component = manifest["components"]["pictures"]
    assert component["dropped"] == {"min_answer_words": 10}
    assert component["pool"] == 20
    assert component["kept"] == 11, "the next in line took the place of junk"
    assert set(component["rejects"]) <= {"min-side", "max-aspect", "min-contrast"}
    assert component["drawn"] == 11 + component["rejected"]
    assert component["rejected"] == len(list(rejects(curated))) > 0
    index = pq.read_table(curated / "index.parquet")
    assert min(index["min_side"].to_pylist()) >= 100
    assert max(index["max_aspect"].to_pylist()) <= 3
    assert min(index["contrast"].to_pylist()) >= 8
    assert set(index["shortest_answer"].to_pylist()) == {14}
    assert min(index["min_bytes"].to_pylist()) > 1000
    report = (curated / "report.html").read_text()
    assert "Dropped by filters" in report
    assert "min_answer_words" in report
    assert validate(str(curated)) == []


def test_a_greedy_step_on_texts_stops_before_any_media_is_opened(tmp_path: Path, tokenizer_folder: Path) -> None:
    data = corpus(tmp_path)
    shutil.rmtree(data / "llava15/coco")
    out = tmp_path / "out"
    with pytest.raises(BuildError, match=r"components\.pictures: filters drop 33\.3% of 30 records") as caught:
        build(request(out, data, tokenizer_folder, filters={"min_answer_words": 3}), Progress())
    assert "min_answer_words            10    33.3%" in str(caught.value)
    assert not (out / "shards").exists()


def test_a_greedy_step_on_pictures_stops_the_build_and_what_is_done_is_kept(
    tmp_path: Path, tokenizer_folder: Path, executor: Executor
) -> None:
    data = corpus(tmp_path)
    out = tmp_path / "out"
    everything = {"pictures": {"source": "llava15", "count": "all"}}
    steps = {"min_side": 100, "min_contrast": 8}
    with pytest.raises(BuildError, match=r"(?s)filters drop .*min_(side|contrast) .*records opened so far"):
        build(request(out, data, tokenizer_folder, filters=steps, components=everything), Progress())
    allowed = request(out, data, tokenizer_folder, filters=steps, components=everything, max_drop=0.25)
    assert build(allowed, Progress())["components"]["pictures"]["rejects"] == {"min-contrast": 3, "min-side": 4}
    assert validate(str(out)) == []


def test_a_dry_run_shows_what_each_step_drops(tmp_path: Path, curated: Path, tokenizer_folder: Path) -> None:
    wanted = request(tmp_path / "out", curated.parents[1], tokenizer_folder, filters=STEPS)
    plan = preview(wanted, Progress())["components"]["pictures"]
    assert plan["dropped"] == {"min_answer_words": 10}
    assert plan["drop_share"] == pytest.approx(1 / 3)
    assert plan["drop_share"] > plan["max_drop"] == 0.2
    assert sum(plan["dropped_pictures"].values()) > 0


def test_replay_can_be_cut_by_the_scores_of_an_earlier_build(
    tmp_path: Path, curated: Path, tokenizer_folder: Path, executor: Executor
) -> None:
    sides = sorted(pq.read_table(curated / "index.parquet")["max_side"].to_pylist())
    steps = {"max_side": sides[5]}
    replay = {"again": {"replay": "earlier", "count": "all", "max_drop": 1}}
    wanted = {"components": replay, "filters": steps, "builds": {"earlier": str(curated)}}
    manifest = build(request(tmp_path / "out", tmp_path, tokenizer_folder, **wanted), Progress())
    assert manifest["components"]["again"]["kept"] == 6
    assert manifest["components"]["again"]["dropped"] == {"max_side": 5}
    scores = pq.read_table(tmp_path / "out/index.parquet", columns=["id", *dict(SCORES)]).to_pylist()
    before = pq.read_table(curated / "index.parquet", columns=["id", *dict(SCORES)]).to_pylist()
    assert all(row in before for row in scores)
    assert validate(str(tmp_path / "out")) == []


def test_a_build_from_before_there_were_scores_can_be_replayed_but_not_cut(
    tmp_path: Path, curated: Path, tokenizer_folder: Path, executor: Executor
) -> None:
    old = tmp_path / "old"
    shutil.copytree(curated, old)
    table = pq.read_table(old / "index.parquet").drop_columns(list(dict(SCORES)))
    pq.write_table(table, old / "index.parquet")
    manifest = json.loads((old / "manifest.json").read_bytes())
    manifest["index"]["sha256"] = file_sha256(old / "index.parquet")
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert validate(str(old)) == []
    components = {"again": {"replay": "old", "count": "all"}}
    cut = Recipe.model_validate({"name": "r", "tokenizer": "t", "components": components, "filters": {"min_words": 2}})
    with pytest.raises(RecipeError, match="min_words cannot be told of the build 'old', which was made before"):
        Planner(cut, [], {"old": EarlierBuild("old", old, manifest)}, tmp_path / "plan")
    build(request(tmp_path / "out", tmp_path, tokenizer_folder, components=components), Progress())
    assert pq.read_table(tmp_path / "out/index.parquet")["n_words"].null_count == 11
    assert validate(str(tmp_path / "out")) == []
