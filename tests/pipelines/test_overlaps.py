"""pipelines.overlaps: builds that pass over duplicates and contaminated records."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from formats.errors import RecipeError, UsageError
from formats.manifest import read_manifest
from pipelines.benchmark_prints import write_fingerprints
from pipelines.build import Request, build
from pipelines.executor import Executor
from pipelines.overlap_report import overlap_report
from pipelines.progress import Progress
from recipes.schema import Recipe, load_recipe
from validators.run import validate

MIX = "llava_v1_5_mix665k.json"
PICTURES = 12


def photographs(shared: Path) -> list[Path]:
    folder = shared / "data/annotations/mantis_chat/train_images/sharegpt4v/coco/train2017"
    return sorted(folder.glob("*.jpg"))[:PICTURES]


@pytest.fixture(scope="module")
def corpus(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photographs with a question each, and after them what is planted; row numbers are in `PLANTED`."""
    data = tmp_path_factory.mktemp("corpus")
    folder = data / "llava15"
    (folder / "coco").mkdir(parents=True)
    rows: list[tuple[str, str, str | None]] = []
    for i, path in enumerate(photographs(shared)):
        shutil.copy(path, folder / f"coco/{i}.jpg")
        rows.append((f"What can be seen in photograph number {i}?", f"Things of the kind {i}.", f"coco/{i}.jpg"))
    shutil.copy(photographs(shared)[0], folder / "coco/copy.jpg")
    anew = io.BytesIO()
    picture = Image.open(photographs(shared)[1]).convert("RGB")
    picture.resize((picture.width // 2, picture.height // 2)).save(anew, "JPEG", quality=70)
    (folder / "coco/anew.jpg").write_bytes(anew.getvalue())
    rows += [
        ("What can be seen in photograph number 0?", "Things of the kind 0.", "coco/copy.jpg"),  # 12: exact
        ("What can be seen in photograph number 1?", "Things of the kind 1.", "coco/anew.jpg"),  # 13: near
        ("How many people are there?", "None.", "coco/0.jpg"),  # 14: another question
        ("What can be seen in photograph number 0?", "Things of the kind 0.", "coco/5.jpg"),  # 15: another picture
        ("Who wrote it?", "A poet.", None),  # 16
        ("Who  wrote it?", "A poet.", None),  # 17: exact
        ("Who wrote IT?", "a poet", None),  # 18: near
        ("What can be seen in photograph number 2?", "Things of the kind 2.", "coco/absent.jpg"),  # 19: no picture
    ]
    records = []
    for i, (asked, answer, image) in enumerate(rows):
        turns = [{"from": "human", "value": "<image>\n" * bool(image) + asked}, {"from": "gpt", "value": answer}]
        records.append({"id": i, **({"image": image} if image else {}), "conversations": turns})
    (folder / MIX).write_text(json.dumps(records))
    return data


def recipe(tokenizer_folder: Path, **changes: Any) -> Recipe:
    components = {"all": {"source": "llava15", "count": "all"}}
    content = {"name": "apart", "tokenizer": str(tokenizer_folder), "samples_per_shard": 8, "components": components}
    return Recipe.model_validate({**content, **changes})


def request(wanted: Recipe, data: Path, out: Path) -> Request:
    return Request(wanted, Path(), str(data), out, data / "catalog")


def made(wanted: Recipe, data: Path, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], set[int]]:
    """Builds, and checks what is built; returns the manifest, the ledger of overlaps and the numbers of the kept."""
    build(request(wanted, data, out), Progress())
    assert validate(str(out), deep=True) == []
    manifest = read_manifest(out)
    for component in manifest["components"].values():
        assert component["drawn"] == component["kept"] + component["rejected"]
    ledger = [json.loads(line) for line in (out / "overlaps.jsonl").read_text().splitlines()]
    assert manifest["overlaps"]["rows"] == len(ledger)
    return manifest, ledger, {number(uid) for uid in pq.read_table(out / "index.parquet")["id"].to_pylist()}


def number(uid: str) -> int:
    return int(uid.rpartition(":")[2])


@pytest.mark.parametrize(
    ("mode", "groups"), [("exact", [{0, 12}, {16, 17}]), ("near", [{0, 12}, {1, 13}, {16, 17, 18}])]
)
def test_one_of_each_group_is_kept_and_the_ledger_says_which(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path, mode: str, groups: list[set[int]]
) -> None:
    manifest, ledger, kept = made(recipe(tokenizer_folder, duplicates=mode), corpus, tmp_path / "out")
    everyone = set(range(PICTURES + 8)) - {19}
    alone = everyone - set().union(*groups)
    assert alone <= kept
    assert [len(kept & group) for group in groups] == [1] * len(groups)
    component = manifest["components"]["all"]
    dropped = sum(len(group) - 1 for group in groups)
    assert component["filtered"] == {"duplicate": dropped}
    assert component["pool"] == PICTURES + 8 - dropped
    assert component["rejects"] == {"media-missing": 1}
    assert len(ledger) == dropped
    for line in ledger:
        group = next(group for group in groups if number(line["uid"]) in group)
        assert number(line["kept"]) in group & kept
        assert (line["component"], line["reason"], line["kept_component"]) == ("all", "duplicate", "all")
    exact = {(0, 12), (16, 17)}
    for line in ledger:
        pair = tuple(sorted((number(line["uid"]), number(line["kept"]))))
        assert line["exact"] == (pair in exact)


def test_over_components_the_one_that_draws_first_keeps_a_record(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    pictures = {"source": "llava15", "filters": {"modality": ["image"]}}
    components = {"a": {**pictures, "count": 5}, "b": {**pictures, "count": 5}}
    manifest, ledger, kept = made(
        recipe(tokenizer_folder, duplicates="near", components=components), corpus, tmp_path / "out"
    )
    index = pq.read_table(tmp_path / "out/index.parquet").to_pylist()
    assert len(index) == len(kept) == 10
    assert not {0, 12} <= kept
    assert not {1, 13} <= kept
    pools = sum(component["pool"] for component in manifest["components"].values())
    passed = sum(component["filtered"]["duplicate"] for component in manifest["components"].values())
    assert passed == len(ledger)
    assert pools + passed == 2 * (PICTURES + 5)
    assert pools == PICTURES + 3  # 0 or 12, 1 or 13, and no record in both


def test_an_earlier_build_keeps_what_it_has(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    texts = {"all": {"source": "llava15", "count": "all", "filters": {"modality": ["text"]}}}
    made(recipe(tokenizer_folder, name="earlier", duplicates="near", components=texts), corpus, tmp_path / "earlier")
    components = {"new": {"source": "llava15", "count": "all"}, "again": {"replay": "earlier", "count": 1}}
    wanted = recipe(tokenizer_folder, duplicates="near", apart_from=["earlier"], components=components)
    manifest, ledger, kept = made(wanted, corpus, tmp_path / "later")
    assert manifest["components"]["new"]["kept"] == PICTURES + 2
    assert len(kept & {16, 17, 18}) == manifest["components"]["again"]["kept"] == 1
    of_texts = [line for line in ledger if number(line["uid"]) >= 16]
    assert {number(line["uid"]) for line in of_texts} == {16, 17, 18}
    assert {(line["component"], line["kept_component"]) for line in of_texts} == {("new", "build earlier")}


def test_contaminated_records_are_passed_over_and_no_copy_goes_for_them(
    corpus: Path, shared: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    folder = tmp_path / "benchmarks/MM-Vet/images"
    folder.mkdir(parents=True)
    shutil.copy(photographs(shared)[0], folder / "v1_0.jpg")
    item = {"v1_0": {"imagename": "v1_0.jpg", "question": "What is in the image?"}}
    (folder.parent / "mm-vet.json").write_text(json.dumps(item))
    prints = tmp_path / "prints.parquet"
    write_fingerprints(str(tmp_path / "benchmarks"), prints, executor, Progress())
    wanted = recipe(tokenizer_folder, duplicates="exact", decontaminate=str(prints))
    manifest, ledger, kept = made(wanted, corpus, tmp_path / "out")
    assert {0, 12, 14} & kept == set()
    contaminated = [line for line in ledger if line["reason"] == "contaminated"]
    assert {number(line["uid"]) for line in contaminated} == {0, 12, 14}
    assert {(line["benchmark"], line["item"], line["other"]) for line in contaminated} == {
        ("mmvet", "v1_0", "v1_0.jpg")
    }
    assert manifest["components"]["all"]["filtered"] == {"contaminated": 3, "duplicate": 1}
    report = overlap_report(request(wanted, corpus, tmp_path / "unused"), Progress())
    assert report["components"] == {"all": {"records": PICTURES + 8, "contaminated": 3, "duplicate": 1}}
    assert report["benchmarks"] == {"mmvet": {"items": 1, "records": 3}}
    assert report["groups"] == 1


def test_the_bytes_are_the_same_for_one_worker_and_for_two(
    corpus: Path, tokenizer_folder: Path, executor: Executor, tmp_path: Path
) -> None:
    wanted = recipe(tokenizer_folder, duplicates="near")
    made(wanted, corpus, tmp_path / "two")
    content = {**wanted.model_dump(mode="json", exclude_unset=True)}
    (tmp_path / "apart.yaml").write_text(yaml.safe_dump(content))
    line = [sys.executable, "-m", "longllava", "build", str(tmp_path / "apart.yaml"), "--data", str(corpus)]
    line += ["--catalog", str(tmp_path / "catalog"), "--out", str(tmp_path / "one"), "--workers", "1"]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(line, capture_output=True, text=True, check=False, env=alone)
    assert result.returncode == 0, result.stderr
    for path in sorted((tmp_path / "two").rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (tmp_path / "one" / path.relative_to(tmp_path / "two")).read_bytes(), path.name
    manifests = [read_manifest(tmp_path / name) for name in ("one", "two")]
    for manifest in manifests:
        del manifest["environment"]
    assert manifests[0] == manifests[1]


def test_a_bare_off_in_yaml_means_off(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: r\ntokenizer: t\nduplicates: off\ncomponents: {a: {source: llava15, count: 1}}\n")
    assert load_recipe(file).duplicates == "off"
    file.write_text(file.read_text() + "apart_from: [b]\n")
    with pytest.raises(RecipeError, match="no effect while duplicates is off"):
        load_recipe(file)


def test_fingerprints_that_are_absent_stop_a_build_at_once(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"absent.parquet is no fingerprint file"):
        build(request(recipe(tokenizer_folder, decontaminate="absent.parquet"), corpus, tmp_path / "out"), Progress())
