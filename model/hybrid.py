"""Jamba: seven Mamba layers to one of attention, a mixture of experts in every other layer (Lieber et al. 2024).

The same function and parameter names as transformers' Jamba, but packed samples can be kept apart, the scan goes on
where a cache left off, and its backward pass is linear in length. No positions are encoded anywhere: Mamba layers know
the order.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import JambaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from model.cache import HybridCache, MambaState
from model.ops.causal_conv import causal_conv
from model.ops.selective_scan import selective_scan
from model.packing import Packing


class HybridModel(nn.Module):
    """Embeddings to final hidden states."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        packing: Packing | None = None,
        cache: HybridCache | None = None,
        balances: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs all layers.

        Args:
            inputs_embeds: [batch, length, hidden].
            packing: samples to keep apart.
            cache: what was read before; what is read now is added to it.
            balances: gets the `load_balance` of each layer of experts, when training.

        Returns:
            [batch, length, hidden], normalised.

        Raises:
            ValueError: if both packing and cache are given: a cache remembers one sample a row.
        """
        if packing is not None and cache is not None:
            raise ValueError("a cache goes on with one sample a row; run packed rows without one")
        hidden = inputs_embeds
        for layer in self.layers:
            hidden, balance = layer(hidden, packing, cache)
            if balances is not None and balance is not None:
                balances.append(balance)
        if cache is not None:
            cache.length += inputs_embeds.shape[1]
        normalised: Tensor = self.final_layernorm(hidden)
        return normalised


class HybridLayer(GradientCheckpointingLayer):
    """A mixer of positions, Mamba or attention, and a mixer of channels, dense or of experts."""

    def __init__(self, config: JambaConfig, index: int) -> None:
        super().__init__()
        if config.layers_block_type[index] == "attention":
            self.self_attn = Attention(config, index)
        else:
            self.mamba = MambaMixer(config, index)
        experts = config.layers_num_experts[index]
        self.feed_forward = SparseMoe(config) if experts > 1 else MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, packing: Packing | None, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, length, hidden] to the same shape, and the experts' balance if there are any and it trains."""
        mixer = self.self_attn if hasattr(self, "self_attn") else self.mamba
        hidden = hidden + mixer(self.input_layernorm(hidden), packing, cache)
        mixed = self.feed_forward(self.pre_ff_layernorm(hidden))
        if isinstance(mixed, tuple):
            return hidden + mixed[0], mixed[1]
        return hidden + mixed, None


