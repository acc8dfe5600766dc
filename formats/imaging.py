"""Pictures: from the bytes of a file to the 336×336 JPEGs that a shard stores.

Pure functions. Pillow says what is right; `formats.jpeg` decodes ordinary JPEGs and `formats.resample` resizes, to the
same bytes in less time. Two kinds of failure leave this file, both as `Reject`: bytes that are no picture
("unknown-format") and bytes that Pillow refuses ("broken-image") or that would take too much memory ("too-large").
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from formats import jpeg, resample
from formats.errors import Reject
from formats.protocol import ImageRole
from formats.resample import Pixels

SIDE = 336
"""Width and height of every stored image: CLIP ViT-L/14-336's input."""

MEAN_COLOUR = (122, 116, 104)
"""What images are padded with: CLIP's channel means times 255, cut to whole numbers as LLaVA does."""

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]

_FAST_SIDE = 560
"""Pixels that "fast" leaves of the longer side, 5/3 of the result's: what docs/benchmarks.md weighs."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How pictures are read and stored.

    Attributes:
        mode: "exact" has the pixels that LLaVA and CLIP would make; "fast" decodes JPEGs at a half, a quarter or an
            eighth of their size if that leaves the longer side 560 pixels or more.
        passthrough: store a 336×336 JPEG as it is, if it is at least as good as a stored one would be and bare
            (`formats.jpeg.may_stay`).
        quality, subsampling: of the stored JPEGs.
        max_pixels: larger pictures are rejected before they are decoded. Pillow's own limit, about 179 million, holds
            as well.
    """

    mode: Literal["exact", "fast"] = "exact"
    passthrough: bool = False
    quality: int = 95
    subsampling: Subsampling = "4:2:0"
    max_pixels: int = 64_000_000


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as a shard stores it.

    Attributes:
        jpeg: the file's bytes.
        role: what it is to the sample.
        width, height: of the JPEG, in pixels.
        source_size: (width, height) of what it was made from, upright and before any scaling.
        tile: (row, column) of a tile.
        time: seconds from the first frame of a video, of a frame.
        contrast: levels between the darkest and the brightest place of what it shows, padding aside, in the colour
            where that is most: 0 for one plain colour, 255 at most. None for tiles.
    """

    jpeg: bytes
    role: ImageRole
    width: int
    height: int
    source_size: tuple[int, int]
    tile: tuple[int, int] | None = None
    time: float | None = None
    contrast: int | None = None


# What the bytes are -------------------------------------------------------------------------------------------------

_PILLOW = {"jpeg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF"}

IMAGE_TYPES = frozenset(_PILLOW)
"""What `decode` reads. "jpeg" covers MPO (two JPEGs in one file), of which the first picture is taken."""

_MAGIC = (
    ("jpeg", b"\xff\xd8\xff"),
    ("png", b"\x89PNG\r\n\x1a\n"),
    ("gif", b"GIF87a"),
    ("gif", b"GIF89a"),
    ("tiff", b"II*\0"),
    ("tiff", b"MM\0*"),
    ("tiff", b"II+\0"),
    ("tiff", b"MM\0+"),
    ("matroska", b"\x1a\x45\xdf\xa3"),
    ("flv", b"FLV\x01"),
    ("asf", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    ("ogg", b"OggS"),
    ("mpeg", b"\0\0\x01\xba"),
)
_RIFF = {b"WEBP": "webp", b"AVI ": "avi"}
_HEIF_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heif", b"heix": "heif", b"mif1": "heif", b"msf1": "heif"}
_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)


def sniff(head: bytes) -> str | None:
    """What a file is, by its first bytes; 512 are enough. Its name is never trusted: upstream sets rename freely.

    Returns:
        One of `IMAGE_TYPES`, a container of videos ("mp4" for all of that family, "matroska" for WebM too, "avi",
        "mpegts", "mpeg", "flv", "asf", "ogg"), a type that is known but not read ("avif", "heif"), or None.
    """
    for name, magic in _MAGIC:
        if head.startswith(magic):
            return name
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _HEIF_BRANDS.get(head[8:12], "mp4")
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mp4"  # QuickTime files from before the `ftyp` atom
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return "bmp"
    if any(head[at : at + 1] == b"\x47" == head[at + size : at + size + 1] for at, size in ((0, 188), (4, 192))):
        return "mpegts"
    return None


# Decoding -----------------------------------------------------------------------------------------------------------

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258


def decode(data: bytes, settings: ImageSettings) -> Image.Image:
    """The picture in a file: upright, RGB, transparency on white; the first frame of an animation; in full size.

    Raises:
        Reject: "unknown-format", "broken-image" (also for a file that ends early) or "too-large".
    """
    with _opened(data, settings) as file:
        return _load(file)


@contextmanager
def _opened(data: bytes, settings: ImageSettings) -> Iterator[Image.Image]:
    """The file, with its header read; raises as `decode` does, also for what is done with it."""
    kind = sniff(data[:512])
    if kind not in IMAGE_TYPES:
        raise Reject("unknown-format", f"not an image that is read here: {kind or repr(data[:16])}")
    with _pillow_errors():
        file = Image.open(io.BytesIO(data), formats=[_PILLOW[kind]])
        check_pixels(file.size, settings)
        yield file


def _load(file: Image.Image) -> Image.Image:
    file.load()
    image, orientation = _to_rgb(file), _orientation(file)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _pixels(data: bytes, file: Image.Image, settings: ImageSettings) -> tuple[Pixels, tuple[int, int]]:
    """An opened file's picture, as `decode` gives it, and its (width, height); "fast" may leave fewer pixels."""
    if file.format in jpeg.FORMATS and _orientation(file) == 1:
        scale = jpeg.shrink(max(file.size), _FAST_SIDE) if settings.mode == "fast" else 1
        pixels = jpeg.read(data, file, scale)
        if pixels is not None:
            return pixels, file.size
    image = _load(file)
    return _as_array(image), image.size


