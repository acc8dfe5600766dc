"""What training takes of each process's memory. Arithmetic only; no tensor is made.

What is held between steps is exact up to a few rows that do not divide evenly (`benchmarks/training_memory.py` compares
it with what a sharded model has). What a layer needs while it computes is an estimate from the tensors that the code
holds at its fullest moment, and is said to be one; it has not been measured on a GPU.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass

from model.budget import Shape, chunk_bytes_per_token, parameters
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


def working(
    shape: Shape, trainable: Collection[Part], sequence_length: int, activation_checkpointing: bool
) -> dict[str, int]:
    """What a step needs besides, in bf16: estimates, by what they are for."""
    s = shape
    mixer = max(s.mamba and 3 * s.hidden * s.channels, 2 * s.hidden * (s.hidden + s.kv))
    largest = mixer + s.expert * (s.experts if s.moe else 1)
    root = 2 * s.vocabulary * s.hidden
    learns = "llm" in trainable
    token = chunk_bytes_per_token(s)
    inside = 2 * sequence_length * token  # activations, and gradients of about as many
    gradients = (_BF16 * largest, (_BF16 + _FP32) * largest) if learns else (0, 0)
    kept = _BF16 * s.hidden if activation_checkpointing else token
    return {
        "largest layer, gathered": _BF16 * largest,
        "its backward pass": max(inside + gradients[0], gradients[1]),  # float32 gradients come when it is through
        "embeddings and head, gathered": _BF16 * root * (2 if learns else 1),
        "inputs of all layers" if activation_checkpointing else "activations of all layers": s.layers
        * sequence_length
        * kept,
    }
