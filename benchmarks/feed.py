"""How many images a CPU-second does the feed deliver, beside other loaders and beside JPEG decoding alone?

    python benchmarks/feed.py [--samples 1000] [--repeats 3]

Writes one set of samples (texts of about 200 words, one to eight 336 x 336 pictures of about 33 kB) as a build and, for
those loaders that are installed, in their own formats. Then measures each in a fresh process, interleaved: all samples
once, shuffled, every picture a uint8 tensor in the main process. Imports do not count; CPU-seconds are those of the
main process and its workers, from opening the set to the end of the last worker. The feed does more than the others:
it checks each sample's sha256, tokenises its text and packs it; "no text" is the same set with a few words a sample.
"""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import feed_sets
from measure import measured, median

# Each prints [images, CPU seconds, wall seconds, samples, sequences] from after its imports to the end of its workers.
_CLOCK = """
import json, os, sys, time
class Clock:
    def __init__(self):
        self.images = self.samples = self.sequences = 0
    def start(self):
        self.started = sum(os.times()[:4]), time.perf_counter()
    def batch(self, images, samples, sequences=0):
        self.images += images
        self.samples += samples
        self.sequences += sequences
    def report(self):
        cpu, wall = sum(os.times()[:4]) - self.started[0], time.perf_counter() - self.started[1]
        print(json.dumps([self.images, cpu, wall, self.samples, self.sequences]))
clock = Clock()
"""
FEED = """
from model.feed import Feed
import torch; torch.set_num_threads(1)
clock.start()
for s in Feed([sys.argv[1]], threads=2):
    clock.batch(len(s.images), len(s.rows), 1)
clock.report()
"""
LIMIT = """
import io
import numpy as np
from PIL import Image
from formats.blend import blend
from pathlib import Path
from model.shards import LocalShards, ShardReader, decode, members
b = blend([Path(sys.argv[1])])
r = ShardReader([LocalShards(Path(sys.argv[1]) / "shards")], ["x"])
files = [f for row in range(min(400, len(b.samples.tokens))) for f in members(r.read(b.entry(row)))[1]]
if sys.argv[2] == "pillow":
    def decode(jpeg, out): out[:] = np.asarray(Image.open(io.BytesIO(jpeg)))
out = np.empty((int(sys.argv[3]), 336, 336, 3), np.uint8)
out[:] = 1
decode(files[0], out[0])
clock.start()
for i, f in enumerate(files):
    decode(f, out[i % len(out)])
clock.batch(len(files), 0)
clock.report()
"""
WEBDATASET = """
import warnings; warnings.simplefilter("ignore")
import glob, numpy as np, torch, webdataset as wds; torch.set_num_threads(1)
def stacked(s):
    pictures = [s[k] for k in sorted(s) if k.endswith(".jpg")]
    return s["json"], (torch.stack(pictures) if pictures else torch.empty(0, 3, 336, 336, dtype=torch.uint8))
clock.start()
shards = sorted(glob.glob(sys.argv[1] + "/shards/*.tar"))
d = wds.WebDataset(shards, shardshuffle=100).shuffle(256).decode("torchrgb8").map(stacked)
loader = torch.utils.data.DataLoader(d.batched(8, collation_fn=list), batch_size=None, num_workers=int(sys.argv[2]))
for batch in loader:
    clock.batch(sum(len(i) for _, i in batch), len(batch))
clock.report()
"""
TAR_INDEX = """
import io, numpy as np, torch; torch.set_num_threads(1)
from pathlib import Path
from PIL import Image
from formats.blend import blend
from model.shards import LocalShards, ReadMemory, ShardReader, members
class Samples(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.blend, self.reader = blend([Path(folder)]), ShardReader([LocalShards(Path(folder) / "shards")], ["x"])
        self.memory = ReadMemory()
    def __len__(self): return len(self.blend.samples.tokens)
    def __getitem__(self, i):
        e = self.blend.entry(i)
        record, files = members(self.reader._read(e, self.memory.place(e.size)))
        pictures = [torch.from_numpy(np.array(Image.open(io.BytesIO(f)))) for f in files]
        return record, torch.stack(pictures) if pictures else torch.empty(0, 336, 336, 3, dtype=torch.uint8)
clock.start()
loader = torch.utils.data.DataLoader(
    Samples(sys.argv[1]), batch_size=8, shuffle=True, collate_fn=list, num_workers=int(sys.argv[2]))
for batch in loader:
    clock.batch(sum(len(i) for _, i in batch), len(batch))
clock.report()
"""
LITDATA = """
import warnings; warnings.simplefilter("ignore")
import numpy as np, torch; torch.set_num_threads(1)
import litdata
class Set(litdata.StreamingDataset):
    def __getitem__(self, i):
        s = super().__getitem__(i)
        return s["json"], torch.stack(list(s["images"]))
clock.start()
loader = litdata.StreamingDataLoader(Set(sys.argv[1], shuffle=True), batch_size=8, collate_fn=list,
                                     num_workers=int(sys.argv[2]))
for batch in loader:
    clock.batch(sum(len(i) for _, i in batch), len(batch))
clock.report()
"""
MDS = """
import warnings; warnings.simplefilter("ignore")
import numpy as np, torch; torch.set_num_threads(1)
from streaming import StreamingDataset
class Set(StreamingDataset):
    def __getitem__(self, i):
        s = super().__getitem__(i)
        pictures = [torch.from_numpy(np.array(p)) for p in s["images"]]
        return s["json"], torch.stack(pictures) if pictures else torch.empty(0, 336, 336, 3, dtype=torch.uint8)
clock.start()
loader = torch.utils.data.DataLoader(Set(local=sys.argv[1], shuffle=True, batch_size=8), batch_size=8,
                                     collate_fn=list, num_workers=int(sys.argv[2]))
for batch in loader:
    clock.batch(sum(len(i) for _, i in batch), len(batch))
clock.report()
"""
ENERGON = """
import warnings; warnings.simplefilter("ignore")
import logging; logging.disable(logging.CRITICAL)
import torch; torch.set_num_threads(1)
from megatron.energon import (Cooker, DefaultTaskEncoder, SampleDecoder, WorkerConfig, basic_sample_keys,
                              get_savable_loader, get_train_dataset, stateless)
@stateless
def cook(s): return dict(**basic_sample_keys(s), json=s["json"], images=[s[k] for k in sorted(s) if k.endswith(".jpg")])
class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]
    decoder = SampleDecoder(image_decode="torchrgb8")
    @stateless
    def batch(self, samples): return samples
    @stateless
    def encode_sample(self, s): return s
clock.start()
config = WorkerConfig(rank=0, world_size=1, num_workers=int(sys.argv[2]))
d = get_train_dataset(sys.argv[1], worker_config=config, batch_size=8, shuffle_buffer_size=256, repeat=False,
                      max_samples_per_sequence=100, task_encoder=Encoder())
for batch in get_savable_loader(d):
    clock.batch(sum(len(s["images"]) for s in batch), len(batch))
clock.report()
"""


