"""Floating-point operations of reading a prompt, by the paper's counting and exactly.

`paper_flops` gives the figures of the paper's table of efficiency: 1.52 T for one image, 0.09 P for 54, 0.22 P for 128.
It counts 4 attention layers as if nothing else were in the model but 24 Mamba layers, half of them with two experts,
and leaves out the third matrix of each feed-forward, all of Mamba's projections, 4 of the 28 Mamba layers, all but 256
of the scan's 8,192 channels, the head and the image side; and it counts looking a word up as a multiplication by the
whole table. `exact_flops` counts two operations for each multiplication of a matrix product that is made.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from model.budget import Shape

_DROPOUT, _NORM, _ACTIVATION, _SOFTMAX = 4, 5, 8, 5
_PAPER_CHANNELS = 256


def paper_flops(shape: Shape, images: int) -> int:
    """Operations for a number of images, nothing else in the prompt, as the paper counts them."""
    h, i, s = shape.hidden, shape.intermediate, images * shape.image_tokens
    feed = 4 * h * i + (_ACTIVATION + 1) * i + (2 + _DROPOUT + _NORM) * h
    scan = _PAPER_CHANNELS * (9 * shape.state + 1)
    attention = 8 * h * h + 4 * h * s + (_SOFTMAX + _DROPOUT + 1) * shape.heads * s + (5 + _DROPOUT) * h + _NORM + feed
    lookup = h * (2 * shape.vocabulary + 2 * (s + 2) + 2 + _NORM + _DROPOUT)
    classifier = h * (2 * h + 1 + _ACTIVATION + 2)
    pairs = 3 * shape.attention  # of Mamba layers, one dense and one with two experts
    per_token = shape.attention * attention + lookup + classifier + pairs * (3 * feed + 2 * scan)
    return s * per_token


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of reading a prompt once.

    Attributes:
        text: of the language model, with the last token's logits.
        vision: of tower (all layers that are run) and projector.
    """

    text: int
    vision: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.text + self.vision


def exact_flops(shape: Shape, tokens: int, images: int = 0) -> Flops:
    """Operations for a prompt of so many tokens, its images' tokens included.

    Args:
        shape: of the model.
        tokens: of the prompt, `images * shape.image_tokens` at least.
        images: how many of them are encoded.

    Raises:
        ValueError: if the images alone are more tokens.
    """
    s = shape
    if tokens < images * s.image_tokens:
        raise ValueError(f"{images} images are {images * s.image_tokens} tokens, more than {tokens}")
    mamba = 2 * s.channels * (3 * s.hidden + (s.rank + 2 * s.state) + s.rank + s.taps) + 9 * s.channels * s.state
    attention = 4 * s.hidden * (s.hidden + s.kv)
    feed = 2 * s.expert
    per_token = (
        s.mamba * mamba
        + s.attention * attention
        + (s.layers - s.moe) * feed
        + s.moe * (s.chosen * feed + 2 * s.hidden * s.experts)
    )
    pairs = tokens * (tokens + 1) // 2  # of a query and a key that it sees
    text = tokens * per_token + s.attention * 4 * s.hidden * pairs + 2 * s.hidden * s.vocabulary
    return Flops(text, images * _image(s))


def training_flops(
    shape: Shape,
    lengths: Sequence[int],
    images: int,
    targets: int,
    trainable: Collection[Literal["vision", "projector", "llm"]],
) -> int:
    """Operations of learning from samples once: a forward pass and what of a backward pass is needed.

    A matrix that is trained costs as much again for its gradient, one through which gradients pass as much again for
    those; computing a layer's activations a second time is not counted.

    Args:
        shape: of the model.
        lengths: tokens of each sample that is kept apart from the others.
        images: of all samples.
        targets: tokens that have a loss.
        trainable: parts that learn.
    """
    head = 2 * shape.hidden * shape.vocabulary
    text = sum(exact_flops(shape, length).text - head for length in lengths) + targets * head
    projector = _projector(shape) * images
    tower = _image(shape) * images - projector
    learns = {part: part in trainable for part in ("vision", "projector", "llm")}
    through_projector = learns["vision"]
    through_text = learns["vision"] or learns["projector"]  # in a text layer gradients pass on to the one below anyway
    return (
        text * (1 + max(through_text, learns["llm"]) + learns["llm"])
        + projector * (1 + through_projector + learns["projector"])
        + tower * (1 + 2 * learns["vision"])
    )


def _image(s: Shape) -> int:
    positions, w = s.patches + 1, s.vision_width
    layer = positions * (8 * w * w + 4 * w * s.vision_intermediate + 4 * w * positions)
    return s.patches * 2 * 3 * s.patch**2 * w + (s.vision_layers - 1) * layer + _projector(s)


def _projector(s: Shape) -> int:
    return s.image_tokens * 2 * s.hidden * (s.vision_width + s.hidden)
