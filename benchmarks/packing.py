"""How full are sequences, what is lost, and how evenly is work spread, beside other packers?

    python benchmarks/packing.py [--samples 50000] [--large 750000]

Two synthetic mixes of lengths at 40,960 tokens, three seeds each: "long" (text, single images, several images, clips)
and "sft" (mostly single images). The other packers are written anew here after their published code: the authors'
concatenation as it stands and with images counted once, next fit (ms-swift, sequential), greedy knapsack over a buffer
(Megatron-Energon with Megatron-LM's example; LLaMA-Factory), constant-volume bins (ms-swift with binpacking, which puts
each sample, longest first, into the fullest bin that holds it), best fit decreasing over all.
"""

import argparse
import json
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from pathlib import Path
from typing import Any

import feed_sets
import numpy as np

from formats.blend import blend
from formats.packing import Packing, Samples, plan_epoch
from model.course import Course, Position, Reader

LENGTH = 40_960
IMAGE = 146
Sequences = list[list[int]]


def long_mix(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, images and kind of each sample: text, one image or five tiles, 2 to 64 images, 8 to 64 frames."""
    random = np.random.default_rng(seed)
    kind = random.choice(4, n, p=[0.12, 0.43, 0.25, 0.20])
    tiles = np.where(random.random(n) < 0.12, 5, 1)
    several = np.clip(np.round(2 * np.exp(random.exponential(0.75, n))), 2, 64)
    frames = np.clip(np.round(8 + random.exponential(16, n)), 8, 64)
    images = np.choose(kind, [np.zeros(n), tiles, several, frames]).astype(np.int64)
    text = np.where(kind == 0, random.lognormal(np.log(1340), 0.9, n), random.lognormal(np.log(250), 0.7, n) + 20)
    return (1 + text + images * IMAGE).astype(np.int64), images, kind


def sft_mix(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for mostly single images with a conversation."""
    random = np.random.default_rng(seed)
    kind = random.choice(3, n, p=[0.15, 0.80, 0.05])
    images = np.choose(kind, [np.zeros(n), np.ones(n), random.integers(2, 7, n)]).astype(np.int64)
    text = random.lognormal(np.log(270), 0.8, n) + 15
    return (1 + text + images * IMAGE).astype(np.int64), images, kind


def authors(tokens: list[int], images: list[int], messages: list[int]) -> Sequences:
    """The authors' concat.py: an item's images are counted for each of its messages; what does not fit is dropped,
    and so is a sequence without images."""
    done: Sequences = []
    current: list[int] = []
    filled = 0
    for i, (length, shown, times) in enumerate(zip(tokens, images, messages, strict=True)):
        counted = length + (times - 1) * shown * IMAGE
        if filled + counted <= LENGTH:
            current.append(i)
            filled += counted
            continue
        if any(images[j] for j in current):
            done.append(current)
        current, filled = [], 0
    return [*done, current] if any(images[j] for j in current) else done


def next_fit(tokens: list[int]) -> Sequences:
    """In order; a sample that does not fit begins the next sequence."""
    done: Sequences = [[]]
    filled = 0
    for i, length in enumerate(tokens):
        if length > LENGTH:
            continue
        if filled + length > LENGTH:
            done.append([])
            filled = 0
        done[-1].append(i)
        filled += length
    return done


def knapsack(tokens: list[int], buffer: int) -> Sequences:
    """Buffer by buffer, each sequence takes the longest that still fits until none does; a buffer is used up whole."""
    done: Sequences = []
    for first in range(0, len(tokens), buffer):
        waiting = sorted((tokens[i], i) for i in range(first, min(first + buffer, len(tokens))) if tokens[i] <= LENGTH)
        while waiting:
            done.append([])
            room = LENGTH
            while (place := bisect_right(waiting, (room, 1 << 60)) - 1) >= 0:
                length, i = waiting.pop(place)
                done[-1].append(i)
                room -= length
    return done


def fullest_bin(tokens: list[int], rows: list[int]) -> Sequences:
    """Longest first, each into the fullest bin that holds it (best fit decreasing)."""
    bins: Sequences = []
    rooms: list[tuple[int, int]] = []
    for i in sorted(rows, key=lambda row: -tokens[row]):
        place = bisect_left(rooms, (tokens[i], -1))
        if place == len(rooms):
            bins.append([i])
            insort(rooms, (LENGTH - tokens[i], len(bins) - 1))
            continue
        room, number = rooms.pop(place)
        bins[number].append(i)
        insort(rooms, (room - tokens[i], number))
    return bins


def carried_over(tokens: list[int], step: int) -> Sequences:
    """ms-swift's streaming packer: bins of so many new samples and what the last, unfinished bin held before."""
    done: Sequences = []
    held: list[int] = []
    for first in range(0, len(tokens), step):
        held += [i for i in range(first, min(first + step, len(tokens))) if tokens[i] <= LENGTH]
        bins = fullest_bin(tokens, held)
        done += bins[:-1]
        held = bins[-1] if bins else []
    return [*done, held]


def ours(tokens: np.ndarray, images: np.ndarray, kind: np.ndarray, seed: int) -> tuple[Sequences, np.ndarray]:
    """formats.packing, and the arrival order that it fills sequences in."""
    zeros = np.zeros(len(tokens), np.int64)
    columns = Samples(tokens, images, zeros, np.arange(len(tokens)) // 1000, kind)
    plan = plan_epoch(columns, Packing(LENGTH, seed))
    return [rows.tolist() for rows in plan], plan.arrival


def figures(
    sequences: Sequences, arrival: np.ndarray, tokens: np.ndarray, images: np.ndarray, kind: np.ndarray
) -> dict[str, float]:
    """What a packing is worth."""
    sequences = [rows for rows in sequences if rows]
    rows = np.concatenate([np.asarray(s) for s in sequences])
    starts = np.cumsum([0, *(len(s) for s in sequences[:-1])])
    place = np.full(len(tokens), -1)
    place[arrival] = np.arange(len(arrival))
    cost = np.add.reduceat(tokens[rows].astype(float) ** 2, starts)
    shown = np.add.reduceat(images[rows], starts)
    return {
        "fill_percent": 100 * tokens[rows].sum() / (len(sequences) * LENGTH),
        "dropped_samples_percent": 100 * (1 - len(rows) / len(tokens)),
        "dropped_tokens_percent": 100 * (1 - tokens[rows].sum() / tokens.sum()),
        "displacement": float(np.abs(place[rows] - np.arange(len(rows))).mean()),
        "attention_cost_spread": cost.std() / cost.mean(),
        "images_spread": shown.std() / shown.mean(),
        "most_images": int(shown.max()),
        "share_off_by_percent_in_100": 100 * _deviation(tokens[rows], kind[rows], starts),
    }


def _deviation(tokens: np.ndarray, kind: np.ndarray, starts: np.ndarray) -> float:
    by_kind = np.stack([np.add.reduceat(np.where(kind == k, tokens, 0), starts) for k in range(kind.max() + 1)], 1)
    sums = np.vstack([np.zeros(by_kind.shape[1]), np.cumsum(by_kind, 0)])
    hundreds = sums[100:] - sums[:-100]
    return float(np.abs(hundreds / hundreds.sum(1, keepdims=True) - by_kind.sum(0) / by_kind.sum()).max())


def packers(tokens: list[int], images: list[int], messages: list[int]) -> dict[str, Callable[[], Sequences]]:
    """The others, on samples in shuffled order."""
    fitting = [i for i, length in enumerate(tokens) if length <= LENGTH]
    return {
        "authors' concat.py, as it stands": lambda: authors(tokens, images, messages),
        "authors' concat.py, images counted once": lambda: authors(tokens, images, [1] * len(tokens)),
        "ms-swift, sequential": lambda: next_fit(tokens),
        "Energon with Megatron-LM's knapsack, buffer 100": lambda: knapsack(tokens, 100),
        "Energon with Megatron-LM's knapsack, buffer 500": lambda: knapsack(tokens, 500),
        "LLaMA-Factory, 1000 a map batch": lambda: knapsack(tokens, 1000),
        "ms-swift, binpacking, 128 at a time": lambda: carried_over(tokens, 128),
        "best fit decreasing over all": lambda: fullest_bin(tokens, fitting),
    }


def one_run(mix: Callable[..., Any], n: int, seed: int) -> dict[str, dict[str, float]]:
    """All packers on one mix with one seed."""
    tokens, images, kind = mix(n, seed)
    messages = (2 * np.random.default_rng(seed).geometric(0.4, n)).tolist()
    columns = tokens.tolist(), images.tolist(), messages
    found: dict[str, dict[str, float]] = {}
    for name, run in packers(*columns).items():
        started = time.process_time()
        sequences = run()
        seconds = time.process_time() - started
        found[name] = {
            **figures(sequences, np.arange(n), tokens, images, kind),
            "microseconds_a_sample": 1e6 * seconds / n,
        }
    started = time.process_time()
    sequences, arrival = ours(tokens, images, kind, seed)
    seconds = time.process_time() - started
    found["ours"] = {**figures(sequences, arrival, tokens, images, kind), "microseconds_a_sample": 1e6 * seconds / n}
    return found


def large(n: int) -> dict[str, float]:
    """CPU seconds for a whole epoch, and for going on in its middle."""
    tokens, images, kind = long_mix(n, 0)
    zeros = np.zeros(n, np.int64)
    columns = Samples(tokens, images, zeros, np.arange(n) // 1000, kind)
    whole, middle = [], []
    for _ in range(3):
        started = time.process_time()
        sequences = len(plan_epoch(columns, Packing(LENGTH)))
        whole.append(time.process_time() - started)
        started = time.process_time()
        plan = plan_epoch(columns, Packing(LENGTH))
        plan.block(plan.blocks // 2)
        middle.append(time.process_time() - started)
    fill = tokens[tokens <= LENGTH].sum() / (sequences * LENGTH)
    return {
        "samples": n,
        "sequences": sequences,
        "fill_percent": 100 * float(fill),
        "plan_cpu_s": statistics.median(whole),
        "go_on_in_the_middle_cpu_s": statistics.median(middle),
    }


def from_disk(n: int) -> dict[str, float]:
    """CPU seconds to open a build of that many samples, and to get from a saved position to the next sequence."""
    with tempfile.TemporaryDirectory() as name:
        build = feed_sets.index_only(Path(name) / "build", *long_mix(n, 0))
        opened, resumed = [], []
        for _ in range(3):
            started = time.process_time()
            course = Course(blend([build]), 1)
            assert len(course.blend.samples.tokens) == n
            opened.append(time.process_time() - started)
            middle = course.plan(0).blocks // 2
            course = Course(course.blend, 1)
            started = time.process_time()
            position, _ = course.restored(course.state(Position(0, 0, middle, 5)))
            next(course.assigned(position, Reader(), fill=True))
            resumed.append(time.process_time() - started)
    return {"open_cpu_s": statistics.median(opened), "resume_cpu_s": statistics.median(resumed)}


def main() -> None:
    """Prints one JSON object: medians over three seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--large", type=int, default=750_000)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for name, mix in {"long": long_mix, "sft": sft_mix}.items():
        runs = [one_run(mix, options.samples, seed) for seed in range(3)]
        tokens = mix(options.samples, 0)[0]
        result[name] = {"mean_tokens": round(float(tokens.mean())), "median_tokens": int(np.median(tokens))}
        for packer in runs[0]:
            result[name][packer] = {
                key: round(statistics.median(run[packer][key] for run in runs), 3) for key in runs[0][packer]
            }
    figures_of_large = {**large(options.large), **from_disk(options.large)}
    result["large"] = {key: round(value, 3) for key, value in figures_of_large.items()}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
