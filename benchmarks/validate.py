"""What does a check of a build cost, a sample, and what do reading and hashing the same bytes cost?

    python benchmarks/validate.py [--samples 3000] [--images 1] [--repeats 3]

Writes two builds of short conversations, each sample with IMAGES pictures of noise, one with SAMPLES and one with a
tenth as many, and measures on both, each in a fresh process, interleaved: `validate`, `validate --deep`, reading the
shards, and SHA-256 of them. Seconds of the larger less those of the smaller, over the samples between them, is what one
sample costs; the rest is the start.
"""

import argparse
import hashlib
import io
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import measured, median
from PIL import Image

from formats.manifest import FORMAT, INDEX, REJECTS, SHARDS, TOKENIZER, file_sha256, fingerprint, write_manifest
from formats.protocol import VERSION
from formats.shard import INDEX_SCHEMA, ShardWriter, encode_record, shard_name
from formats.tokens import IMAGE_TOKEN, TOKENS_PER_IMAGE, ChatTokenizer
from pipelines.demo.tokenizer import train_tokenizer
from pipelines.energon import write_meta, write_offsets

VALIDATE = """
import json, sys
from validators.run import summary, validate
print(json.dumps(summary(validate(sys.argv[1], deep={deep}))))
"""
PASS = """
import hashlib, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("shards/*.tar")):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            {use}
print("{{}}")
"""
MODES = {
    "validate": VALIDATE.format(deep=False),
    "deep": VALIDATE.format(deep=True),
    "read": PASS.format(use="pass"),
    "sha256": PASS.format(use="digest.update(block)"),
}
PER_SHARD = 500
WORDS = ["What", "colour", "is", "the", "circle", "in", "this", "picture", "of", "a", "small", "red", "house", "why"]


