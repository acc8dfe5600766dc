"""pipelines.build end to end: real Ray, real pictures, real shards."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from formats.errors import BuildError
from formats.manifest import read_manifest
from pipelines.build import Request, build
from pipelines.executor import Executor
from pipelines.progress import Progress
from pipelines.report import rejects, statistics, stored_samples
from recipes.schema import Recipe
from validators.run import validate

PICTURES, TEXTS = 30, 12
MIX = "llava_v1_5_mix665k.json"


def write_corpus(data: Path, broken: tuple[int, ...] = ()) -> Path:
    """A small llava15: PICTURES drawn pictures of many sizes, TEXTS text-only rows."""
    folder = data / "llava15"
    (folder / "coco").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i in range(PICTURES):
        picture = Image.new("RGB", (200 + 37 * i, 400 - 5 * i), (8 * i, 100, 200))
        ImageDraw.Draw(picture).ellipse((20, 20, 120, 120), fill="white")
        picture.save(folder / "coco" / f"{i}.jpg", quality=90)
        if i in broken:
            (folder / "coco" / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
        turns = [{"from": "human", "value": f"<image>\nWhat is in {i}?"}, {"from": "gpt", "value": "A circle."}]
        rows.append({"id": i, "image": f"coco/{i}.jpg", "conversations": turns})
    for i in range(TEXTS):
        turns = [{"from": "human", "value": f"Literal <image> {i}"}, {"from": "gpt", "value": "Yes. " * (i + 1)}]
        rows.append({"id": f"t{i}", "model": "", "conversations": turns})
    (folder / MIX).write_text(json.dumps(rows))
    return data


def recipe(tokenizer_folder: Path, **changes: Any) -> Recipe:
    content = {
        "name": "mixed",
        "tokenizer": str(tokenizer_folder),
        "samples_per_shard": 8,
        "components": {
            "pictures": {"source": "llava15", "count": 20, "filters": {"modality": ["image"]}},
            "texts": {"source": "llava15", "count": 10, "filters": {"modality": ["text"]}},
        },
    }
    return Recipe.model_validate({**content, **changes})


def request(wanted: Recipe, data: Path, out: Path) -> Request:
    return Request(wanted, Path(), str(data), out, data / "catalog")


def made(wanted: Recipe, data: Path, out: Path) -> dict[str, Any]:
    return build(request(wanted, data, out), Progress())


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file of a build; of the manifest without its time and place."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["environment"]
    return {**{n: hashlib.sha256(b).hexdigest() for n, b in found.items()}, "manifest": json.dumps(manifest)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), broken=(3, 4, 5, 6))


@pytest.fixture(scope="module")
def finished(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("finished") / "mixed"
    made(recipe(tokenizer_folder), corpus, out)
    return out


def test_counts_add_up_and_failures_are_replaced(finished: Path) -> None:
    manifest = read_manifest(finished)
    for name, c in manifest["components"].items():
        assert c["asked"] == c["kept"] + c["short"], name
        assert c["drawn"] == c["kept"] + c["rejected"], name
        assert c["short"] == 0
    pictures = manifest["components"]["pictures"]
    assert pictures["rejects"] == {"broken-image": pictures["rejected"]}
    assert pictures["rejected"] > 0
    ledger = list(rejects(finished))
    assert len(ledger) == pictures["rejected"]
    kept = set(pq.read_table(finished / "index.parquet")["id"].to_pylist())
    for reject in ledger:
        assert reject["uid"] not in kept
        replacement = reject["replaced_by"]
        assert replacement in kept or replacement in {r["uid"] for r in ledger}


def test_validators_find_nothing(finished: Path) -> None:
    assert validate(str(finished), deep=True) == []


def test_the_kept_are_those_with_the_smallest_hashes_that_work(finished: Path, corpus: Path) -> None:
    good = [f"llava15/{MIX}:{i}" for i in range(PICTURES) if i not in (3, 4, 5, 6)]
    by_hash = sorted(good, key=lambda uid: hashlib.md5(f"0/draw/pictures/{uid}".encode()).hexdigest())
    index = pq.read_table(finished / "index.parquet").to_pylist()
    assert {row["id"] for row in index if row["component"] == "pictures"} == set(by_hash[:20])


def test_literal_control_strings_are_escaped_and_counted(finished: Path) -> None:
    (sample,) = stored_samples(finished, component="texts", limit=1)
    assert sample.record["escaped"] == 1
    assert sample.record["conversations"][0]["value"].startswith("Literal < image>")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset
def test_webdataset_reads_as_many_images_as_there_are_placeholders(finished: Path) -> None:
    import webdataset

    shards = sorted(map(str, (finished / "shards").glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert len(samples) == 30
    for sample in samples:
        text = "".join(turn["value"] for turn in sample["json"]["conversations"])
        images = [sample[entry["file"]] for entry in sample["json"]["images"]]
        assert text.count("<image>") == len(images)
        assert all(image.size == (336, 336) and image.mode == "RGB" for image in images)


def command(wanted: Recipe, data: Path, out: Path, *extra: str) -> list[str]:
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(wanted.model_dump_json(exclude_unset=True))  # JSON is YAML
    catalog = str(out.with_suffix(".catalog"))
    arguments = ["build", str(path), "--data", str(data), "--out", str(out), "--catalog", catalog, *extra]
    return [sys.executable, "-m", "longllava", *arguments]


def test_any_number_of_workers_makes_the_same_bytes(
    corpus: Path, tokenizer_folder: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "one" / "mixed"
    subprocess.run(command(recipe(tokenizer_folder), corpus, out, "--workers", "1"), check=True, capture_output=True)
    assert digests(out) == digests(finished)


def test_a_killed_build_goes_on_to_the_same_bytes(
    corpus: Path, tokenizer_folder: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed" / "mixed"
    line = command(recipe(tokenizer_folder), corpus, out, "--workers", "1")
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 60
        while not list(out.glob(".build/shards/*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        children = psutil.Process(job.pid).children(recursive=True)
        os.kill(job.pid, signal.SIGKILL)
    assert psutil.wait_procs(children, timeout=150)[1] == []  # no Ray, no worker, no decoder
    assert not (out / "manifest.json").exists()
    subprocess.run(line, check=True, capture_output=True)
    assert digests(out) == digests(finished)
    assert not (out / ".build").exists()


def test_a_finished_build_is_left_alone(finished: Path, corpus: Path, tokenizer_folder: Path) -> None:
    before = digests(finished)
    made(recipe(tokenizer_folder), corpus, finished)
    assert digests(finished) == before
    with pytest.raises(BuildError, match=r"finished build of another recipe \(seed differ"):
        made(recipe(tokenizer_folder, seed=1), corpus, finished)


def test_a_changed_recipe_is_not_resumed(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    wanted = recipe(tokenizer_folder, components={"pictures": {"source": "llava15", "count": 40}})
    with pytest.raises(BuildError, match="asked 40, got 38") as caught:
        made(wanted, corpus, tmp_path / "out")
    assert "--set components.pictures.on_short=accept" in str(caught.value)
    with pytest.raises(BuildError, match="the recipe changed since it began"):
        made(wanted.model_copy(update={"seed": 3}), corpus, tmp_path / "out")
    inputs = tmp_path / "out" / ".build" / "inputs.json"
    before = inputs.read_text()
    inputs.write_text(re.sub(r'("the version of longllava": "[0-9.]+)[+]\w+', r"\1+0123456789ab", before))
    with pytest.raises(BuildError, match="the version of longllava changed since it began"):  # as by a `git pull`
        made(wanted, corpus, tmp_path / "out")
    inputs.write_text(before)
    accepting = recipe(
        tokenizer_folder, components={"pictures": {"source": "llava15", "count": 40, "on_short": "accept"}}
    )
    manifest = made(accepting, corpus, tmp_path / "out")
    assert manifest["components"]["pictures"]["short"] == 2
    assert validate(str(tmp_path / "out")) == []


def test_all_takes_what_can_be_used(corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path) -> None:
    wanted = recipe(tokenizer_folder, components={"pictures": {"source": "llava15", "count": "all"}})
    counts = made(wanted, corpus, tmp_path / "out")["components"]["pictures"]
    assert (counts["asked"], counts["kept"], counts["short"]) == (42, 38, 4)


def test_a_build_of_nothing_is_a_build(tokenizer_folder: Path, executor: Executor, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "data", broken=tuple(range(PICTURES)))
    component = {"source": "llava15", "count": "all", "filters": {"modality": ["image"]}}
    manifest = made(recipe(tokenizer_folder, components={"pictures": component}), data, tmp_path / "out")
    assert (manifest["totals"]["samples"], manifest["totals"]["rejected"], manifest["shards"]) == (0, PICTURES, [])
    assert validate(str(tmp_path / "out")) == []
    assert statistics(tmp_path / "out")["total"]["samples"] == 0


def test_a_pool_that_is_too_small_is_told_before_the_work(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    components = {"texts": {"source": "llava15", "count": 13, "filters": {"modality": ["text"]}}}
    with pytest.raises(BuildError, match=r"texts: asked 13, but 12 pass the filters, 30 dropped by modality"):
        made(recipe(tokenizer_folder, components=components), corpus, tmp_path / "out")


def test_a_repeating_component_whose_media_all_fail_comes_to_an_end(
    tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data", broken=tuple(range(PICTURES)))
    component = {"source": "llava15", "count": 40, "on_short": "repeat", "filters": {"modality": ["image"]}}
    with pytest.raises(BuildError, match="asked 40, got 0 of"):
        made(recipe(tokenizer_folder, components={"pictures": component}), data, tmp_path / "out")


def test_two_builds_into_one_directory_are_refused(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    from pipelines.build import alone

    with alone(tmp_path / "out"), pytest.raises(BuildError, match="another build is at work"):
        made(recipe(tokenizer_folder), corpus, tmp_path / "out")


def test_replay_copies_and_sub_images_go_back_to_the_pictures(
    finished: Path, corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    wanted = recipe(
        tokenizer_folder,
        name="third",
        builds={"mixed": str(finished)},
        components={
            "again": {"replay": "mixed", "count": 12, "filters": {"modality": ["image"]}},
            "tiles": {"subimage": "mixed", "count": 8, "max_tiles": 4},
        },
    )
    out = tmp_path / "third"
    manifest = made(wanted, corpus, out)
    assert validate(str(out), deep=True) == []
    assert Counter(row["modality"] for row in pq.read_table(out / "index.parquet").to_pylist()) == {
        "image": 12,
        "subimage": 8,
    }
    originals = {sample.row["id"]: sample for sample in stored_samples(finished, limit=1000)}
    samples = list(stored_samples(out, limit=1000))
    assert len({sample.row["id"] for sample in samples}) == 20
    for sample in samples:
        original = originals[sample.row["id"]]
        if sample.row["component"] == "again":
            assert (sample.record, sample.images) == (original.record, original.images)
        else:
            assert sample.images[0] == original.images[0]
            assert 1 <= len(sample.images) - 1 <= 4
            assert sample.record["provenance"]["build"]["name"] == "mixed"
    assert manifest["builds"]["mixed"]["recipe_sha256"] == read_manifest(finished)["recipe_sha256"]


def test_a_rotten_earlier_build_is_not_replayed(
    finished: Path, corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    import shutil

    rotten = tmp_path / "mixed"
    shutil.copytree(finished, rotten)
    for shard in (rotten / "shards").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[5_000::9_000] = bytes(len(data[5_000::9_000]))
        shard.write_bytes(data)
    wanted = recipe(tokenizer_folder, components={"again": {"replay": "mixed", "count": 20}})
    with pytest.raises(BuildError, match="is not what its index says; rebuild mixed"):
        made(wanted, corpus, tmp_path / "third")


def test_pictures_inside_annotations_are_found_when_the_media_root_is_elsewhere(
    tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "mantis" / "chartqa"
    folder.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (50, 40), "red").save(file, "PNG")
    turns = [{"role": "user", "content": "What colour?<image>"}, {"role": "assistant", "content": "Red"}]
    row = {"id": "1", "images": [{"bytes": file.getvalue(), "path": "x.png"}], "conversation": turns, "source": "c"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "train-00000-of-00001.parquet")
    wanted = recipe(
        tokenizer_folder,
        sources={"mantis": {"media_root": str(tmp_path)}},
        components={"charts": {"source": "mantis", "count": 1}},
    )
    made(wanted, tmp_path / "data", tmp_path / "out")
    (sample,) = stored_samples(tmp_path / "out")
    assert sample.record["images"][0]["source_size"] == [50, 40]


def test_a_file_that_breaks_costs_only_the_records_that_use_it(
    finished: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data", broken=(3, 4, 5, 6))
    before = {sample.row["id"]: sample for sample in stored_samples(finished, limit=100)}
    victim = next(uid for uid, sample in before.items() if sample.row["component"] == "pictures")
    (data / "llava15" / "coco" / f"{victim.rsplit(':')[-1]}.jpg").unlink()
    manifest = made(recipe(tokenizer_folder), data, tmp_path / "out")
    after = {sample.row["id"]: sample for sample in stored_samples(tmp_path / "out", limit=100)}
    (loss,) = [reject for reject in rejects(tmp_path / "out") if reject["reason"] == "media-missing"]
    assert loss["uid"] == victim
    assert set(before) - set(after) == {victim}
    assert len(set(after) - set(before)) == 1
    for uid in set(before) & set(after):
        assert (after[uid].record, after[uid].images) == (before[uid].record, before[uid].images)
    assert manifest["components"]["pictures"]["kept"] == 20


def test_sub_images_never_come_from_other_annotations(
    tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data")
    made(recipe(tokenizer_folder), data, tmp_path / "mixed")
    file = data / "llava15" / MIX
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[-1], *rows[:-1]]))  # the same size, and every record one further
    tiles = recipe(tokenizer_folder, components={"tiles": {"subimage": "mixed", "count": 3}})
    with pytest.raises(BuildError, match=f"llava15/{MIX} is not the file that the build 'mixed' was made of"):
        made(tiles, data, tmp_path / "tiles")
    again = recipe(tokenizer_folder, components={"again": {"replay": "mixed", "count": 3}})
    assert made(again, data, tmp_path / "again")["totals"]["samples"] == 3


def test_folders_that_look_like_columns_are_just_folders(
    finished: Path, corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "modality=video" / "n[0]*" / "mixed"
    shutil.copytree(finished, folder)
    wanted = recipe(
        tokenizer_folder,
        builds={"mixed": str(folder)},
        components={
            "again": {"replay": "mixed", "count": 9, "filters": {"modality": ["image"]}},
            "texts": {"source": "llava15", "count": 9, "filters": {"modality": ["text"]}},
        },
    )
    asked = Request(wanted, Path(), str(corpus), tmp_path / "out", tmp_path / "modality=video" / "c[1]")
    assert build(asked, Progress())["totals"]["samples"] == 18


def test_replays_of_one_build_do_not_overlap(
    finished: Path, corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    components = {name: {"replay": "mixed", "count": 9} for name in ("a", "b", "c")}
    wanted = recipe(tokenizer_folder, builds={"mixed": str(finished)}, components=components)
    made(wanted, corpus, tmp_path / "out")
    assert len({sample.row["id"] for sample in stored_samples(tmp_path / "out", limit=100)}) == 27


def test_shards_of_an_earlier_build_do_not_survive_a_rebuild(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    made(recipe(tokenizer_folder), corpus, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    components = {"texts": {"source": "llava15", "count": 4, "filters": {"modality": ["text"]}}}
    made(recipe(tokenizer_folder, components=components), corpus, tmp_path / "out")
    left = sorted(path.name for path in (tmp_path / "out" / "shards").iterdir())
    assert left == ["train-000000.tar", "train-000000.tar.idx"]
    assert validate(str(tmp_path / "out")) == []


def test_repeating_fills_the_count_although_half_of_the_records_fail(
    tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    data = write_corpus(tmp_path / "data", broken=tuple(range(0, PICTURES, 2)))
    component = {"source": "llava15", "count": 100, "on_short": "repeat", "filters": {"modality": ["image"]}}
    manifest = made(recipe(tokenizer_folder, components={"pictures": component}), data, tmp_path / "out")
    assert manifest["components"]["pictures"]["kept"] == 100
    assert validate(str(tmp_path / "out")) == []


def test_there_is_nothing_to_repeat_in_an_empty_pool(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    component = {"source": "llava15", "count": 5, "on_short": "repeat", "filters": {"modality": ["video"]}}
    with pytest.raises(BuildError, match="asked 5, but 0 pass the filters"):
        made(recipe(tokenizer_folder, components={"films": component}), corpus, tmp_path / "out")
