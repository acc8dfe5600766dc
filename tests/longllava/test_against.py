"""`validate --against`: a build is held against the upstream files, through the command's own wiring."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from formats.manifest import file_sha256
from formats.shard import ShardWriter, encode_record, members_of
from longllava.against import check_against
from longllava.cli import app
from pipelines.build import Request, build
from pipelines.executor import Executor
from pipelines.progress import Progress
from pipelines.retry import request_of, retry
from recipes.schema import Recipe
from validators.findings import Finding
from validators.run import summary, validate


def against(build: Path, data: Path, share: float = 0.01, seed: int = 0) -> list[Finding]:
    with check_against(str(build), str(data), share, seed, None, Progress()) as how:
        return validate(str(build), against=how)


class Heard(Progress):
    """Remembers how many samples were to be rebuilt."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self.totals[name] = total


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Path:
    """The third build of the demo in a folder of its own, with what it draws from beside it."""
    shutil.copytree(demo / "builds", tmp_path / "builds")
    return tmp_path / "builds" / "multi_image"


def test_every_kind_of_sample_comes_out_the_same_again(demo: Path, executor: Executor) -> None:
    heard = Heard()
    made = str(demo / "builds/multi_image")
    with check_against(made, str(demo / "data"), 0.05, 1, None, heard) as how:
        assert validate(made, against=how) == []
    assert heard.totals["rebuild"] == 10 + 10 + 8 + 10 + 8 + 8  # 5 % of each component, at least 8


CURATED = {
    "name": "curated",
    "samples_per_shard": 40,
    "duplicates": "near",
    "apart_from": ["text"],
    "filters": {"max_words": 30, "max_refusals": 0, "min_side": 32, "max_aspect": 4.0},
    "max_drop": 0.9,
    "components": {
        "pictures": {"source": "llava15", "count": 30, "filters": {"min_side": 120}},
        "films": {"source": "videochat2", "count": 6, "on_short": "accept"},
        "written": {"source": "wildchat", "count": 10, "on_short": "repeat"},
        "again": {"replay": "single_image", "count": 12, "filters": {"max_side": 2000}},
        "tiles": {"subimage": "single_image", "count": 8, "max_tiles": 4},
    },
}


def test_what_was_filtered_and_freed_of_copies_comes_out_the_same_again(copied: Path, demo: Path) -> None:
    recipe = Recipe.model_validate({**CURATED, "tokenizer": str(demo / "tokenizer")})
    out = copied.parent / "curated"
    manifest = build(Request(recipe, Path(), str(demo / "data"), out, demo / "catalog"), Progress())
    assert any(component["dropped"] for component in manifest["components"].values())
    assert manifest["overlaps"]["rows"] > 0
    assert against(out, demo / "data", share=1.0) == []


def test_a_mended_build_comes_out_the_same_again(copied: Path, demo: Path, tmp_path: Path) -> None:
    """One of its pictures was not there when it was made, and is exchanged for another after it was mended."""
    data, out = tmp_path / "data", copied.parent / "mended"
    shutil.copytree(demo / "data/llava15", data / "llava15")
    annotations = next((data / "llava15").glob("*.json"))
    records = [record for record in json.loads(annotations.read_text()) if "image" in record]
    annotations.write_text(json.dumps(records[:12]))
    content = {"name": "mended", "tokenizer": str(demo / "tokenizer")}
    component = {"source": "llava15", "count": "all", "filters": {"modality": ["image"]}}
    recipe = Recipe.model_validate({**content, "components": {"pictures": component}})
    victim = next(path for record in records[:12] if (path := data / "llava15" / record["image"]).exists())
    away = victim.rename(victim.with_suffix(".away"))
    build(Request(recipe, Path(), str(data), out, tmp_path / "catalog"), Progress())
    away.rename(victim)
    assert retry(request_of(out), Progress())["mended"]
    assert against(out, data, share=1.0) == []
    Image.new("RGB", (200, 100), "green").save(victim)
    assert set(summary(against(out, data, share=1.0))) == {"rebuilt-image", "rebuilt-json"}


def rewritten(build: Path, component: str, change: Callable[[dict[str, Any], list[bytes]], None]) -> None:
    """Changes all samples of a component, and all hashes, counts and offsets with them."""
    manifest = json.loads((build / "manifest.json").read_text())
    rows = pq.read_table(build / "index.parquet")
    lines = rows.to_pylist()
    for entry in manifest["shards"]:
        path = build / entry["file"]
        data = path.read_bytes()
        ends = [0]
        with ShardWriter(path) as shard:
            for line in (line for line in lines if line["shard"] == path.name):
                _, content, images = members_of(data[line["offset"] : line["offset"] + line["size"]])
                record = json.loads(content)
                if line["component"] == component:
                    change(record, images)
                place = shard.add(line["key"], encode_record(record), images)
                line.update(offset=place.offset, size=place.size, sha256=place.sha256, source=record["source"])
                ends.append(place.offset + place.size)
            done = shard.finish()
        entry.update(sha256=done.sha256, bytes=done.bytes)
        path.with_name(f"{path.name}.idx").write_bytes(b"".join(end.to_bytes(8, "little") for end in ends))
    pq.write_table(pa.Table.from_pylist(lines, schema=rows.schema), build / "index.parquet")
    manifest["index"]["sha256"] = file_sha256(build / "index.parquet")
    manifest["totals"]["bytes"] = sum(entry["bytes"] for entry in manifest["shards"])
    (build / "manifest.json").write_text(json.dumps(manifest))


