"""pipelines.retry: after a file is mended, a build is what it would have been from the start."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from formats.errors import BuildError
from formats.manifest import read_manifest
from pipelines.build import Request, build
from pipelines.executor import Executor
from pipelines.progress import Progress
from pipelines.report import rejects
from pipelines.retry import rehearse, request_of, retry
from recipes.schema import Recipe
from validators.run import validate

PICTURES, TEXTS = 40, 6
BROKEN, MISSING = (3, 4, 5, 6, 7), (11, 12)
MIX = "llava_v1_5_mix665k.json"


def picture(path: Path, i: int) -> None:
    drawn = Image.new("RGB", (120 + 7 * i, 140), (5 * i, 100, 200))
    ImageDraw.Draw(drawn).ellipse((20, 20, 90, 90), fill="white")
    drawn.save(path, quality=90)


def write_corpus(data: Path) -> Path:
    folder = data / "llava15" / "coco"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i in range(PICTURES):
        if i not in MISSING:
            picture(folder / f"{i}.jpg", i)
        if i in BROKEN:
            (folder / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
        turns = [{"from": "human", "value": f"<image>\nWhat is in {i}?"}, {"from": "gpt", "value": "A circle."}]
        rows.append({"id": i, "image": f"coco/{i}.jpg", "conversations": turns})
    for i in range(TEXTS):
        turns = [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": "Yes. " * (i + 1)}]
        rows.append({"id": f"t{i}", "model": "", "conversations": turns})
    (folder.parent / MIX).write_text(json.dumps(rows))
    return data


def recipe(tokenizer_folder: Path, **changes: Any) -> Recipe:
    content = {
        "name": "mixed",
        "tokenizer": str(tokenizer_folder),
        "samples_per_shard": 5,
        "components": {
            "pictures": {"source": "llava15", "count": 28, "filters": {"modality": ["image"]}},
            "texts": {"source": "llava15", "count": 6, "filters": {"modality": ["text"]}},
        },
    }
    return Recipe.model_validate({**content, **changes})


def made(wanted: Recipe, data: Path, out: Path) -> dict[str, Any]:
    return build(Request(wanted, Path(), str(data), out, data / "catalog"), Progress())


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file of a build; of the manifest without its time and place."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["environment"]
    return {**{n: hashlib.sha256(b).hexdigest() for n, b in found.items()}, "manifest": json.dumps(manifest)}


def places(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard, by its content."""
    shards = {hashlib.sha256(p.read_bytes()).hexdigest(): p.stat() for p in (out / "shards").glob("*.tar")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in shards.items()}


