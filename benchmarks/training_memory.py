"""What does training hold on each process, and does the arithmetic say so?

    torchrun --nproc-per-node 2 benchmarks/training_memory.py [--model tiny]
    python benchmarks/training_memory.py --layers [--json FILE]

The first shards a model as `longllava train` does, adds up the bytes of each process's weights, gradients and optimiser
states, and compares the fullest process with `model.training_budget.held`. Then it takes a step in bfloat16 of a small
model in the proportions of 53b, follows what is alive, and compares the fullest moment with `working`. The second does
so for single layers of several widths, and for the tower. The scan is Triton's with its kernels left out: they make no
tensors. Needs no GPU and no build.
"""

import argparse
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.distributed.tensor import DTensor  # noqa: TID253
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID253
from torch.utils._pytree import tree_leaves  # noqa: TID253

import model.hybrid
from model.budget import Shape
from model.config import LongLlavaConfig, named_config
from model.hybrid import HybridLayer
from model.longllava import LongLlavaForConditionalGeneration
from model.ops.selective_scan import selective_scan
from model.packing import Packing
from model.prepare import shape_of
from model.sharding import checkpoint_activations, flatten_experts, freeze, optimiser_of, shard
from model.stage import Part
from model.training_budget import NORM, halves, held, pictures, working
from model.vision import encode
from model.world import World, joined

STAGES: dict[str, tuple[Part, ...]] = {
    "text": ("llm",),
    "I": ("projector",),
    "II, III": ("projector", "llm"),
}
WIDTHS = ((64, 224, 2, 16, 2), (32, 160, 2, 8, 1), (64, 96, 1, 16, 3), (96, 144, 2, 16, 2))
"""Hidden, intermediate, channels for each hidden one, state, experts of a token."""
TOKENS = 2048
PICTURES = 4


def main() -> None:
    """Prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--layers", action="store_true", help="single layers and the tower instead of whole models")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.layers:
        rows = [*layers(), *towers()]
        print("| | arithmetic | alive | |\n|---|---:|---:|---:|")
        for name, said, found in rows:
            print(f"| {name} | {said:,} | {found:,.0f} | {said / found - 1:+.1%} |")
        if given.json:
            given.json.write_text(json.dumps(rows))
        return
    with joined() as world:
        if world.first:
            print(f"{given.model}, {world.size} processes, bytes of the fullest\n")
            print("| stage | | arithmetic | measured | |\n|---|---|---:|---:|---:|")
        for stage, trainable in STAGES.items():
            compare(given.model, stage, trainable, world)
        for checkpointing in (False, True):
            for stage in ("I", "II, III"):
                step(stage, STAGES[stage], checkpointing, world)


def compare(name: str, stage: str, trainable: tuple[Part, ...], world: World) -> None:
    """Prints a stage's rows."""
    torch.manual_seed(0)
    config = named_config(name)
    model = LongLlavaForConditionalGeneration(config)
    flatten_experts(model)
    freeze(model, trainable)
    shard(model, world, torch.float32)
    model.train()
    optimiser = optimiser_of(model, 1e-5, 0.0, 0.999, world.device)
    ids = torch.arange(5, 69, device=world.device)[None]
    cast(Tensor, model(ids, labels=ids.clone(), packing=Packing.of((0, 64))).token_losses).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    measured = {
        "trained": held_by(trained),
        "gradients": held_by(p.grad for p in trained if p.grad is not None),
        "optimiser": held_by(moments),
        "frozen": held_by(p for p in model.parameters() if not p.requires_grad),
    }
    fullest = world.most(*measured.values())
    expected = held(shape_of(config), trainable, world.size, frozen_bytes=4)  # a new model is in float32
    if not world.first:
        return
    for kind, found in zip(measured, fullest, strict=True):
        said = getattr(expected, kind)
        print(f"| {stage} | {kind} | {said:,} | {int(found):,} | {found / said - 1:+.2%} |")


