"""The selective scan as a Triton kernel: resets, first and last state, forward and backward; no CUDA build.

One program walks one channel of one sample through time, tile by tile; within a tile the recurrence
(a, b) ∘ (a', b') = (a·a', b·a' + b') is an associative scan, one for each of the N parts of the state. The forward pass
keeps the states between tiles, from which the backward pass computes the rest again. Gradients of B and C are summed
over channels by atomic additions, so their last bits vary from run to run, as with mamba-ssm's kernel.

Runs on a GPU, and in Triton's interpreter (TRITON_INTERPRET=1) on a CPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 512


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, resets: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`selective_scan` without D; shapes as there. Computes in float32 whatever u is; N is a power of two."""
    n = A.shape[1]
    if n & (n - 1):
        raise ValueError(f"selective scan: backend 'triton' needs a state whose size is a power of two, not {n}")
    over_time = [x.transpose(1, 2).contiguous() for x in (u, delta, B, C)]
    with torch.cuda.device_of(u):  # Triton launches on the current GPU, wherever the tensors are
        y, last = _Scan.apply(*over_time[:2], A.float().contiguous(), *over_time[2:], resets, state)  # type: ignore[no-untyped-call]
    return y.transpose(1, 2), last


@triton.jit
def _then(a, b, next_a, next_b):
    return a * next_a, b * next_a + next_b


@triton.jit
def _column(x, columns, n):
    """Column n of a [rows, columns] tile."""
    return tl.sum(tl.where(columns[None, :] == n, x, 0.0), 1)


@triton.jit
def _forward(
    u, delta, A, B, C, resets, first, y, starts, last, length, channels, tiles,
    N: tl.constexpr, TILE: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    channel, sample = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1)
    row = (sample * channels + channel).to(tl.int64)[:, None]
    parts, offsets = tl.arange(0, N), tl.arange(0, TILE)
    carry = tl.zeros((1, N), tl.float32)
    if HAS_FIRST:
        carry = tl.load(first + row * N + parts[None, :])
    for tile in range(tiles):
        tl.store(starts + (row * tiles + tile) * N + parts[None, :], carry)
        t = tile * TILE + offsets
        inside = t < length
        at = row * length + t[None, :]
        x = tl.load(u + at, mask=inside[None, :], other=0.0).to(tl.float32)
        step = tl.load(delta + at, mask=inside[None, :], other=0.0).to(tl.float32)
        if HAS_RESETS:
            reset = tl.load(resets + sample * length + t, mask=inside, other=0) != 0
        out = tl.zeros((1, TILE), tl.float32)
        for n in range(N):
            along = (sample * N + n) * length + t
            b = tl.load(B + along, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(C + along, mask=inside, other=0.0).to(tl.float32)
            a = tl.exp(step * tl.load(A + channel * N + n)[:, None])
            if HAS_RESETS:
                a = tl.where(reset[None, :], 0.0, a)
            through, h = tl.associative_scan((a, step * x * b[None, :]), 1, _then)
            h += through * _column(carry, parts, n)[:, None]
            out += h * c[None, :]
            end = _column(h, offsets, TILE - 1)
            carry = tl.where(parts[None, :] == n, end[:, None], carry)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside[None, :])
    tl.store(last + row * N + parts[None, :], carry)


