"""A few samples of a build, drawn by seed, in a form that a page can show: text, protocol tokens, pictures as drawn.

Pictures are made smaller for the page and its size is kept within a budget; `longllava show … --extract` gives the
bytes that the model reads.
"""

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from formats.errors import ProtocolError
from formats.protocol import CONTROL, Clip, Part, Patched, Picture, parse, roles_of
from pipelines.opened import OpenBuild, Stored

_SIDES = {"image": 224, "main": 224, "frame": 128, "tile": 112}  # pixels on the page, by role
_QUALITY = 80
_MOST_FRAMES = 24
_MOST_TILES = 36
_HEAD, _TAIL = 1_500, 500  # characters of a long text that are shown
_PER_COMPONENT = 12
_ROOMS = ((48, 40), (12, 20), (2, 4))  # images and turns of one sample that are shown, if they fit; else fewer


@dataclass(frozen=True, slots=True)
class Shown:
    """One image on the page.

    Attributes:
        src: a data URI.
        label: what a screen reader says of it.
        caption: time of a frame, size of a picture before resizing.
    """

    src: str
    label: str
    caption: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a turn.

    Attributes:
        kind: plain text, a control string, the characters left out of a long text, or images: one picture,
            a clip's frames, or a whole picture with its tiles.
        text: of "text", "token" and "gap".
        images: of the others, in order; the whole picture first.
        columns: of a grid's tiles.
        note: what is not shown.
    """

    kind: Literal["text", "token", "gap", "picture", "clip", "grid"]
    text: str = ""
    images: tuple[Shown, ...] = ()
    columns: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Shot:
    """A turn: who speaks, whether it is trained on, and what it says."""

    role: str
    trained: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A sample on the page; `row` is its line of the index."""

    row: Mapping[str, Any]
    turns: tuple[Shot, ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """Bytes of its pictures and texts on a page."""
        pieces = [piece for turn in self.turns for piece in turn.pieces]
        pictures = sum(len(image.src) for piece in pieces for image in piece.images)
        texts = (*(piece.text for piece in pieces), *self.facts.values())
        return pictures + sum(len(html.escape(text).encode("utf-8", "replace")) for text in texts)


def drawn_rows(build: OpenBuild, per_component: int) -> dict[str, list[dict[str, Any]]]:
    """Lines of the index: for each component the same few, whoever asks."""
    seed = int(build.manifest["recipe"].get("seed", 0))
    rows = build.rows(
        f"""FROM samples JOIN (
                SELECT key, row_number() OVER (PARTITION BY component ORDER BY md5('{seed}/report/' || key)) AS place
                FROM samples QUALIFY place <= {int(per_component)}
            ) USING (key) ORDER BY component, place"""
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in build.manifest["components"]}
    for row in rows:
        del row["place"]
        found[row["component"]].append(row)
    return found


def draw(build: OpenBuild, budget: int) -> list[Exhibit]:
    """Samples of every component in turn, as many as fit into `budget` bytes.

    The first of each component is in, with fewer of its images and turns if need be.
    """
    rows = {name: mine for name, mine in drawn_rows(build, _PER_COMPONENT).items() if mine}
    found = {name: [_fitting(build.stored(mine[0]), budget // len(rows))] for name, mine in rows.items()}
    spent = sum(exhibit.weight for mine in found.values() for exhibit in mine)
    for place in range(1, _PER_COMPONENT):
        for name, mine in rows.items():
            if place >= len(mine):
                continue
            exhibit = exhibit_of(build.stored(mine[place]))
            if spent + exhibit.weight <= budget:
                spent += exhibit.weight
                found[name].append(exhibit)
    return [exhibit for mine in found.values() for exhibit in mine]


def _fitting(sample: Stored, budget: int) -> Exhibit:
    """A sample with as much of it as fits, but at least a little."""
    exhibits = (exhibit_of(sample, *room) for room in _ROOMS)
    return next((exhibit for exhibit in exhibits if exhibit.weight <= budget), exhibit_of(sample, *_ROOMS[-1]))


def exhibit_of(sample: Stored, images: int = _ROOMS[0][0], turns: int = _ROOMS[0][1]) -> Exhibit:
    """A stored sample as a page shows it, with at most so many images and turns."""
    return Exhibit(sample.row, tuple(_turns(sample, images, turns)), _facts(sample))


def _facts(sample: Stored) -> dict[str, str]:
    """Where it comes from and what was done to it."""
    record = sample.record
    facts = {str(name): _said(value) for name, value in record["provenance"].items() if value not in (None, [], {})}
    if record.get("escaped"):
        facts["escaped control strings"] = str(record["escaped"])
    for what, (before, after) in record.get("cut", {}).items():
        facts[f"{what} cut"] = f"{after} of {before} kept"
    return facts


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        said = ", ".join(f"{name} {_said(inner)}" for name, inner in value.items())
    else:
        said = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return said if len(said) <= _HEAD else said[:_HEAD] + " …"


_Images = Sequence[tuple[Mapping[str, Any], bytes]]


@dataclass(slots=True)
class _Room:
    """How many more images of a sample can be shown."""

    left: int

    def take(self, images: _Images, most: int) -> _Images:
        """As many as may be shown, evenly spread."""
        shown = _evenly(images, min(most, self.left))
        self.left -= len(shown)
        return shown


def _turns(sample: Stored, images: int, turns: int) -> Iterator[Shot]:
    entries, said = sample.record["images"], sample.record["conversations"]
    room, taken = _Room(images), 0
    for turn in said[:turns]:
        here = turn["value"].count("<image>")
        mine = [*zip(entries[taken : taken + here], sample.images[taken : taken + here], strict=True)]
        taken += here
        yield Shot(turn["from"], turn["from"] == "gpt", tuple(_pieces(turn["value"], mine, room)))
    if len(said) > turns:
        yield Shot("", False, (Piece("gap", f"… {len(said) - turns:,} more turns …"),))


def _pieces(value: str, images: _Images, room: _Room) -> Iterator[Piece]:
    try:
        parts = parse(value, [entry["role"] for entry, _ in images])
    except ProtocolError:  # a damaged build is shown as it is
        parts = [value]
    taken = 0
    for part in parts:
        if isinstance(part, str):
            yield from _text(part)
            continue
        mine = images[taken : taken + len(roles_of(part))]
        taken += len(mine)
        yield from _visual(part, mine, room)


def _text(text: str) -> Iterator[Piece]:
    if len(text) <= _HEAD + _TAIL:
        yield from _tokens_apart(text)
        return
    yield from _tokens_apart(text[:_HEAD])
    yield Piece("gap", f"… {len(text) - _HEAD - _TAIL:,} characters …")
    yield from _tokens_apart(text[-_TAIL:])


_TOKENS = re.compile("(" + "|".join(map(re.escape, CONTROL)) + ")")


def _tokens_apart(text: str) -> Iterator[Piece]:
    for i, piece in enumerate(_TOKENS.split(text)):
        if piece:
            yield Piece("token" if i % 2 else "text", piece)


def _visual(part: Part, images: _Images, room: _Room) -> Iterator[Piece]:
    match part:
        case Picture():
            shown = room.take(images, 1)
            yield Piece("token", "<img>")
            yield Piece("picture", images=_all(shown)) if shown else Piece("gap", "a picture, not shown")
            yield Piece("token", "</img>")
        case Clip(frames):
            shown = room.take(images, _MOST_FRAMES)
            note = f"{len(shown)} of {frames} frames shown" if len(shown) < frames else f"{frames} frames"
            yield Piece("token", "<vid>")
            yield Piece("clip", images=_all(shown), note=note) if shown else Piece("gap", f"{note}, not shown")
            yield Piece("token", "</vid>")
        case Patched(rows, columns):
            fits = rows * columns <= _MOST_TILES and len(images) <= room.left
            shown = room.take(images if fits else images[:1], len(images))
            note = f"the whole, then {rows} × {columns} tiles" + ("" if len(shown) > 1 else " (too many to show)")
            yield Piece("token", "<img>")
            grid = Piece("grid", images=_all(shown), columns=columns, note=note)
            yield grid if shown else Piece("gap", f"{note}, not shown")
            yield Piece("token", "</img>")


def _all(images: _Images) -> tuple[Shown, ...]:
    return tuple(_shown(image) for image in images)


def _evenly(images: _Images, most: int) -> _Images:
    """At most so many, first and last among them."""
    if len(images) <= most or most < 2:
        return images[: max(most, 0)]
    return [images[round(i * (len(images) - 1) / (most - 1))] for i in range(most)]


def _shown(image: tuple[Mapping[str, Any], bytes]) -> Shown:
    entry, jpeg = image
    size = "x".join(map(str, entry["source_size"]))
    match entry["role"]:
        case "frame":
            label, caption = f"frame at {entry['time']:.2f} seconds", f"{entry['time']:.2f} s"
        case "tile":
            row, column = entry["tile"]
            label, caption = f"tile in row {row + 1}, column {column + 1}", ""
        case "main":
            label, caption = f"whole picture, {size} before resizing", size
        case _:
            label, caption = f"picture, {size} before resizing", size
    return Shown(_data_uri(jpeg, _SIDES[entry["role"]]), label, caption)


def _data_uri(jpeg: bytes, side: int) -> str:
    """A smaller copy as a data URI; what cannot be decoded becomes an empty picture."""
    small = io.BytesIO()
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            image.draft("RGB", (side, side))
            image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS).save(small, "JPEG", quality=_QUALITY)
    except (OSError, ValueError):
        return "data:,"
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()
