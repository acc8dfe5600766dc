"""How fast a run goes, how much of the hardware that uses, and how long it waits for data."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from model.budget import Shape
from model.feed import PackedSequence
from model.flops import training_flops
from model.loss import supervised
from model.metrics import peak_flops, peak_memory
from model.packing import Packing
from model.stage import Part
from model.world import World


@dataclass(slots=True)
class Speedometer:
    """Measures steps, from the end of one to the end of the next.

    Attributes:
        shape: of the model, for counting operations.
        trainable: parts that learn, likewise.
        isolate: whether samples are kept apart, likewise.
    """

    world: World
    shape: Shape
    trainable: Collection[Part]
    isolate: bool
    _began: float = 0.0
    _waited: float = 0.0
    _seconds: float = 0.0
    _steps: int = 0

    def start(self) -> None:
        """Begins the first step."""
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around reading a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def step(self, sequences: Sequence[PackedSequence], tokens: int, images: int) -> dict[str, Any]:
        """Ends a step.

        Args:
            sequences: that this process read.
            tokens: that all processes read, and `images` likewise.

        Returns:
            seconds; tokens_per_second and images_per_second of all processes together; mfu, the share of the
            hardware's operations that training needs (None where nobody knows those); feed_wait, the share of the time
            that the slowest process waited for data; memory, the most bytes that a process held.
        """
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        flops = float(self.world.sum(torch.tensor([sum(self._flops(s) for s in sequences)], dtype=torch.float64)))
        seconds, waited, memory = self.world.most(
            time.perf_counter() - self._began, self._waited, peak_memory(self.world.device)
        )
        self._began, self._waited = time.perf_counter(), 0.0
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        peak = peak_flops(self.world.device)
        return {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "mfu": round(flops / seconds / (peak * self.world.size), 4) if peak else None,
            "feed_wait": round(waited / seconds, 4),
            "memory": int(memory),
        }

    def remaining(self, steps: int) -> float:
        """Seconds that so many more steps take, as the ones so far did."""
        return steps * self._seconds / max(1, self._steps)

    def _flops(self, sequence: PackedSequence) -> int:
        if sequence.filler:
            return 0
        bounds = sequence.cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)] if self.isolate else [bounds[-1]]
        targets = int(supervised(sequence.labels[None], Packing.of(bounds, isolate=self.isolate)).sum())
        return training_flops(self.shape, lengths, len(sequence.images), targets, self.trainable)
