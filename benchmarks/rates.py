"""What do one ordinary picture, one clip and one text cost? For estimates of a whole build in docs/cluster.md.

    python benchmarks/rates.py [--repeats 5]

CPU seconds of `render_media` on a 2.5 megapixel JPEG and on 60 seconds of 720p H.264 at 1 frame a second. Prints JSON.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from formats.imaging import ImageSettings
from formats.sample import Media
from formats.video import VideoSettings
from pipelines.media import render_media


def scene(width: int, height: int, at: int = 0) -> Image.Image:
    """Something with smooth and busy parts, so that it compresses as photographs do."""
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns + 8 * at) % 256], axis=2)
    busy = np.random.default_rng(at % 5).normal(0, 12, (height, width, 1))
    return Image.fromarray((smooth + busy).clip(0, 255).astype(np.uint8))


def write_clip(path: Path, seconds: int) -> None:
    """720p H.264 at 24 frames a second."""
    scenes = [av.VideoFrame.from_image(scene(1280, 720, i)) for i in range(24)]
    with av.open(str(path), "w") as output:
        stream = output.add_stream("h264", rate=24, width=1280, height=720, options={"preset": "ultrafast"})
        stream.pix_fmt = "yuv420p"
        for i in range(24 * seconds):
            frame = scenes[i % 24]
            frame.pts = i
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def cpu_seconds(media: Media, data: str | bytes, repeats: int) -> tuple[float, int]:
    """The median cost of one rendering, and its images."""
    spent, images = [], 0
    for _ in range(repeats):
        before = time.process_time()
        images = len(render_media(media, data, ImageSettings(), VideoSettings()))
        spent.append(time.process_time() - before)
    return statistics.median(spent), images


def main() -> None:
    """Prints the costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    file = io.BytesIO()
    scene(1936, 1288).save(file, "JPEG", quality=90)
    picture, _ = cpu_seconds(Media(kind="image", path="x.jpg"), file.getvalue(), options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder) / "x.mp4", 60)
        clip, frames = cpu_seconds(Media(kind="video", path="x.mp4"), str(Path(folder) / "x.mp4"), options.repeats)
    print(
        json.dumps({"cpu_ms_per_picture": round(1000 * picture, 1), "cpu_ms_per_frame": round(1000 * clip / frames, 1)})
    )


if __name__ == "__main__":
    main()