def write_build(folder: Path, samples: int, images: int, tokenizer: ChatTokenizer, pictures: list[bytes]) -> None:
    """A build that is sound in every check."""
    (folder / SHARDS).mkdir(parents=True)
    tokenizer.copy_to(folder / TOKENIZER)
    chance = np.random.default_rng(0)
    order = sorted(range(samples), key=_place)
    rows: list[dict[str, Any]] = []
    shards = []
    for start in range(0, samples, PER_SHARD):
        with ShardWriter(folder / SHARDS / shard_name(start // PER_SHARD)) as shard:
            numbers = range(start, min(start + PER_SHARD, samples))
            mine = [_add(shard, n, order[n], images, tokenizer, pictures, chance) for n in numbers]
            done = shard.finish()
            shards.append(replace(done, file=f"{SHARDS}/{done.file}"))
        rows += mine
        write_offsets(shard.path, [row["offset"] for row in mine], [row["size"] for row in mine])
    write_meta(folder, shards)
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / INDEX)
    (folder / REJECTS).write_bytes(b"")
    sums = {name: sum(row[f"n_{name}"] for row in rows) for name in ("images", "tokens", "target_tokens")}
    component = {"source": "llava15", "count": "all"}
    recipe = {"name": "small", "seed": 0, "sequence_length": 8192, "components": {"all": component}}
    tally = {"records": samples, "usable": samples, "rejected": 0}
    counts = {"asked": samples, "pool": samples, "drawn": samples, "kept": samples, "rejected": 0, "short": 0}
    manifest = {
        **{"format": FORMAT, "protocol": VERSION, "recipe": recipe, "recipe_sha256": fingerprint(recipe)},
        "tokenizer": {
            **{"name": "small", "sha256": tokenizer.fingerprint},
            **{"image_token": IMAGE_TOKEN, "tokens_per_image": TOKENS_PER_IMAGE},
        },
        "sources": {"llava15": {**tally, "files": [{"file": "a.json", "bytes": 1, **tally}]}},
        "components": {"all": {**counts, "filtered": {}, "rejects": {}, **sums}},
        "totals": {"samples": samples, **sums, "rejected": 0, "bytes": sum(shard.bytes for shard in shards)},
        "shards": [shard.as_dict() for shard in shards],
        "index": {"file": INDEX, "sha256": file_sha256(folder / INDEX), "rows": samples},
        "rejects": {"file": REJECTS, "sha256": hashlib.sha256(b"").hexdigest(), "rows": 0},
        "environment": {},
    }
    write_manifest(folder, manifest)


def _place(ordinal: int) -> str:
    """Where seed 0 lays a record out."""
    return hashlib.md5(f"0/order/all/llava15/a.json:{ordinal}/0".encode()).hexdigest()


def _add(
    shard: ShardWriter,
    number: int,
    ordinal: int,
    images: int,
    tokenizer: ChatTokenizer,
    pictures: list[bytes],
    chance: np.random.Generator,
) -> dict[str, Any]:
    question, answer = (" ".join(chance.choice(WORDS, chance.integers(5, 60))) for _ in range(2))
    shown = "<img><image></img>\n" * images
    turns = [{"from": "human", "value": shown + question}, {"from": "gpt", "value": answer}]
    entry = {"role": "image", "width": 336, "height": 336, "source_size": [640, 480]}
    modality = "text" if not images else "image" if images == 1 else "multi_image"
    known = {"id": f"llava15/a.json:{ordinal}", "source": "llava15", "component": "all", "modality": modality}
    record = {
        **known,
        "conversations": turns,
        "images": [{"file": f"{i:04d}.jpg", **entry} for i in range(images)],
        "escaped": 0,
        "provenance": {"file": "a.json", "ordinal": ordinal},
    }
    key = f"{number:09d}"
    place = shard.add(key, encode_record(record), [pictures[(number + i) % len(pictures)] for i in range(images)])
    count = tokenizer.count(turns)
    return {
        **known,
        **{"key": key, "shard": shard.path.name, "offset": place.offset, "size": place.size, "sha256": place.sha256},
        **{"n_images": images, "n_text_tokens": count.text, "n_tokens": count.total},
        **{"n_target_tokens": count.targets, "n_turns": 2, "flags": [], "n_words": len((question + answer).split())},
        **({"min_side": 480, "max_side": 640, "max_aspect": 1.3333, "contrast": 200} if images else {}),
        **({"width": 640, "height": 480} if images else {}),
    }


def _pictures() -> list[bytes]:
    chance = np.random.default_rng(0)
    found = []
    for _ in range(16):
        coarse = Image.fromarray(chance.integers(0, 256, (42, 42, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((336, 336), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        found.append(file.getvalue())
    return found


def main() -> None:
    """Prints one JSON object with medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sizes = {"small": options.samples // 10, "large": options.samples}
    with tempfile.TemporaryDirectory() as name:
        train_tokenizer([" ".join(WORDS)] * 3, Path(name) / "tokenizer")
        tokenizer = ChatTokenizer.load(str(Path(name) / "tokenizer"))
        pictures = _pictures()
        for build, samples in sizes.items():
            write_build(Path(name) / build, samples, options.images, tokenizer, pictures)
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(options.repeats):
            for mode, code in MODES.items():
                for build in sizes:
                    run = measured(code, Path(name) / build)
                    assert run["result"] == {}, run["result"]
                    runs.setdefault((mode, build), []).append(run)
        size = sum(path.stat().st_size for path in Path(name).glob("large/shards/*.tar"))
    between = sizes["large"] - sizes["small"]
    results = {mode: _cost(runs[mode, "small"], runs[mode, "large"], between) for mode in MODES}
    shape = {"samples": between, "images": options.images, "bytes_a_sample": size // options.samples}
    print(json.dumps({**shape, **results}, indent=2))


def _cost(small: list[dict[str, Any]], large: list[dict[str, Any]], samples: int) -> dict[str, float]:
    """Medians: seconds of the start, and milliseconds a sample."""
    found = {"start_cpu_s": median(small, "cpu_s"), "peak_mb": median(large, "peak_mb")}
    for key in ("cpu_s", "wall_s"):
        more = [b[key] - a[key] for a, b in zip(small, large, strict=True)]
        found[f"ms_{key[:-2]}_a_sample"] = round(1000 * statistics.median(more) / samples, 3)
    return found


if __name__ == "__main__":
    main()
