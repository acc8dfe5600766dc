"""How long, and how much memory, do the statistics of a large build take?

    python benchmarks/stats.py [--rows 1000000] [--repeats 3]

Writes an index of as many rows with six components into a temporary folder, and a small one beside it, then measures
`longllava stats --json` and the plots of report.html on each in a fresh process, interleaved. The difference is what
the rows cost.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import measured, median

from formats.manifest import FORMAT, INDEX, write_manifest
from formats.shard import INDEX_SCHEMA, SCORES

STATISTICS = """
import json, sys
from pipelines.report import statistics
print(json.dumps(statistics(sys.argv[1])["total"]["samples"]))
"""
PLOTS = """
import sys
from pipelines.charts import charts
from pipelines.opened import OpenBuild
print(sum(row["samples"] for row in charts(OpenBuild(sys.argv[1]))[1].spec["data"]["values"]))
"""
MODALITIES = ("text", "image", "multi_image", "video", "subimage")
GROUP_ROWS = 100_000


def write_build(folder: Path, rows: int) -> None:
    """A build without shards: the index is all that statistics read."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    with pq.ParquetWriter(folder / INDEX, INDEX_SCHEMA, compression="zstd") as writer:
        for start in range(0, rows, GROUP_ROWS):
            writer.write_table(_group(start, min(start + GROUP_ROWS, rows), chance))
    components = {f"part{i}": {"asked": rows, "kept": rows, "rejects": {}} for i in range(6)}
    recipe = {"name": "large", "sequence_length": 40_960}
    write_manifest(folder, {"format": FORMAT, "recipe": recipe, "components": components, "sources": {}})


def _group(start: int, stop: int, chance: np.random.Generator) -> pa.Table:
    numbers = np.arange(start, stop)
    images = chance.integers(0, 64, len(numbers))
    text = chance.lognormal(5, 1, len(numbers)).astype(int) + 1
    columns: dict[str, Any] = {
        "key": [f"{n:09d}" for n in numbers],
        "id": [f"llava15/llava_v1_5_mix665k.json:{n}" for n in numbers],
        "shard": [f"train-{n // 1000:06d}.tar" for n in numbers],
        "offset": numbers * 1024,
        "size": images * 30_000 + 2048,
        "sha256": [f"{n:064x}" for n in chance.integers(0, 2**62, len(numbers))],
        "source": [f"source{n % 9}" for n in numbers],
        "component": [f"part{n % 6}" for n in numbers],
        "modality": [MODALITIES[n % 5] for n in numbers],
        "n_images": images,
        "n_text_tokens": text,
        "n_tokens": text + 144 * images,
        "n_target_tokens": text // 2,
        "n_turns": 2 + numbers % 4,
        "flags": [[]] * len(numbers),
        "repetition": chance.random(len(numbers)).round(4),
        "max_aspect": (1 + chance.random(len(numbers))).round(4),
        "question_language": ["en"] * len(numbers),
        "answer_language": ["en"] * len(numbers),
        "language_mismatch": [False] * len(numbers),
    }
    scores = [name for name, _ in SCORES if name not in columns]
    columns |= {name: chance.integers(1, 2_000, len(numbers)) for name in scores}
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA})


def main() -> None:
    """Prints one JSON object with medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        builds = {"small": (Path(name) / "small", 1_000), "large": (Path(name) / "large", options.rows)}
        for folder, rows in builds.values():
            write_build(folder, rows)
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(options.repeats):
            for case, (folder, rows) in builds.items():
                for what, code in (("stats", STATISTICS), ("plots", PLOTS)):
                    found = measured(code, folder)
                    assert found["result"] == rows
                    runs.setdefault((what, case), []).append(found)
    result = {
        f"{what}, {case}": {
            "rows": builds[case][1],
            **{key: median(found, key) for key in ("wall_s", "cpu_s", "peak_mb")},
        }
        for (what, case), found in runs.items()
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
