"""What does a check of a build cost, a sample?

    python benchmarks/validate.py [--samples 3000] [--images 1] [--repeats 3]

Writes two builds of short conversations, each sample with IMAGES pictures of noise, one with SAMPLES and one with a
tenth as many, and measures `validate` on both, plain and `--deep`, each in a fresh process, interleaved. CPU seconds of
the larger less those of the smaller, over the samples between them, is what one sample costs; the rest is the start.
"""

import argparse
import hashlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import measured
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
print(json.dumps(summary(validate(sys.argv[1], deep=sys.argv[2] == "deep"))))
"""
PER_SHARD = 500
WORDS = ["What", "colour", "is", "the", "circle", "in", "this", "picture", "of", "a", "small", "red", "house", "why"]


def write_build(folder: Path, samples: int, images: int, tokenizer: ChatTokenizer, pictures: list[bytes]) -> None:
    """A build that is sound in every check."""
    (folder / SHARDS).mkdir(parents=True)
    tokenizer.copy_to(folder / TOKENIZER)
    chance = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    shards = []
    for start in range(0, samples, PER_SHARD):
        with ShardWriter(folder / SHARDS / shard_name(start // PER_SHARD)) as shard:
            numbers = range(start, min(start + PER_SHARD, samples))
            mine = [_add(shard, n, images, tokenizer, pictures, chance) for n in numbers]
            shards.append(shard.finish())
        rows += mine
        write_offsets(shard.path, pa.Table.from_pylist(mine, schema=INDEX_SCHEMA))
    write_meta(folder, shards)
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / INDEX)
    (folder / REJECTS).write_bytes(b"")
    sums = {name: sum(row[f"n_{name}"] for row in rows) for name in ("images", "tokens", "target_tokens")}
    recipe = {"name": "small", "sequence_length": 8192, "components": {"all": {"source": "llava15", "count": "all"}}}
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
        "shards": [{**shard.as_dict(), "file": f"{SHARDS}/{shard.file}"} for shard in shards],
        "index": {"file": INDEX, "sha256": file_sha256(folder / INDEX), "rows": samples},
        "rejects": {"file": REJECTS, "sha256": hashlib.sha256(b"").hexdigest(), "rows": 0},
        "environment": {},
    }
    write_manifest(folder, manifest)


def _add(
    shard: ShardWriter,
    number: int,
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
    known = {"id": f"llava15/a.json:{number}", "source": "llava15", "component": "all", "modality": modality}
    record = {
        **known,
        "conversations": turns,
        "images": [{"file": f"{i:04d}.jpg", **entry} for i in range(images)],
        "escaped": 0,
        "provenance": {"file": "a.json", "ordinal": number},
    }
    key = f"{number:09d}"
    place = shard.add(key, encode_record(record), [pictures[(number + i) % len(pictures)] for i in range(images)])
    count = tokenizer.count(turns)
    return {
        **known,
        **{"key": key, "shard": shard.path.name, "offset": place.offset, "size": place.size, "sha256": place.sha256},
        **{"n_images": images, "n_text_tokens": count.text, "n_tokens": count.total},
        **{"n_target_tokens": count.targets, "n_turns": 2},
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
        cpu: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.repeats):
            for mode in ("plain", "deep"):
                for build in sizes:
                    run = measured(VALIDATE, Path(name) / build, mode)
                    assert run["result"] == {}, run["result"]
                    cpu.setdefault((mode, build), []).append(run["cpu_s"])
    between = sizes["large"] - sizes["small"]
    result = {
        mode: {
            "start_s": round(statistics.median(cpu[mode, "small"]), 3),
            "ms_a_sample": round(
                1000
                * statistics.median(b - a for a, b in zip(cpu[mode, "small"], cpu[mode, "large"], strict=True))
                / between,
                3,
            ),
        }
        for mode in ("plain", "deep")
    }
    sample_bytes = sum(map(len, pictures)) // len(pictures) * options.images
    print(json.dumps({"samples": between, "images": options.images, "image_bytes": sample_bytes, **result}, indent=2))


if __name__ == "__main__":
    main()