def other_provenance(record: dict[str, Any], images: list[bytes]) -> None:
    record["provenance"]["upstream_id"] = "forged"


def other_source(record: dict[str, Any], images: list[bytes]) -> None:
    record["source"] = "nowhere"


def other_file(record: dict[str, Any], images: list[bytes]) -> None:
    record["provenance"]["file"] = "../llava15/llava_v1_5_mix665k.json"


def other_image(record: dict[str, Any], images: list[bytes]) -> None:
    images[-1] = images[0] if len(images) > 1 else images[0][:-2] + b"\0\0\xff\xd9"


@pytest.mark.parametrize(
    ("component", "change", "codes"),
    [
        ("mantis", other_provenance, {"rebuilt-json"}),
        ("sub_image", other_image, {"rebuilt-image"}),
        ("single_image_replay", other_provenance, {"replay-origin"}),
    ],
)
def test_a_consistent_forgery_is_found_by_going_back(
    component: str,
    change: Callable[[dict[str, Any], list[bytes]], None],
    codes: set[str],
    copied: Path,
    demo: Path,
    executor: Executor,
) -> None:
    rewritten(copied, component, change)
    assert validate(str(copied)) == []
    found = against(copied, demo / "data")
    assert codes <= set(summary(found)) <= codes | {"rebuilt-json"}
    components = components_of(copied)
    assert Counter(components[finding.key or ""] for finding in found).keys() == {component}


@pytest.mark.parametrize(
    ("change", "detail"),
    [(other_source, "there is no source 'nowhere'"), (other_file, "mix665k.json is no annotation file of it")],
)
def test_a_forged_origin_is_not_followed(
    change: Callable[[dict[str, Any], list[bytes]], None], detail: str, copied: Path, demo: Path
) -> None:
    rewritten(copied, "mantis", change)
    found = [finding for finding in against(copied, demo / "data") if finding.code == "upstream-missing"]
    assert found
    assert all(detail in finding.detail for finding in found)


def test_the_command_rebuilds_and_says_what_differs(
    copied: Path, demo: Path, capsys: pytest.CaptureFixture[str], executor: Executor
) -> None:
    line = ["validate", str(copied), "--against", str(demo / "data"), "--json"]
    assert app(line, standalone_mode=False) in (None, 0)
    assert json.loads(capsys.readouterr().out)["findings"] == []
    rewritten(copied, "sub_image", other_provenance)
    assert app([*line, "--against-share", "0.2"], standalone_mode=False) == 1
    components = list(components_of(copied).values())
    assert json.loads(capsys.readouterr().out)["codes"] == {"rebuilt-json": components.count("sub_image") / 5}


def components_of(build: Path) -> dict[str, str]:
    return {row["key"]: row["component"] for row in pq.read_table(build / "index.parquet").to_pylist()}


def test_sources_that_are_gone_are_findings(copied: Path, demo: Path, tmp_path: Path, executor: Executor) -> None:
    assert set(summary(against(copied, tmp_path / "nowhere"))) == {"upstream-missing"}
    shutil.rmtree(copied.parent / "text")
    found = against(copied, demo / "data")
    assert set(summary(found)) == {"upstream-missing"}
    assert all("the build text: is not at" in finding.detail for finding in found)


def test_sources_that_changed_are_findings(copied: Path, demo: Path, tmp_path: Path, executor: Executor) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo / "data", data)
    for file in (data / "sharegpt4video").glob("*.jsonl"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[1:], lines[0]]))
    for video in (data / "videochat2").rglob("*.mp4"):
        video.write_bytes(b"")
    for archive in (data / "videochat2").rglob("*.zip"):
        archive.unlink()
    codes = summary(against(copied, data))
    assert {"upstream-changed", "rebuilt-json", "rebuilt-rejected"} <= set(codes)
    assert set(codes) <= {"upstream-changed", "rebuilt-json", "rebuilt-image", "rebuilt-rejected", "upstream-missing"}


def test_other_tools_are_a_warning(copied: Path, demo: Path, executor: Executor) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["tools"]["pillow"] = "1.0"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    (found,) = against(copied, demo / "data")
    assert (found.code, found.severity) == ("tools-changed", "warning")
    assert "pillow 1.0" in found.detail


def test_what_is_no_build_is_said_once(tmp_path: Path, demo: Path) -> None:
    assert summary(against(tmp_path / "nowhere", demo / "data")) == {"manifest-missing": 1}
