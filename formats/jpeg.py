"""Ordinary JPEGs, read by libjpeg-turbo through simplejpeg: Pillow's pixels without its way through Python's buffers.

Pillow stays the judge. What it would not open never comes here; what simplejpeg warns of or does not know (print
colours, damage, odd sampling) goes back to Pillow, which reads or rejects it.
"""

import io
from functools import cache
from typing import Any

import simplejpeg
from PIL import Image

from formats import resample
from formats.resample import Pixels

FORMATS = frozenset({"JPEG", "MPO"})
"""Pillow's names for what this reads; an MPO is two JPEGs, of which the first is taken."""

_SCREEN_MODES = ("RGB", "L")
_BARE = frozenset({"APP0", "APP14"})  # JFIF's and Adobe's notes on the colours
_SAMPLING = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


def shrink(length: int, least: int) -> int:
    """The largest of 1, 2, 4 and 8 by which a length can be divided and stay at least `least`."""
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or length >= scale * least)


def read(data: bytes, file: Image.Image, scale: int = 1) -> Pixels | None:
    """A JPEG's pixels, from `resample.blank`, as they are stored, not turned upright.

    Args:
        data: the file's bytes.
        file: the same, opened by Pillow but not loaded.
        scale: 1, 2, 4 or 8: take only every so manieth pixel, smoothed, which takes less time.

    Returns:
        At scale 1 the same as Pillow's; None if Pillow is to read it.
    """
    if file.mode not in _SCREEN_MODES:
        return None
    width, height = (-(-length // scale) for length in file.size)
    pixels = resample.blank(height, width)
    try:
        made = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=scale, buffer=pixels, strict=True
        )
    except ValueError:
        return None
    return pixels if made.shape == pixels.shape else None


def may_stay(data: bytes, file: Image.Image, side: int, quality: int, subsampling: str) -> bool:
    """Whether a file can be stored as it is.

    So it is a whole baseline JPEG of `side` × `side` pixels in colour, its quantisation and its sampling of colours are
    at least as fine as asked for, and nothing but the picture is in it: no EXIF, comment, profile or trailing bytes.
    """
    if file.format != "JPEG" or file.mode != "RGB" or file.size != (side, side):
        return False
    layers, tables = _layers(file), getattr(file, "quantization", {})
    factors = {_SAMPLING[name] for name in _SAMPLING if name >= subsampling}
    return (
        "progressive" not in file.info
        and "comment" not in file.info
        and {name for name, _ in getattr(file, "applist", [])} <= _BARE
        and [layer[0] for layer in layers] == [1, 2, 3]
        and layers[0][1:3] in factors
        and {layer[1:3] for layer in layers[1:]} == {(1, 1)}
        and all(_finer(tables[layer[3]], _table(quality, i > 0)) for i, layer in enumerate(layers))
        and data.endswith(b"\xff\xd9")
        and read(data, file) is not None
    )


def _layers(file: Image.Image) -> list[tuple[int, int, int, int]]:
    """Of each component: id, horizontal and vertical sampling, number of its quantisation table."""
    return [tuple(layer) for layer in getattr(file, "layer", [])]


def _finer(table: list[int], than: list[int]) -> bool:
    return all(a <= b for a, b in zip(table, than, strict=True))


@cache
def _table(quality: int, colour: bool) -> list[int]:
    """The quantisation table that Pillow writes."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG", quality=quality)
    with Image.open(io.BytesIO(out.getvalue())) as file:
        tables: dict[int, Any] = getattr(file, "quantization", {})
        return list(tables[int(colour)])
