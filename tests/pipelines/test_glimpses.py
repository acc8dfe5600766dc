"""pipelines.glimpses: thumbnails of what was rejected, and of nothing else."""

import base64
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from formats.catalog import to_row
from formats.imaging import ImageSettings
from formats.sample import Media, Sample, Turn
from pipelines.gallery import draw, exhibit_of
from pipelines.glimpses import GlimpseTask, _chosen, _small_picture, glimpse
from pipelines.guard import Guard
from pipelines.materialise import Settings
from pipelines.opened import OpenBuild
from pipelines.page import REPORT, report_page
from pipelines.report import fair_share, rejects
from pipelines.tools import tool_versions
from recipes.schema import Recipe
from validators.run import validate

MakeBuild = Callable[..., Path]
RED, BLUE = (200, 30, 20), (20, 40, 210)


def file_of(kind: str, size: tuple[int, int], colour: tuple[int, int, int] = RED) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").point(
        [c * v // 255 for c in colour for v in range(256)]
    ).save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that promises more pixels than any memory holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def picture_of(reject: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(reject["thumbnail"])))


LARGE = file_of("JPEG", (700, 500))
ROWS = {
    "fine": (400, 300),
    "narrow": file_of("JPEG", (380, 60)),
    "small": file_of("PNG", (20, 20), BLUE),
    "cut short": file_of("JPEG", (400, 300))[:-2000],
    "large": LARGE,
    "large, no JPEG": file_of("PNG", (700, 500)),
    "bomb": bomb(60_000, 60_000),
    "no picture": b"<!DOCTYPE html>",
}
EXPECTED = {
    "narrow": "max-aspect",
    "small": "min-side",
    "cut short": "broken-image",
    "large": "too-large",
    "large, no JPEG": "too-large",
    "bomb": "too-large",
    "no picture": "unknown-format",
}
SEEN = {"narrow": (96, 15), "small": (20, 20), "cut short": (96, 72), "large": (96, 69)}


@pytest.fixture
def build(make_build: MakeBuild) -> Path:
    rows = [(f"What is {name}?", "It is red.", picture) for name, picture in ROWS.items()]
    settings = {"filters": {"min_side": 30, "max_aspect": 5}, "image": {"max_pixels": 200_000}, "max_drop": 1}
    return make_build(rows, **settings)


def test_what_can_be_seen_is_shown_and_nothing_else(build: Path) -> None:
    names = list(ROWS)
    found = {names[int(reject["uid"].rpartition(":")[2])]: reject for reject in rejects(build)}
    assert {name: reject["reason"] for name, reject in found.items()} == EXPECTED
    assert {name: picture_of(reject).size for name, reject in found.items() if "thumbnail" in reject} == SEEN
    for name in SEEN:
        red, _, blue = picture_of(found[name]).resize((1, 1)).getpixel((0, 0))
        assert (blue > red) == (name == "small"), name
    assert validate(str(build)) == []
    page = (build / REPORT).read_text()
    shown = re.findall(r'<img loading="lazy" src="data:image/jpeg;base64,([^"]*)" alt="what was rejected for', page)
    assert shown == [reject["thumbnail"] for reject in rejects(build) if "thumbnail" in reject]
    assert report_page([OpenBuild(build)]).decode() == page


def task(folder: Path, names: list[str], reason: str) -> GlimpseTask:
    """A rejected record of several pictures below a folder."""
    component = {"all": {"source": "llava15", "count": "all"}}
    recipe = {"name": "r", "tokenizer": "t", "components": component, "filters": {"min_side": 30}}
    known: dict[str, Any] = {"recipe": Recipe.model_validate(recipe), "media_roots": {"llava15": str(folder)}}
    known["tools"] = tool_versions()
    settings = Settings(**{field.name: known.get(field.name, {}) for field in fields(Settings)})
    turns = (Turn("human", "Which?", (0,) * len(names)), Turn("gpt", "None."))
    media = tuple(Media(kind="image", path=name, roots=("",)) for name in names)
    sample = Sample(uid="llava15/x.json:0", source="llava15", turns=turns, media=media, file="x.json", ordinal=0)
    return GlimpseTask(settings, "all", to_row(sample), reason)


