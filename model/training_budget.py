"""What training takes of each process's memory. Arithmetic only; no tensor is made.

What is held between steps is exact up to a few rows that do not divide evenly. What a step needs besides is counted
from the tensors that autograd keeps and that the backward pass makes, in bytes per token of each half of a layer.
`benchmarks/training_memory.py` compares both with what is alive; on a GPU neither has been measured.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass

from model.budget import Shape, parameters
from model.stage import Part

_BF16, _FP32 = 2, 4


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that one process holds all the time.

    Attributes:
        trained: float32 weights that learn.
        gradients: of those, from the backward pass to the step.
        optimiser: both moments of AdamW.
        frozen: weights that do not learn.
    """

    trained: int
    gradients: int
    optimiser: int
    frozen: int

    @property
    def total(self) -> int:
        """Of all."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters that are spread over processes and that are whole in each, learning and frozen."""

    spread: int
    spread_frozen: int
    whole: int
    whole_frozen: int


def counts(shape: Shape, trainable: Collection[Part]) -> Counts:
    """Counts parameters by what becomes of them in training."""
    count = parameters(shape)
    projector = shape.vision_width * shape.hidden + shape.hidden**2 + 2 * shape.hidden
    parts: dict[Part, int] = {
        "vision": count.vision - projector,
        "projector": projector,
        "llm": count.text - count.kept_wide,
    }
    learns = "llm" in trainable
    return Counts(
        spread=sum(n for part, n in parts.items() if part in trainable),
        spread_frozen=sum(n for part, n in parts.items() if part not in trainable),
        whole=count.kept_wide if learns else 0,
        whole_frozen=0 if learns else count.kept_wide,
    )


