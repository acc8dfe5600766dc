"""The short depthwise convolution in front of a Mamba layer's scan, causal, with sample starts and carried state."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

Starts = tuple[tuple[int, ...], ...]
"""Where samples start, for each row of a batch; rising."""


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, starts: Starts | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = bias + Σ_j weight[:, taps-1-j] · x_{t-j}, where tap j counts only if no sample starts in (t-j, t].

    PyTorch's convolution, after which the first tokens of each sample are computed again without what they may not see.

    Args:
        x: [batch, length, channels].
        weight: [channels, taps].
        bias: [channels].
        starts: of samples that are kept apart, from each other and from `state`.
        state: [batch, taps - 1, channels], what an earlier call returned; zeros if absent.

    Returns:
        y like x (summed in float32 at least), with time last in memory, as the scan wants it; and the inputs that later
        steps still see, for the next call.
    """
    batch, length, channels = x.shape
    past = weight.shape[1] - 1
    before = x.new_zeros((batch, past, channels)) if state is None else state.to(x.dtype)
    inputs = torch.cat([before.transpose(1, 2), x.transpose(1, 2)], 2)
    y = F.conv1d(inputs, weight.to(x.dtype)[:, None], None if bias is None else bias.to(x.dtype), groups=channels)
    last = inputs[:, :, length:].transpose(1, 2).clone()  # a view would keep all inputs for as long as the state lives
    if starts is not None:
        rows, at, reach = _early(starts, length, past).to(x.device, non_blocking=True)
        y[rows, :, at] = _seeing(x, weight, bias, rows, at, reach).to(y.dtype)
        for row, own in enumerate(starts):
            if own:
                last[row, : max(0, own[-1] - (length - past))] = 0
    return y.transpose(1, 2), last


def _seeing(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, at: Tensor, reach: Tensor) -> Tensor:
    """The convolution at some positions, each of which sees `reach` steps back: [positions, channels]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    back = torch.arange(weight.shape[1] - 1, -1, -1, device=x.device)
    hidden = back > reach[:, None]
    seen = x[rows[:, None], (at[:, None] - back).clamp(min=0)].masked_fill(hidden[..., None], 0)
    y = torch.einsum("ptc,ct->pc", seen.to(dtype), weight.to(dtype))
    return y if bias is None else y + bias.to(dtype)


@lru_cache(maxsize=4)  # all layers of a pass ask the same
def _early(starts: Sequence[Sequence[int]], length: int, past: int) -> Tensor:
    """Tokens less than `past` steps into their sample: int64 [3, tokens], their row, position and steps."""
    found = [
        (row, start + steps, steps)
        for row, own in enumerate(starts)
        for start, end in pairwise((*own, length))
        for steps in range(min(past, end - start))
    ]
    return torch.tensor(found, dtype=torch.int64).view(-1, 3).T