def test_the_picture_that_is_shown_is_the_one_that_was_rejected(tmp_path: Path) -> None:
    for name, size, colour in (("large", (90, 60), RED), ("small", (25, 60), BLUE), ("smaller", (20, 60), RED)):
        (tmp_path / f"{name}.png").write_bytes(file_of("PNG", size, colour))
    known, thumbnail = glimpse(task(tmp_path, ["large.png", "small.png", "smaller.png"], "min-side"))
    assert known == ("all", "llava15/x.json:0")
    shown = picture_of({"thumbnail": thumbnail})
    red, _, blue = shown.resize((1, 1)).getpixel((0, 0))
    assert shown.size == (25, 60)
    assert blue > red
    assert picture_of({"thumbnail": glimpse(task(tmp_path, ["large.png"], "too-long"))[1]}).size == (90, 60)
    for names, reason in ((["large.png"], "min-side"), (["gone.png"], "min-side"), (["small.png"], "broken-image")):
        assert glimpse(task(tmp_path, names, reason))[1] == "", "it was mended, or went, since"
    assert glimpse(task(tmp_path, [], "too-long"))[1] == ""


def test_a_bomb_is_not_opened_even_where_it_looks_small() -> None:
    with Guard(deadline=5, memory=1 << 30) as guard:
        for data in (bomb(60_000, 60_000), bomb(12_000, 12_000), b"\xff\xd8\xff" + bytes(99), b"", LARGE[:300]):
            assert guard.call(_small_picture, data, ImageSettings(max_pixels=1_000_000)) == b""
        assert len(guard.call(_small_picture, LARGE, ImageSettings(max_pixels=30_000))) > 500


def test_only_a_few_of_each_kind_are_looked_at() -> None:
    reasons = ["min-side"] * 500 + ["media-missing"] * 500 + ["too-large"] * 3 + ["broken-image"] * 500
    lines = [{"component": "abc"[i % 2], "uid": f"x:{i // 2}", "reason": reason} for i, reason in enumerate(reasons)]
    chosen = _chosen(pa.Table.from_pylist(lines))
    counts = [list(chosen.values()).count(reason) for reason in ("min-side", "too-large", "broken-image")]
    assert counts == [24, 3, 24]
    many = [{"component": f"c{i}", "uid": "x", "reason": "too-long"} for i in range(500)]
    assert len(_chosen(pa.Table.from_pylist(many))) == 60
    assert _chosen(pa.table({name: pa.array([], pa.string()) for name in ("component", "uid", "reason")})) == {}
    assert fair_share([500, 1, 500], 101) == 50
    assert fair_share([], 10) == 10


def test_a_page_stays_small_however_much_it_is_given(make_build: MakeBuild) -> None:
    noise = Image.effect_noise((336, 336), 200).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=95)
    out = make_build([("&" * 20_000, "<" * 20_000, file.getvalue())] * 14, samples_per_shard=14)
    hostile = {
        "uid": "&" * 9_000,
        "component": "all",
        "reason": "too-large",
        "detail": "<" * 9_000,
        "replaced_by": None,
    }
    with (out / "rejects.jsonl").open("a") as ledger:
        ledger.writelines(json.dumps({**hostile, "thumbnail": "A" * 11_999}) + "\n" for _ in range(600))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["components"]["all"]["rejects"] = {"too-large": 600}
    (out / "manifest.json").write_text(json.dumps(manifest))
    page = report_page([OpenBuild(out)])
    assert 20 < page.count(b'data-item="reject"') < 600
    assert len(page) < 4_900_000


def test_a_sample_of_many_pictures_and_turns_shows_some_of_them(demo: Path) -> None:
    opened = OpenBuild(demo / "builds/multi_image")
    (most,) = opened.rows("FROM samples WHERE modality = 'multi_image' ORDER BY n_images DESC LIMIT 1")
    sample = opened.stored(most)
    turns = sample.record["conversations"]
    sample.record["conversations"] = turns + [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}] * 50
    sample.record["images"] *= 30
    sample.images.extend(sample.images * 29)
    turns[0]["value"] = "<img><image></img>\n" * len(sample.images) + "Which?"
    for turn in turns[1:]:
        turn["value"] = "None."
    exhibit = exhibit_of(sample)
    pieces = [piece for turn in exhibit.turns for piece in turn.pieces]
    assert sum(piece.kind == "picture" for piece in pieces) == 48
    assert sum(piece.text == "a picture, not shown" for piece in pieces) == len(sample.images) - 48
    assert pieces[-1].text == f"… {len(sample.record['conversations']) - 40} more turns …"
    assert draw(opened, 0)
