import io
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from formats import imaging, jpeg
from formats.errors import Reject
from formats.imaging import SIDE, ImageSettings, decode, encode, picture

EXACT, FAST = ImageSettings(), ImageSettings(mode="fast")
KEEP = ImageSettings(passthrough=True)


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes and some noise."""
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [127 + 100 * np.sin(x + i) * np.cos(y * (1 + i / 3)) for i in range(3)]
    noise = np.random.default_rng(0).normal(0, 3, (height, width, 1))
    return Image.fromarray((np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def outcome(read, data: bytes):
    try:
        return np.asarray(read(data))
    except Reject as reject:
        return str(reject)


def by_pillow(data: bytes):
    with imaging._opened(data, EXACT) as file:
        return imaging._load(file)


def by_ours(data: bytes):
    with imaging._opened(data, EXACT) as file:
        return imaging._pixels(data, file, EXACT)[0]


def resized(data: bytes, settings: ImageSettings):
    """The pixels before they are stored."""
    with imaging._opened(data, settings) as file:
        return np.asarray(imaging._fit(*imaging._pixels(data, file, settings)), float)


# Decoding


@pytest.mark.parametrize(
    "options", [{"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")] + [{"progressive": True}, {"optimize": True}]
)
@pytest.mark.parametrize("size", [(301, 203), (640, 480), (1, 1)])
def test_pixels_are_those_that_pillow_reads(options, size):
    data = saved(photo(*size), **options)
    assert np.array_equal(jpeg.read(data, opened(data)), opened(data))


def test_a_grey_jpeg_is_read_as_colours():
    data = saved(photo(64, 48).convert("L"))
    assert np.array_equal(jpeg.read(data, opened(data)), opened(data).convert("RGB"))


def test_print_colours_are_left_to_pillow():
    data = saved(photo(64, 48).convert("CMYK"))
    assert jpeg.read(data, opened(data)) is None


def test_real_files_and_their_damaged_copies_come_out_as_by_pillow(shared):
    files = [p for p in sorted((shared / "data").rglob("*")) if p.is_file() and p.stat().st_size < 300_000]
    contents = [data for data in (p.read_bytes() for p in files) if data.startswith(b"\xff\xd8\xff")]
    assert len(contents) > 50
    for data in contents:
        chance = random.Random(len(data))
        changed = bytearray(data)
        for _ in range(3):
            changed[chance.randrange(3, len(data))] = chance.randrange(256)
        for version in (data, data[: len(data) // 2], data[:-2], data + b"more", bytes(changed)):
            ours, pillows = outcome(by_ours, version), outcome(by_pillow, version)
            assert np.array_equal(ours, pillows) if isinstance(ours, np.ndarray) else ours == pillows


def test_a_file_with_an_orientation_is_turned_before_it_is_resized():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(photo(700, 501), exif=exif)
    (image,) = picture(data, EXACT)
    assert image.jpeg == encode(imaging.fit(decode(data, EXACT)), EXACT)
    assert image.source_size == (501, 700)


# The fast mode


def test_the_largest_fraction_that_leaves_enough_is_taken():
    assert [jpeg.shrink(length, 560) for length in (600, 1119, 1120, 2239, 2240, 4479, 4480, 50_000)] == [
        *(1, 1, 2, 2, 4, 4, 8, 8)
    ]


@pytest.mark.parametrize("size", [(1300, 1001), (2001, 1502), (850, 4501)])
def test_fast_is_near_exact_and_remembers_the_size(size):
    data = saved(photo(*size))
    exact, fast = picture(data, EXACT)[0], picture(data, FAST)[0]
    assert exact.source_size == fast.source_size == size
    assert exact.jpeg != fast.jpeg
    error = resized(data, EXACT) - resized(data, FAST)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 44


def test_fast_is_exact_where_nothing_is_gained():
    small, png = saved(photo(1000, 800)), io.BytesIO()
    photo(1600, 1200).save(png, "PNG")
    for data in (small, png.getvalue()):
        assert picture(data, EXACT) == picture(data, FAST)


# Passing through


def test_a_file_that_is_right_already_stays_as_it_is_where_the_recipe_allows():
    data = encode(photo(SIDE, SIDE), EXACT)
    assert picture(data, KEEP)[0].jpeg == data
    assert picture(data, EXACT)[0].jpeg != data


@pytest.mark.parametrize("options", [{"quality": 96}, {"subsampling": "4:2:2"}, {"subsampling": "4:4:4"}])
def test_a_better_file_stays_too(options):
    data = saved(photo(SIDE, SIDE), **{"quality": 95, "subsampling": "4:2:0", **options})
    assert picture(data, KEEP)[0].jpeg == data


EXIF = Image.Exif()
EXIF[0x010E] = "where I live"


@pytest.mark.parametrize(
    "options",
    [
        *({"quality": 94}, {"progressive": True}, {"comment": b"secret"}, {"exif": EXIF}),
        *({"icc_profile": b"x" * 200}, {"size": (SIDE, SIDE - 1)}, {"mode": "L"}, {"mode": "CMYK"}),
    ],
)
def test_a_worse_or_talkative_file_is_made_anew(options):
    size, mode = options.pop("size", (SIDE, SIDE)), options.pop("mode", "RGB")
    data = saved(photo(*size).convert(mode), **{"quality": 95, "subsampling": "4:2:0", **options})
    assert picture(data, KEEP) == picture(data, EXACT)


@pytest.mark.parametrize("change", [lambda d: d + b"secret", lambda d: d[:-2], lambda d: d[:-400] + b"\xff\xd9"])
def test_a_file_with_something_behind_it_or_missing_does_not_stay(change):
    data = change(encode(photo(SIDE, SIDE), EXACT))
    kept = outcome(lambda d: np.frombuffer(picture(d, KEEP)[0].jpeg, np.uint8), data)
    made = outcome(lambda d: np.frombuffer(picture(d, EXACT)[0].jpeg, np.uint8), data)
    assert np.array_equal(kept, made) if isinstance(kept, np.ndarray) else kept == made


def with_segment(data, marker, content):
    return data[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content + data[2:]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: with_segment(d, 0xE5, b"where I live"),
        lambda d: with_segment(d, 0xE0, b"JFXX\0\x10" + encode(photo(16, 16), EXACT)),  # a thumbnail
        lambda d: with_segment(d, 0xDC, b"\0\0"),
        lambda d: d[:-2] + b"\xff\xfe\0\x08secret" + d[-2:],  # a comment after the scan
        lambda d: d[:2] + b"\xff" + d[2:],  # fill bytes
    ],
)
def test_a_file_that_hides_something_is_made_anew(change):
    data = change(encode(photo(SIDE, SIDE), EXACT))
    kept, made = picture(data, KEEP)[0], picture(data, EXACT)[0]
    assert kept.jpeg == made.jpeg != data


def test_a_kept_file_has_its_contrast():
    data = encode(photo(SIDE, SIDE), EXACT)
    assert picture(data, KEEP)[0] == replace(picture(data, EXACT)[0], jpeg=data)
    blank = encode(Image.new("RGB", (SIDE, SIDE), "navy"), EXACT)
    assert picture(blank, KEEP)[0].contrast == 0


def test_coarser_colours_than_asked_for_do_not_stay():
    fine = ImageSettings(passthrough=True, subsampling="4:4:4")
    data = encode(photo(SIDE, SIDE), EXACT)
    assert picture(data, fine)[0].jpeg != data
