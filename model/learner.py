"""One step of training: what a batch's sequences teach, weighed by all target tokens of all processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from formats.blend import Blend
from formats.errors import TrainingError
from model.feed import PackedSequence
from model.loss import supervised
from model.packing import Packing
from model.sharding import average_whole, clip
from model.world import World

_NAMED = 10  # samples that an error names


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a step saw, over all processes.

    Attributes:
        loss: mean over target tokens.
        loss_by_source: the same for each source that has any, by its name.
        balance: mean over tokens of the experts' load balance; None without experts.
        targets: tokens with a loss.
        tokens: read, fillers left out; and so `images`, `samples` and `sequences`.
        norm: of the gradients, before clipping.
    """

    loss: float
    loss_by_source: dict[str, float]
    balance: float | None
    targets: int
    tokens: int
    images: int
    samples: int
    sequences: int
    norm: float


@dataclass(frozen=True, slots=True)
class Learner:
    """Everything that a step needs.

    Attributes:
        model: sharded.
        isolate: whether samples of a sequence are kept apart.
        balance: weight of the load balance in the loss.
        clip: largest norm of gradients.
        blend: names samples and sources.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    world: World
    blend: Blend
    isolate: bool
    balance: float
    clip: float

    def step(self, sequences: Sequence[PackedSequence], rate: float) -> Learnt:
        """Learns from this process's share of a batch, together with all others.

        The loss is the sum of all token losses divided by the target tokens of the whole batch, wherever they are, and
        beside it the load balance, each sequence's weighed by its tokens. Gradients are averaged over processes, so
        each process multiplies by their number first.

        Raises:
            TrainingError: if the loss is not finite; names the samples.
        """
        inputs = [_Input.of(sequence, self.isolate, self.world.device) for sequence in sequences]
        counts = self.world.sum(torch.tensor([[i.targets, i.tokens] for i in inputs], dtype=torch.float64).sum(0))
        targets, tokens = counts.clamp(min=1).tolist()
        tally = _Tally(len(self.blend.sources), self.world.device)
        seen: list[tuple[_Input, Tensor, Tensor]] = []
        self.optimiser.zero_grad(set_to_none=True)
        for one in inputs:
            out = self.model(one.ids, one.pixels, one.labels, packing=one.packing)
            loss = out.token_losses.sum() / targets
            if self.balance and out.balance is not None:
                loss = loss + self.balance * out.balance * (one.tokens / tokens)
            (loss * self.world.size).backward()
            tally.add(one, out)
            seen.append((one, out.token_losses.detach(), out.token_positions))
        average_whole(self.model, self.world)
        norm = clip(self.model, self.clip, self.world)
        learnt = tally.learnt(self.world, self.blend.sources, norm)
        self._refuse_infinite(learnt, seen)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return learnt

    def _refuse_infinite(self, learnt: Learnt, seen: Sequence[tuple["_Input", Tensor, Tensor]]) -> None:
        if torch.tensor([learnt.loss, learnt.norm]).isfinite().all():
            return
        # What is no number stays none until the sequence ends, so only where it begins is of interest.
        begin = [(one, positions[~losses.isfinite()][:1]) for one, losses, positions in seen]
        rows = [row for one, position in begin for row in one.rows_at(position)]
        wrong = [name for names in self.world.gathered(self._names(rows)) for name in names]
        if wrong:
            what, names = f"the loss is {learnt.loss}, which began in", wrong
        else:
            everything = [row for one, *_ in seen for row in one.sequence.rows.tolist() if row >= 0]
            gathered = self.world.gathered(self._names(everything))
            what, names = f"the gradients' norm is {learnt.norm} after", [n for group in gathered for n in group]
        more = f"\n  … and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise TrainingError(
            f"{what} these samples:\n  " + "\n  ".join(names[:_NAMED]) + more + "\nLook at them with `longllava show"
            " BUILD KEY`; if nothing is wrong with them, train with a lower --learning-rate or with --precision fp32,"
            " and into another --out: this one's run keeps its settings"
        )

    def _names(self, rows: Sequence[int]) -> list[str]:
        entries = [self.blend.entry(row) for row in dict.fromkeys(rows)]
        return [f"{self.blend.parts[e.build].name}: {e.key} in {e.shard}" for e in entries]


@dataclass(frozen=True, slots=True)
class _Input:
    """A sequence as the model takes it."""

    sequence: PackedSequence
    ids: Tensor
    labels: Tensor
    pixels: Tensor | None
    packing: Packing | None
    targets: int
    tokens: int

    @classmethod
    def of(cls, sequence: PackedSequence, isolate: bool, device: torch.device) -> "_Input":
        packing = Packing.of(sequence.cu_seqlens.tolist(), isolate=isolate)
        targets = int(supervised(sequence.labels[None], packing).sum())
        moved = sequence.to(device, non_blocking=True)
        return cls(
            sequence=moved,
            ids=moved.input_ids[None],
            labels=moved.labels[None],
            pixels=moved.images.permute(0, 3, 1, 2) if len(moved.images) else None,
            packing=packing and Packing(packing.bounds, packing.resets.to(device)),
            targets=targets,
            tokens=0 if sequence.filler else len(sequence.input_ids),
        )

    def rows_at(self, positions: Tensor) -> list[int]:
        """Rows of the samples that tokens belong to."""
        samples = torch.searchsorted(self.sequence.cu_seqlens, positions.int(), right=True) - 1
        rows: list[int] = self.sequence.rows[samples].tolist()
        return rows


class _Tally:
    """Adds up what metrics need, in float64 and on the device: nothing waits for it."""

    def __init__(self, sources: int, device: torch.device) -> None:
        self._losses = torch.zeros(2, sources, dtype=torch.float64, device=device)
        self._balance = torch.zeros(1, dtype=torch.float64, device=device)
        self._numbers = torch.zeros(5, dtype=torch.float64)

    def add(self, one: _Input, out: Any) -> None:
        sources = one.sequence.token_sources[out.token_positions]
        losses = out.token_losses.detach().double()
        self._losses[0].index_add_(0, sources, losses)
        self._losses[1].index_add_(0, sources, torch.ones_like(losses))  # bincount would wait for the GPU
        if out.balance is not None:
            self._balance += out.balance.detach().double() * one.tokens
        rows, images = len(one.sequence.rows), len(one.sequence.images)
        full = not one.sequence.filler
        self._numbers += torch.tensor(
            [out.balance is not None, one.tokens, images, rows * full, full], dtype=torch.float64
        )

    def learnt(self, world: World, names: Sequence[str], norm: float) -> Learnt:
        found = torch.cat([self._losses.flatten(), self._balance]).cpu()
        together = world.sum(torch.cat([found, self._numbers]))
        sums, counts = together[: self._losses.numel()].view(2, -1)
        balance, balanced, tokens, images, samples, sequences = together[self._losses.numel() :].tolist()
        by_source = {name: float(s / c) for name, s, c in zip(names, sums, counts, strict=True) if c}
        return Learnt(
            loss=float(sums.sum() / counts.sum().clamp(min=1)),
            loss_by_source=by_source,
            balance=balance / max(1, tokens) if balanced else None,
            targets=int(counts.sum()),
            tokens=int(tokens),
            images=int(images),
            samples=int(samples),
            sequences=int(sequences),
            norm=norm,
        )


@contextmanager
def memory_explained(sequence_length: int, activation_checkpointing: bool, processes: int) -> Iterator[None]:
    """Turns running out of memory into words on what to change.

    Raises:
        TrainingError: instead of the allocator's error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU it is a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        first = (
            []
            if activation_checkpointing
            else ["--activation-checkpointing (a third slower, a fraction of the memory)"]
        )
        knobs = [
            *first,
            f"more processes (weights, gradients and optimiser states are shared out over them; now {processes})",
            "--max-images N, if sequences with many pictures are the ones that fail",
            f"a smaller --sequence-length (now {sequence_length:,}), with builds made for it",
        ]
        raise TrainingError(
            f"out of memory ({str(error).splitlines()[0]}). In this order, try:\n  - "
            + "\n  - ".join(knobs)
            + "\n`longllava train … --dry-run` estimates what each needs"
        ) from error
