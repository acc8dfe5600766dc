"""What a hybrid model remembers between calls: convolution and scan states, and preallocated keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import JambaConfig


@dataclass(slots=True)
class MambaState:
    """A Mamba layer's memory, the same size whatever was read.

    Attributes:
        conv: [batch, taps - 1, channels], the inputs that the convolution still sees.
        ssm: [batch, channels, N], float32.
    """

    conv: Tensor | None = None
    ssm: Tensor | None = None


@dataclass(slots=True)
class KeyValues:
    """An attention layer's memory: keys and values, [batch, heads, capacity, head size]."""

    keys: Tensor
    values: Tensor


class HybridCache:
    """The memory of all layers.

    Args:
        config: of the language model.
        batch: rows.
        capacity: tokens that will ever be read; keys and values are allocated once.
        dtype: of keys and values.
        devices: of each layer; keys and values lie where their layer's weights are.

    Attributes:
        length: tokens read so far; the model moves it on after all layers have.
    """

    def __init__(
        self, config: JambaConfig, batch: int, capacity: int, dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> None:
        self.length, self.capacity = 0, capacity
        heads = config.num_key_value_heads
        shape = (batch, heads, capacity, config.hidden_size // config.num_attention_heads)
        self.layers: list[MambaState | KeyValues] = [
            KeyValues(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
            if kind == "attention"
            else MambaState()
            for kind, device in zip(config.layers_block_type, devices, strict=True)
        ]

    def grow(self, capacity: int) -> None:
        """Makes room for so many tokens in all, if there is less."""
        if capacity <= self.capacity:
            return
        for state in self.layers:
            if isinstance(state, KeyValues):
                state.keys, state.values = (_longer(old, capacity, self.length) for old in (state.keys, state.values))
        self.capacity = capacity

    def mamba(self, layer: int) -> MambaState:
        """The state of a Mamba layer, to be read and replaced."""
        state = self.layers[layer]
        assert isinstance(state, MambaState)
        return state

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds an attention layer's new keys and values and returns all so far.

        Raises:
            ValueError: if they do not fit.
        """
        state = self.layers[layer]
        assert isinstance(state, KeyValues)
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity:,} tokens; these would be {end:,}")
        state.keys[:, :, self.length : end] = keys
        state.values[:, :, self.length : end] = values
        return state.keys[:, :, :end], state.values[:, :, :end]


def _longer(old: Tensor, capacity: int, length: int) -> Tensor:
    new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
    new[:, :, :length] = old[:, :, :length]
    return new
