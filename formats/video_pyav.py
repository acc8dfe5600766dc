"""Reads chosen frames of a video with PyAV (FFmpeg), exactly, in three steps, each the check of the one before:

1. list the packets without decoding: their timestamps say which frames to take, and where the keyframes are
2. seek to the keyframe before each and decode up to it; the decoded frame must carry the expected timestamp
3. where it does not (damaged file, index that lies): decode everything, and choose among what came out
"""

import io
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import av
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from formats.errors import Reject
from formats.faults import blaming_storage
from formats.imaging import SIDE, ImageSettings, check_pixels, on_white

Choose = Callable[[Sequence[Fraction], Fraction], list[int]]
"""Given the times of all frames (ascending, the first is 0) and when the last one ends: which to take."""


@dataclass(frozen=True, slots=True)
class Shot:
    """A chosen frame: upright, at most 336 pixels wide and high; `size` is what it was before."""

    image: Image.Image
    time: Fraction
    size: tuple[int, int]


# `sniff` decides on the container, FFmpeg does not probe: it also knows play lists, which make it open other URLs.
DEMUXERS = {
    "mp4": "mov",
    "matroska": "matroska",
    "avi": "avi",
    "mpegts": "mpegts",
    "mpeg": "mpeg",
    "flv": "flv",
    "asf": "asf",
    "ogg": "ogg",
    "gif": "gif",
}
"""What is read: the containers that `sniff` knows, and FFmpeg's names for them."""

_SEEKABLE = ("mp4", "matroska")  # elsewhere FFmpeg guesses positions, and may land after the keyframe
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same bytes on every CPU
_WORTH_SEEKING = 8  # frames to jump over; so few are decoded in less time than a seek takes


class _NotAsListedError(Exception):
    """Decoding did not give what the packets said."""


class _OnDisk:
    """A file for FFmpeg to read, which takes a storage that fails for the end of the file.

    What failed is kept until FFmpeg is done, and raised then whatever it has made of the rest.
    """

    def __init__(self, path: str) -> None:
        self._name = Path(path).name
        self._fault: OSError | None = None
        with blaming_storage(self._name):
            self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115

    def read(self, size: int) -> bytes:
        if self._fault is None:
            try:
                return self._file.read(size) or b""
            except OSError as error:
                self._fault = error
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._fault is not None:
            with blaming_storage(self._name):
                raise self._fault


