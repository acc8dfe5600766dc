"""Weights in eight bits: experts and large matrices, a scale for each output channel, activations as they are.

87 % of the large model are experts held in fused three-dimensional parameters, which libraries that replace `nn.Linear`
pass over. Works on CPU and GPU alike. Activations are multiplied by the whole numbers and the result by the scales.

The gain is memory. A matrix is widened when it is used, one at a time, which reads and writes it five bytes a weight
instead of bfloat16's two: little beside the products of a long chunk of a prompt, but a token written on a GPU, which
waits for memory alone, takes up to two and a half times as long. On a CPU PyTorch has a kernel that reads the bytes as
they are, and a few tokens take it: in bfloat16 it is 20 times as fast for one, and faster up to 32. Its counterpart for
GPUs is left alone: in some releases it is one thread for each output, and none was at hand to measure.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.hybrid import MLP, Attention, Experts, MambaMixer, gated

_LARGEST = 127
_FEW = {torch.bfloat16: 32, torch.float32: 2}
"""Up to how many tokens a CPU is faster with the bytes as they are, at 4,096 by 8,192 weights; one thread, AVX-512."""
_WHOLE = 32
"""PyTorch's kernel reads inputs by so many, and beyond the end of a row that is no multiple of them."""


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as whole numbers and scales.

    Args:
        weight: […, outputs, inputs].

    Returns:
        int8 of the same shape, and scales […, outputs, 1] in the weight's type: weight ≈ numbers · scales, to half a
        scale. A channel of zeros keeps them.
    """
    largest = weight.float().abs().amax(-1, keepdim=True)
    scales = (largest / _LARGEST).to(weight.dtype)
    numbers = torch.where(scales == 0, 0.0, weight.float() / scales.float())
    return numbers.round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear layer whose weight is in eight bits; made from one that is not."""

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scales = quantised(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.squeeze(-1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        y = _linear(x, self.weight, self.scales)
        return y if self.bias is None else y + self.bias


def _linear(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """[…, inputs] to […, outputs]; scales are applied to the result, which is smaller than the weight and exacter."""
    scales = scales.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    few = x.device.type == "cpu" and len(rows) <= _FEW.get(x.dtype, 0)
    if few and x.shape[-1] % _WHOLE == 0 and not x.requires_grad:
        return torch._weight_int8pack_mm(rows.contiguous(), numbers, scales).view(*x.shape[:-1], -1)
    return F.linear(x, numbers.to(x.dtype)) * scales


class Int8Experts(Experts):
    """Experts whose weights are in eight bits; made from some that are not."""

    gate_up_proj: Tensor  # type: ignore[assignment]
    down_proj: Tensor  # type: ignore[assignment]
    gate_up_scales: Tensor
    down_scales: Tensor

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.count = experts.count
        for name in ("gate_up", "down"):
            weight = getattr(experts, f"{name}_proj").detach()
            numbers = torch.empty_like(weight, dtype=torch.int8)
            scales = weight.new_empty((*weight.shape[:2], 1))
            for i, matrix in enumerate(weight):  # one at a time: float32 copies of all would be four times the int8
                numbers[i], scales[i] = quantised(matrix)
            self.register_buffer(f"{name}_proj", numbers)
            self.register_buffer(f"{name}_scales", scales.squeeze(-1))

    def swiglu(self) -> Callable[[int, Tensor], Tensor]:
        """Runs an expert, by its number, on its tokens; one matrix is wide at a time."""

        def run(expert: int, x: Tensor) -> Tensor:
            product = gated(_linear(x, self.gate_up_proj[expert], self.gate_up_scales[expert]))
            return _linear(product, self.down_proj[expert], self.down_scales[expert])

        return run


def quantise(text: nn.Module, *, linears: bool = True) -> None:
    """Turns a language model's experts, and by choice its other large matrices, into eight bits, in place.

    Routers, Mamba's small projections, embeddings and norms stay: they are under 2 % of the model. The result is for
    inference only and is not saved; quantise after loading, on the CPU if the model does not fit elsewhere before.

    Args:
        text: `model.model.language_model`, or a layer of it.
        linears: also the projections of Mamba, attention and dense feed-forwards.
    """
    large = {
        MambaMixer: ("in_proj", "out_proj"),
        Attention: ("q_proj", "k_proj", "v_proj", "o_proj"),
        MLP: ("gate_proj", "up_proj", "down_proj"),
    }
    for module in list(text.modules()):
        experts = getattr(module, "experts", None)
        if isinstance(experts, Experts) and not isinstance(experts, Int8Experts):
            module.experts = Int8Experts(experts)
        for name in large.get(type(module), ()) if linears else ():
            if isinstance(linear := getattr(module, name), nn.Linear):
                setattr(module, name, Int8Linear(linear))
