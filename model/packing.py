"""Where samples begin in packed sequences: the one thing that attention, convolution and scan must agree on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Samples that share rows and may not see one another.

    Attributes:
        bounds: for each row of the batch its samples' boundaries, from 0 to the row's length ("cu_seqlens").
        resets: bool [batch, length], True at each sample's first token.
    """

    bounds: tuple[tuple[int, ...], ...]
    resets: Tensor

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """Where samples start in each row, the first at 0."""
        return tuple(row[:-1] for row in self.bounds)

    @classmethod
    def of(
        cls, *rows: Sequence[int], isolate: bool = True, device: torch.device | str | None = None
    ) -> "Packing | None":
        """Packing of rows by their samples' boundaries, such as (0, 1200, 40960).

        Args:
            rows: boundaries of each row of the batch; all rows end at the same length.
            isolate: False lets state and attention run from sample to sample, as LongLLaVA was trained.
            device: where the model computes.

        Returns:
            None if nothing is to be kept apart.

        Raises:
            ValueError: if boundaries do not rise from 0 to one common length.
        """
        bounds = tuple(tuple(int(b) for b in row) for row in rows)
        lengths = {row[-1] if row else 0 for row in bounds}
        if len(lengths) != 1 or any(row[:1] != (0,) or any(b <= a for a, b in pairwise(row)) for row in bounds):
            raise ValueError(f"packing: boundaries must rise from 0 to the same length in each row, not {bounds}")
        if not isolate or all(len(row) <= 2 for row in bounds):
            return None
        resets = torch.zeros(len(bounds), lengths.pop(), dtype=torch.bool)
        for row, starts in zip(resets, bounds, strict=True):
            row[list(starts[:-1])] = True
        return cls(bounds, resets.to(device))

    @classmethod
    def of_mask(cls, attention_mask: Tensor) -> "Packing | None":
        """Packing that keeps padding, on either side, from what it pads.

        Args:
            attention_mask: [batch, length], 0 at padding.
        """
        changes = (attention_mask != 0).int().diff(dim=1).cpu()
        length = attention_mask.shape[1]
        rows = [(0, *(int(at) + 1 for at in row.nonzero().flatten()), length) for row in changes]
        return cls.of(*rows, device=attention_mask.device)
