"""Is each sample what the contract says: its JSON, its turns, its images?"""

import io
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from PIL import Image as Pillow
from pydantic import ConfigDict, Field, ValidationError

from validators.findings import Check, Finding, error
from validators.manifest import Block, Count
from validators.shards import Stored

SIDE = 336
"""Width and height of every stored image, in pixels."""

Name = Annotated[str, Field(min_length=1)]
Pixels = Annotated[int, Field(ge=1)]
ImageRole = Literal["image", "main", "tile", "frame"]


class Turn(Block):
    """One message, in protocol text."""

    role: Literal["human", "gpt", "system"] = Field(alias="from")
    value: str


class Image(Block):
    """One image member.

    Attributes:
        source_size: (width, height) of the picture or clip that it was made of.
        tile: (row, column) in the grid of the main image before it.
        time: of a frame in its clip, in seconds.
    """

    file: str
    role: ImageRole
    width: int
    height: int
    source_size: tuple[Pixels, Pixels]
    tile: tuple[Count, Count] | None = None
    time: float | None = None


class Provenance(Block):
    """Where the record stands in its upstream set."""

    model_config = ConfigDict(extra="allow")

    file: str
    ordinal: Count


class Record(Block):
    """The JSON member of a sample."""

    id: Name
    source: Name
    component: Name
    modality: Literal["text", "image", "multi_image", "video", "subimage"]
    conversations: list[Turn]
    images: list[Image]
    escaped: Count
    cut: dict[str, list[Count]] | None = None
    provenance: Provenance


def read(sample: Stored) -> Check[Record | None]:
    """Reads a sample's JSON; None if it cannot be understood."""
    content = dict(sample.parts).get("json")
    if content is None:
        yield error("sample-json", "there is no JSON member", file=sample.file, key=sample.key)
        return None
    try:
        return Record.model_validate_json(content)
    except ValidationError as problems:
        shown = [f"{'.'.join(map(str, p['loc'])) or 'all'}: {p['msg']}" for p in problems.errors(include_url=False)]
        yield error("sample-json", "; ".join(shown[:8]), file=sample.file, key=sample.key)
        return None


def check(record: Record, sample: Stored, *, deep: bool) -> Iterator[Finding]:
    """Checks turns and images.

    Args:
        record: the sample's JSON.
        sample: its bytes.
        deep: decode every image, rather than read its header only.
    """
    faults = [*_turns(record.conversations), *_modality(record), *_images(record, dict(sample.parts), deep)]
    for code, detail in faults:
        yield error(code, detail, file=sample.file, key=sample.key)


Fault = tuple[str, str]
"""A code and a detail."""


def _turns(turns: list[Turn]) -> Iterator[Fault]:
    roles = [turn.role for turn in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["human", "gpt"] * (len(dialogue) // 2):
        yield "sample-roles", f"turns are {', '.join(roles) or 'none'}"
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and not turn.value.strip():
            yield "sample-empty-answer", f"turn {number} is empty"


def _modality(record: Record) -> Iterator[Fault]:
    roles = Counter(image.role for image in record.images)
    fits = {
        "text": not roles,
        "image": roles == {"image": 1},
        "multi_image": roles.keys() == {"image"} and roles["image"] > 1,
        "video": roles["frame"] > 0 and not roles["main"] and not roles["tile"],
        "subimage": roles["main"] > 0 and not roles["frame"],
    }
    if not fits[record.modality]:
        shown = ", ".join(f"{count} {role}" for role, count in roles.items()) or "none"
        yield "sample-modality", f"modality is {record.modality}, images are: {shown}"


def _images(record: Record, parts: dict[str, bytes], deep: bool) -> Iterator[Fault]:
    members = [part for part in parts if part != "json"]
    if len(members) != len(record.images):
        yield "image-count", f"{len(members)} image members; the JSON lists {len(record.images)}"
    for number, image in enumerate(record.images):
        if image.file != f"{number:04d}.jpg":
            yield "image-file", f"image {number} is called {image.file!r}"
        if (image.width, image.height) != (SIDE, SIDE):
            yield "image-size", f"image {number} is {image.width} x {image.height} in the JSON"
    for name in members:
        yield from _jpeg(name, parts[name], deep)


def _jpeg(name: str, data: bytes, deep: bool) -> Iterator[Fault]:
    header = _frame_header(data)
    if header is None:
        yield "image-undecodable", f"{name} is no JPEG"
    elif header != (SIDE, SIDE, 3):
        yield "image-size", f"{name} has (width, height, channels) {header}"
    elif not data.endswith(b"\xff\xd9"):
        yield "image-undecodable", f"{name} has no end-of-image marker"
    elif deep and (problem := _decoding_problem(data)):
        yield "image-undecodable", f"{name}: {problem}"


def _frame_header(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, channels) from a JPEG's start-of-frame segment (ITU-T T.81, B.2.2); None if there is none.

    A hundred times faster than opening the image.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            return width, height, data[at + 9]
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _decoding_problem(data: bytes) -> str | None:
    """Why an image cannot be decoded to RGB; None if it can."""
    try:
        with Pillow.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
            return None if image.mode == "RGB" else f"mode is {image.mode}"
    except Exception as problem:  # Pillow raises many kinds, and other libraries' too
        return f"{type(problem).__name__}: {problem}"