def installed(module: str) -> bool:
    """Whether a loader can be measured."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def cases(folder: Path, samples: int) -> dict[str, tuple[str, tuple[object, ...]]]:
    """What is measured: a name, its code and its arguments; writes the sets."""
    build = feed_sets.build(folder / "build", samples, words=200)
    short = feed_sets.build(folder / "short", samples, words=2)
    chosen: dict[str, tuple[str, tuple[object, ...]]] = {
        "decode alone, simplejpeg": (LIMIT, (build, "simplejpeg", 1)),
        "decode alone, simplejpeg, into batches": (LIMIT, (build, "simplejpeg", 800)),
        "decode alone, Pillow": (LIMIT, (build, "pillow", 1)),
        "feed, 2 threads": (FEED, (build,)),
        "feed, 2 threads, no text": (FEED, (short,)),
        "torch DataLoader over the index, 2 workers": (TAR_INDEX, (build, 2)),
    }
    peers: dict[str, tuple[str, Callable[[Path, Path], Any], str]] = {
        "webdataset": ("webdataset", lambda source, _: source, WEBDATASET),
        "Megatron-Energon": ("megatron.energon", feed_sets.energon, ENERGON),
        "MosaicML Streaming": ("streaming", feed_sets.mds, MDS),
        "LitData": ("litdata", feed_sets.litdata, LITDATA),
    }
    for name, (module, write, code) in peers.items():
        if installed(module):
            place = write(build, folder / module)
            chosen[f"{name}, 2 workers"] = (code, (place, 2))
            chosen[f"{name}, no workers"] = (code, (place, 0))
    return chosen


def main() -> None:
    """Prints one JSON object: medians for each loader, and ratios within the run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        chosen = cases(Path(name), options.samples)
        runs: dict[str, list[dict[str, Any]]] = {case: [] for case in chosen}
        for _ in range(options.repeats):
            for case, (code, arguments) in chosen.items():
                images, cpu, wall, samples, sequences = measured(_CLOCK + code, *arguments)["result"]
                rates = {"images": images, "samples": samples, "sequences": sequences}
                runs[case].append(
                    {f"{what}_per_cpu_s": count / cpu for what, count in rates.items()}
                    | {"images_per_wall_s": images / wall}
                )
    result = {case: {key: median(measurements, key) for key in measurements[0]} for case, measurements in runs.items()}
    speed = {case: figures["images_per_cpu_s"] for case, figures in result.items()}
    peers = {case: rate for case, rate in speed.items() if case.endswith("2 workers")}
    best = max(peers, key=lambda case: peers[case])
    ratios = {"best peer with two workers": best}
    for case in ("feed, 2 threads", "feed, 2 threads, no text"):
        ratios |= {
            f"{case} / best peer": round(speed[case] / speed[best], 2),
            f"{case} / decode alone": round(speed[case] / speed["decode alone, simplejpeg"], 3),
        }
    print(json.dumps({"samples": options.samples, **result, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
