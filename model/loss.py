"""Cross entropy where there is something to learn, and nowhere else.

At 40,960 tokens and 65,536 words all logits in float32 are 10.7 GB; few positions are supervised, and those are taken a
chunk at a time, with their logits computed again in the backward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from formats.tokens import IGNORED
from model.packing import Packing

CHUNK = 1024
"""Positions whose logits exist at one time: 256 MiB in float32 at 65,536 words."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Losses of the supervised tokens.

    Attributes:
        losses: float32 [supervised].
        positions: [supervised], where each token stands in the flattened batch: row · length + position.
    """

    losses: Tensor
    positions: Tensor

    def mean(self, tokens: Tensor | int | None = None) -> Tensor:
        """The sum over `tokens`, by default as many as there are; 0 if nothing is supervised.

        With gradients over several batches or machines, `tokens` is how many all of them supervise together.
        """
        return self.losses.sum() / (max(1, len(self.losses)) if tokens is None else tokens)


def token_losses(hidden: Tensor, labels: Tensor, head: nn.Module, packing: Packing | None) -> TokenLosses:
    """The loss of each supervised token, given all before it.

    Args:
        hidden: [batch, length, hidden].
        labels: [batch, length], the tokens themselves (not shifted), `IGNORED` where nothing is to be learnt.
        head: hidden to logits.
        packing: the first token of a sample is not predicted from the sample before.
    """
    positions = supervised(labels, packing).flatten().nonzero().squeeze(1)
    targets = labels.flatten()[positions]
    before = hidden.flatten(0, 1)[positions - 1]
    losses = [
        checkpoint(_losses, head, h, t, use_reentrant=False)
        for h, t in zip(before.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return TokenLosses(torch.cat(losses), positions)


def supervised(labels: Tensor, packing: Packing | None) -> Tensor:
    """Which tokens have a loss: bool [batch, length]. Arguments as in `token_losses`."""
    wanted = labels != IGNORED
    wanted[:, 0] = False
    return wanted if packing is None else wanted & ~packing.resets


def _losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets.long(), reduction="none")