def held(shape: Shape, trainable: Collection[Part], processes: int, frozen_bytes: int = _BF16) -> Held:
    """What each process holds all the time.

    Args:
        shape: of the model.
        trainable: parts that learn.
        processes: that share it.
        frozen_bytes: of a frozen weight; 2 if the checkpoint is bfloat16. A and D are in float32 always.
    """
    c = counts(shape, trainable)
    learning = -(-c.spread // processes) + c.whole
    return Held(
        trained=_FP32 * learning,
        gradients=_FP32 * learning,
        optimiser=2 * _FP32 * learning,
        frozen=frozen_bytes * -(-c.spread_frozen // processes) + _FP32 * c.whole_frozen,
    )


@dataclass(frozen=True, slots=True)
class Half:
    """Half a layer, a norm and a mixer of positions or of channels, in bytes per token, bf16.

    Attributes:
        kept: by autograd, from the forward pass to the backward pass.
        fullest: at the fullest moment of its backward pass, with what was kept.
    """

    kept: int
    fullest: int


NORM = 8
"""Bytes of a number that goes into a norm: itself in float32, and what it becomes in bf16."""
_THROUGH_NORM = 28  # in a norm's backward pass: half a dozen tensors in float32
_TILE = 512  # of `model.ops.scan_triton`: a state is kept for each


def halves(shape: Shape) -> dict[str, Half]:
    """What the kinds of halves take that a model has: `mamba`, `attention`, `dense`, `experts`.

    Experts are taken to be used alike; packed samples are kept apart.
    """
    s = shape
    norm = NORM * s.hidden
    found: dict[str, Half] = {}
    if s.mamba:
        # both halves of the input projection; the convolution's input, and its result before and after SiLU; step
        # sizes before softplus and, with time last, after; the scan's result, the gate, their product
        channel = 2 * _BF16 + 3 * _BF16 + 2 * _FP32 + 3 * _BF16
        kept = norm + s.channels * channel + NORM * (s.rank + 2 * s.state)
        kept += _FP32 * s.channels * s.state // _TILE
        found["mamba"] = Half(kept, kept + 4 * s.hidden + 9 * s.channels)
    if s.attention:
        kept = norm + 3 * _BF16 * s.hidden + 2 * _BF16 * s.kv + _FP32 * s.heads
        found["attention"] = Half(kept, max(kept + 2 * s.hidden + 4 * s.kv, _THROUGH_NORM * s.hidden))
    if s.moe < s.layers:
        kept = norm + 4 * _BF16 * s.intermediate
        found["dense"] = Half(kept, max(kept + 4 * s.hidden + 4 * s.intermediate, _THROUGH_NORM * s.hidden))
    if s.moe:
        routed = 12 * s.experts + 40 * s.chosen  # probabilities, and where each token goes
        kept = norm + s.chosen * (2 * _BF16 * s.hidden + 4 * _BF16 * s.intermediate) + routed
        fullest = kept + 4 * s.hidden + 4 * s.chosen * s.hidden
        found["experts"] = Half(kept, max(fullest, _THROUGH_NORM * s.hidden))
    return found


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a sequence's images take, in bytes of each.

    Attributes:
        kept: from the forward pass to the backward pass.
        fullest: in the tower, forward or backward, with what is kept.
    """

    kept: int
    fullest: int


def pictures(shape: Shape, trainable: Collection[Part], activation_checkpointing: bool) -> Pictures:
    """The tower encodes all images of a sequence at once; one that does not learn keeps nothing."""
    s, w, i = shape, shape.vision_width, shape.vision_intermediate
    patches, layers = s.patches + 1, s.vision_layers - 1
    pixels = 3 * s.patch**2
    fullest = patches * max(2 * _FP32 * pixels, 4 * w + 3 * _BF16 * i)  # forward
    kept = s.image_tokens * (_BF16 * w + 3 * _BF16 * s.hidden) if {"projector", "llm"} & set(trainable) else 0
    if "vision" in trainable:
        kept += patches * (_BF16 * pixels + 2 * _BF16 * w)
        kept += patches * layers * (_BF16 * w if activation_checkpointing else 16 * w + 6 * i)
        again = 19 * w + 10 * i if activation_checkpointing else 3 * w + 4 * i
        fullest = max(fullest, kept + patches * again)
    return Pictures(kept, fullest)


def working(
    shape: Shape,
    trainable: Collection[Part],
    sequence_length: int,
    activation_checkpointing: bool,
    images: int | None = None,
) -> dict[str, int]:
    """What a step needs besides, in bf16, by what it is for: counted, for even use of experts, and rounded up.

    While a layer goes back, the one before it is gathered, and the gradients of the one behind it are on their way in
    float32. With `model.sharding.checkpoint_activations` each layer keeps what goes in, and its mixer of positions is
    computed once more when the channels are through. Frozen layers keep less than is said here without checkpoints.

    Args:
        images: of a sequence; as many as it has room for if None.
    """
    s = shape
    learns = "llm" in trainable
    most = sequence_length // s.image_tokens if images is None else images
    inputs = sequence_length * s.layers * _BF16 * s.hidden
    if not activation_checkpointing:
        inputs += sequence_length * sum(half.kept * _layers(s)[name] for name, half in halves(s).items())
    image = pictures(s, trainable, activation_checkpointing)
    tower = most * (image.fullest - image.kept) - inputs  # which are not there yet, or no more
    weights = _weights(s)
    root = 2 * s.vocabulary * s.hidden
    return {
        "two layers, gathered": _BF16 * (sum(weights.values()) if len(weights) > 1 else 2 * max(weights.values())),
        "backward pass of a layer": max(tower, *_moments(s, sequence_length, activation_checkpointing, learns)),
        "embeddings and head, gathered": _BF16 * root * (2 if learns else 1),
        "inputs of all layers" if activation_checkpointing else "activations of all layers": inputs,
        "images": most * image.kept,
    }


def _moments(s: Shape, tokens: int, activation_checkpointing: bool, learns: bool) -> Iterator[int]:
    """Activations and gradients while a layer of each kind goes back, and when it is through."""
    half, weights = halves(s), _weights(s)
    positions = max(half[name].fullest for name in ("mamba", "attention") if name in half)
    for name, own in weights.items():
        behind = next((other for kind, other in weights.items() if kind != name), own)
        fullest = half[name].fullest
        inside = max(positions, NORM * s.hidden + fullest) if activation_checkpointing else fullest - half[name].kept
        activations = tokens * (inside + _BF16 * s.hidden)  # the gradient of the result with them
        yield activations + (_BF16 * own + _FP32 * behind if learns else 0)
        yield (_BF16 + _FP32) * own if learns else 0


def _weights(s: Shape) -> dict[str, int]:
    """Parameters of the largest layer with dense channels, and with experts."""
    mixer = max(s.mamba and 3 * s.hidden * s.channels, 2 * s.hidden * (s.hidden + s.kv))
    counts = {"dense": 1, "experts": s.experts}
    return {name: mixer + s.expert * counts[name] for name, layers in _layers(s).items() if layers and name in counts}


def _layers(s: Shape) -> dict[str, int]:
    return {"mamba": s.mamba, "attention": s.attention, "dense": s.layers - s.moe, "experts": s.moe}