def check_pixels(size: tuple[int, int], settings: ImageSettings) -> None:
    """Raises `Reject` "too-large" if a picture of this size may not be decoded."""
    width, height = size
    if width * height > settings.max_pixels:
        raise Reject("too-large", f"{width}x{height} pixels; max_pixels is {settings.max_pixels:,}")


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """Turns whatever Pillow throws into a `Reject`, and keeps its warnings (odd EXIF, mostly) to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Reject:
            raise
        except (MemoryError, Image.DecompressionBombError) as error:
            raise Reject("too-large", str(error) or "out of memory") from error
        except UnidentifiedImageError as error:  # its text holds an address in memory
            raise Reject("broken-image", "the header cannot be read") from error
        except Exception as error:  # damaged files bring out OSError, SyntaxError, struct.error, KeyError and more
            raise Reject("broken-image", f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # as above; a picture without a readable note on its orientation is still a picture
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode in ("I", "F", "LAB"):
        raise Reject("unknown-format", f"pixels of type {image.mode} have no agreed range of brightness")
    return on_white(image) if image.has_transparency_data else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8; `convert` would clip instead and leave a white picture."""
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    top = (1 << bits) - 1
    wide = image.convert("I")
    grey = wide.point([min((2 * v * 255 + top) // (2 * top), 255) for v in range(1 << 16)], "L")
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(wide.point([0 if v == clear else 255 for v in range(1 << 16)], "L"))
    return grey


def on_white(image: Image.Image) -> Image.Image:
    """Lays a picture with transparency on white and returns it as RGB."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB")


# Resizing -----------------------------------------------------------------------------------------------------------

_MAX_PADDED_SIDE = 32_768
_STRIP_PIXELS = 1 << 22


def fit(image: Image.Image) -> Image.Image:
    """Pads a picture to a square, centred, with the mean colour and resizes it to 336×336.

    The same pixels as LLaVA's `expand2square` and CLIP's bicubic resize, but without making the square.

    Raises:
        Reject: "too-large" if a side is longer than 32,768 pixels; the work grows with its square.
    """
    return _fit(_as_array(image), image.size)


def _as_array(image: Image.Image) -> Pixels:
    pixels = resample.blank(image.height, image.width)
    pixels[:] = np.asarray(image)
    return pixels


def _fit(pixels: Pixels, size: tuple[int, int]) -> Image.Image:
    if max(size) > _MAX_PADDED_SIDE:
        raise Reject("too-large", f"{size[0]}x{size[1]} pixels; no side may be over {_MAX_PADDED_SIDE:,}")
    square = resample.resize_square(pixels, size, SIDE, MEAN_COLOUR)
    if square is None:
        return fit_with_pillow(Image.fromarray(pixels))
    return Image.frombytes("RGB", (SIDE, SIDE), square.tobytes(), "raw", "RGBX")


def fit_with_pillow(image: Image.Image) -> Image.Image:
    """What `fit` does where `formats.resample` cannot.

    Pillow resizes along rows first, so strips of rows give the same result in little memory, whatever the shape.
    """
    width, height = image.size
    side = max(width, height)
    left, above = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (SIDE, side), MEAN_COLOUR)
    rows = max(1, _STRIP_PIXELS // side)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = Image.new("RGB", (side, bottom - top), MEAN_COLOUR)
        strip.paste(image.crop((0, top, width, bottom)), (left, 0))
        narrow.paste(strip.resize((SIDE, bottom - top), Image.Resampling.BICUBIC), (0, above + top))
    return narrow.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """Puts a picture in the middle of a larger one of the mean colour; an odd pixel goes to the right and bottom."""
    canvas = Image.new("RGB", (width, height), MEAN_COLOUR)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


@dataclass(frozen=True, slots=True)
class Grid:
    """How a picture is cut: scaled to `width`×`height`, padded to `rows`×`columns` tiles of 336×336."""

    width: int
    height: int
    rows: int
    columns: int


def grid(width: int, height: int, max_tiles: int) -> Grid:
    """The grid of a picture: unscaled if that takes at most `max_tiles` tiles, else the largest scale that does."""
    scale = Fraction(1)
    if _tiles(width) * _tiles(height) > max_tiles:
        # The best scale fills some grid of c columns in one direction, so it is enough to try each c.
        scale = max(
            min(Fraction(columns * SIDE, width), Fraction(max_tiles // columns * SIDE, height))
            for columns in range(1, max_tiles + 1)
        )
    width, height = (max(1, _nearest(length * scale)) for length in (width, height))
    return Grid(width, height, rows=_tiles(height), columns=_tiles(width))


def _tiles(length: int) -> int:
    return -(-length // SIDE)


def _nearest(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


# From file to stored images -----------------------------------------------------------------------------------------


def picture(data: bytes, settings: ImageSettings) -> list[EncodedImage]:
    """A file as one image of 336×336.

    Raises:
        Reject: as `decode` and `fit` do.
    """
    with _opened(data, settings) as file:
        if settings.passthrough:
            kept = jpeg.pixels_of_keepable(data, file, SIDE, settings.quality, settings.subsampling)
            if kept is not None:
                size = (SIDE, SIDE)
                known = contrast(Image.fromarray(kept), size)
                return [EncodedImage(data, "image", SIDE, SIDE, size, contrast=known)]
        pixels, size = _pixels(data, file, settings)
        return [stored(_fit(pixels, size), "image", size, settings)]


def patched(data: bytes, settings: ImageSettings, max_tiles: int) -> list[EncodedImage]:
    """A file as the whole picture followed by its 336×336 tiles, row by row (LongLLaVA, section 3.2: sub-images).

    Args:
        data: the file's bytes.
        settings: how to read and store.
        max_tiles: at most so many tiles; a larger picture is scaled down, keeping its shape, just enough.

    Raises:
        Reject: as `decode` and `fit` do.
    """
    image = decode(data, settings)
    cut = grid(*image.size, max_tiles)
    scaled = image.resize((cut.width, cut.height), Image.Resampling.BICUBIC)
    canvas = pad(scaled, cut.columns * SIDE, cut.rows * SIDE)
    images = [stored(fit(image), "main", image.size, settings)]
    for row in range(cut.rows):
        for column in range(cut.columns):
            x, y = column * SIDE, row * SIDE
            tile = canvas.crop((x, y, x + SIDE, y + SIDE))
            images.append(stored(tile, "tile", image.size, settings, tile=(row, column)))
    return images


def stored(
    image: Image.Image,
    role: ImageRole,
    source_size: tuple[int, int],
    settings: ImageSettings,
    *,
    tile: tuple[int, int] | None = None,
    time: float | None = None,
    shown: tuple[int, int] | None = None,
) -> EncodedImage:
    """A 336×336 picture as a shard stores it.

    Args:
        image: the picture.
        role: what it is.
        source_size: (width, height) of what it was made from.
        settings: how to store it.
        tile: row and column of a tile.
        time: of a frame, in seconds.
        shown: (width, height) before padding; of `source_size`'s shape by default, which pixels that are not square
            do not have.
    """
    known = None if tile else contrast(image, shown or source_size)
    return EncodedImage(encode(image, settings), role, image.width, image.height, source_size, tile, time, known)


_EDGE = 3  # pixels into which resizing carries the padding's colour; more where it enlarges
_PLACE = 4  # pixels; what noise there is evens out over a place


def contrast(image: Image.Image, source_size: tuple[int, int]) -> int | None:
    """How far the brightest and the darkest place of a padded 336×336 picture are apart, 0 to 255.

    Text on an empty page counts as a place, an even sky with its noise does not. None if too little of the square is
    picture to tell.
    """
    (width, height), side = source_size, max(source_size)
    left, top = (SIDE * (side - length) // (2 * side) for length in (width, height))
    edge = _EDGE + max(0, 2 * SIDE // side - 2)
    left, top = (margin + edge if margin else 0 for margin in (left, top))
    if min(SIDE - 2 * left, SIDE - 2 * top) < _PLACE:
        return None
    shown = image.crop((left, top, SIDE - left, SIDE - top)).reduce(_PLACE)
    return int(np.ptp(np.asarray(shown.getextrema()), axis=1).max())


def encode(image: Image.Image, settings: ImageSettings) -> bytes:
    """A JPEG of an RGB picture, without metadata: the same pixels give the same bytes."""
    bare = Image.new("RGB", image.size)
    bare.paste(image)  # Pillow would write a comment or profile that it remembers from the source
    out = io.BytesIO()
    bare.save(out, "JPEG", quality=settings.quality, subsampling=settings.subsampling)
    return out.getvalue()
