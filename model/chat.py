"""Talking to a model: questions with pictures and clips in, text out as it comes.

Prompts go through `model.processor`, so that what is asked has the form of the training data, and a question cannot
spell the protocol's tokens.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import Reject, UsageError
from model.generate import Memory, Settings, ends
from model.longllava import LongLlavaForConditionalGeneration
from model.processor import Message, Processor

MAX_TILES = 16
"""Tiles that a patched picture is cut into, at most: as many as the recipes' sub-images."""


@dataclass(frozen=True, slots=True)
class Media:
    """What a question shows.

    Attributes:
        images: files of pictures, in the order in which the question's `<image>` stand.
        videos: files of clips, likewise for `<video>`.
        patched: whether pictures are cut into tiles besides.
        fps, max_frames: how many frames of a clip are taken; the processor's settings by default.
    """

    images: Sequence[Path] = ()
    videos: Sequence[Path] = ()
    patched: bool = False
    fps: float | None = None
    max_frames: int | None = None

    def __bool__(self) -> bool:
        return bool(self.images or self.videos)


def question(prompt: str, media: Media | None = None) -> Message:
    """A user's message.

    `<image>` and `<video>` in the prompt say where media stand; a kind that the prompt does not name comes in front,
    images first, each followed by a newline, as in the training data.

    Raises:
        UsageError: if the prompt names more or fewer of a kind than are given, or a file is not there.
    """
    media = media or Media()
    if absent := [str(file) for file in (*media.images, *media.videos) if not Path(file).is_file()]:
        raise UsageError(f"{', '.join(absent)}: no such file")
    options = {name: getattr(media, name) for name in ("fps", "max_frames") if getattr(media, name) is not None}
    tiles = {"max_tiles": MAX_TILES} if media.patched else {}
    given: dict[str, list[dict[str, Any]]] = {
        "image": [{"type": "image", "image": file, **tiles} for file in media.images],
        "video": [{"type": "video", "video": file, **options} for file in media.videos],
    }
    parts: list[dict[str, Any]] = []
    for kind, files in given.items():
        named = prompt.count(f"<{kind}>")
        if named not in (0, len(files)):
            raise UsageError(
                f"the prompt has {named} <{kind}>, but {len(files)} of --{kind} are given; give as many, or leave"
                f" <{kind}> out of the prompt to put them in front (for the word itself write < {kind}>)"
            )
        if not named:
            parts += [part for file in files for part in (file, _text("\n"))]
            files.clear()
    for piece in re.split(r"(<image>|<video>)", prompt):
        if piece in ("<image>", "<video>"):
            parts.append(given[piece[1:-1]].pop(0))
        elif piece:
            parts.append(_text(piece))
    return {"role": "user", "content": parts}


def _text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said.

    Attributes:
        text: it.
        tokens: how many were written, the end of the text included if it came.
        ended: whether the model ended its answer, or was cut off at `max_new_tokens`.
        prompt_tokens: of the talk so far, without the answer; `read_tokens` of them had to be read for this answer.
        images: pictures, tiles and frames in the talk so far.
    """

    text: str
    tokens: int
    ended: bool
    prompt_tokens: int
    read_tokens: int
    images: int


class Chat:
    """One talk with one model.

    Args:
        model: in evaluation mode.
        processor: that fits it.
        settings: how answers are written.
        system: what is said before the talk.

    Attributes:
        messages: the talk so far.
    """

    def __init__(
        self,
        model: LongLlavaForConditionalGeneration,
        processor: Processor,
        settings: Settings | None = None,
        system: str = "",
    ) -> None:
        self.model, self.processor = model, processor
        self.settings = settings or Settings()
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets the talk."""
        self.messages: list[Message] = list(self._opening)
        self._memory = Memory(self.model)

    def ask(self, message: Message, on_text: Callable[[str], None] | None = None) -> Answer:
        """Asks, and waits for the whole answer; a question that cannot be read leaves the talk as it was.

        Args:
            message: of the user, from `question`.
            on_text: called with each piece of the answer as soon as it is sure.

        Raises:
            UsageError: if a picture or clip cannot be read.
        """
        try:
            inputs = self.processor([*self.messages, message])
        except Reject as error:
            raise UsageError(f"{error}{_REMEDIES.get(error.reason, '')}") from error
        stream = _Stream(self.processor, on_text)
        written, read = self._memory.generate(inputs.input_ids, inputs.pixel_values, self.settings, on_token=stream.add)
        stream.finish()
        text = self.processor.decode(written.tokens)
        self.messages = [*self.messages, message, {"role": "assistant", "content": text}]
        return Answer(
            text=text,
            tokens=len(written.tokens),
            ended=int(written.tokens[-1]) in ends(self.model, self.settings),
            prompt_tokens=inputs.input_ids.shape[1],
            read_tokens=read,
            images=0 if inputs.pixel_values is None else len(inputs.pixel_values),
        )


_REMEDIES = {
    "unknown-format": "; pictures can be JPEG, PNG, GIF, WebP, BMP or TIFF, clips what FFmpeg reads (--video)",
    "broken-image": "; the file is damaged: fetch it again",
    "broken-video": "; the file is damaged: fetch it again",
    "too-large": "; scale it down",
}


class _Stream:
    """Text from tokens: what a later token can no longer change is passed on at once."""

    def __init__(self, processor: Processor, on_text: Callable[[str], None] | None) -> None:
        self._processor, self._on_text = processor, on_text
        self._ids: list[int] = []
        self._start = self._sure = 0  # tokens that are passed on end at `_sure`; those from `_start` are their context

    def add(self, token: int) -> None:
        self._ids.append(token)
        if self._on_text:
            self._pass_on(whole=False)

    def finish(self) -> None:
        if self._on_text:
            self._pass_on(whole=True)

    def _pass_on(self, *, whole: bool) -> None:
        """Bytes of one character can lie in several tokens; until all are there they are decoded as U+FFFD."""
        before = self._processor.decode(self._ids[self._start : self._sure])
        text = self._processor.decode(self._ids[self._start :])
        if len(text) > len(before) and (whole or not text.endswith("\ufffd")):
            assert self._on_text is not None
            self._on_text(text[len(before) :])
            self._start, self._sure = self._sure, len(self._ids)
