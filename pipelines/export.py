"""Finished builds in the forms that other programs read, sample by sample and in the build's own order.

hf       OUT/data/train-00000-of-00009.parquet, one a shard: `images` and `messages`, with their features, so that
         `datasets.load_dataset(OUT)` gives pictures; OUT/README.md for a hub
llava    OUT/data.json and OUT/images/<key>/0000.jpg: what the authors' trainer takes as --data_path, --image_folder
energon  OUT/shards and OUT/.nv-meta: for a build from anywhere, or from before builds had these files
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from formats.errors import UsageError
from formats.manifest import SHARDS
from formats.shard import ShardSummary, safe_shard_name
from pipelines.card import card
from pipelines.energon import write_meta, write_offsets
from pipelines.opened import OpenBuild, Stored
from pipelines.progress import Progress

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_GROUP_SAMPLES = 100  # a row group's images are in memory at once

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_TEXTS = ("key", "id", "source", "component", "modality")
_FEATURES = {
    **{name: {"dtype": "string", "_type": "Value"} for name in _TEXTS},
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    "messages": {
        "feature": {name: {"dtype": "string", "_type": "Value"} for name in ("role", "content")},
        "_type": "List",
    },
    "n_tokens": {"dtype": "int32", "_type": "Value"},
    "layout": {"dtype": "string", "_type": "Value"},
    "provenance": {"dtype": "string", "_type": "Value"},
}
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        ("images", pa.list_(_IMAGE)),
        ("messages", pa.list_(_MESSAGE)),
        ("n_tokens", pa.int32()),
        ("layout", pa.string()),
        ("provenance", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
"""`layout` is the JSON of a sample's image list: role, size before resizing, tile or time of each."""


def export(build: OpenBuild, to: str, out: Path, progress: Progress) -> dict[str, Any]:
    """Writes a build in another form.

    Args:
        build: an opened build.
        to: "hf", "llava" or "energon".
        out: a folder that is not there yet; it appears when everything is written.
        progress: told of every sample.

    Returns:
        Counts, and under "next" what to do with it.

    Raises:
        UsageError: if the form is unknown or the folder there already.
    """
    if to not in _WRITERS:
        raise UsageError(f"--to {to}: choose one of {', '.join(_WRITERS)}")
    progress.stage("export", build.manifest["totals"]["samples"], "samples")
    with _appearing(out) as folder:
        after = _WRITERS[to](build, folder, progress)
    totals = build.manifest["totals"]
    step = after.replace("OUT", str(out))
    return {"out": str(out), "to": to, "samples": totals["samples"], "images": totals["images"], "next": step}


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete."""
    if out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another --out")
    folder = out.with_name(f".{out.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _by_shard(build: OpenBuild) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Lines of the index, one shard's at a time."""
    for name, rows in groupby(build.in_order(), key=itemgetter("shard")):
        yield safe_shard_name(name), list(rows)


def _to_hf(build: OpenBuild, out: Path, progress: Progress) -> str:
    data = out / "data"
    data.mkdir()
    count = max(len(build.manifest["shards"]), 1)
    files = [data / f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
    if not build.manifest["shards"]:
        pq.write_table(_SCHEMA.empty_table(), files[0])
    for file, (_, rows) in zip(files, _by_shard(build), strict=False):
        with pq.ParquetWriter(file, _SCHEMA, compression="none", write_page_index=True) as writer:  # JPEG is dense
            for start in range(0, len(rows), _GROUP_SAMPLES):
                samples = [_hf_row(build.stored(row)) for row in rows[start : start + _GROUP_SAMPLES]]
                writer.write_table(pa.Table.from_pylist(samples, schema=_SCHEMA))
                progress.advance(len(samples))
    (out / "README.md").write_bytes(_hf_card(build))
    return (
        'datasets.load_dataset("OUT", split="train"); to share it: huggingface-cli upload NAME OUT --repo-type dataset'
    )


def _hf_row(sample: Stored) -> dict[str, Any]:
    record = sample.record
    entries = zip(record["images"], sample.images, strict=True)
    return {
        **{name: sample.row[name] for name in _TEXTS},
        "images": [{"bytes": jpeg, "path": entry["file"]} for entry, jpeg in entries],
        "messages": [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]],
        "n_tokens": sample.row["n_tokens"],
        "layout": json.dumps(record["images"], ensure_ascii=False),
        "provenance": json.dumps(record["provenance"], ensure_ascii=False),
    }


