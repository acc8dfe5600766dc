"""Weights, gradients and optimiser states spread over all processes (FSDP2, what others call ZeRO-3).

Each layer is gathered when it computes and given back afterwards. What is trained is held in float32 and gathered in
the precision of the computation; what is frozen stays in the precision of its checkpoint and has neither gradient nor
optimiser state. A and D of Mamba layers, a few thousandths of all, are whole in every process and never leave float32.
"""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from model.hybrid import Attention, Experts, MambaMixer
from model.longllava import LongLlavaForConditionalGeneration
from model.stage import Part
from model.world import World

_WHOLE = (".A_log", ".D")
_PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "llm": ("model.language_model.", "lm_head."),
}


def freeze(model: nn.Module, trainable: Sequence[Part]) -> None:
    """Leaves only some parts to learn; those are brought to float32."""
    prefixes = tuple(prefix for part in trainable for prefix in _PREFIXES[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def flatten_experts(model: nn.Module) -> None:
    """Makes each layer's experts two matrices of rows, so that any number of processes gets equal shares of them."""
    for module in model.modules():
        if isinstance(module, Experts):
            for name in ("gate_up_proj", "down_proj"):
                fused: nn.Parameter = getattr(module, name)
                setattr(module, name, nn.Parameter(fused.data.flatten(0, 1), fused.requires_grad))


def shard(model: LongLlavaForConditionalGeneration, world: World, compute: torch.dtype) -> None:
    """Spreads a model's parameters in place, after `freeze` and `flatten_experts`.

    Args:
        compute: bfloat16, or float32 for everything as it is.
    """
    _move_whole(model, world.device)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    spread = partial(fully_shard, mesh=world.mesh, mp_policy=policy, ignored_params=set(whole(model)))
    tower = model.model.vision_tower
    tower = cast(nn.Module, getattr(tower, "vision_model", tower))  # older transformers wrap it once more
    for layer in (*tower.encoder.layers, *model.model.language_model.layers):  # type: ignore[union-attr, misc]
        spread(layer)
    spread(model)


def _move_whole(model: nn.Module, device: torch.device) -> None:
    """FSDP moves only what it shards. What has no memory yet stays so until it is loaded."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if f".{name}" in _WHOLE and not parameter.is_meta:
                setattr(module, name, nn.Parameter(parameter.data.to(device), parameter.requires_grad))


def whole(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that each process has all of."""
    return [parameter for name, parameter in model.named_parameters() if name.endswith(_WHOLE)]


def checkpoint_activations(model: nn.Module) -> None:
    """Lets each layer compute again in the backward pass what it held in the forward pass.

    Within a layer of the language model the mixer of positions does so once more: what it holds is then not there while
    the channels go back, at the price of computing it, a quarter of a layer, a third time. All of it together would be
    the fullest moment of a step.
    """
    again = partial(checkpoint, use_reentrant=False)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = again  # type: ignore[assignment]
        if isinstance(layer, MambaMixer | Attention):
            layer.forward = partial(again, layer.forward)  # type: ignore[method-assign]


_UNDECAYED = re.compile(r"(?:bias|norm\w*\.weight|\.A_log|\.D)$")


def optimiser_of(
    model: nn.Module, rate: float, weight_decay: float, beta2: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over what is trained, its states made at once: if they do not fit, that shows before the first step.

    Biases, norms and Mamba's A and D do not decay, as is usual since GPT-2 and Mamba.
    """
    kept = {id(p) for p in whole(model)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in kept, bool(_UNDECAYED.search(name))), []).append(parameter)
    optimiser = torch.optim.AdamW(
        [{"params": group, "weight_decay": 0.0 if free else weight_decay} for (_, free), group in groups.items()],
        lr=rate,
        betas=(0.9, beta2),
        fused=device.type == "cuda",
    )
    for parameter in chain.from_iterable(groups.values()):
        step = torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu")
        zeros = [torch.zeros_like(parameter, requires_grad=False) for _ in range(2)]
        optimiser.state[parameter] = {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    return optimiser


def average_whole(model: nn.Module, world: World) -> None:
    """Does for the gradients of whole parameters what FSDP does for those of the others."""
    gradients = [p.grad for p in whole(model) if p.grad is not None]
    if world.size == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip(model: nn.Module, largest: float, world: World) -> float:
    """Scales all gradients together to a norm of at most `largest`; gives the norm that they had."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    others = [g for g in gradients if not isinstance(g, DTensor)]
    squares = torch.stack([_squares(shards, world.device), _squares(others, world.device)])
    dist.all_reduce(squares[:1])
    norm = float(squares.sum().sqrt())
    if norm > largest:
        for gradient in (*shards, *others):
            gradient.mul_(largest / norm)
    return norm


def _squares(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    norms = [torch.linalg.vector_norm(g.detach(), dtype=torch.float64) ** 2 for g in gradients]
    return torch.stack(norms).sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
