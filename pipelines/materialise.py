"""Plan to shards: one task builds one shard from its rows of a round, and leaves a note that it is done."""

import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from formats import resample
from formats.catalog import from_row
from formats.errors import BuildError, Reject
from formats.imaging import EncodedImage, ImageSettings
from formats.manifest import SHARDS
from formats.sample import Media
from formats.shard import (
    SCORES,
    TEXT_SCORES,
    Place,
    ShardSummary,
    ShardWriter,
    encode_record,
    members_of,
    safe_shard_name,
)
from formats.tokens import ChatTokenizer
from formats.video import VideoSettings
from pipelines.curate import picture_scores, refuse_junk
from pipelines.guard import Guard
from pipelines.media import MediaStore, render_media
from pipelines.notes import BEFORE, ShardNote, leave_note, remains, shard_file
from pipelines.plan import read_rows
from pipelines.render import render_sample
from pipelines.storage import Root
from pipelines.tools import refuse_other_tools
from recipes.schema import Recipe

RECORD_SECONDS = 3600.0  # for a record alone in its process, all its media, each with a deadline of its own
RECORD_MEMORY = 16 << 30


@dataclass(frozen=True, slots=True)
class Settings:
    """What all shards of a build share."""

    recipe: Recipe
    work: str
    tokenizer: str
    media_roots: Mapping[str, str]
    annotation_roots: Mapping[str, str]
    builds: Mapping[str, str]
    build_hashes: Mapping[str, str]
    tools: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to build: rows `start` … `stop` of a round, whose first sample has position `position`.

    `plan` is the fingerprint of those rows.
    """

    settings: Settings
    number: int
    round_file: str
    start: int
    stop: int
    position: int
    plan: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A record as a shard stores it, and its line of the index but for key and place."""

    record: bytes
    images: list[bytes]
    columns: dict[str, Any]


def build_shard(task: ShardTask) -> ShardNote:
    """Renders the rows of one shard; what cannot be used goes to the ledger and leaves a gap in the keys.

    If an earlier worker died over this shard, records are rendered in another process, so that the one that kills takes
    nothing else along: it is tried once more in a fresh process and then rejected as "decoder-crash".

    Raises:
        BuildError: if this machine would make other bytes than others, or the plan no longer fits what it draws from.
        ConnectionError, TimeoutError: if storage fails; the task can be tried again.
    """
    refuse_other_tools(task.settings.tools)
    work = Path(task.settings.work)
    dead = remains(work, task.number)
    for path in dead:
        path.unlink(missing_ok=True)
    with ShardWriter(shard_file(work, task.number)) as shard, Guard(RECORD_SECONDS, RECORD_MEMORY) as alone:
        render = (lambda row, settings: alone.call(render_row, row, settings)) if dead else render_row
        index, rejects = _fill(shard, task, render)
        summary = shard.finish() if index else ShardSummary("", "", 0, 0)
    return leave_note(work, task.number, summary.sha256, summary.bytes, index, rejects, task.plan)


