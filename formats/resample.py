"""Pillow's bicubic resize, bit for bit, several times as fast.

Pillow filters along rows, rounds to bytes, filters along columns; its weights are whole numbers over 2²², and both sums
are exact in 32 bits, so whoever adds up the same products has the same picture. Here two loops do so with vector
instructions. They are written in LLVM's portable assembly, which llvmlite compiles for the machine at hand in some
50 ms: whole numbers only, so that every machine computes the same. Where llvmlite, the system or the picture's shape
does not allow it, the caller uses Pillow and gets the same bytes.

Pictures are uint8 arrays (height, width, 3).
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.resample_llvm import COLUMNS, VECTORS, assembly

Pixels = npt.NDArray[np.uint8]

_BITS = 22  # of a weight, as in Pillow
_LOW = 11  # bits of a weight's lower part: both parts fit 16 bits, whose products vector units add up in pairs
_SPARE = 16  # bytes that the loops may read, not use, after the last pixel


def blank(height: int, width: int) -> Pixels:
    """An array for a picture, with unspecified content, as the functions below need it."""
    size = height * width * 3
    return np.empty(size + _SPARE, np.uint8)[:size].reshape(height, width, 3)


def resize_square(pixels: Pixels, size: tuple[int, int], side: int, colour: Sequence[int]) -> Pixels | None:
    """Pads a picture to a square, centred (an odd pixel right and below), and resizes that, without making it.

    Args:
        pixels: (height, width, 3), from `blank`.
        size: (width, height) of the picture before it was decoded at a fraction of them, if it was.
        side: of the result.
        colour: of the padding, (red, green, blue).

    Returns:
        (side, side, 4): Pillow's pixels, and a byte each that means nothing. None if the picture is too small for this,
        or the loops cannot be compiled here.
    """
    height, width = pixels.shape[:2]
    full = max(size)
    scale = round(full / max(height, width))
    across = _plan(width, size[0], full, scale, side, tuple(colour))
    return _resize(pixels, across, _plan(height, size[1], full, scale, side, tuple(colour)))


def _resize(pixels: Pixels, across: "_Plan", down: "_Plan") -> Pixels | None:
    height, width = pixels.shape[:2]
    loops = _loops()
    if loops is None or across.pairs > (width + 1) // 2 or down.pairs > (height + 1) // 2:
        return None
    vectors = -(-4 * height // loops.lanes)
    if vectors < VECTORS:
        return None
    columns, rows = len(across.starts), len(down.starts)
    at_once = VECTORS * loops.lanes
    stride = -(-4 * columns // at_once) * at_once * 2
    wide = _aligned(VECTORS, (across.reach + 4) * loops.lanes)
    narrow = _aligned(vectors * loops.lanes // 8, stride)
    result = np.empty((rows, stride // 8, 4), np.uint8)
    loops.across(
        *(pixels.ctypes.data, height, width, wide.ctypes.data, wide.shape[1], narrow.ctypes.data, stride),
        *(columns, across.starts.ctypes.data, across.weights.ctypes.data, across.pairs, across.bias.ctypes.data),
    )
    loops.down(
        *(narrow.ctypes.data, stride, result.ctypes.data, rows),
        *(down.starts.ctypes.data, down.weights.ctypes.data, down.pairs, down.bias.ctypes.data),
    )
    return np.ascontiguousarray(result[:, :columns])


def _aligned(rows: int, columns: int) -> npt.NDArray[np.int16]:
    """An array whose rows begin where a vector does: reading across the processor's cache lines takes twice as long."""
    columns = -(-columns // 32) * 32
    space = np.empty(rows * columns + 32, np.int16)
    skip = -space.ctypes.data // 2 % 32
    return space[skip : skip + rows * columns].reshape(rows, columns)


# Weights ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one direction is resized: result i is made of 2 × `pairs` pixels from `starts[i]` on, an even number.

    Attributes:
        weights: (results, pairs, 2, 2): for each pair of pixels two upper parts, two lower ones.
        bias: (results, 4): what the padding adds, and a half for rounding.
        reach: how many pixels `COLUMNS` results side by side are made of, at most.
    """

    starts: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int16]
    pairs: int
    bias: npt.NDArray[np.int32]
    reach: int


@lru_cache(maxsize=1024)
def _plan(length: int, size: int, full: int, scale: int, target: int, colour: tuple[int, ...]) -> _Plan:
    """Resizing `full` pixels to `target`.

    The `size` in the middle are a picture, of which every `scale` have become one of `length`; the rest is `colour`.
    """
    before, fraction = divmod((full - size) // 2, scale)
    first, weights = _weights(full / scale, target, fraction / scale)
    bias = np.full((target, 4), 1 << _BITS - 1, np.int32)
    first = first - before
    taps = np.arange(weights.shape[1])
    if size < full:
        place = first[:, None] + taps
        outside = (place < 0) | (place >= length)
        bias[:, :3] += (weights * outside).sum(1, dtype=np.int32)[:, None] * np.array(colour, np.int32)
        weights = np.where(outside, np.int32(0), weights)
    even = first & ~1
    pairs = int((first - even).max() + len(taps) + 1) // 2
    starts = np.clip(even, 0, max((length + 1) // 2 - pairs, 0) * 2)
    room = np.zeros((target, 2 * (len(taps) + pairs) + 2), np.int32)  # for windows that reach over either end
    middle = len(taps) + 1
    shift = np.clip(first - starts, -middle, 2 * pairs)
    np.put_along_axis(room, shift[:, None] + taps + middle, weights, axis=1)
    window = room[:, middle : middle + 2 * pairs]
    parts = np.stack([window >> _LOW, window & (1 << _LOW) - 1], axis=1).reshape(target, 2, pairs, 2)
    last = np.minimum(np.arange(target) + COLUMNS, target) - 1
    reach = int((starts[last] - starts).max()) + 2 * pairs
    return _Plan(starts, np.ascontiguousarray(parts.swapaxes(1, 2), np.int16), pairs, bias, reach)


def _weights(length: float, target: int, shift: float = 0.0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Pillow's bicubic (a = -0.5) in its order of operations: first pixel and weights over 2²² of each result.

    Args:
        length: what is resized to `target`; if it is no whole number, the last pixel stands for less than the others.
        target: how many results.
        shift: the pixels begin so much later.
    """
    scale = length / target
    stretch = max(scale, 1.0)
    reach = 2.0 * stretch
    centre = (np.arange(target) + 0.5) * scale - shift
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int64), ceil(length)) - first
    offset = np.arange(count.max())
    x = np.abs((offset + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch))
    near, far = ((1.5 * x - 2.5) * x) * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    w = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)) * (offset < count[:, None])
    w *= 1.0 / np.cumsum(w, axis=1)[:, -1:]  # one after the other, like Pillow; np.sum would add in another order
    return first, (w * (1 << _BITS) + np.copysign(0.5, w)).astype(np.int32)