@pytest.fixture(scope="module")
def first(tokenizer_folder: Path, executor: Executor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and build of which some pictures are broken or missing."""
    folder = tmp_path_factory.mktemp("first")
    made(recipe(tokenizer_folder), write_corpus(folder / "data"), folder / "mixed")
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    """A copy of it to mend; the catalog goes by times and is read anew."""
    shutil.copytree(first, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture(scope="module")
def some(first: Path) -> tuple[int, int]:
    """A broken and a missing picture that are in the ledger."""
    broken, missing = (next(i for i in lost(first) if i in kind) for kind in (BROKEN, MISSING))
    return broken, missing


@pytest.fixture(scope="module")
def sound(first: Path, some: tuple[int, int], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build that has those right from the start."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(first / "data", folder / "data")
    mend(folder, *some)
    made(recipe(tokenizer_folder), folder / "data", folder / "mixed")
    return folder / "mixed"


def tried(place: Path) -> dict[str, Any]:
    return retry(request_of(place / "mixed", str(place / "data")), Progress())


def lost(place: Path) -> list[int]:
    """Numbers of the pictures that are in the ledger."""
    return sorted(int(reject["uid"].rpartition(":")[2]) for reject in rejects(place / "mixed"))


def test_mended_pictures_make_the_build_of_a_sound_start(place: Path, some: tuple[int, int], sound: Path) -> None:
    known = lost(place)
    before = places(place / "mixed")
    mend(place, *some)
    result = tried(place)
    assert digests(place / "mixed") == digests(sound)
    assert {verdict["uid"] for verdict in result["mended"]} == {f"llava15/{MIX}:{i}" for i in some}
    assert result["tried"] == len(known)
    after = places(place / "mixed")
    kept = before.keys() & after.keys()
    assert all(before[name] == after[name] for name in kept)
    assert len(kept) == result["shards"]["kept"] > result["shards"]["rewritten"] > 0
    assert validate(str(place / "mixed"), deep=True) == []


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def mend(place: Path, *numbers: int) -> None:
    for i in numbers:
        picture(place / "data/llava15/coco" / f"{i}.jpg", i)


def test_a_retry_of_what_was_not_mended_changes_nothing(place: Path, executor: Executor) -> None:
    before = state(place / "mixed")
    result = tried(place)
    assert (result["mended"], result["changed"], result["shards"]["rewritten"]) == ([], [], 0)
    assert sum(result["failing"].values()) == result["tried"] == len(lost(place)) > 3
    assert state(place / "mixed") == before


def test_a_dry_run_says_what_a_retry_would_do_and_touches_nothing(place: Path, executor: Executor) -> None:
    one, other = lost(place)[:2]
    mend(place, one)
    (place / "data/llava15/coco" / f"{other}.jpg").unlink()
    before = state(place / "mixed")
    result = rehearse(request_of(place / "mixed", str(place / "data")), Progress())
    assert [verdict["uid"] for verdict in result["mended"]] == [f"llava15/{MIX}:{one}"]
    assert [(v["reason"], v["now"]) for v in result["changed"]] == [("broken-image", "media-missing")]
    assert state(place / "mixed") == before


def test_another_reason_is_another_line_of_the_ledger(place: Path, tokenizer_folder: Path, executor: Executor) -> None:
    (place / "data/llava15/coco" / f"{lost(place)[0]}.jpg").unlink()
    before = places(place / "mixed")
    result = tried(place)
    made(recipe(tokenizer_folder), place / "data", place / "fresh")
    assert digests(place / "mixed") == digests(place / "fresh")
    assert result["mended"] == []
    assert before.keys() == places(place / "mixed").keys()  # no sample came or went


class Interrupted(Progress):
    """Ends the run, as Ctrl-C would, at some advance of some stage."""

    def __init__(self, stage: str, at: int) -> None:
        self._wanted, self._left = stage, at
        self._stage = ""

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self._stage = name

    def advance(self, amount: int, **_: Any) -> None:
        self._left -= self._stage == self._wanted
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "at"), [("try again", 0), ("build", 0), ("build", 7)])
def test_an_interrupted_retry_goes_on_though_more_was_mended_meanwhile(
    stage: str, at: int, place: Path, some: tuple[int, int], sound: Path
) -> None:
    one, other = some
    before = digests(place / "mixed")
    mend(place, one)
    with pytest.raises(KeyboardInterrupt):
        retry(request_of(place / "mixed", str(place / "data")), Interrupted(stage, at))
    still = {name: sha256 for name, sha256 in digests(place / "mixed").items() if not name.startswith(".build")}
    assert still == before  # until all is made, the build is what it was
    mend(place, other)
    tried(place)
    assert digests(place / "mixed") == digests(sound)


def test_a_retry_killed_while_it_finishes_goes_on(place: Path, some: tuple[int, int], sound: Path) -> None:
    mend(place, *some)
    line = [sys.executable, "-m", "longllava", "retry", str(place / "mixed"), "--data", str(place / "data")]
    line += ["--workers", "1"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while (place / "mixed/manifest.json").exists() and job.poll() is None:
            time.sleep(0.002)
        os.kill(job.pid, signal.SIGKILL)
    assert not (place / "mixed/manifest.json").exists()
    tried(place)
    assert digests(place / "mixed") == digests(sound)


def test_changed_annotations_are_no_case_for_a_retry(place: Path, executor: Executor) -> None:
    file = place / "data/llava15" / MIX
    file.write_text(file.read_text().replace("A circle.", "A disc."))
    before = state(place / "mixed")
    with pytest.raises(BuildError, match=f"llava15/{MIX} changed since it was built.*build anew"):
        tried(place)
    assert state(place / "mixed") == before


def test_data_that_are_gone_are_asked_for(place: Path) -> None:
    with pytest.raises(BuildError, match="which is not there; say with --data"):
        request_of(place / "mixed", str(place / "elsewhere"))
    with pytest.raises(BuildError, match="is not a build"):
        request_of(place)


PICTURES_ONLY = {"source": "llava15", "filters": {"modality": ["image"]}}
MIXES: dict[str, dict[str, Any]] = {
    "a shard a sample": {"samples_per_shard": 1, "components": {"pictures": {**PICTURES_ONLY, "count": 14}}},
    "other ways to draw": {
        "components": {
            "nothing-replaced": {**PICTURES_ONLY, "count": 30, "backfill": False, "on_short": "accept"},
            "all-there-is": {**PICTURES_ONLY, "count": "all"},
            "more-than-there-is": {**PICTURES_ONLY, "count": 45, "on_short": "repeat"},
        }
    },
}


@pytest.mark.parametrize("name", MIXES)
def test_a_retry_follows_the_recipe(name: str, place: Path, tokenizer_folder: Path, executor: Executor) -> None:
    wanted = recipe(tokenizer_folder, **MIXES[name])
    shutil.rmtree(place / "mixed")
    made(wanted, place / "data", place / "mixed")
    assert {reject["component"] for reject in rejects(place / "mixed")} == set(wanted.components)
    mend(place, lost(place)[1], lost(place)[-1])
    result = tried(place)
    made(wanted, place / "data", place / "fresh")
    assert list(rejects(place / "mixed")) == list(rejects(place / "fresh"))
    assert digests(place / "mixed") == digests(place / "fresh")
    assert len(result["mended"]) >= 2
    assert validate(str(place / "mixed")) == []


def test_a_build_that_fell_short_is_finished_by_a_retry(
    place: Path, tokenizer_folder: Path, executor: Executor
) -> None:
    wanted = recipe(tokenizer_folder, components={"pictures": {**PICTURES_ONLY, "count": 35}})
    with pytest.raises(BuildError, match="asked 35, got 33"):
        made(wanted, place / "data", place / "short")
    with pytest.raises(BuildError, match="asked 35, got 33"):
        retry(request_of(place / "short"), Progress())
    mend(place, *BROKEN)
    assert rehearse(request_of(place / "short"), Progress())["tried"] == 7
    retry(request_of(place / "short"), Progress())
    made(wanted, place / "data", place / "fresh")
    assert digests(place / "short") == digests(place / "fresh")


def test_a_later_build_is_not_retried_over_an_earlier_one_that_changed(
    place: Path, sound: Path, tokenizer_folder: Path
) -> None:
    components = {
        "again": {"replay": "mixed", "count": 6},
        "tiles": {"subimage": "mixed", "count": 9, "max_tiles": 4},
    }
    wanted = recipe(tokenizer_folder, name="third", components=components)
    victim = next(i for i in range(PICTURES) if i not in (*BROKEN, *MISSING))
    kept = place / "data/llava15/coco" / f"{victim}.jpg"
    for path in kept.parent.glob("*.jpg"):
        path.rename(path.with_suffix(".away")) if path.stem in ("20", "21", "22", "23", "24", "25") else None
    made(wanted, place / "data", place / "third")
    assert read_manifest(place / "third")["components"]["tiles"]["rejected"] > 0
    for path in kept.parent.glob("*.away"):
        path.rename(path.with_suffix(".jpg"))
    retry(request_of(place / "third", str(place / "data")), Progress())
    made(wanted, place / "data", place / "fresh")
    assert digests(place / "third") == digests(place / "fresh")
    assert validate(str(place / "third")) == []  # sub-images are drawn from the back
    shutil.rmtree(place / "mixed")
    shutil.copytree(sound, place / "mixed")
    with pytest.raises(BuildError, match="the build mixed changed since it was built"):
        retry(request_of(place / "third", str(place / "data")), Progress())


def test_a_shard_that_was_empty_in_a_short_build_is_filled_by_a_retry(
    place: Path, tokenizer_folder: Path, executor: Executor
) -> None:
    file = place / "data/llava15" / MIX
    file.write_text(json.dumps(json.loads(file.read_text())[:6]))
    mend(place, *range(6))
    wanted = recipe(tokenizer_folder, samples_per_shard=1, components={"all": {**PICTURES_ONLY, "count": 6}})
    made(wanted, place / "data", place / "sound")
    second = int(pq.read_table(place / "sound/index.parquet")["id"][1].as_py().rpartition(":")[2])
    (place / "data/llava15/coco" / f"{second}.jpg").unlink()
    with pytest.raises(BuildError, match="asked 6, got 5"):
        made(wanted, place / "data", place / "short")
    mend(place, second)
    assert retry(request_of(place / "short"), Progress())["totals"]["samples"] == 6
    assert digests(place / "short") == digests(place / "sound")
