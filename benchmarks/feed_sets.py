"""One set of samples as a finished build, and the same samples in other loaders' formats."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from formats.blend import blend
from formats.manifest import FORMAT, INDEX, SHARDS, TOKENIZER, file_sha256, write_manifest
from formats.protocol import VERSION
from formats.shard import INDEX_SCHEMA, ShardWriter, encode_record, shard_name
from formats.tokens import IMAGE_TOKEN, TOKENS_PER_IMAGE, ChatTokenizer
from model.shards import LocalShards, ShardReader, members
from pipelines.demo.tokenizer import train_tokenizer

_SHARD = 100
_PICTURES = 300  # different ones; decoding costs the same, however often one comes
_WORDS = [f"{a}{b}" for a in ("re", "con", "st", "pla", "mo", "in") for b in ("ver", "tion", "ding", "nt", "el", "ary")]


def build(folder: Path, samples: int, words: int) -> Path:
    """Writes a finished build of samples with one to eight pictures each, 4.6 on average, and returns it."""
    random = np.random.default_rng(0)
    (folder / SHARDS).mkdir(parents=True)
    train_tokenizer([" ".join(_WORDS)] * 3, folder / TOKENIZER)
    tokenizer = ChatTokenizer.load(str(folder / TOKENIZER))
    pictures = [_picture(random) for _ in range(_PICTURES)]
    rows: list[dict[str, Any]] = []
    for first in range(0, samples, _SHARD):
        with ShardWriter(folder / SHARDS / shard_name(first // _SHARD)) as shard:
            rows += [_add(shard, i, words, pictures, tokenizer, random) for i in range(first, first + _SHARD)]
            shard.finish()
    _finish(folder, tokenizer, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    return folder


def index_only(folder: Path, tokens: np.ndarray, images: np.ndarray, kind: np.ndarray) -> Path:
    """A build without shards, for what needs its index alone."""
    folder.mkdir(parents=True)
    train_tokenizer([" ".join(_WORDS)] * 3, folder / TOKENIZER)
    n = len(tokens)
    names = [f"{i:09d}" for i in range(n)]
    kinds = np.array(["text", "image", "multi_image", "video"])[kind]
    numbers = {field.name: np.zeros(n, np.int64) for field in INDEX_SCHEMA if pa.types.is_integer(field.type)}
    columns = {
        **numbers,
        **{"key": names, "id": names, "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names]},
        **{"shard": [shard_name(i // 1000) for i in range(n)], "modality": kinds, "n_tokens": tokens},
        **{"source": kinds, "component": kinds, "n_images": images},
    }
    tokenizer = ChatTokenizer.load(str(folder / TOKENIZER))
    known = {field.name: columns.get(field.name, pa.nulls(n, field.type)) for field in INDEX_SCHEMA}
    _finish(folder, tokenizer, pa.table(known).cast(INDEX_SCHEMA))
    return folder


def _finish(folder: Path, tokenizer: ChatTokenizer, index: pa.Table) -> None:
    pq.write_table(index, folder / INDEX, compression="zstd")
    about = {"name": "benchmark", "sha256": tokenizer.fingerprint, "image_token": IMAGE_TOKEN}
    write_manifest(
        folder,
        {
            "format": FORMAT,
            "protocol": VERSION,
            "recipe": {"name": "benchmark", "sequence_length": 40_960},
            "tokenizer": {**about, "tokens_per_image": TOKENS_PER_IMAGE},
            "index": {"file": INDEX, "sha256": file_sha256(folder / INDEX), "rows": index.num_rows},
        },
    )


def _picture(random: np.random.Generator) -> bytes:
    """A JPEG of about 31 kB: shapes at several scales, some grain."""
    canvas = np.zeros((336, 336, 3))
    for side, strength in ((6, 60), (42, 30), (168, 8), (336, 2)):
        layer = random.normal(0, strength, (side, side, 3)).clip(-127, 127) + 128
        picture = Image.fromarray(layer.astype(np.uint8)).resize((336, 336), Image.Resampling.BICUBIC)
        canvas += np.asarray(picture, np.float64) - 128
    file = io.BytesIO()
    Image.fromarray((canvas + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _add(
    shard: ShardWriter, i: int, words: int, pictures: list[bytes], tokenizer: ChatTokenizer, random: np.random.Generator
) -> dict[str, Any]:
    images = int(random.integers(1, 9))
    text = " ".join(random.choice(_WORDS, words))
    asked = "".join("<img><image></img>\n" for _ in range(images)) + "What is shown?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": text}]
    chosen = [pictures[k] for k in random.integers(0, len(pictures), images)]
    place = shard.add(f"{i:09d}", encode_record({"id": str(i), "conversations": turns}), chosen)
    count = tokenizer.count(turns)
    return {
        **{"key": f"{i:09d}", "id": str(i), "shard": shard.path.name, "source": "noise", "component": "noise"},
        **{"offset": place.offset, "size": place.size, "sha256": place.sha256, "n_turns": 2, "modality": "image"},
        **{"n_images": images, "n_tokens": count.total, "n_text_tokens": count.text, "n_target_tokens": count.targets},
    }


def _samples(source: Path) -> list[tuple[dict[str, Any], list[bytes]]]:
    chosen = blend([source])
    reader = ShardReader([LocalShards(source / SHARDS)], [str(source)])
    found = []
    for row in range(len(chosen.samples.tokens)):
        record, files = members(reader.read(chosen.entry(row)))
        found.append((record, [bytes(file) for file in files]))
    return found


def mds(source: Path, to: Path) -> Path:
    """The samples as MosaicML's MDS shards."""
    from streaming import MDSWriter

    with MDSWriter(out=str(to), columns={"json": "json", "images": "jpeg_array"}) as writer:
        for record, files in _samples(source):
            writer.write({"json": record, "images": files})
    return to


def litdata(source: Path, to: Path) -> Path:
    """The samples as LitData chunks; pictures as one leaf, so that none is lost."""
    from litdata.streaming.cache import Cache
    from litdata.types import JpegArray

    cache = Cache(str(to), chunk_bytes="64MB")
    for i, (record, files) in enumerate(_samples(source)):
        cache[i] = {"json": json.dumps(record), "images": JpegArray(files)}
    cache.done()
    cache.merge()
    return to


def energon(source: Path, to: Path) -> Path:
    """The same tar files with what Energon needs beside them."""
    shutil.copytree(source / SHARDS, to)
    chosen = blend([source])
    counts: dict[str, int] = {}
    for path in sorted(to.glob("*.tar")):
        entries = [chosen.entry(row) for row in range(len(chosen.samples.tokens))]
        own = [entry for entry in entries if entry.shard == path.name]
        counts[path.name] = len(own)
        offsets = [*(entry.offset for entry in own), own[-1].offset + own[-1].size]
        path.with_suffix(".tar.idx").write_bytes(np.array(offsets, "<u8").tobytes())
    meta = to / ".nv-meta"
    meta.mkdir()
    (meta / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": counts}))
    split = {"split_parts": {"train": list(counts), "val": [], "test": []}, "exclude": []}
    (meta / "split.yaml").write_text(json.dumps(split))
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    return to