@dataclass(frozen=True, slots=True)
class _File:
    """A video file, opened anew for each pass over it."""

    source: str | bytes
    kind: str
    images: ImageSettings

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first stream of moving pictures; a cover picture is none."""
        content = io.BytesIO(self.source) if isinstance(self.source, bytes) else _OnDisk(self.source)
        with content, av.open(content, format=DEMUXERS[self.kind], metadata_errors="ignore") as container:
            stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
            if stream is None or stream.codec_context is None:
                raise Reject("unknown-format", f"no video that FFmpeg can decode in this {self.kind} file")
            check_pixels((stream.codec_context.width, stream.codec_context.height), self.images)
            stream.codec_context.thread_count = 1  # a machine is filled by running many workers
            yield container, stream


@dataclass(frozen=True, slots=True)
class _Listing:
    """What the packets of a video say; times are in units of its time base.

    Attributes:
        pts: when each frame appears, ascending, from the first keyframe on (what is before it cannot be decoded).
        keys: those of them that are keyframes.
        until: when the last frame disappears.
        promised: how many frames there should be, by the packets and by the header.
        trusted: whether every packet was whole and had a time of its own.
        aspect: width of a pixel in heights of a pixel.
    """

    unit: Fraction
    pts: list[int]
    keys: list[int]
    until: int
    promised: int
    trusted: bool
    aspect: Fraction

    def targets(self, times: list[int], choose: Choose, min_decodable: float) -> list[int]:
        """Which of the frames that can be decoded, by their times, are to be taken."""
        if len(times) < max(1, min_decodable * self.promised):
            raise Reject("broken-video", f"{len(times)} of {self.promised} frames can be decoded")
        seconds = [(t - times[0]) * self.unit for t in times]
        until = (max(self.until, times[-1] + 1) - times[0]) * self.unit
        return [times[i] for i in choose(seconds, until)]


def read(source: str | bytes, kind: str, choose: Choose, min_decodable: float, images: ImageSettings) -> list[Shot]:
    """The frames that `choose` takes.

    Args:
        source: a path or the file's bytes.
        kind: one of `DEMUXERS`.
        choose: which frames to take, given when they appear.
        min_decodable: the share of the promised frames that must be there.
        images: for the limit on pixels.

    Raises:
        Reject: "broken-video" if too little can be decoded, "unknown-format", "too-large".
        FFmpegError, OSError: if the file cannot be opened at all.
        ConnectionError: the storage's fault, not the file's.
    """
    file = _File(source, kind, images)
    listing = _list_packets(file)
    shrink = _Shrinker(listing.aspect, images)
    try:
        if not listing.trusted:
            raise _NotAsListedError
        times = listing.pts
        targets = listing.targets(times, choose, min_decodable)
        pictures = [shrink(frame) for frame in _decode_at(targets, listing, file)]
    except (_NotAsListedError, FFmpegError):
        places = _clock([(frame.pts, frame.dts) for frame in _decode_all(file)])
        times = sorted(places)
        targets = listing.targets(times, choose, min_decodable)
        wanted = {places[t]: t for t in targets}
        found = {wanted[i]: shrink(f) for i, f in enumerate(_decode_all(file)) if i in wanted}
        pictures = [found[t] for t in targets]
    return [
        Shot(image, (t - times[0]) * listing.unit, size) for t, (image, size) in zip(targets, pictures, strict=True)
    ]


def _list_packets(file: _File) -> _Listing:
    shown: list[tuple[int, int, bool]] = []  # time, duration, whether it is a keyframe
    hidden = damaged = 0
    ends: dict[int, int] = {}
    with file.opened() as (container, stream):
        for packet in _packets(container, stream, ends):
            if packet is None or packet.pts is None or packet.is_corrupt:
                damaged += 1
            elif packet.is_discard:
                hidden += 1  # cut away by an edit list
            else:
                shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
        missing = _missing(container, stream, len(shown) + hidden + damaged, ends)
        unit, aspect = stream.time_base, stream.sample_aspect_ratio or Fraction(1)
    first = min((pts for pts, _, key in shown if key), default=None)
    decodable = [entry for entry in shown if first is not None and entry[0] >= first]
    pts = sorted({pts for pts, _, _ in decodable})
    timed = file.kind != "avi"  # which stores no times: FFmpeg guesses, and wrongly where there are B-frames
    return _Listing(
        unit=unit,
        pts=pts,
        keys=sorted(pts for pts, _, key in decodable if key),
        until=max((pts + duration for pts, duration, _ in decodable), default=0),
        promised=len(decodable) + damaged + missing,
        trusted=timed and not damaged and 0 < len(pts) == len(decodable),
        aspect=aspect,
    )


def _packets(container: Any, stream: Any, ends: dict[int, int]) -> Iterator[Any]:
    """A stream's packets, None where the file breaks; notes in `ends` when the last packet of every stream ends."""
    try:
        for packet in container.demux():
            if not packet.size:
                continue
            index = packet.stream_index
            if packet.pts is not None:
                ends[index] = max(ends.get(index, 0), packet.pts + (packet.duration or 0))
            if index == stream.index:
                yield packet
    except FFmpegError:
        yield None


def _missing(container: Any, stream: Any, packets: int, ends: Mapping[int, int]) -> int:
    """How many packets the header promises beyond those found, as when a download was cut short."""
    if stream.frames:
        return max(0, int(stream.frames) - packets)
    if not container.duration or not ends:
        return 0
    length: float = container.duration / av.time_base
    end = max(float(end * container.streams[index].time_base) for index, end in ends.items())
    found: float = max(end - (container.start_time or 0) / av.time_base, 0.001)
    return max(0, round(packets * (length / found - 1)))


def _decode_at(targets: Sequence[int], listing: _Listing, file: _File) -> Iterator[Any]:
    """The frames that appear at these times, ascending, with as little decoding as the keyframes allow."""
    keys = listing.keys if file.kind in _SEEKABLE else listing.keys[:1]
    reached = 0
    with file.opened() as (container, stream):
        decoded = container.decode(stream)
        for target in targets:
            key = keys[bisect_right(keys, target) - 1]
            if bisect_left(listing.pts, key) - reached > _WORTH_SEEKING:
                container.seek(key, stream=stream)
                decoded = container.decode(stream)
            yield _forward(decoded, target)
            reached = bisect_left(listing.pts, target)


