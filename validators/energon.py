"""Do the side files for Megatron-Energon, where there are any, say where the samples are?

`X.tar.idx` is a list of little-endian 64-bit offsets, one a sample and one for the end of the last;
`.nv-meta/.info.json` counts each shard's samples; `.nv-meta/split.yaml` says which shards are read for what, and names
a run of them as "train-{000000..000004}.tar".
"""

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
import yaml

from validators.findings import Check, Finding, error
from validators.folder import Folder
from validators.manifest import Manifest

INFO = ".nv-meta/.info.json"
SPLIT = ".nv-meta/split.yaml"
_RUN = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)")


def check_offsets(folder: Folder, shard: str, offsets: Sequence[int]) -> Iterator[Finding]:
    """Holds a shard's .idx against its samples.

    Args:
        offsets: where each sample starts, and where the last one ends.
    """
    file = f"{shard}.idx"
    if folder.size(file) is None:
        if folder.size(INFO) is not None:
            yield error("energon-index", f"it is absent, and {INFO} is there", file=file)
        return
    content = folder.read(file)
    if len(content) % 8 or np.frombuffer(content, "<u8").tolist() != list(offsets):
        yield error("energon-index", "the offsets are not those of the samples", file=file)


def check_info(folder: Folder, manifest: Manifest) -> Check[None]:
    """Holds the counts of .info.json against the manifest."""
    if folder.size(INFO) is None:
        return
    stated = json.loads(folder.read(INFO))["shard_counts"]
    found = {name.rpartition("/")[2]: count for name, count in stated.items()}
    expected = {shard.file.rpartition("/")[2]: shard.samples for shard in manifest.shards}
    if found != expected:
        yield error("energon-index", "shard_counts are not the manifest's samples", file=INFO)


def check_split(folder: Folder, manifest: Manifest) -> Check[None]:
    """Every shard is in one part of split.yaml."""
    if folder.size(SPLIT) is None:
        return
    parts = yaml.safe_load(folder.read(SPLIT))["split_parts"].values()
    most = len(manifest.shards)
    named = [shard for part in parts for pattern in part for shard in _expanded(pattern, most)]
    if sorted(named) != sorted(shard.file for shard in manifest.shards):
        yield error("energon-index", f"the shards of all parts are {', '.join(named[:8])} …", file=SPLIT)


def _expanded(pattern: str, most: int) -> Iterator[str]:
    """The shards of a pattern; of a run, which a forger may make endless, one more than there can be."""
    run = _RUN.fullmatch(pattern)
    if run is None:
        yield pattern
        return
    before, first, last, after = run.groups()
    for number in range(int(first), min(int(last), int(first) + most) + 1):
        yield f"{before}{number:0{len(first)}d}{after}"