# The loops ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Loops:
    across: Callable[..., None]
    down: Callable[..., None]
    lanes: int
    owner: Any  # of their code's memory


@cache
def _loops() -> _Loops | None:
    """Compiles the loops; None where that is not possible."""
    if sys.byteorder != "little" or not _code_may_be_made():
        return None
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    lanes = _lanes(features)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    # No passes over the assembly: they would take the pairs of products apart that become one instruction.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(assembly(_BITS, _LOW, lanes)), machine)
    engine.finalize_object()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    across = (pointer, number, number, pointer, number, pointer, number, number, pointer, pointer, number, pointer)
    down = (pointer, number, pointer, number, pointer, pointer, number, pointer)
    return _Loops(
        ctypes.CFUNCTYPE(None, *across)(engine.get_function_address("across")),
        ctypes.CFUNCTYPE(None, *down)(engine.get_function_address("down")),
        lanes,
        engine,
    )


def _lanes(features: Mapping[str, bool]) -> int:
    """Sums in a vector, where the machine has such vectors and the instruction that adds up products."""
    return 16 if features.get("avx512vnni") else 8


def available() -> bool:
    """Whether there are loops here; if not, all pictures are left to the caller."""
    return _loops() is not None


def _code_may_be_made() -> bool:
    """Whether memory may become executable. Hardened systems forbid it, and LLVM would end the process over that."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        start = ctypes.addressof(ctypes.c_char.from_buffer(page))
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return bool(protect(start, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) == 0)