def _forward(decoded: Iterator[Any], target: int) -> Any:
    for frame in decoded:
        if frame.is_corrupt or (frame.pts is not None and frame.pts > target):
            break
        if frame.pts == target:
            return frame
    raise _NotAsListedError


def _decode_all(file: _File) -> Iterator[Any]:
    """Every whole frame, in the order in which they come out.

    After damage, nothing is whole before the next keyframe: the decoder goes on, but with what it has made up.
    """
    whole = True
    with file.opened() as (container, stream), suppress(FFmpegError):
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except FFmpegError:
                whole = False
                continue
            for frame in decoded:
                whole = not frame.is_corrupt and (whole or frame.key_frame)
                if whole:
                    yield frame


def _clock(stamps: Sequence[tuple[int | None, int | None]]) -> dict[int, int]:
    """When frames appear, given (pts, dts) of each in the order in which they come out: from times to places.

    Frames come out in the order in which they are shown, so stamps that run backwards were not read but guessed.
    """
    for column in zip(*stamps, strict=True):
        times = [time for time in _with_tail(column) if time is not None]
        if len(times) == len(stamps) and all(a < b for a, b in pairwise(times)):
            return {time: place for place, time in enumerate(times)}
    return {pts: place for place, (pts, _) in enumerate(stamps) if pts is not None}


def _with_tail(column: Sequence[int | None]) -> list[int | None]:
    """Goes on counting at the end: frames that the decoder still held after the last packet may have no dts."""
    times = list(column)
    for i in range(2, len(times)):
        before, last = times[i - 2], times[i - 1]
        if times[i] is None and before is not None and last is not None:
            times[i] = 2 * last - before
    return times


class _Shrinker:
    """Makes a decoded frame an upright picture of at most 336×336, scaling while it still is YUV.

    Full frames would take 20 times the memory and 4 times the time of scaling.
    """

    def __init__(self, aspect: Fraction, images: ImageSettings) -> None:
        self._aspect = aspect
        self._images = images
        self._scaler = VideoReformatter()

    def __call__(self, frame: Any) -> tuple[Image.Image, tuple[int, int]]:
        check_pixels((frame.width, frame.height), self._images)
        width, height = within_side(frame.width * self._aspect, Fraction(frame.height))
        transparent = any(part.is_alpha for part in frame.format.components)
        small = self._scaler.reformat(
            frame, width, height, "rgba" if transparent else "rgb24", interpolation=_SCALING, threads=1
        )
        image = Image.fromarray(small.to_ndarray())
        if transparent:
            image = on_white(image)
        return _upright(image, (frame.width, frame.height), frame.side_data.get("DISPLAYMATRIX"))


def _upright(image: Image.Image, size: tuple[int, int], matrix: Any) -> tuple[Image.Image, tuple[int, int]]:
    """A frame and its size as they are to be shown: turned, mirrored or both (ISO/IEC 14496-12, track header).

    Args:
        image: the frame as it is stored.
        size: of it before it was scaled.
        matrix: FFmpeg's nine numbers (a b u, c d v, x y w): a point is shown at (a·x + c·y, b·x + d·y), shifted. None
            if the file has none. What it turns by less than a quarter is left as it is stored.
    """
    if matrix is None:
        return image, size
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    along, cross = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(along, cross) * _SLANT > max(along, cross):
        return image, size
    turned = cross > along
    how = _TURNS[turned, (c if turned else a) < 0, (b if turned else d) < 0]
    return image if how is None else image.transpose(how), size[::-1] if turned else size


_SLANT = 50  # times as much along one axis as along the other: about one degree
_TURNS = {
    (False, False, False): None,
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
"""By whether rows become columns, and what then runs backwards across and down: Pillow turns counter-clockwise."""


def within_side(width: Fraction, height: Fraction) -> tuple[int, int]:
    """The largest whole size of that shape that is at most 336×336."""
    scale = SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
