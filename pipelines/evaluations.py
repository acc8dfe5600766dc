"""Local copies of the benchmarks that LongLLaVA reports, read by one generic reader and a table of their layouts.

Each lies in a folder of its own below one folder: BENCHMARKS/mvbench/json/*.json and so on, as its hub or its authors
ship it. Field names of MVBench were checked on real files; those of the others come from their published loaders and
dataset cards. What a file lacks is an error that names the file and the field, never a benchmark that looks clean.
"""

import base64
import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from formats.errors import Reject, SourceError
from formats.sample import Kind, Media, safe_path
from pipelines.media import VIDEO_SUFFIXES
from pipelines.storage import Root, refuse_stand_in


@dataclass(frozen=True, slots=True)
class Layout:
    """How one kind of file of a benchmark is read.

    Attributes:
        files: pattern below the benchmark's folder.
        question: field, dots for fields within fields; None for a file of pictures only.
        item: field that names an item; its number in the file if None.
        media: names of files, with fields in braces, or one field in braces that holds bytes, base64 or a list.
        roots: where the named files are, relative to the benchmark; {folder}, {parent} and {stem} are the file's.
        records: field of a JSON document that holds the items; the document itself if empty.
        only: field and value; other records are left out.
        kind: of media whose name does not tell.
    """

    files: str
    question: str | None = "question"
    item: str | None = None
    media: tuple[str, ...] = ()
    roots: tuple[str, ...] = ("", "images", "*.zip", "images/*.zip")
    records: str = ""
    only: tuple[str, str] | None = None
    kind: Kind = "image"


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark.

    Attributes:
        name: what upstream calls it, or "<file>:<number>".
        question: as it stands; empty for a picture without one.
        media: to be found below the benchmark's folder.
        embedded: pictures inside the file, by their column.
    """

    name: str
    question: str
    media: tuple[Media, ...] = ()
    embedded: tuple[tuple[str, bytes], ...] = ()


_MVBENCH_ROOTS = (
    *(
        "star/Charades_v1_480",
        "ssv2_video",
        "Moments_in_Time_Raw/videos",
        "FunQA_test/test",
        "clevrer/video_validation",
    ),
    *("perception/videos", "sta/sta_video", "scene_qa/video", "nturgbd", "vlnqa", "tvqa/frames_fps3_hq"),
)
_ARCHIVES = ("", "video/*.zip", "videos/*.zip", "*.zip")
_HUB = "data/test-*.parquet"
_MMMU_IMAGES = tuple(f"{{image_{i}}}" for i in range(1, 8))

BENCHMARKS: Mapping[str, tuple[Layout, ...]] = {
    "milebench": (
        Layout(
            "*/*.json",
            "task_instance.context",
            "sample_id",
            ("{task_instance.images_path}",),
            ("{folder}/images", "{folder}"),
            records="data",
        ),
    ),
    "videomme": (
        Layout(
            "videomme/*.parquet",
            item="question_id",
            media=("{videoID}.mp4",),
            roots=("data", "videos", *_ARCHIVES),
            kind="video",
        ),
    ),
    "mvbench": (
        Layout(
            "json/*.json",
            media=("{video}",),
            roots=(*_MVBENCH_ROOTS, *(f"video/{root}" for root in _MVBENCH_ROOTS), *_ARCHIVES),
            kind="video",
        ),
    ),
    "vnbench": (Layout("*.json", media=("{video}",), roots=("videos", "VNBench_new", *_ARCHIVES), kind="video"),),
    "gqa": (
        Layout("testdev_balanced_questions.json", media=("{imageId}.jpg",)),
        Layout("testdev_balanced_instructions/*.parquet", item="id"),
        Layout("testdev_balanced_images/*.parquet", None, "id", ("{image}",)),
    ),
    "mme": (
        Layout(_HUB, item="question_id", media=("{image}",)),
        Layout("**/*.txt", media=("{stem}.jpg",), roots=("{folder}", "{parent}/images")),
    ),
    "mmvet": (
        Layout("mm-vet.json", media=("{imagename}",)),
        Layout(_HUB, item="question_id", media=("{image}",)),
    ),
    "scienceqa": (
        Layout(
            "**/problems.json", media=("test/{item}/{image}",), roots=("images", "*.zip", ""), only=("split", "test")
        ),
        Layout("**/test-*.parquet", media=("{image}",)),
    ),
    "seedbench": (
        Layout(
            "SEED-Bench.json",
            item="question_id",
            media=("{data_id}",),
            records="questions",
            roots=("SEED-Bench-image", *_ARCHIVES),
        ),
        Layout(_HUB, item="question_id", media=("{image}",)),
    ),
    "mmbench": (
        Layout("*.tsv", item="index", media=("{image}",)),
        Layout("**/*.parquet", item="index", media=("{image}",)),
    ),
    "mmmu": (Layout("**/*.parquet", item="id", media=_MMMU_IMAGES),),
    "vstar": (Layout("test_questions.jsonl", "text", "question_id", ("{image}",)),),
}
"""Layouts by benchmark; every one whose files are there is read."""

_ALIASES = {"vstarbench": "vstar", "v": "vstar", "seed": "seedbench", "sqa": "scienceqa"}


def benchmark_named(folder: str) -> str | None:
    """Which benchmark a folder's name means: "Video-MME" is videomme; None if none that is known."""
    plain = re.sub("[^a-z0-9]", "", folder.lower())
    plain = _ALIASES.get(plain, plain)
    return plain if plain in BENCHMARKS else None


