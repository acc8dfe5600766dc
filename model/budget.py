"""What a model of some shape costs: parameters, bytes, operations. Arithmetic only; no tensor is made.

Bytes of weights, keys and values, and states are exact. What a chunk needs while it is computed is an estimate from the
tensors that the code holds at its fullest moment, and is said to be one.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from formats.errors import UsageError

_CONFIGS = Path(__file__).with_name("configs")
_BF16, _FP32, _INT8 = 2, 4, 1

TEXT_PER_IMAGE = 7
"""Tokens of text that a frame costs besides its image tokens: `</img><t><img>` for Jamba's tokenizer."""

Weights = Literal["bf16", "int8-experts", "int8"]
"""`int8-experts`: only experts in int8; `int8`: the other large matrices of the language model too."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a configuration that costs depend on."""

    hidden: int
    intermediate: int
    layers: int
    attention: int
    moe: int
    heads: int
    kv_heads: int
    experts: int
    chosen: int
    vocabulary: int
    channels: int
    state: int
    taps: int
    rank: int
    context: int
    image_tokens: int
    vision_width: int
    vision_intermediate: int
    vision_layers: int
    patches: int
    patch: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """The shape of a config.json's content."""
        text, vision = config["text_config"], config["vision_config"]
        layers = range(text["num_hidden_layers"])
        period, offset = text["expert_layer_period"], text["expert_layer_offset"]
        return cls(
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=len(layers),
            attention=sum(i % text["attn_layer_period"] == text["attn_layer_offset"] for i in layers),
            moe=sum(i % period == offset for i in layers) if text["num_experts"] > 1 else 0,
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            experts=text["num_experts"],
            chosen=text["num_experts_per_tok"],
            vocabulary=text["vocab_size"],
            channels=text["mamba_expand"] * text["hidden_size"],
            state=text["mamba_d_state"],
            taps=text["mamba_d_conv"],
            rank=text["mamba_dt_rank"],
            context=text["max_position_embeddings"],
            image_tokens=config["image_seq_length"],
            vision_width=vision["hidden_size"],
            vision_intermediate=vision["intermediate_size"],
            vision_layers=vision["num_hidden_layers"],
            patches=(vision["image_size"] // vision["patch_size"]) ** 2,
            patch=vision["patch_size"],
        )

    @classmethod
    def named(cls, name: str) -> "Shape":
        """The shape of one of the project's configurations, or of a folder with a config.json.

        Raises:
            UsageError: if there is none.
        """
        for file in (_CONFIGS / f"{name}.json", Path(name) / "config.json"):
            if file.is_file():
                try:
                    return cls.of(json.loads(file.read_text()))
                except (ValueError, KeyError) as error:
                    raise UsageError(f"{file}: no configuration of this model ({error!r})") from error
        known = ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.json")))
        raise UsageError(f"model {name!r}: neither one of {known} nor a folder with a config.json")

    @property
    def mamba(self) -> int:
        """How many layers are Mamba's."""
        return self.layers - self.attention

    @property
    def kv(self) -> int:
        """Width of an attention layer's keys, and of its values."""
        return self.kv_heads * (self.hidden // self.heads)

    @property
    def expert(self) -> int:
        """Parameters of one feed-forward."""
        return 3 * self.hidden * self.intermediate


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters by what becomes of them.

    Attributes:
        experts: of all experts.
        matrices: large matrices of the language model besides (what `model.int8` quantises).
        kept_wide: A and D, in float32.
        other: embeddings, head, small matrices, norms, biases.
        vision: tower and projector.
    """

    experts: int
    matrices: int
    kept_wide: int
    other: int
    vision: int

    @property
    def text(self) -> int:
        """Of the language model."""
        return self.experts + self.matrices + self.kept_wide + self.other


def parameters(shape: Shape) -> Parameters:
    """Counts parameters, to the last one."""
    s = shape
    per_mamba = 3 * s.hidden * s.channels
    per_attention = 2 * s.hidden * (s.hidden + s.kv)
    small = (
        s.channels * (s.rank + 2 * s.state)  # x_proj
        + s.channels * (s.rank + 1)  # dt_proj
        + s.channels * (s.taps + 1)  # conv1d
        + s.rank
        + 2 * s.state  # norms
    )
    return Parameters(
        experts=s.moe * s.experts * s.expert,
        matrices=s.mamba * per_mamba + s.attention * per_attention + (s.layers - s.moe) * s.expert,
        kept_wide=s.mamba * s.channels * (s.state + 1),
        other=s.mamba * small
        + s.moe * s.experts * s.hidden
        + (2 * s.layers + 1) * s.hidden
        + 2 * s.vocabulary * s.hidden,
        vision=_vision_parameters(s),
    )


def _vision_parameters(s: Shape) -> int:
    w, i = s.vision_width, s.vision_intermediate
    layer = 4 * w * (w + 1) + w * i + i + i * w + w + 4 * w
    embeddings = 3 * s.patch**2 * w + w + (s.patches + 1) * w
    projector = w * s.hidden + s.hidden + s.hidden * s.hidden + s.hidden
    return s.vision_layers * layer + embeddings + 4 * w + projector


# Memory -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a GPU's memory goes when a prompt is read in chunks. All in bytes but the last four.

    Attributes:
        gpu: what there is.
        weights: by kind.
        reserve: set aside for the driver, libraries and fragments.
        state: of all Mamba layers, whatever the length.
        chunk: what one chunk of the prompt needs while it is computed; an estimate.
        images_at_once: what encoding one batch of images needs; an estimate.
        kv_per_token: keys and values.
        tokens: that fit, prompt and answer.
        images: that fit, with the text around each.
        tokens_per_image: with that text.
        images_in_context: that fit into the positions that the base model was made for.
    """

    gpu: int
    weights: dict[str, int]
    reserve: int
    state: int
    chunk: int
    images_at_once: int
    kv_per_token: int
    tokens: int
    images: int
    tokens_per_image: int
    images_in_context: int

    @property
    def fixed(self) -> int:
        """Bytes that are needed before the first token is kept; if they are more than the GPU's, nothing fits."""
        return sum(self.weights.values()) + self.reserve + self.state + self.chunk + self.images_at_once

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"fixed": self.fixed}


def plan_memory(
    shape: Shape,
    gpu: int,
    weights: Weights = "int8",
    *,
    chunk: int = 8192,
    images_at_once: int = 32,
    reserve: int = 2 << 30,
    answer: int = 1024,
) -> Plan:
    """How many tokens and images fit, and why.

    Args:
        shape: of the model.
        gpu: bytes of the GPU's memory.
        weights: how they are held.
        chunk: tokens read at a time.
        images_at_once: images encoded at a time.
        reserve: bytes set aside.
        answer: tokens kept free for question and answer.
    """
    held = weight_bytes(shape, weights)
    state = shape.mamba * shape.channels * (_FP32 * shape.state + _BF16 * (shape.taps - 1))
    scratch = chunk * chunk_bytes_per_token(shape)
    if shape.moe and weights != "bf16":
        scratch += _BF16 * shape.expert  # one expert at a time is made bf16
    vision = images_at_once * (shape.patches + 1) * _BF16 * (6 * shape.vision_width + 2 * shape.vision_intermediate)
    kv = 2 * _BF16 * shape.attention * shape.kv
    free = gpu - sum(held.values()) - reserve - state - scratch - vision
    tokens = max(0, free // kv)
    each = shape.image_tokens + TEXT_PER_IMAGE
    return Plan(
        gpu=gpu,
        weights=held,
        reserve=reserve,
        state=state,
        chunk=scratch,
        images_at_once=vision,
        kv_per_token=kv,
        tokens=tokens,
        images=max(0, (tokens - answer) // each),
        tokens_per_image=each,
        images_in_context=(shape.context - answer) // each,
    )


_GPUS = (16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Sizes that GPUs are sold in, in GB."""


def instead(shape: Shape, gpu: int, weights: Weights, chunk: int) -> dict[str, str | None]:
    """What would hold at least one image, where a GPU with these weights does not.

    Returns:
        "weights": the widest precision that fits into that GPU; "gpu": the smallest size sold that holds these weights;
        each None if there is none.
    """
    lighter = (kind for kind in get_args(Weights) if plan_memory(shape, gpu, kind, chunk=chunk).images)
    larger = (f"{size}GB" for size in _GPUS if plan_memory(shape, size * 10**9, weights, chunk=chunk).images)
    return {"weights": next(lighter, None), "gpu": next(larger, None)}


def weight_bytes(shape: Shape, weights: Weights) -> dict[str, int]:
    """Bytes of weights by kind; int8 matrices have a bf16 scale for each row."""
    count = parameters(shape)
    s = shape
    expert_rows = s.moe * s.experts * (2 * s.intermediate + s.hidden)
    rows = (
        s.mamba * (2 * s.channels + s.hidden)
        + s.attention * (2 * s.hidden + 2 * s.kv)
        + (s.layers - s.moe) * (2 * s.intermediate + s.hidden)
    )
    quantised = {"bf16": (), "int8-experts": ("experts",), "int8": ("experts", "matrices")}[weights]

    def held(kind: str, numbers: int, rows: int) -> int:
        return numbers * _INT8 + rows * _BF16 if kind in quantised else numbers * _BF16

    return {
        "experts": held("experts", count.experts, expert_rows),
        "matrices": held("matrices", count.matrices, rows),
        "A and D": count.kept_wide * _FP32,
        "embeddings, head, norms": count.other * _BF16,
        "vision": count.vision * _BF16,
    }


def chunk_bytes_per_token(shape: Shape) -> int:
    """Bytes that a token of a chunk needs at the fullest moment of a layer; an estimate.

    In a Mamba layer that is the scan: residual and its norm; both halves of the input projection; the convolution's
    result; step sizes before and after softplus in float32; copies of input and step sizes with time last; the result,
    twice. In a layer of experts it is the moment when every token is with one expert: gathered tokens and results,
    that expert's gate and up projections, and their product.
    """
    s = shape
    residual = 2 * s.hidden * _BF16
    scan = s.channels * (2 * _BF16 + _BF16 + 2 * _FP32 + (_BF16 + _FP32) + 2 * _BF16)
    feed = s.intermediate * 4 * _BF16 + (4 * s.chosen * s.hidden * _BF16 if s.moe else 0)
    return residual + max(scan, feed)


_SIZE = re.compile(r"^\s*([0-9.]+)\s*(GB|GiB|MB|MiB)\s*$", re.IGNORECASE)
_UNITS = {"gb": 10**9, "gib": 1 << 30, "mb": 10**6, "mib": 1 << 20}


def parse_size(text: str) -> int:
    """Bytes of "80GB" (80 · 10⁹) or "80GiB" (80 · 2³⁰).

    Raises:
        UsageError: if it is neither.
    """
    found = _SIZE.match(text)
    try:
        return int(float(found[1]) * _UNITS[found[2].lower()]) if found else _no_size(text)
    except ValueError:
        return _no_size(text)


def _no_size(text: str) -> int:
    raise UsageError(f"{text!r} is no size of memory; write 80GB or 79.1GiB")


def report(model: str, gpu: str, weights: str, chunk: int = 8192) -> dict[str, Any]:
    """What `longllava plan-memory` shows.

    Raises:
        UsageError: if an argument cannot be read.
    """
    from model.flops import exact_flops, paper_flops

    if weights not in get_args(Weights):
        raise UsageError(f"--weights {weights}: one of {', '.join(get_args(Weights))}")
    shape = Shape.named(model)
    kind = cast(Weights, weights)
    plan = plan_memory(shape, parse_size(gpu), kind, chunk=chunk)
    counts = sorted({1, 54, 128, 1000, plan.images} - {0})
    return {
        "model": model,
        "weights": weights,
        "memory": plan.as_dict(),
        "instead": None if plan.images else instead(shape, plan.gpu, kind, chunk),
        "flops": {
            str(n): {"paper": paper_flops(shape, n), "exact": exact_flops(shape, n * shape.image_tokens, n).total}
            for n in counts
        },
    }
