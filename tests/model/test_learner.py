from types import SimpleNamespace

import torch

from model.hybrid import load_balance
from model.learner import _Tally


def test_adding_up_metrics_reads_nothing_off_the_device() -> None:
    """A meta tensor has no values: whatever would wait for them fails."""
    device = torch.device("meta")
    sequence = SimpleNamespace(
        token_sources=torch.zeros(8, dtype=torch.int64, device=device), rows=[0], images=[], filler=False
    )
    out = SimpleNamespace(
        token_losses=torch.ones(3, device=device),
        token_positions=torch.ones(3, dtype=torch.int64, device=device),
        balance=torch.ones((), device=device),
    )
    tally = _Tally(2, device)
    tally.add(SimpleNamespace(sequence=sequence, tokens=8), out)  # type: ignore[arg-type]
    assert tally._numbers.tolist() == [1, 8, 0, 1, 1]


def test_the_load_balance_is_known_without_waiting_for_the_device() -> None:
    probabilities = torch.empty(6, 4, device="meta")
    assert load_balance(probabilities, torch.zeros(6, 2, dtype=torch.int64, device="meta")).shape == ()