def benchmark_files(name: str, root: Root) -> list[tuple[int, str]]:
    """The files of a benchmark, each with the number of its layout.

    Raises:
        SourceError: if there are none.
    """
    layouts = BENCHMARKS[name]
    found = [(i, file) for i, layout in enumerate(layouts) for file in root.glob(layout.files)]
    if not found:
        expected = " or ".join(layout.files for layout in layouts)
        raise SourceError(f"{name}: no questions at {root.url}; expected {expected}")
    return found


def read_items(name: str, layout: int, root: Root, file: str) -> Iterator[Item]:
    """The items of one file.

    Raises:
        SourceError: if it is not what its name says, or has other fields.
    """
    chosen = BENCHMARKS[name][layout]
    where = f"{name}/{file}"
    number = -1
    try:
        for number, (key, record) in enumerate(_records(chosen, root, file)):
            if chosen.only and _field(record, chosen.only[0], where) != chosen.only[1]:
                continue
            yield _item(chosen, record, key or f"{file}:{number}", file, where)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        after = f" after item {number}" if number >= 0 else ""
        raise SourceError(f"{where}: cannot be read{after} ({type(error).__name__}: {error})") from error


def _item(layout: Layout, record: Mapping[str, Any], key: str, file: str, where: str) -> Item:
    name = str(_field(record, layout.item, where)) if layout.item else key
    question = str(_field(record, layout.question, where) or "") if layout.question else ""
    path = PurePosixPath(file)
    places = {"folder": str(path.parent), "parent": str(path.parent.parent), "stem": path.stem, "item": key}
    roots = tuple(re.sub(r"{(\w+)}", lambda found: places[found[1]], root) for root in layout.roots)
    media: list[Media] = []
    embedded: list[tuple[str, bytes]] = []
    for template in layout.media:
        for value in _media_values(template, record, places, where):
            if isinstance(value, bytes):
                embedded.append((template.strip("{}"), value))
                continue
            kind: Kind = "video" if PurePosixPath(value).suffix.lower() in VIDEO_SUFFIXES else layout.kind
            try:
                media.append(Media(kind=kind, path=safe_path(value), roots=roots))
            except Reject as reject:
                raise SourceError(f"{where}: item {name}: {reject.detail}") from reject
    return Item(name, question, tuple(media), tuple(embedded))


def _media_values(
    template: str, record: Mapping[str, Any], places: Mapping[str, str], where: str
) -> Iterator[str | bytes]:
    """File names, or the bytes of pictures inside a record."""
    fields = re.findall(r"{([^}]+)}", template)
    if template != "{" + fields[0] + "}" or fields[0] in places:
        values = {name: places.get(name) or _field(record, name, where) for name in fields}
        if all(values.values()):
            yield re.sub(r"{([^}]+)}", lambda found: str(values[found[1]]), template)
        return
    value = _field(record, fields[0], where)
    for part in value if isinstance(value, list) else [value]:
        content = part.get("bytes") or part.get("path") if isinstance(part, Mapping) else part
        if not content:
            continue
        is_base64 = isinstance(content, str) and len(content) > 1024
        yield base64.b64decode(content) if is_base64 else content


def _field(record: Mapping[str, Any], name: str, where: str) -> Any:
    """A field of a record, dots for fields within fields.

    Raises:
        SourceError: if it is not there.
    """
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise SourceError(f"{where}: a record has no field {name!r}; it has {', '.join(map(str, record))}")
        value = value[part]
    return value


# Files --------------------------------------------------------------------------------------------------------------


def _records(layout: Layout, root: Root, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a file, each with its key if the file has keys."""
    suffix = PurePosixPath(file).suffix
    refuse_stand_in(root.read(file, 512), f"{root.url}/{file}")
    if suffix == ".parquet":
        with root.open(file) as stream:
            columns = _columns(layout)
            parquet = pq.ParquetFile(stream)
            for batch in parquet.iter_batches(32, columns=[c for c in parquet.schema_arrow.names if c in columns]):
                yield from (("", row) for row in batch.to_pylist())
        return
    text = root.read(file).decode("utf-8-sig")
    if suffix == ".jsonl":
        yield from (("", json.loads(line)) for line in text.splitlines() if line.strip())
    elif suffix == ".tsv":
        csv.field_size_limit(1 << 28)  # pictures as base64
        yield from (("", row) for row in csv.DictReader(text.splitlines(), delimiter="\t"))
    elif suffix == ".txt":
        yield from (("", {"question": line.split("\t")[0]}) for line in text.splitlines() if line.strip())
    else:
        content = json.loads(text)
        found = content[layout.records] if layout.records else content
        yield from found.items() if isinstance(found, dict) else (("", record) for record in found)


def _columns(layout: Layout) -> set[str]:
    """The columns of a table that a layout needs."""
    used = [layout.question or "", layout.item or "", *(layout.only or ())[:1], *layout.media]
    return {name for text in used for name in re.findall(r"[A-Za-z]\w*", text)}