@triton.jit
def _backward(
    u, delta, A, B, C, resets, starts, grad_y, grad_last, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_first,
    length, channels, tiles,
    N: tl.constexpr, TILE: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    channel, sample = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1)
    row = (sample * channels + channel).to(tl.int64)[:, None]
    parts, offsets = tl.arange(0, N), tl.arange(0, TILE)
    carry = tl.load(grad_last + row * N + parts[None, :])  # the gradient of the state that is handed back through time
    sum_A = tl.zeros((1, N), tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        t = tile * TILE + offsets
        inside, has_before, has_after = t < length, (offsets > 0) & (t < length), t + 1 < length
        at = row * length + t[None, :]
        x = tl.load(u + at, mask=inside[None, :], other=0.0).to(tl.float32)
        step = tl.load(delta + at, mask=inside[None, :], other=0.0).to(tl.float32)
        x_before = tl.load(u + at - 1, mask=has_before[None, :], other=0.0).to(tl.float32)
        step_before = tl.load(delta + at - 1, mask=has_before[None, :], other=0.0).to(tl.float32)
        step_after = tl.load(delta + at + 1, mask=has_after[None, :], other=0.0).to(tl.float32)
        gy = tl.load(grad_y + at, mask=inside[None, :], other=0.0).to(tl.float32)
        if HAS_RESETS:
            flag = resets + sample * length + t
            reset = tl.load(flag, mask=inside, other=0) != 0
            reset_before = tl.load(flag - 1, mask=has_before, other=0) != 0
            reset_after = tl.load(flag + 1, mask=has_after, other=0) != 0
        gu, gdelta = tl.zeros((1, TILE), tl.float32), tl.zeros((1, TILE), tl.float32)
        start = tl.load(starts + (row * tiles + tile) * N + parts[None, :])
        for n in range(N):
            A_n = tl.load(A + channel * N + n)[:, None]
            along = (sample * N + n) * length + t
            b = tl.load(B + along, mask=inside, other=0.0).to(tl.float32)[None, :]
            b_before = tl.load(B + along - 1, mask=has_before, other=0.0).to(tl.float32)[None, :]
            c = tl.load(C + along, mask=inside, other=0.0).to(tl.float32)[None, :]
            a, a_before, a_after = tl.exp(step * A_n), tl.exp(step_before * A_n), tl.exp(step_after * A_n)
            if HAS_RESETS:
                a = tl.where(reset[None, :], 0.0, a)
                a_before = tl.where(reset_before[None, :], 0.0, a_before)
                a_after = tl.where(reset_after[None, :], 0.0, a_after)
            through, h_before = tl.associative_scan((a_before, step_before * x_before * b_before), 1, _then)
            h_before += through * _column(start, parts, n)[:, None]
            through, gh = tl.associative_scan((a_after, gy * c), 1, _then, reverse=True)
            gh += through * _column(carry, parts, n)[:, None]
            gh = tl.where(inside[None, :], gh, 0.0)
            by_decay = gh * h_before * a
            gdelta += by_decay * A_n + gh * x * b
            gu += gh * step * b
            sum_A += tl.where(parts[None, :] == n, tl.sum(by_decay * step, 1)[:, None], 0.0)
            tl.atomic_add(grad_B + along, tl.sum(gh * step * x, 0), mask=inside)
            tl.atomic_add(grad_C + along, tl.sum(gy * (a * h_before + step * x * b), 0), mask=inside)
            carry = tl.where(parts[None, :] == n, _column(gh, offsets, 0)[:, None], carry)
        tl.store(grad_u + at, gu.to(grad_u.dtype.element_ty), mask=inside[None, :])
        tl.store(grad_delta + at, gdelta.to(grad_delta.dtype.element_ty), mask=inside[None, :])
    decay = tl.exp(tl.load(delta + row * length).to(tl.float32) * tl.load(A + channel[:, None] * N + parts[None, :]))
    if HAS_RESETS:
        decay = tl.where(tl.load(resets + sample * length) != 0, 0.0, decay)
    tl.store(grad_first + row * N + parts[None, :], carry * decay)
    tl.atomic_add(grad_A + channel[:, None] * N + parts[None, :], sum_A)


class _Scan(torch.autograd.Function):
    """Tensors here have time last: u, delta [batch, channels, length], B, C [batch, N, length]."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        resets: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, channels, length = u.shape
        n = A.shape[1]
        tile = min(_TILE, triton.next_power_of_2(length))
        tiles = triton.cdiv(length, tile)
        flags = u if resets is None else resets.to(torch.int8).contiguous()
        first = A if state is None else state.float().contiguous()
        y = torch.empty_like(u)
        starts = A.new_empty((batch, channels, tiles, n))
        last = A.new_empty((batch, channels, n))
        _forward[(channels, batch)](
            u, delta, A, B, C, flags, first, y, starts, last, length, channels, tiles,
            N=n, TILE=tile, HAS_RESETS=resets is not None, HAS_FIRST=state is not None,
        )  # fmt: skip
        ctx.save_for_backward(u, delta, A, B, C, flags, starts)
        ctx.tile, ctx.has_resets, ctx.stateful = tile, resets is not None, state is not None
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, flags, starts = ctx.saved_tensors
        batch, channels, length = u.shape
        tiles, n = starts.shape[2:]
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_A, grad_B, grad_C = (torch.zeros_like(x, dtype=torch.float32) for x in (A, B, C))
        grad_first = torch.empty_like(starts[:, :, 0])
        _backward[(channels, batch)](
            u, delta, A, B, C, flags, starts, grad_y.contiguous(), grad_last.float().contiguous(),
            grad_u, grad_delta, grad_A, grad_B, grad_C, grad_first, length, channels, tiles,
            N=n, TILE=ctx.tile, HAS_RESETS=ctx.has_resets,
        )  # fmt: skip
        return (
            grad_u,
            grad_delta,
            grad_A,
            grad_B.to(B.dtype),
            grad_C.to(C.dtype),
            None,
            grad_first if ctx.stateful else None,
        )
