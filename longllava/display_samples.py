"""Samples and rejects in the terminal; nothing that stands in them can steer it."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image
from rich.columns import Columns
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from formats.tokens import IGNORED, ChatTokenizer
from longllava.commands.terminal import printable
from pipelines.opened import Stored

_MARKUP = re.compile(r"</?(?:image|img|vid)>|<t>")
_MOST_IMAGES = 8
_BLOCK_COLUMNS = 28


def protocol_text(value: str) -> Text:
    """Protocol text with its control strings coloured."""
    text = Text(printable(value))
    text.highlight_regex(_MARKUP, "cyan")
    return text


def show_sample(
    sample: Stored, console: Console, *, tokenizer: ChatTokenizer | None = None, pictures: bool = False
) -> None:
    """One sample: where it is from, its turns, its images.

    Args:
        sample, console: what to print, and where.
        tokenizer: to print its tokens too, those that are trained on in green.
        pictures: draw small pictures with coloured blocks.
    """
    row, record = sample.row, sample.record
    console.rule(Text(printable(f"{row['key']}  {row['component']}  {row['modality']}")), align="left", style="bold")
    tokens = f"{row['n_tokens']:,} tokens, {row['n_target_tokens']:,} trained on, {row['n_images']} images"
    console.print(Text(printable(f"{row['id']}  ({tokens})"), "dim"))
    for turn in record["conversations"]:
        answer = turn["from"] == "gpt"
        heading = f"{turn['from']}, trained on:" if answer else f"{turn['from']}:"
        console.print(Text(printable(heading), "bold green" if answer else "bold blue"))
        console.print(_shortened(protocol_text(turn["value"])))
    if pictures and sample.images:
        console.print(Columns([blocks(jpeg) for jpeg in sample.images[:_MOST_IMAGES]], padding=(0, 2)))
    for image in record["images"]:
        console.print(Text(printable(f"  {_described(image)}"), "dim"))
    for name, value in record["provenance"].items():
        if value not in (None, [], {}):
            console.print(Text(printable(f"  {name}: {value}"), "dim"))
    if tokenizer is not None:
        console.print(_shortened(token_text(record["conversations"], tokenizer)))


def _described(image: Mapping[str, Any]) -> str:
    size = "x".join(map(str, image["source_size"]))
    where = f" {image['tile']}" if "tile" in image else ""
    when = f" at {image['time']} s" if "time" in image else ""
    return f"{image['file']} {image['role']}{where}{when}, from {size}"


def blocks(jpeg: bytes, columns: int = _BLOCK_COLUMNS) -> Text:
    """A picture as coloured half blocks, two rows of pixels a line."""
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            pixels = np.asarray(image.convert("RGB").resize((columns, columns)))
    except (OSError, ValueError):
        return Text("(no picture)", "red")
    text = Text(no_wrap=True)
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=_colour(above), bgcolor=_colour(below)))
        text.append("\n")
    return text


def _colour(rgb: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def token_text(conversations: Sequence[Mapping[str, str]], tokenizer: ChatTokenizer) -> Text:
    """Every token between bars, an image's as one; what is trained on in green."""
    text = Text()
    for ids, trained in token_runs(conversations, tokenizer):
        piece = tokenizer.piece(ids[0]) + (f" ×{len(ids)}" if len(ids) > 1 else "")
        text.append(printable(piece), "green" if trained else "dim")
        text.append("|", "dim")
    return text


def token_runs(
    conversations: Sequence[Mapping[str, str]], tokenizer: ChatTokenizer
) -> Iterator[tuple[list[int], bool]]:
    """Tokens and whether they are trained on; repetitions of the image token together."""
    encoded = tokenizer.encode(conversations)
    pairs = zip(encoded.ids.tolist(), (encoded.labels != IGNORED).tolist(), strict=True)
    for (token, trained), run in groupby(pairs):
        ids = [token for token, _ in run]
        if token == tokenizer.image_token_id:
            yield ids, trained
        else:
            yield from (([token], trained) for token in ids)


def _shortened(text: Text, limit: int = 4_000) -> Text:
    if len(text) <= limit:
        return text
    gap = (f"\n... {len(text) - limit:,} characters ...\n", "dim")
    return Text.assemble(text[: limit // 2], gap, text[-limit // 2 :])


def rejects_table(rejects: Sequence[Mapping[str, Any]]) -> Table:
    """Records that were drawn and not written."""
    table = Table(title=f"{len(rejects):,} rejects", title_justify="left")
    for name in ("record", "component", "reason", "detail", "replaced by"):
        table.add_column(name, overflow="fold")
    for reject in rejects:
        values = (reject[key] or "" for key in ("uid", "component", "reason", "detail", "replaced_by"))
        table.add_row(*(Text(printable(value)) for value in values))
    return table
