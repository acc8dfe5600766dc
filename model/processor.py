"""From messages with pictures and clips to what the model reads, by the same path as the training data.

Pictures go through `formats.imaging` and come back as a shard would hold them, text through `formats.protocol`, and
both through the chat template of `formats.tokens`: what the model is asked looks like what it was trained on.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from formats.errors import Reject, UsageError
from formats.imaging import EncodedImage, ImageSettings, patched, picture
from formats.protocol import Clip, Part, Patched, Picture, Visual, render
from formats.tokens import ChatTokenizer
from formats.video import VideoSettings, frames
from model.config import LongLlavaConfig

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text or a list of parts}. A part is {"type": "text", "text": …},
{"type": "image", "image": path or bytes} (with "max_tiles": N it is cut into at most N tiles besides), or
{"type": "video", "video": path or bytes} (with "fps" and "max_frames", if others than usual)."""

_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `LongLlavaForConditionalGeneration.generate` and `forward` take.

    Attributes:
        input_ids: int64 [1, length].
        pixel_values: uint8 [images, 3, 336, 336], or None.
        labels: int64 [1, length], for training on the answers; None for a prompt.
    """

    input_ids: Tensor
    pixel_values: Tensor | None
    labels: Tensor | None

    def as_dict(self) -> dict[str, Tensor]:
        """What there is, by name: `model(**inputs.as_dict())`."""
        named = {"input_ids": self.input_ids, "pixel_values": self.pixel_values, "labels": self.labels}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Processor:
    """Turns messages into inputs.

    Attributes:
        tokenizer: Jamba's, or the demo's.
        tokens_per_image: the model's `image_seq_length`.
        images, video: how media are read.
    """

    tokenizer: ChatTokenizer
    tokens_per_image: int = 144
    images: ImageSettings = field(default_factory=ImageSettings)
    video: VideoSettings = field(default_factory=VideoSettings)

    @classmethod
    def of(cls, config: LongLlavaConfig, tokenizer: ChatTokenizer) -> "Processor":
        """The processor that fits a model.

        Raises:
            UsageError: if tokenizer and model mean different tokens by an image, or the vocabulary is too small.
        """
        text = config.text_config
        if tokenizer.image_token_id != config.image_token_id:
            raise UsageError(
                f"{tokenizer.file}: an image is token {tokenizer.image_token_id}, but the model's config.json says"
                f" image_token_id {config.image_token_id}; model and tokenizer do not belong together"
            )
        if tokenizer.vocabulary_size > text.vocab_size:
            raise UsageError(
                f"{tokenizer.file} has {tokenizer.vocabulary_size:,} tokens, the model {text.vocab_size:,};"
                " they do not belong together"
            )
        return cls(tokenizer, config.image_seq_length)

    def __call__(self, messages: Sequence[Message]) -> Inputs:
        """Reads media and writes ids.

        Messages that end with the user's become a prompt for an answer; such that end with the assistant's get labels.

        Raises:
            UsageError: if a message is not of the form that `Message` says.
            Reject: if a picture or clip cannot be read.
        """
        stored: list[EncodedImage] = []
        conversation = [self._turn(i, message, stored) for i, message in enumerate(messages)]
        if not conversation:
            raise UsageError("messages: there are none")
        prompt = conversation[-1]["from"] != "gpt"
        if prompt:
            conversation.append({"from": "gpt", "value": ""})
        encoded = self.tokenizer.encode(conversation, self.tokens_per_image)
        kept = slice(0, -1 if prompt else None)  # a prompt ends where the answer's first token would be
        ids, labels = (torch.from_numpy(x[kept].astype(np.int64))[None] for x in (encoded.ids, encoded.labels))
        pixels = torch.from_numpy(np.stack([_pixels(image) for image in stored])) if stored else None
        return Inputs(ids, pixels, None if prompt else labels)

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """The text of what was generated."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        return self.tokenizer.decode(ids)

    def _turn(self, number: int, message: Message, stored: list[EncodedImage]) -> dict[str, str]:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise UsageError(f"messages[{number}]: role is {role!r}; it can be {', '.join(_ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise UsageError(f"messages[{number}]: content is neither text nor a list of parts")
        where = f"messages[{number}].content"
        parts = [part for i, given in enumerate(content) for part in self._parts(f"{where}[{i}]", given, stored)]
        return {"from": _ROLES[str(role)], "value": render(parts)}

    def _parts(self, where: str, part: Mapping[str, Any], stored: list[EncodedImage]) -> Iterator[Part]:
        kind = part.get("type")
        if kind not in ("text", "image", "video") or not isinstance(part.get(kind), str | bytes | Path):
            raise UsageError(f"{where}: not a text, image or video part: {dict(part)!r:.200}")
        if kind == "text":
            yield self.tokenizer.escaper(str(part["text"]))[0]
            return
        group = self._images(where, part)
        stored += group
        yield _visual(group, kind)

    def _images(self, where: str, part: Mapping[str, Any]) -> list[EncodedImage]:
        try:
            return self._read(where, part)
        except Reject as error:
            file = part[part["type"]]
            raise Reject(error.reason, f"{where if isinstance(file, bytes) else file}: {error.detail}") from error

    def _read(self, where: str, part: Mapping[str, Any]) -> list[EncodedImage]:
        if part["type"] == "video":
            given = {name: part[name] for name in ("fps", "max_frames") if name in part}
            source = part["video"] if isinstance(part["video"], bytes) else str(part["video"])
            settings = replace(self.video, **given)
            return frames(source, settings, self.images)
        try:
            data = part["image"] if isinstance(part["image"], bytes) else Path(part["image"]).read_bytes()
        except OSError as error:
            raise UsageError(f"{where}: {part['image']}: {error.strerror}") from error
        tiles = part.get("max_tiles")
        return patched(data, self.images, int(tiles)) if tiles else picture(data, self.images)


def _visual(group: Sequence[EncodedImage], kind: str) -> Visual:
    if kind == "video":
        return Clip(len(group))
    if last := group[-1].tile:
        return Patched(last[0] + 1, last[1] + 1)
    return Picture()


def _pixels(image: EncodedImage) -> np.ndarray:
    """uint8 [3, 336, 336]."""
    with Image.open(io.BytesIO(image.jpeg)) as opened:
        return np.asarray(opened.convert("RGB")).transpose(2, 0, 1)
