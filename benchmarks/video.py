"""How long do the frames of a clip take, beside decord and a plain PyAV loop?

    python benchmarks/video.py [--seconds 10 120] [--repeats 3] [--cache FOLDER]

Makes 720p clips (30 frames a second, a keyframe every 5 s or so, moving texture) in H.264, HEVC, VP9 and AV1, and takes
frames at 1 fps and 32 evenly spread ones, as pictures within 336×336. CPU seconds of the whole process, encoding of the
JPEGs left out; methods interleaved. decord is measured if it is installed: `pip install decord`.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from formats import video_pyav
from formats.imaging import ImageSettings
from formats.video import VideoSettings, choose
from formats.video_pyav import within_side

WIDTH, HEIGHT, RATE = 1280, 720, 30
CODECS = {
    "h264": ("libx264", {"preset": "superfast", "g": "150"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=150"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "150", "b": "1M"}),
    "av1": ("libsvtav1", {"preset": "12", "g": "150", "crf": "40"}),
}
SUFFIX = {"h264": "mp4", "hevc": "mp4", "vp9": "webm", "av1": "mp4"}
IMAGES = ImageSettings()


def make(folder: Path, codec: str, seconds: int) -> Path:
    """A clip of a large texture that drifts; made unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{codec}-{seconds}.{SUFFIX[codec]}"
    if path.exists():
        return path
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    scene = np.asarray(coarse.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.BICUBIC))
    encoder, options = CODECS[codec]
    unfinished = path.with_suffix(".part." + SUFFIX[codec])
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream(encoder, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(seconds * RATE):
            x, y = int((1 + np.sin(i / 60)) * WIDTH / 2), int((1 + np.cos(i / 90)) * HEIGHT / 2)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[y : y + HEIGHT, x : x + WIDTH]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    unfinished.rename(path)
    return path


# Methods: from a clip and the name of a draw to pictures within 336×336 -----------------------------------------------


def settings(draw: str) -> VideoSettings:
    """What a recipe would say."""
    return VideoSettings(fps=1.0) if draw == "1 fps" else VideoSettings(fps=60.0, max_frames=32)


def ours(path: Path, draw: str) -> list[np.ndarray]:
    """`formats.video_pyav`."""
    kind = "matroska" if path.suffix == ".webm" else "mp4"
    shots = video_pyav.read(str(path), kind, lambda times, until: choose(times, until, settings(draw)), 0.9, IMAGES)
    return [np.asarray(shot.image) for shot in shots]


def plain_pyav(path: Path, draw: str) -> list[np.ndarray]:
    """Decodes everything with as many threads as FFmpeg likes to use, and keeps what is wanted."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        wanted = set(numbers(stream.frames or round(float(container.duration / av.time_base) * RATE), draw))
        return [small(frame.to_image()) for i, frame in enumerate(container.decode(stream)) if i in wanted]


def decord(path: Path, draw: str) -> list[np.ndarray]:
    """decord's own way of taking frames by their numbers."""
    import decord as library

    reader = library.VideoReader(str(path), num_threads=1)
    return [small(Image.fromarray(frame)) for frame in reader.get_batch(numbers(len(reader), draw)).asnumpy()]


def numbers(frames: int, draw: str) -> list[int]:
    """Frame numbers of a draw, at a steady rate."""
    if draw == "1 fps":
        return list(range(0, frames, RATE))
    return [round(i * (frames - 1) / 31) for i in range(32)]


def small(image: Image.Image) -> np.ndarray:
    """Within 336×336."""
    size = within_side(Fraction(image.width), Fraction(image.height))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


# Measuring ----------------------------------------------------------------------------------------------------------


def cost(method: Callable[[Path, str], list[np.ndarray]], path: Path, draw: str) -> tuple[float, int]:
    """CPU seconds and the number of frames; no time if the method cannot read the clip."""
    before = time.process_time()
    try:
        frames = len(method(path, draw))
    except Exception as error:  # what a reader throws at a codec that it does not know is its own affair
        print(f"{method.__name__} on {path.name}: {type(error).__name__}", flush=True)
        return float("nan"), 0
    return time.process_time() - before, frames


def main() -> None:
    """Prints one JSON object: frames a CPU second, medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 120])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--cache", type=Path, help="where the clips are, or are left")
    options = parser.parse_args()
    compared = [ours, plain_pyav] + [decord] * bool(importlib.util.find_spec("decord"))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for codec in options.codecs:
            for seconds in options.seconds:
                path = make(options.cache or Path(name), codec, seconds)
                for draw in ("1 fps", "32 frames"):
                    runs: dict[str, list[tuple[float, int]]] = {}
                    for _ in range(options.repeats):
                        for method in compared:
                            runs.setdefault(method.__name__, []).append(cost(method, path, draw))
                    result[f"{codec}, {seconds} s, {draw}"] = {
                        method: round(values[0][1] / statistics.median(seconds for seconds, _ in values), 1)
                        if values[0][1]
                        else None
                        for method, values in runs.items()
                    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
