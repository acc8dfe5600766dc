"""pipelines.evaluations: each benchmark's files as they are published, and what is wrong with a copy."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from formats.errors import SourceError
from pipelines.evaluations import BENCHMARKS, Item, benchmark_files, benchmark_named, read_items
from pipelines.storage import Root

QUESTION = "What is to the left of the red cube?"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(file, "PNG")
    return file.getvalue()


EMBEDDED = {"bytes": png(), "path": "0.png"}
NO_IMAGES = {f"image_{i}": None for i in range(2, 8)}

# One record each, in the file and with the fields that upstream has; what is not read is left out.
FILES: dict[str, dict[str, Any]] = {
    "milebench": {
        "Tasks/Tasks.json": {
            "meta_data": {},
            "data": [
                {
                    "sample_id": 7,
                    "task_instance": {"context": QUESTION, "images_path": ["a.jpg", "b.jpg"]},
                    "response": "x",
                }
            ],
        }
    },
    "videomme": {"videomme/test-00000-of-00001.parquet": [{"videoID": "fFjv93ACGo8", "question_id": "001-1"}]},
    "mvbench": {"json/action_count.json": [{"video": "video_1.mp4", "candidates": [], "answer": "a"}]},
    "vnbench": {"VNBench-main-4try.json": [{"video": "VNBench_new/cnt_edit1_1.mp4", "options": [], "gt": "2"}]},
    "gqa": {
        "testdev_balanced_questions.json": {"201307251": {"question": QUESTION, "imageId": "n161313"}},
        "testdev_balanced_images/0.parquet": [{"id": "n161313", "image": EMBEDDED}],
    },
    "mme": {
        "data/test-00000-of-00002.parquet": [{"question_id": "art/1.png", "image": EMBEDDED}],
        "artwork/questions_answers_YN/1.txt": f"{QUESTION}\tYes\n",
    },
    "mmvet": {"mm-vet.json": {"v1_0": {"imagename": "v1_0.png", "question": QUESTION}}},
    "scienceqa": {
        "data/scienceqa/problems.json": {
            "1": {"question": QUESTION, "image": "image.png", "split": "test"},
            "2": {"question": QUESTION, "image": None, "split": "train"},
        }
    },
    "seedbench": {"SEED-Bench.json": {"questions": [{"question": QUESTION, "question_id": "5", "data_id": "1_2"}]}},
    "mmbench": {
        "mmbench_dev_en.tsv": f"index\tquestion\timage\n3\t{QUESTION}\t{base64.b64encode(png() * 9).decode()}\n"
    },
    "mmmu": {"Art/test-00000-of-00001.parquet": [{"id": "test_Art_1", "image_1": EMBEDDED, **NO_IMAGES}]},
    "vstar": {"test_questions.jsonl": [{"image": "direct/1.jpg", "text": QUESTION, "question_id": 4}]},
}
MEDIA = {
    "milebench": ["a.jpg", "b.jpg"],
    "videomme": ["fFjv93ACGo8.mp4"],
    "mvbench": ["video_1.mp4"],
    "vnbench": ["VNBench_new/cnt_edit1_1.mp4"],
    "gqa": ["n161313.jpg", "image"],
    "mme": ["1.jpg", "image"],
    "mmvet": ["v1_0.png"],
    "scienceqa": ["test/1/image.png"],
    "seedbench": ["1_2"],
    "mmbench": ["image"],
    "mmmu": ["image_1"],
    "vstar": ["direct/1.jpg"],
}


def write(folder: Path, files: dict[str, Any]) -> Root:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([{"question": QUESTION, **row} for row in content]), path)
        elif path.suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, content)))
        elif isinstance(content, list):
            path.write_text(json.dumps([{"question": QUESTION, **row} for row in content]))
        else:
            path.write_text(json.dumps(content))
    return Root(str(folder))


def read(name: str, root: Root) -> list[Item]:
    return [item for layout, file in benchmark_files(name, root) for item in read_items(name, layout, root, file)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_and_media_are_found_in_the_published_layout(tmp_path: Path, name: str) -> None:
    items = read(name, write(tmp_path, FILES[name]))
    assert {item.question for item in items} - {""} == {QUESTION}
    named = [media.path for item in items for media in item.media]
    assert sorted(named + [column for item in items for column, _ in item.embedded]) == sorted(MEDIA[name])
    assert all(Image.open(io.BytesIO(content)).size == (90, 60) for item in items for _, content in item.embedded)
    assert len({item.name for item in items}) == len({(item.name, bool(item.question)) for item in items})


def test_folders_may_be_named_as_the_benchmarks_are() -> None:
    names = ["Video-MME", "MVBench", "V*", "vstar_bench", "SEED-Bench", "MM-Vet", "ScienceQA", "GQA", "other"]
    found = [benchmark_named(name) for name in names]
    assert found == ["videomme", "mvbench", "vstar", "vstar", "seedbench", "mmvet", "scienceqa", "gqa", None]


def test_the_real_files_of_mvbench_are_read_whole(shared: Path) -> None:
    items = read("mvbench", Root(str(shared / "data/annotations/mvbench")))
    assert len(items) == 2600
    assert all(item.question and len(item.media) == 1 and item.media[0].kind == "video" for item in items)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"json/a.json": [{"videos": "x.mp4"}]}, r"mvbench/json/a.json: a record has no field 'video'"),
        ({"json/a.json": "[{"}, r"mvbench/json/a.json: cannot be read"),
        ({"json/a.json": "version https://git-lfs.github.com/spec/v1"}, "git-LFS pointer"),
        ({"json/a.json": [{"video": "../../etc/passwd"}]}, r"item json/a.json:0: '../../etc/passwd'"),
        ({"other/a.json": "[]"}, r"mvbench: no questions at .*; expected json/\*.json"),
    ],
)
def test_a_copy_that_is_not_what_it_should_be_is_an_error(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read("mvbench", write(tmp_path, files))
