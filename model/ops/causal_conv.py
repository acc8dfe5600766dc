"""The short depthwise convolution in front of a Mamba layer's scan, causal, with resets and carried state."""

import torch
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, resets: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = bias + Σ_j weight[:, taps-1-j] · x_{t-j}, where tap j counts only if no sample starts in (t-j, t].

    Args:
        x: [batch, length, channels].
        weight: [channels, taps].
        bias: [channels].
        resets: bool [batch, length], True where a sample starts.
        state: [batch, taps - 1, channels], what an earlier call returned; zeros if absent.

    Returns:
        y like x (summed in float32 at least), and the inputs that later steps still see, for the next call.
    """
    batch, length, channels = x.shape
    past = weight.shape[1] - 1
    before = x.new_zeros((batch, past, channels)) if state is None else state.to(x.dtype)
    inputs = torch.cat([before, x], 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(dtype)
    y = x.to(dtype) * taps[:, past]
    if bias is not None:
        y = y + bias.to(dtype)
    reach = None if resets is None else _reach(resets, past)
    for j in range(1, past + 1):
        seen = inputs[:, past - j : past - j + length].to(dtype)
        if reach is not None:
            seen = seen * (reach >= j)[..., None]
        y = torch.addcmul(y, seen, taps[:, past - j])
    last = inputs[:, length:].clone()  # a view would keep all inputs for as long as the state lives
    if reach is not None:
        age = torch.arange(past, 0, -1, device=x.device)  # of each input kept, seen from the next position
        last = last * (reach[:, -1:] >= age - 1)[..., None]
    return y.to(x.dtype), last


def _reach(resets: Tensor, most: int) -> Tensor:
    """How many steps back each position may look, at most `most`: int [batch, length]."""
    at = torch.arange(resets.shape[1], device=resets.device)
    start = torch.where(resets, at, -most - 1).cummax(1).values
    return (at - start).clamp(max=most)
