"""pipelines.contamination: benchmark items in a corpus, and templates that are none."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from formats.errors import UsageError
from pipelines.benchmark_prints import read_prints, write_fingerprints
from pipelines.contamination import write_hits
from pipelines.executor import Executor
from pipelines.ingest import Location, ingested
from pipelines.progress import Progress
from pipelines.sql import parquet

FILE = "llava_v1_5_mix665k.json"
Row = tuple[str, str, str | None]


def hits(
    folder: Path, rows: list[Row], prints: Path, executor: Executor, pictures: dict[str, bytes] | None = None
) -> list[dict[str, Any]]:
    """What a llava15 of (question, answer, picture's name) rows has of the benchmarks; uids are row numbers."""
    source = folder / "data/llava15"
    for name, content in {"coco/none.jpg": b"", **(pictures or {})}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    records = [
        {
            "id": i,
            **({"image": picture} if picture else {}),
            "conversations": [
                {"from": "human", "value": "<image>\n" * bool(picture) + asked},
                {"from": "gpt", "value": answer},
            ],
        }
        for i, (asked, answer, picture) in enumerate(rows)
    ]
    (source / FILE).write_text(json.dumps(records))
    place = Location.below(str(folder / "data"), "llava15")
    with ingested([place], folder / "catalog", executor, Progress()) as catalogs:
        among = f"(SELECT uid FROM {parquet(catalogs[0].files)})"
        write_hits(prints, catalogs, among, folder, executor, Progress(), folder / "hits.parquet")
    found = pq.read_table(folder / "hits.parquet").to_pylist()
    return [{**hit, "uid": int(hit["uid"].rpartition(":")[2])} for hit in found]


@pytest.fixture(scope="module")
def mvbench(shared: Path, executor: Executor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fingerprints of two of MVBench's real tasks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "MVBench/json").mkdir(parents=True)
    for name in ("episodic_reasoning", "fine_grained_action"):
        shutil.copy(shared / f"data/annotations/mvbench/json/{name}.json", folder / "MVBench/json")
    out = folder / "prints.parquet"
    found = write_fingerprints(str(folder), out, executor, Progress())
    assert found["mvbench"]["questions"] == 400
    return out


def questions(shared: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((shared / f"data/annotations/mvbench/json/{name}.json").read_bytes())  # type: ignore[no-any-return]


def test_planted_questions_are_found_with_both_sides(
    mvbench: Path, shared: Path, tmp_path: Path, executor: Executor
) -> None:
    long = [q for q in questions(shared, "episodic_reasoning") if len(q["question"].split()) >= 13][:20]
    short = [q for q in questions(shared, "episodic_reasoning") if len(q["question"].split()) == 9][:5]
    planted: list[Row] = [
        (f"Watch.\n{q['question'].upper()}\nAnswer shortly.", q["answer"], None) for q in long + short
    ]
    inside: list[Row] = [("Tell me.", f"They asked: {q['question']} Nobody knew.", None) for q in long]
    others: list[Row] = [
        (f"How is {i} made, and by whom, in the north of the country?", "So.", None) for i in range(50)
    ]
    found = hits(tmp_path, [*planted, *inside, *others], mvbench, executor)
    assert {hit["uid"] for hit in found} == set(range(len(planted) + len(inside)))
    items = {f"json/episodic_reasoning.json:{i}": q for i, q in enumerate(questions(shared, "episodic_reasoning"))}
    for hit in found:
        assert hit["benchmark"] == "mvbench"
        assert all(word in items[hit["item"]]["question"].casefold() for word in hit["matched"].split())
    assert {hit["how"] for hit in found} == {"words", "question"}


def test_a_template_is_no_hit_unless_the_medium_is_the_items_too(
    mvbench: Path, shared: Path, tmp_path: Path, executor: Executor
) -> None:
    item = questions(shared, "fine_grained_action")[0]
    assert item["question"] == "What is the action performed by the person in the video?"
    stem = Path(item["video"]).stem
    rows: list[Row] = [
        (item["question"], "Bathing.", None),
        ("What is in the image?", "A cat.", "coco/none.jpg"),
        (item["question"], "Bathing.", f"coco/{stem}.jpg"),
        ("What is this?", "Bathing.", f"coco/{stem}.jpg"),
    ]
    (hit,) = hits(tmp_path, rows, mvbench, executor)
    assert (hit["uid"], hit["how"], hit["item"]) == (2, "file", "json/fine_grained_action.json:0")


def test_a_question_that_many_records_ask_is_a_template(
    mvbench: Path, shared: Path, tmp_path: Path, executor: Executor
) -> None:
    asked = [q["question"] for q in questions(shared, "episodic_reasoning") if len(q["question"].split()) >= 13]
    rows: list[Row] = [(asked[0], f"Answer {i}.", None) for i in range(21)] + [(asked[1], "x", None)] * 20
    assert {hit["uid"] for hit in hits(tmp_path, rows, mvbench, executor)} == set(range(21, 41))


def test_a_benchmarks_picture_is_found_whatever_is_asked_about_it(
    shared: Path, tmp_path: Path, executor: Executor
) -> None:
    folder = shared / "data/annotations/mantis_chat/train_images/sharegpt4v/coco/train2017"
    photographs = sorted(folder.glob("*.jpg"))[:6]
    (tmp_path / "benchmarks/vstar/direct").mkdir(parents=True)
    items = []
    for i, path in enumerate(photographs[:3]):
        shutil.copy(path, tmp_path / f"benchmarks/vstar/direct/{i}.jpg")
        items.append({"image": f"direct/{i}.jpg", "text": "What colour is it?", "question_id": i})
    Image.new("RGB", (400, 300), "white").save(tmp_path / "benchmarks/vstar/direct/9.jpg")
    items.append({"image": "direct/9.jpg", "text": "Is it blank?", "question_id": 9})
    (tmp_path / "benchmarks/vstar/test_questions.jsonl").write_text("\n".join(map(json.dumps, items)))
    outs = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for out in outs:
        found = write_fingerprints(str(tmp_path / "benchmarks"), out, executor, Progress())
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert found["vstar"] == {"questions": 4, "alone": 0, "media": 4, "missing": {}}
    pictures = {}
    for i, path in enumerate(photographs):
        file = io.BytesIO()
        image = Image.open(path).convert("RGB")
        image.resize((image.width * 2 // 3, image.height * 2 // 3)).save(file, "JPEG", quality=60)
        pictures[f"coco/train{i}.jpg"] = file.getvalue()
    blank = io.BytesIO()
    Image.new("RGB", (500, 200), "white").save(blank, "PNG")
    pictures["coco/train9.jpg"] = blank.getvalue()
    rows: list[Row] = [(f"Describe number {i}.", "Yes.", name) for i, name in enumerate(pictures)]
    result = hits(tmp_path, rows, outs[0], executor, pictures)
    assert [(hit["uid"], hit["item"], hit["path"], hit["other"]) for hit in result] == [
        (i, str(i), f"coco/train{i}.jpg", f"direct/{i}.jpg") for i in range(3)
    ]
    assert all(hit["how"] == "looks" and 0 < hit["bits"] <= 24 for hit in result)


def test_what_is_no_fingerprint_file_is_refused(tmp_path: Path, executor: Executor) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="longllava decontaminate"):
        read_prints(str(tmp_path / "x.parquet"))
    (tmp_path / "unknown").mkdir()
    with pytest.raises(UsageError, match="has no folder named after a benchmark"):
        write_fingerprints(str(tmp_path), tmp_path / "out.parquet", executor, Progress())
