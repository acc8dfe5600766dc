"""The small files that let Megatron-Energon open a build as it is, without `energon prepare`.

    shards/train-000000.tar.idx   little-endian u64: where each sample starts, then where the last one ends
    .nv-meta/.info.json           samples of each shard
    .nv-meta/split.yaml           all shards are "train"
    .nv-meta/dataset.yaml         samples are `InterleavedSample`, made by
    .nv-meta/sample_loader.py     the chat template's text with each image where the model reads it

Energon's index.sqlite is left out: reading does not need it (`energon prepare --tar-index-only` adds it).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from formats.manifest import write_atomically
from formats.shard import ShardSummary

META = ".nv-meta"
_VERSION = "7.4.1"  # of the layout, as Energon states it
_LOADER = Path(__file__).parent / "templates" / "sample_loader.py"
_DATASET = {
    "sample_type": {"__module__": "megatron.energon", "__class__": "InterleavedSample"},
    "sample_loader": "sample_loader.py:sample_loader",
    "part_filter": "sample_loader.py:part_filter",
}


def write_offsets(shard: Path, starts: Sequence[int], sizes: Sequence[int]) -> None:
    """Writes a shard's .idx from where its samples start and how many bytes each has, in the shard's order."""
    offsets = np.append(starts, starts[-1] + sizes[-1])
    write_atomically(shard.with_name(f"{shard.name}.idx"), offsets.astype("<u8").tobytes())


def write_meta(build: Path, shards: Sequence[ShardSummary]) -> None:
    """Writes .nv-meta; a build without samples gets none, since Energon has no empty sets."""
    if not shards:
        return
    folder = build / META
    folder.mkdir(exist_ok=True)
    info = {"energon_version": _VERSION, "shard_counts": {shard.file: shard.samples for shard in shards}}
    split = {"split_parts": {"train": [_all_of(shards)]}, "exclude": []}
    write_atomically(folder / ".info.json", json.dumps(info, indent=2).encode() + b"\n")
    write_atomically(folder / "split.yaml", yaml.safe_dump(split, sort_keys=False).encode())
    write_atomically(folder / "dataset.yaml", yaml.safe_dump(_DATASET, sort_keys=False).encode())
    write_atomically(folder / "sample_loader.py", _LOADER.read_bytes())


def _all_of(shards: Sequence[ShardSummary]) -> str:
    """All shards as one brace pattern: shards/train-{000000..000932}.tar."""
    first, last = (shard.file.removesuffix(".tar").rpartition("-") for shard in (shards[0], shards[-1]))
    return f"{first[0]}-{{{first[2]}..{last[2]}}}.tar"