class RMSNorm(nn.Module):
    """Division by the root mean square, in float32, and a weight.

    The quotient is rounded to the type of x before it is multiplied, as transformers does; the weight is not handed to
    `rms_norm`, which would round once, after it, and give one in four bfloat16 numbers another last bit.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


class MambaMixer(nn.Module):
    """Mamba with Jamba's norms of the step size, B and C."""

    def __init__(self, config: JambaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        hidden, channels = config.hidden_size, config.mamba_expand * config.hidden_size
        rank, n, taps = int(config.mamba_dt_rank), config.mamba_d_state, config.mamba_d_conv
        self.parts = [rank, n, n]
        self.in_proj = nn.Linear(hidden, 2 * channels, bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=config.mamba_conv_bias)
        self.x_proj = nn.Linear(channels, rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(rank, channels, bias=True)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, hidden, bias=config.mamba_proj_bias)
        self.dt_layernorm = RMSNorm(rank, config.rms_norm_eps)
        self.b_layernorm = RMSNorm(n, config.rms_norm_eps)
        self.c_layernorm = RMSNorm(n, config.rms_norm_eps)

    def forward(self, x: Tensor, packing: Packing | None, cache: HybridCache | None) -> Tensor:
        """[batch, length, hidden] to the same shape."""
        resets = None if packing is None else packing.resets
        state = MambaState() if cache is None else cache.mamba(self.index)
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        kernel = self.conv1d.weight.squeeze(1)
        starts = None if packing is None else packing.starts
        u, state.conv = causal_conv(u, kernel, self.conv1d.bias, starts=starts, state=state.conv)
        u = F.silu(u)
        step, B, C = self.x_proj(u).split(self.parts, dim=-1)
        step = F.linear(self.dt_layernorm(step), self.dt_proj.weight).float()
        delta = F.softplus(step + self.dt_proj.bias.float())
        y, state.ssm = selective_scan(
            u,
            delta,
            -torch.exp(self.A_log.float()),
            self.b_layernorm(B),
            self.c_layernorm(C),
            self.D,
            resets=resets,
            state=state.ssm,
        )
        out: Tensor = self.out_proj(y * F.silu(gate))
        return out


_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which PyTorch prefers on Hopper and which plans anew, for 20 to 40 ms, at each new pair of lengths:
each written token and each packed sample has lengths of its own."""


class Attention(nn.Module):
    """Causal attention in which groups of heads share keys and values; positions are not encoded."""

    def __init__(self, config: JambaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        hidden, self.size = config.hidden_size, config.hidden_size // config.num_attention_heads
        shared = config.num_key_value_heads * self.size
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, shared, bias=False)
        self.v_proj = nn.Linear(hidden, shared, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, packing: Packing | None, cache: HybridCache | None) -> Tensor:
        """[batch, length, hidden] to the same shape."""
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.extend(self.index, key, value)
        with sdpa_kernel(_KERNELS):
            if packing is not None:
                mixed = _apart(query, key, value, packing)
            elif key.shape[2] == query.shape[2]:
                mixed = _attend(query, key, value, is_causal=True)
            else:  # the last of all queries see all keys; for one query there is nothing to hide
                hide = causal_lower_right(query.shape[2], key.shape[2]) if query.shape[2] > 1 else None
                mixed = _attend(query, key, value, attn_mask=hide)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


def _attend(query: Tensor, key: Tensor, value: Tensor, **causal: Any) -> Tensor:
    """Attention of [batch, heads, length, size], of whose keys and values each serves several heads.

    On GPUs no fused kernel shares keys in float32, and PyTorch would fall back, in silence, to one that holds all
    scores at once (pytorch#154363).
    """
    shared = query.dtype != torch.float32
    if not shared:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=shared, **causal)


def _apart(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Causal attention within each sample: exact, and cheaper than masking the square of the packed length."""
    rows = []
    for row, bounds in enumerate(packing.bounds):
        lengths = [end - start for start, end in pairwise(bounds)]
        # `split`, because each slice would have a full-size gradient
        parts = zip(*(x[row : row + 1].split(lengths, dim=2) for x in (query, key, value)), strict=True)
        rows.append(torch.cat([_attend(q, k, v, is_causal=True) for q, k, v in parts], dim=2))
    return torch.cat(rows)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, hidden] to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class SparseMoe(nn.Module):
    """A router and its experts: each token goes to the two likeliest, weighted by their probabilities as they are."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[batch, length, hidden] to the same shape, and the balance of the load when training."""
        tokens = x.flatten(0, 1)
        probabilities = self.router(tokens).float().softmax(-1)
        weights, chosen = probabilities.topk(self.chosen, dim=-1)
        mixed: Tensor = self.experts(tokens, chosen, weights.to(x.dtype))
        return mixed.view_as(x), load_balance(probabilities, chosen) if self.training else None


def load_balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """How unevenly a router uses its experts: E · Σ fᵢ Pᵢ (Fedus et al. 2022), as transformers counts it.

    Args:
        probabilities: [tokens, experts].
        chosen: [tokens, k], the experts of each token.

    Returns:
        scalar: k if all experts are used alike, up to E if always the same ones are.
    """
    experts = probabilities.shape[1]
    load = _counts(chosen, experts) / len(chosen)
    return experts * (load * probabilities.mean(0)).sum()


def _counts(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens each expert gets: int64 [experts]; unlike bincount's, known without waiting for the GPU."""
    flat = chosen.flatten()
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))


class Experts(nn.Module):
    """SwiGLU experts in two fused parameters, as transformers has them in memory."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.count = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sorts tokens by expert, runs each expert once, and puts results back in order.

        Args:
            tokens: [tokens, hidden].
            chosen, weights: [tokens, k], each token's experts and their weights.
        """
        order = chosen.flatten().argsort(stable=True)
        counts = _counts(chosen, self.count).tolist()
        groups = tokens[order // chosen.shape[1]].split(counts)
        swiglu = self.swiglu()
        results = [swiglu(i, group) for i, group in enumerate(groups) if len(group)]
        mixed = torch.cat(results)[order.argsort()].view(*chosen.shape, -1)
        return (mixed * weights[..., None]).sum(1)

    def swiglu(self) -> Callable[[int, Tensor], Tensor]:
        """Runs an expert, by its number, on its tokens.

        `unbind`, because each index would have a full-size gradient; `view`, because training holds both parameters
        as one matrix of all experts' rows (`model.sharding`).
        """
        gate_up, down = (x.view(self.count, -1, x.shape[-1]).unbind() for x in (self.gate_up_proj, self.down_proj))
        return lambda expert, x: F.linear(gated(F.linear(x, gate_up[expert])), down[expert])


def gated(gate_up: Tensor) -> Tensor:
    """SwiGLU's product of [tokens, 2 · intermediate], gates first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
