"""How many pictures a second does one core turn into stored 336×336 JPEGs, beside what others use?

    python benchmarks/images.py [--images 40] [--repeats 3] [--cache FOLDER]

Makes photo-like JPEGs of 1 to 4 megapixels (quality 90, 4:2:0, seeded) and runs every method over all of them,
interleaved. Each method is timed with what surrounds it in a build: reading the file, SHA-256 and tar. Peers are
measured if they are installed: `pip install img2dataset` (its own Resizer class), torch, opencv-python-headless.
Fidelity is that of the pixels before they are stored, against Pillow's.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
from PIL import Image, ImageDraw

from formats import imaging
from formats.imaging import MEAN_COLOUR, SIDE, ImageSettings
from formats.sample import Media
from formats.shard import ShardWriter
from formats.video import VideoSettings
from pipelines.guard import Guard
from pipelines.media import render_media

EXACT, FAST = ImageSettings(), ImageSettings(mode="fast")


# Pictures -----------------------------------------------------------------------------------------------------------


def photo(seed: int) -> bytes:
    """A JPEG with a photo's spectrum, noise and edges: 1 to 4 megapixels, about 1.7 bits a pixel."""
    random = np.random.default_rng(seed)
    aspect = random.choice([4 / 3, 3 / 2, 16 / 9, 1.0, 3 / 4, 2 / 3])
    width = int((random.uniform(1, 4) * 1e6 * aspect) ** 0.5)
    height = int(width / aspect)
    n = 1024
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    frequency[0, 0] = np.inf
    layers = [np.fft.irfft2(np.fft.rfft2(random.standard_normal((n, n))) / frequency**1.35, (n, n)) for _ in range(2)]
    light, tint = (layer / layer.std() for layer in layers)
    texture = np.stack([128 + 48 * light + 14 * tint, 124 + 48 * light, 120 + 48 * light - 14 * tint], axis=-1)
    image = Image.fromarray(texture.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(image) + random.normal(0, 1, (height, width, 1))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, size = (int(random.integers(*span)) for span in ((0, width), (0, height), (10, width // 6)))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + size, y + size), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, subsampling="4:2:0")
    return out.getvalue()


def make(folder: Path, count: int) -> list[Path]:
    """The files, made unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{seed:04d}.jpg" for seed in range(count)]
    for seed, file in enumerate(files):
        if not file.exists():
            file.write_bytes(photo(seed))
    return files


# Methods: from a file's bytes to an image of 336×336 ----------------------------------------------------------------


def opened(data: bytes) -> Image.Image:
    """Decoded by Pillow."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def expand_to_square(data: bytes) -> Image.Image:
    """As LLaVA's loader does: the padded square is made in full size."""
    image = opened(data)
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def inside(width: int, height: int) -> tuple[int, int]:
    """The largest size of that shape within 336×336."""
    scale = SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def plain_pillow(data: bytes) -> Image.Image:
    """Resized, then padded: less work than LLaVA's way, and not quite its pixels."""
    image = opened(data)
    return imaging.pad(image.resize(inside(*image.size), Image.Resampling.BICUBIC), SIDE, SIDE)


def pillow_in_strips(data: bytes) -> Image.Image:
    """LLaVA's pixels by Pillow alone, without making the square: what `exact` does where its own loops cannot."""
    return imaging.fit_with_pillow(opened(data))


def turbo_torch(data: bytes) -> Image.Image:
    """simplejpeg, then torch's antialiased bicubic on bytes."""
    import torch

    torch.set_num_threads(1)
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None]
    width, height = inside(pixels.shape[3], pixels.shape[2])
    small = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return imaging.pad(Image.fromarray(small[0].permute(1, 2, 0).contiguous().numpy()), SIDE, SIDE)


def fastest_decode(data: bytes) -> Image.Image:
    """simplejpeg at the smallest scale that is not below the result, then OpenCV's INTER_AREA: quality comes last."""
    import cv2

    cv2.setNumThreads(1)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    width, height = inside(width, height)
    pixels = simplejpeg.decode_jpeg(data, min_width=width, min_height=height, min_factor=1)
    return imaging.pad(Image.fromarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)), SIDE, SIDE)


def stored(make_image: Callable[[bytes], Image.Image]) -> Callable[[bytes], bytes]:
    """With encoding."""
    return lambda data: imaging.encode(make_image(data), EXACT)


def methods() -> dict[str, Callable[[bytes], bytes]]:
    """What is compared, by name: from a file's bytes to a JPEG's."""
    found = {
        "LLaVA expand2square": stored(expand_to_square),
        "plain Pillow bicubic": stored(plain_pillow),
        "Pillow in strips": stored(pillow_in_strips),
        "ours, exact": lambda data: imaging.picture(data, EXACT)[0].jpeg,
        "ours, fast": lambda data: imaging.picture(data, FAST)[0].jpeg,
    }
    if importlib.util.find_spec("img2dataset"):
        found["img2dataset Resizer"] = img2dataset()
    if importlib.util.find_spec("torch"):
        found["simplejpeg + torch"] = stored(turbo_torch)
    if importlib.util.find_spec("cv2"):
        found["simplejpeg scaled + INTER_AREA"] = stored(fastest_decode)
    return found


def img2dataset() -> Callable[[bytes], bytes]:
    """img2dataset's own class, set to pad to 336×336."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("img2dataset.resizer")
    resizer = module.Resizer(image_size=SIDE, resize_mode="border", resize_only_if_bigger=False, encode_quality=95)

    def run(data: bytes) -> bytes:
        jpeg, *_, error = resizer(io.BytesIO(data))
        if error:
            raise SystemExit(error)
        return bytes(jpeg)

    return run


# Measuring ----------------------------------------------------------------------------------------------------------


def whole_path(files: list[Path], method: Callable[[bytes], bytes], folder: Path) -> float:
    """Images per CPU second, from files to a shard."""
    before = time.process_time()
    with ShardWriter(folder / "shard.tar") as shard:
        for i, file in enumerate(files):
            shard.add(f"{i:09d}", b"{}", [method(file.read_bytes())])
        shard.finish()
    return len(files) / (time.process_time() - before)


def guarded(files: list[Path], folder: Path) -> float:
    """The same through the process that decodes in a build; its CPU time counts, its start does not."""
    media = Media(kind="image", path="x.jpg")
    with Guard() as guard:

        def method(data: bytes) -> bytes:
            return guard.call(render_media, media, data, EXACT, VideoSettings())[0].jpeg

        method(files[0].read_bytes())
        (child,) = psutil.Process().children()
        theirs = sum(child.cpu_times()[:2])
        mine = len(files) / whole_path(files, method, folder)
        return len(files) / (mine + sum(child.cpu_times()[:2]) - theirs)


def fidelity(made: list[np.ndarray], right: list[np.ndarray]) -> dict[str, Any]:
    """PSNR in dB, of all pixels together, and the largest difference."""
    differences = [a.astype(np.int16) - b for a, b in zip(made, right, strict=True)]
    error = statistics.fmean(float((d**2.0).mean()) for d in differences)
    return {
        "psnr_db": round(10 * np.log10(255**2 / error), 1) if error else None,
        "lowest_psnr_db": round(min(10 * np.log10(255**2 / max(float((d**2.0).mean()), 1e-9)) for d in differences), 1)
        if error
        else None,
        "largest_difference": max(int(abs(d).max()) for d in differences),
    }


def pixels_of(data: bytes, settings: ImageSettings) -> np.ndarray:
    """What our modes would store."""
    with imaging._opened(data, settings) as file:
        return np.asarray(imaging._fit(*imaging._pixels(data, file, settings)))


def fidelities(contents: list[bytes]) -> dict[str, Any]:
    """Of each method: ours against LLaVA's pixels, which pad first; peers that pad last against plain Pillow's."""
    llava = [np.asarray(expand_to_square(data)) for data in contents]
    plain = [np.asarray(plain_pillow(data)) for data in contents]
    found = {
        "ours, exact": fidelity([pixels_of(data, EXACT) for data in contents], llava),
        "ours, fast": fidelity([pixels_of(data, FAST) for data in contents], llava),
    }
    for name, module, method in (
        ("simplejpeg + torch", "torch", turbo_torch),
        ("simplejpeg scaled + INTER_AREA", "cv2", fastest_decode),
    ):
        if importlib.util.find_spec(module):
            found[name] = fidelity([np.asarray(method(data)) for data in contents], plain)
    return found


def main() -> None:
    """Prints one JSON object with medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="where the pictures are, or are left")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = make(options.cache or folder / "pictures", options.images)
        contents = [file.read_bytes() for file in files]
        sizes = [Image.open(file).size for file in files]
        compared = methods()
        rates: dict[str, list[float]] = {name: [] for name in [*compared, "ours, exact, guarded"]}
        for method in compared.values():
            method(contents[0])  # imports and compilation
        for _ in range(options.repeats):
            for name, method in compared.items():
                rates[name].append(whole_path(files, method, folder))
            rates["ours, exact, guarded"].append(guarded(files, folder))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ratios = {
            f"{ours} / {peer}": round(medians[ours] / medians[peer], 2)
            for ours in ("ours, exact", "ours, fast", "ours, exact, guarded")
            for peer in ("LLaVA expand2square", "plain Pillow bicubic", "Pillow in strips", "img2dataset Resizer")
            if peer in medians
        }
        result = {
            "images": len(files),
            "mean_megapixels": round(statistics.fmean(w * h for w, h in sizes) / 1e6, 2),
            "bits_per_pixel": round(8 * sum(map(len, contents)) / sum(w * h for w, h in sizes), 2),
            "images_per_cpu_second": {name: round(value, 1) for name, value in medians.items()},
            "lowest_and_highest": {name: [round(min(v), 1), round(max(v), 1)] for name, v in rates.items()},
            "ratios": ratios,
            "fidelity": fidelities(contents),
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
