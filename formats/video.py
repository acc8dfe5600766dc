"""Videos: which frames are taken, and how they are decoded.

The frame shown at 0, 1/fps, 2/fps … seconds is taken, by the container's own timestamps, whatever the frame rate does
in between.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Literal, TypeVar

from av.error import FFmpegError
from PIL import Image

from formats import video_pyav
from formats.errors import Reject, UsageError
from formats.faults import blaming_storage
from formats.imaging import (
    IMAGE_TYPES,
    SIDE,
    EncodedImage,
    ImageSettings,
    check_pixels,
    decode,
    fit,
    pad,
    sniff,
    stored,
)
from formats.video_pyav import DEMUXERS, Choose, Shot, within_side


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """Which frames of a video are taken.

    Attributes:
        fps: frames per second of video.
        max_frames: if `fps` gives more, that many of them, evenly spread, the first and the last included.
        decoder: "pyav", or "decord" (extra `decord`), which knows fewer formats and may hang on damaged files.
        min_decodable: a file is rejected if less than this share of the frames it promises can be decoded.
    """

    fps: float = 1.0
    max_frames: int = 128
    decoder: Literal["pyav", "decord"] = "pyav"
    min_decodable: float = 0.9


def frames(
    source: str | bytes,
    video: VideoSettings,
    images: ImageSettings,
    start: float | None = None,
    end: float | None = None,
) -> list[EncodedImage]:
    """The frames of a video, in time order, at least one; a still picture is a video of one frame.

    Args:
        source: a path or the file's bytes.
        video, images: what to take and how to store it.
        start, end: take only frames shown in [start, end) seconds; an end after the last frame means the whole rest.

    Returns:
        336×336 images of role "frame". `time` counts from the file's first frame, also where `start` is given.

    Raises:
        Reject: "unknown-format", "broken-video", "broken-image" (of a still), "too-large", "media-unreadable", or
            "bad-record" if `end` is not after `start`.
        UsageError: if the decoder is not installed.
        ConnectionError, TimeoutError: the storage's fault, not the file's.
    """
    if start is not None and end is not None and end <= start:
        raise Reject("bad-record", f"the clip ends at {end} s but starts at {start} s")
    kind = sniff(_head(source))
    if kind in IMAGE_TYPES and kind != "gif":
        image = decode(_content(source), images)
        return [stored(fit(image), "frame", image.size, images, time=0.0)]
    if kind not in DEMUXERS:
        raise Reject("unknown-format", f"not a video that is read here: {kind or repr(_head(source)[:16])}")

    def choose_frames(times: Sequence[Fraction], until: Fraction) -> list[int]:
        return choose(times, until, video, start, end)

    try:
        if video.decoder == "decord":
            shots = _read_decord(source, choose_frames, images)
        else:
            shots = video_pyav.read(source, kind, choose_frames, video.min_decodable, images)
    except (Reject, UsageError, ConnectionError, TimeoutError):
        raise
    except MemoryError as error:
        raise Reject("too-large", str(error) or "out of memory") from error
    except Exception as error:  # both libraries let FFmpeg's many errors through, and their own on top
        # These errors' own texts name the file, and so would make a ledger depend on where the data lies.
        what = error.strerror if isinstance(error, (FFmpegError, OSError)) else error
        raise Reject("broken-video", f"{type(error).__name__}: {what}") from error
    return [
        stored(pad(s.image, SIDE, SIDE), "frame", s.size, images, time=round(float(s.time), 3), shown=s.image.size)
        for s in shots
    ]


def _head(source: str | bytes) -> bytes:
    return _content(source, 512)


def _content(source: str | bytes, limit: int | None = None) -> bytes:
    if isinstance(source, bytes):
        return source[:limit]
    try:
        with blaming_storage(Path(source).name), Path(source).open("rb") as f:
            return f.read() if limit is None else f.read(limit)
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        raise Reject("media-unreadable", f"{Path(source).name}: {error.strerror}") from error


# Choosing -----------------------------------------------------------------------------------------------------------


def choose(
    times: Sequence[Fraction],
    until: Fraction,
    video: VideoSettings,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """The frames shown at start, start + 1/fps, … before `end`, each once, thinned to `max_frames`.

    Args:
        times: when each frame appears, in seconds; strictly ascending.
        until: when the last frame disappears.
        video: fps and max_frames.
        start, end: seconds; the whole video by default.

    Returns:
        Ascending positions in `times`, at least one.

    Raises:
        Reject: "broken-video" if the video is over before `start`.
    """
    begin = max(_exact(start or 0), times[0])
    stop = until if end is None else min(until, _exact(end))
    if begin >= until:
        raise Reject("broken-video", f"the clip starts at {start} s but the video ends at {float(until):.3f} s")
    fps = _exact(video.fps)
    chosen: list[int] = []
    for i, (appears, disappears) in enumerate(pairwise([*times, until])):
        tick = begin + max(0, ceil((appears - begin) * fps)) / fps  # the first moment to be shown at or after it
        if tick < disappears and (tick < stop or not chosen):
            chosen.append(i)
    return thin(chosen, video.max_frames)


def _exact(seconds: float) -> Fraction:
    return Fraction(str(seconds))  # 0.1 as a tenth, not as the binary number next to it


T = TypeVar("T")


def thin(items: list[T], most: int) -> list[T]:
    """At most so many items, evenly spread, the first and the last included (of one, the first)."""
    if len(items) <= most:
        return items
    steps = max(most - 1, 1)
    return [items[(2 * i * (len(items) - 1) + steps) // (2 * steps)] for i in range(most)]


# decord -------------------------------------------------------------------------------------------------------------


def _refuse_faults(source: str | bytes) -> None:
    """Reads a file through, and raises what its storage does."""
    if isinstance(source, str):
        with blaming_storage(Path(source).name), Path(source).open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def _read_decord(source: str | bytes, choose: Choose, images: ImageSettings) -> list[Shot]:
    try:
        import decord
    except ImportError as error:
        raise UsageError(
            "video.decoder is 'decord', which is not installed: pip install 'longllava[decord]', or set it to 'pyav'"
        ) from error
    _refuse_faults(source)  # which decord takes for the end of the file
    reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=1)
    spans = reader.get_frame_timestamp(range(len(reader))).tolist()
    times = [Fraction(span[0]) - Fraction(spans[0][0]) for span in spans]
    until = Fraction(spans[-1][1]) - Fraction(spans[0][0])
    shots = []
    for i in choose(times, until):
        image = Image.fromarray(reader[i].asnumpy())
        check_pixels(image.size, images)
        small = image.resize(within_side(Fraction(image.width), Fraction(image.height)), Image.Resampling.BICUBIC)
        shots.append(Shot(small, times[i], image.size))
    return shots