def _fill(
    shard: ShardWriter, task: ShardTask, render: Callable[[Mapping[str, Any], Settings], Ready]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Adds what can be used to a shard; returns its lines of the index, and the rejects."""
    index, rejects = [], []
    for i, row in enumerate(read_rows(Path(task.round_file), task.start, task.stop)):
        try:
            ready = render(row, task.settings)
        except Reject as reject:
            why = {"reason": reject.reason, "detail": reject.detail}
            rejects.append({"uid": row["uid"], "component": row["component"], **why, "rank": row["rank"]})
            continue
        key = f"{task.position + i:09d}"
        place = shard.add(key, ready.record, ready.images)
        known = {"key": key, "id": row["uid"], "component": row["component"]}
        index.append({**known, **asdict(place), **ready.columns})
    return index, rejects


def render_row(row: Mapping[str, Any], settings: Settings) -> Ready:
    """Makes one planned row ready to be stored.

    Raises:
        Reject: if the record cannot be used.
        ConnectionError, TimeoutError: if the storage of its media fails; the task can be tried again.
        BuildError: if the catalog or an earlier build is not what the plan was made of.
    """
    if row["replayed"]:
        return _replay(row, settings)
    if row.get("made"):
        return _copy(Path(settings.work) / BEFORE / SHARDS, row["made"], "this build")
    if row["record"] is None:
        raise BuildError(f"{row['uid']} is in an earlier build but not in the catalog; were its sources changed?")
    recipe = settings.recipe
    component = recipe.components[row["component"]]
    sample = from_row(row["record"])
    tiles = component.max_tiles if component.subimage else None
    opened = [open_media(media, sample.source, settings, tiles) for media in sample.media]
    groups = [images for images, _ in opened]
    pictures = picture_scores(groups, [size for _, size in opened if size is not None])
    refuse_junk(pictures, recipe.steps(row["component"]))
    provenance: dict[str, Any] = {"copy": row["copy"]} if row["copy"] else {}
    if component.subimage:
        provenance["build"] = {"name": component.subimage, "recipe_sha256": settings.build_hashes[component.subimage]}
    rendered = render_sample(
        sample,
        groups,
        _tokenizer(settings.tokenizer),
        component=row["component"],
        sequence_length=recipe.sequence_length,
        cut_text=recipe.overlong == "cut",
        provenance=provenance,
    )
    columns = {
        "source": sample.source,
        "modality": rendered.record["modality"],
        "n_images": len(rendered.images),
        "n_text_tokens": rendered.counts.text,
        "n_tokens": rendered.counts.total,
        "n_target_tokens": rendered.counts.targets,
        "n_turns": len(rendered.record["conversations"]),
        "flags": list(sample.flags),
        **{name: row["record"][name] for name, _ in TEXT_SCORES},
        **asdict(pictures),
    }
    return Ready(encode_record(rendered.record), rendered.images, columns)


def _replay(row: Mapping[str, Any], settings: Settings) -> Ready:
    """A sample of an earlier build: its JSON and images byte for byte."""
    origin = settings.recipe.components[row["component"]].replay or ""
    return _copy(Path(settings.builds[origin]) / SHARDS, row["stored"], origin)


def _copy(shards: Path, stored: Mapping[str, Any], build: str) -> Ready:
    """The sample of a line of an index."""
    path = shards / safe_shard_name(stored["shard"])
    with path.open("rb") as file:
        file.seek(stored["offset"])
        data = file.read(stored["size"])
    if Place.of(0, data).sha256 != stored["sha256"]:
        raise BuildError(f"{path}: sample {stored['key']} is not what its index says; rebuild {build} and try again")
    _, record, images = members_of(data)
    counts = {name: value for name, value in stored.items() if name.startswith("n_")}
    counts |= {name: stored[name] for name, _ in SCORES}
    return Ready(record, images, {"source": stored["source"], "modality": stored["modality"], **counts})


def open_media(
    media: Media, source: str, settings: Settings, max_tiles: int | None
) -> tuple[list[EncodedImage], int | None]:
    """What a source's medium becomes, and the size of its file if that is a picture.

    Raises:
        Reject, ConnectionError, TimeoutError: as `render_row`.
    """
    recipe, data = settings.recipe, fetched(media, source, settings)
    guard = guard_of(recipe.limits.seconds, recipe.limits.memory_mb << 20)
    images = guard.call(render_media, media, data, image_settings(recipe), video_settings(recipe), max_tiles)
    return images, len(data) if media.kind == "image" else None


def fetched(media: Media, source: str, settings: Settings) -> str | bytes:
    """A medium as `MediaStore.fetch` gives it; pictures inside an annotation file lie where the annotations do."""
    embedded = media.roots[0].endswith(".parquet")
    return _media_store((settings.annotation_roots if embedded else settings.media_roots)[source]).fetch(media)


def image_settings(recipe: Recipe) -> ImageSettings:
    """How the recipe wants pictures.

    Raises:
        BuildError: if that is "fast", and this machine would make other pixels than others.
    """
    if recipe.image.mode == "fast" and not resample.available():
        raise BuildError(
            "image.mode fast needs llvmlite and memory that may hold compiled code (systemd: MemoryDenyWriteExecute=no)"
            f" on every machine, and {socket.gethostname()} has not both; mend that, or set image.mode to exact"
        )
    return ImageSettings(**recipe.image.model_dump())


def video_settings(recipe: Recipe) -> VideoSettings:
    """How the recipe wants clips."""
    return VideoSettings(**recipe.video.model_dump())


# One of each for a worker process, which builds many shards.


@cache
def _tokenizer(file: str) -> ChatTokenizer:
    return ChatTokenizer(Path(file))


@cache
def _media_store(url: str) -> MediaStore:
    return MediaStore(Root(url))


@cache
def guard_of(seconds: float, memory: int) -> Guard:
    """This process's guard with these limits."""
    return Guard(seconds, memory)
