"""Ordinary JPEGs, read by libjpeg-turbo through simplejpeg: Pillow's pixels without its way through Python's buffers.

Pillow stays the judge. What it would not open never comes here; what simplejpeg warns of or does not know (print
colours, damage, odd sampling) goes back to Pillow, which reads or rejects it.
"""

import io
import re
from functools import cache
from typing import Any

import simplejpeg
from PIL import Image

from formats import resample
from formats.resample import Pixels

FORMATS = frozenset({"JPEG", "MPO"})
"""Pillow's names for what this reads; an MPO is two JPEGs, of which the first is taken."""

_SCREEN_MODES = ("RGB", "L")
_SCAN = b"\xff\xda"
_NEEDED = frozenset({b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xdd", _SCAN})  # tables, the frame, restarts
_COLOUR_NOTES = frozenset({(b"\xff\xe0", 16), (b"\xff\xee", 14)})  # JFIF's without a thumbnail, and Adobe's
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)  # a marker that is not part of the scan
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


def pixels_of_keepable(data: bytes, file: Image.Image, side: int, quality: int, subsampling: str) -> Pixels | None:
    """A file's pixels if it can be stored as it is, else None.

    So it is a whole baseline JPEG of `side` × `side` pixels in colour, its quantisation and its sampling of colours are
    at least as fine as asked for, and nothing but the picture is in it: no EXIF, comment, profile, thumbnail or bytes
    that decoders pass over.
    """
    if file.format != "JPEG" or file.mode != "RGB" or file.size != (side, side):
        return None
    layers, tables = _layers(file), getattr(file, "quantization", {})
    factors = {_SAMPLING[name] for name in _SAMPLING if name >= subsampling}
    keepable = (
        [layer[0] for layer in layers] == [1, 2, 3]
        and layers[0][1:3] in factors
        and {layer[1:3] for layer in layers[1:]} == {(1, 1)}
        and all(_finer(tables[layer[3]], _table(quality, i > 0)) for i, layer in enumerate(layers))
        and _is_bare(data)
    )
    return read(data, file) if keepable else None


def _is_bare(data: bytes) -> bool:
    """Whether a JPEG is one baseline scan and what decoding it takes, and nothing else (ITU-T T.81, annex B)."""
    at, marker = 2, b""
    while marker != _SCAN:
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4])
        if marker not in _NEEDED and (marker, length) not in _COLOUR_NOTES:
            return False
        at += 2 + length
    end = _AFTER_SCAN.search(data, at)
    return end is not None and data[end.start() :] == b"\xff\xd9"


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
