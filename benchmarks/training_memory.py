"""What does training hold on each process, and does the arithmetic say so?

    torchrun --nproc-per-node 2 benchmarks/training_memory.py [--model tiny]

Shards a model as `longllava train` does, adds up the bytes of each process's weights, gradients and optimiser states,
and compares the fullest process with `model.training_budget.held`. Needs no GPU and no build.
"""

import argparse
from collections.abc import Iterable
from typing import cast

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253
from torch.distributed.tensor import DTensor  # noqa: TID253

from model.config import named_config
from model.longllava import LongLlavaForConditionalGeneration
from model.packing import Packing
from model.prepare import shape_of
from model.sharding import flatten_experts, freeze, optimiser_of, shard
from model.stage import Part
from model.training_budget import held
from model.world import World, joined

STAGES: dict[str, tuple[Part, ...]] = {
    "text": ("llm",),
    "I": ("projector",),
    "II, III": ("projector", "llm"),
}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    name = parser.parse_args().model
    with joined() as world:
        if world.first:
            print(f"{name}, {world.size} processes, bytes of the fullest\n")
            print("| stage | | arithmetic | measured | |\n|---|---|---:|---:|---:|")
        for stage, trainable in STAGES.items():
            compare(name, stage, trainable, world)


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


if __name__ == "__main__":
    main()