def held_by(tensors: Iterable[Tensor]) -> int:
    """Bytes of this process's shares."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


# What a step needs besides --------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Follows the memory of all tensors that come into being.

    Args:
        there: tensors that do not count.
        resized: whether tensors may change their size, as FSDP's do; slower.

    Attributes:
        fullest: most bytes at a time.
    """

    def __init__(self, there: Iterable[Tensor], *, resized: bool = False) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in there}
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._resized, self._now, self.fullest = resized, 0, 0

    @property
    def now(self) -> int:
        """Bytes at this moment."""
        if not self._resized:
            return self._now
        return sum(kept.nbytes() for ref, _ in list(self._held.values()) if (kept := ref()) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self._add(leaf.untyped_storage())
        self.fullest = max(self.fullest, self.now)
        return result

    def _add(self, memory: Any) -> None:
        key = memory._cdata
        if key in self._known or key in self._held:
            return
        self._held[key] = weakref.ref(memory, lambda _: self._remove(key)), memory.nbytes()
        self._now += memory.nbytes()

    def _remove(self, key: int) -> None:
        self._now -= self._held.pop(key)[1]


@dataclass(frozen=True, slots=True)
class _Still:
    """A kernel that fills its results with zeros."""

    results: slice

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: [result.zero_() for result in args[self.results]] and None


@contextmanager
def scan_without_kernels() -> Iterator[None]:
    """Lets Mamba layers call the Triton scan, whose kernels do nothing."""
    from model.ops import scan_triton

    kernels, scan = (scan_triton._forward, scan_triton._backward), model.hybrid.selective_scan
    scan_triton._forward, scan_triton._backward = _Still(slice(7, 10)), _Still(slice(9, 15))  # type: ignore[assignment]
    model.hybrid.selective_scan = partial(selective_scan, backend="triton")  # type: ignore[assignment]
    try:
        yield
    finally:
        scan_triton._forward, scan_triton._backward = kernels  # type: ignore[assignment]
        model.hybrid.selective_scan = scan


def config_of(hidden: int, intermediate: int, expand: int, state: int, chosen: int, **others: Any) -> LongLlavaConfig:
    """Four layers: Mamba and experts in turns, the third of attention."""
    fields = named_config("tiny").to_dict()
    fields["text_config"] |= {
        "hidden_size": hidden, "intermediate_size": intermediate, "mamba_expand": expand, "mamba_d_state": state,
        "mamba_dt_rank": hidden // 16, "num_experts_per_tok": chosen, "num_attention_heads": hidden // 16,
        "num_key_value_heads": 1, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, **others,
    }  # fmt: skip
    return LongLlavaConfig(**fields)


def layers() -> Iterator[tuple[str, int, float]]:
    """Bytes per token of each kind of layer: what is kept and the fullest moment, with and without checkpoints."""
    for widths in WIDTHS:
        for experts_at, index in ((1, 0), (1, 1), (1, 2), (0, 2)):
            config = config_of(*widths, expert_layer_offset=experts_at)
            half = halves(shape_of(config))
            kind = ("attention" if index == 2 else "mamba", "experts" if index % 2 == experts_at else "dense")
            first, second = half[kind[0]], half[kind[1]]
            plain, again = (layer_bytes(config, index, checkpointing) for checkpointing in (False, True))
            name, back = (
                f"{' and '.join(kind)}, {'/'.join(map(str, widths))}",
                2 * widths[0],
            )  # the result, or its gradient
            yield f"{name}: kept", first.kept + second.kept + back, plain[0]
            yield f"{name}: fullest", first.kept + second.fullest + back, plain[1]
            fullest = max(first.fullest, NORM * widths[0] + second.fullest) + back
            yield f"{name}, checkpointed: fullest", fullest, again[1]


def layer_bytes(config: LongLlavaConfig, index: int, checkpointing: bool) -> tuple[float, float]:
    """Bytes per token after a layer's forward pass, and most in its backward pass."""
    torch.manual_seed(0)
    layer = HybridLayer(config.text_config, index).bfloat16().train()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=0.02)
        if name.endswith(("A_log", ".D")):
            parameter.data = parameter.data.float()
        parameter.grad = torch.zeros_like(parameter)
    if checkpointing:
        checkpoint_activations(nn.ModuleList([layer]))
    x = torch.randn(1, TOKENS, config.text_config.hidden_size).bfloat16().requires_grad_()
    packing = Packing.of(range(0, TOKENS + 1, TOKENS // 4))
    alive = Alive([x, *(t for p in layer.parameters() for t in (p, cast(Tensor, p.grad)))])
    with scan_without_kernels(), alive:
        results = [result for result in layer(x, packing, None) if result is not None]
        kept, alive.fullest = alive.now, 0
        torch.autograd.backward(results, [torch.zeros_like(result) for result in results])
    return kept / TOKENS, alive.fullest / TOKENS


def towers() -> Iterator[tuple[str, int, float]]:
    """Bytes per image of the tower: frozen, and learning with and without checkpoints."""
    for width, intermediate in ((128, 512), (256, 512)):
        config = config_of(*WIDTHS[0]).to_dict()
        config["vision_config"] |= {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": 5}
        for name, trainable, checkpointing in (
            ("frozen", ("llm",), False),
            ("learns", ("vision",), False),
            ("learns, checkpointed", ("vision",), True),
        ):
            shape = Shape.of(config)
            said = pictures(shape, cast(tuple[Part, ...], trainable), checkpointing)
            found = tower_bytes(LongLlavaConfig(**config), "vision" in trainable, checkpointing)
            yield f"tower {width} wide, {name}: fullest", said.fullest, found


def tower_bytes(config: LongLlavaConfig, learns: bool, checkpointing: bool) -> float:
    """Most bytes of an image, in the tower's forward pass or, if it learns, its backward pass."""
    tower = LongLlavaForConditionalGeneration(config).model.vision_tower.bfloat16().train().requires_grad_(learns)
    if checkpointing:
        checkpoint_activations(tower)
    for parameter in tower.parameters():
        parameter.grad = torch.zeros_like(parameter) if learns else None
    pixels = torch.zeros(PICTURES, 3, 336, 336, dtype=torch.uint8)
    alive = Alive([pixels, *(t for p in tower.parameters() for t in (p, p.grad) if t is not None)])
    with alive:
        features = encode(tower, pixels)
        if learns:
            features.backward(torch.zeros_like(features))
    return alive.fullest / PICTURES


def step(stage: str, trainable: tuple[Part, ...], checkpointing: bool, world: World) -> None:
    """Prints a row: the fullest moment of a step, beyond what is held, of a small model in the proportions of 53b."""
    torch.manual_seed(0)
    config = config_of(*WIDTHS[0], num_experts=16, vocab_size=1024)
    model = LongLlavaForConditionalGeneration(config)
    flatten_experts(model)
    freeze(model, trainable)
    shard(model, world, torch.bfloat16)
    model.train()
    if checkpointing:
        checkpoint_activations(model)
    each = config.image_seq_length
    ids = torch.arange(TOKENS)[None] % 500
    ids[:, : PICTURES * each] = config.image_token_id
    pixels = torch.zeros(PICTURES, 3, 336, 336, dtype=torch.uint8)
    labels = torch.where(torch.arange(TOKENS) < TOKENS - 256, -100, ids)
    packing = Packing.of(range(0, TOKENS + 1, TOKENS // 4))
    there = [ids, pixels, labels, packing.resets if packing else ids]
    alive = Alive(there, resized=True)
    with scan_without_kernels(), alive:
        loss = cast(Tensor, model(ids, pixels, labels, packing=packing).token_losses)
        loss.sum().backward()
        del loss
    fullest = world.most(alive.fullest)[0]
    shape = shape_of(config)
    kept = held(shape, trainable, world.size)
    said = sum(working(shape, trainable, TOKENS, checkpointing, PICTURES).values()) + kept.gradients
    if world.first:
        name = "a step, checkpointed" if checkpointing else "a step"
        print(f"| {stage} | {name} | {said:,} | {int(fullest):,} | {said / fullest - 1:+.2%} |")


if __name__ == "__main__":
    main()
