"""Thumbnails of the pictures and clips that cost records their place, for the ledger and the report's reject browser.

They are made when the ledger is written, by workers that go back to a record's media as its shard did: found below the
same roots, opened behind the same guard. So the same sources give the same thumbnails, however the build came about,
and a build has a few dozen at most. What cannot be seen has none: media that are missing or unreadable, bytes of an
unknown kind, whatever hung or crashed the decoder, and pictures that cannot be opened in small.
"""

import base64
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile, ImageOps

from formats.catalog import from_row
from formats.errors import Reject
from formats.imaging import IMAGE_TYPES, ImageSettings, on_white, sniff
from formats.sample import Media
from formats.video import VideoSettings, frames
from pipelines.curate import PICTURE_REASONS, picture_scores, refuse_junk
from pipelines.materialise import Settings, fetched, guard_of, image_settings, open_media, video_settings
from pipelines.plan import Planner
from pipelines.report import fair_share
from pipelines.tools import refuse_other_tools

SEEN = frozenset({"broken-image", "broken-video", "too-large", "too-long", *PICTURE_REASONS})
"""Reasons for which a record is rejected whose media may be seen all the same."""

_MOST = 60  # in a build
_MOST_OF_A_KIND = 12  # of one component and reason
_SIDE = 96  # pixels
_MOST_BYTES = 9_000  # what noise of that size comes to
_QUALITY = 75
_SECONDS = 20.0

Known = tuple[str, str]
"""A rejected record: its component and uid."""


@dataclass(frozen=True, slots=True)
class GlimpseTask:
    """A rejected record: its line of the catalog, and why it was rejected."""

    settings: Settings
    component: str
    record: Mapping[str, Any]
    reason: str


def thumbnails(
    rejects: pa.Table,
    settings: Settings,
    planner: Planner,
    run: Callable[[Callable[[GlimpseTask], tuple[Known, str]], list[GlimpseTask]], Iterable[tuple[Known, str]]],
) -> dict[Known, str]:
    """Thumbnails of some rejected records: the first few of each component and reason that can be seen.

    Args:
        rejects: the ledger, with columns component, uid and reason.
        settings: of the shards that rejected them.
        planner: knows the records.
        run: makes the tasks somewhere, in any order, as `Executor.map` does.

    Returns:
        JPEG files in base64.
    """
    wanted = _chosen(rejects)
    records = planner.records({uid for _, uid in wanted})
    known_to_us = [(known, reason) for known, reason in wanted.items() if known[1] in records]
    tasks = [GlimpseTask(settings, known[0], records[known[1]], reason) for known, reason in known_to_us]
    return {known: picture for known, picture in run(glimpse, tasks) if picture} if tasks else {}


def _chosen(rejects: pa.Table) -> dict[Known, str]:
    """The records that are looked at, and why they were rejected; none twice."""
    seen = rejects.filter(pc.is_in(rejects["reason"], pa.array(sorted(SEEN))))
    columns = (seen[name].to_pylist() for name in ("component", "uid", "reason"))
    candidates: dict[Known, str] = {}
    for component, uid, reason in zip(*columns, strict=True):
        candidates.setdefault((component, uid), reason)
    kinds = Counter((component, reason) for (component, _), reason in candidates.items())
    each = min(fair_share(kinds.values(), _MOST), _MOST_OF_A_KIND)
    taken: Counter[tuple[str, str]] = Counter()
    chosen: dict[Known, str] = {}
    for known, reason in candidates.items():
        taken[known[0], reason] += 1
        if taken[known[0], reason] <= each and len(chosen) < _MOST:
            chosen[known] = reason
    return chosen


def glimpse(task: GlimpseTask) -> tuple[Known, str]:
    """Looks for the first medium that a record was rejected for, and makes its thumbnail.

    Returns:
        The record, and a JPEG in base64; empty if there is nothing to see, or if the medium is another by now.

    Raises:
        BuildError: if this machine would make another thumbnail than others.
        ConnectionError, TimeoutError: if the storage of its media fails; the task can be tried again.
    """
    refuse_other_tools(task.settings.tools)
    sample = from_row(task.record)
    seen = next((s for media in sample.media if (s := _seen(media, sample.source, task)) is not None), b"")
    small = seen if len(seen) <= _MOST_BYTES else b""
    return (task.component, sample.uid), base64.b64encode(small).decode()


def _seen(media: Media, source: str, task: GlimpseTask) -> bytes | None:
    """A thumbnail of the medium, empty if none can be made; None if the record was not rejected for it."""
    settings, recipe = task.settings, task.settings.recipe
    component = recipe.components[task.component]
    try:
        tiles = component.max_tiles if component.subimage else None
        images, size = open_media(media, source, settings, tiles)
        refuse_junk(picture_scores([images], [] if size is None else [size]), recipe.steps(task.component))
        if task.reason != "too-long":
            return None
    except Reject as reject:
        if reject.reason != task.reason:
            return None
    guard = guard_of(min(_SECONDS, recipe.limits.seconds), recipe.limits.memory_mb << 20)
    with suppress(Reject):
        data = fetched(media, source, settings)
        return guard.call(_small_copy, media, data, image_settings(recipe), video_settings(recipe))
    return b""


# Behind the guard -----------------------------------------------------------------------------------------------------


def _small_copy(media: Media, data: str | bytes, images: ImageSettings, video: VideoSettings) -> bytes:
    """A thumbnail of a picture, or of the first frame that a clip's file has.

    Raises:
        Reject: if there is none.
    """
    if media.kind == "image":
        assert isinstance(data, bytes)
        return _small_picture(data, images)
    first = VideoSettings(max_frames=1, decoder=video.decoder, min_decodable=0.0)
    return _small_picture(frames(data, first, images)[0].jpeg, images)


def _small_picture(data: bytes, settings: ImageSettings) -> bytes:
    """A thumbnail of a picture, or of as much of it as is there; empty if it cannot be opened in small.

    Of a JPEG no more than an eighth of each side has to be decoded; what has to be may not be more than `max_pixels`.
    """
    kind = sniff(data[:512])
    if kind not in IMAGE_TYPES:
        return b""
    with warnings.catch_warnings(), suppress(Exception):  # Pillow raises whatever a damaged file brings out
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=[kind.upper()]) as file:
            file.draft("RGB", (_SIDE, _SIDE))
            if file.width * file.height <= settings.max_pixels:
                return _encoded(_whole_or_not(file))
    return b""


def _whole_or_not(file: Image.Image) -> Image.Image:
    """A picture's pixels, grey where the file ends early."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        file.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    upright = ImageOps.exif_transpose(file)
    return on_white(upright) if upright.has_transparency_data else upright.convert("RGB")


def _encoded(image: Image.Image) -> bytes:
    small = image.resize(_within(image.size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    bare = Image.new("RGB", small.size)
    bare.paste(small)
    bare.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()


def _within(size: tuple[int, int]) -> tuple[int, int]:
    """The size in which a picture's longer side has 96 pixels, or as many as it has."""
    scale = min(1.0, _SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