def _hf_card(build: OpenBuild) -> bytes:
    """The build's card with a viewer and other lines on loading."""
    text = card(build).decode()
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    del fields["viewer"]
    files = [{"split": "train", "path": "data/train-*.parquet"}]
    fields["configs"] = [{"config_name": "default", "data_files": files}]
    before, load, rest = body.partition("## Load\n")
    _, rebuild, end = rest.partition("## Rebuild\n")
    lines = (
        "\n`images` are in the order of the `<image>` placeholders in `messages`; `layout` says which of them is a"
        " frame (with its time), a whole picture or a tile.\n\n"
        '    import datasets\n    data = datasets.load_dataset(".", split="train")\n'
        '    data[0]["messages"], data[0]["images"]\n\n'
    )
    note = "\nThis is an export (`longllava export --to hf`) of a build that was made so:\n"
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{before}{load}{lines}{rebuild}{note}{end}".encode()


def _to_llava(build: OpenBuild, out: Path, progress: Progress) -> str:
    images = out / "images"
    images.mkdir()
    with (out / "data.json").open("w", encoding="utf-8") as file:
        separator = "[\n"
        for _, rows in _by_shard(build):
            for row in rows:
                file.write(separator + json.dumps(_llava_row(build.stored(row), images), ensure_ascii=False))
                separator = ",\n"
                progress.advance(1)
        file.write("[]\n" if separator == "[\n" else "\n]\n")
    return "the authors' trainer: --data_path OUT/data.json --image_folder OUT/images"


def _llava_row(sample: Stored, images: Path) -> dict[str, Any]:
    """An item of the authors' JSON; text alone has no "image". Their trainer takes protocol text as it stands."""
    record, key = sample.record, safe_key(sample)
    item: dict[str, Any] = {"id": key, "source": record["source"], "uid": record["id"]}
    if sample.images:
        (images / key).mkdir()
        for entry, jpeg in zip(record["images"], sample.images, strict=True):
            (images / key / entry["file"]).write_bytes(jpeg)
        item["image"] = [f"{key}/{entry['file']}" for entry in record["images"]]
    return {**item, "conversations": record["conversations"]}


def _to_energon(build: OpenBuild, out: Path, progress: Progress) -> str:
    (out / SHARDS).mkdir()
    for name, rows in _by_shard(build):
        with build.root.open(f"{SHARDS}/{name}") as source, (out / SHARDS / name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        write_offsets(out / SHARDS / name, [row["offset"] for row in rows], [row["size"] for row in rows])
        progress.advance(len(rows))
    write_meta(out, [ShardSummary(**shard) for shard in build.manifest["shards"]])
    return 'megatron.energon.get_train_dataset("OUT", …)'


def extract(sample: Stored, folder: Path) -> list[Path]:
    """Writes a sample's files as they lie in its shard, and returns their paths."""
    key = safe_key(sample)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{key}.json"
    record.write_text(json.dumps(sample.record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    images = [folder / f"{key}.{i:04d}.jpg" for i in range(len(sample.images))]
    for path, jpeg in zip(images, sample.images, strict=True):
        path.write_bytes(jpeg)
    return [record, *images]


def safe_key(sample: Stored) -> str:
    """A sample's key, if it can be a file's name.

    Raises:
        UsageError: if it cannot, which no build of ours has.
    """
    key, files = str(sample.row["key"]), [entry["file"] for entry in sample.record["images"]]
    if not key.isalnum() or files != [f"{i:04d}.jpg" for i in range(len(files))]:
        raise UsageError(f"sample {key!r} names files that cannot be written; `longllava validate` says what is wrong")
    return key


_Writer = Callable[[OpenBuild, Path, Progress], str]
_WRITERS: Mapping[str, _Writer] = {"hf": _to_hf, "llava": _to_llava, "energon": _to_energon}
