"""One suite for every backend that can run here, against the recurrence written out in float64."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.errors import UsageError
from model.ops.scan_mamba_ssm import extended
from model.ops.selective_scan import default_backend, selective_scan

Scan = Callable[..., tuple[Tensor, Tensor]]

TILE = 16  # of the Triton kernel here, so that short sequences have several
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "extended"]
if find_spec("triton") and (torch.cuda.is_available() or INTERPRETED):
    BACKENDS.append("triton")
if find_spec("mamba_ssm") and torch.cuda.is_available():
    BACKENDS.append("mamba_ssm")


@pytest.fixture(params=BACKENDS)
def scan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Scan:
    if request.param == "extended":
        return extended_reference
    if request.param == "triton":
        monkeypatch.setattr("model.ops.scan_triton._TILE", TILE)

    def run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return selective_scan(*args, **options, backend=request.param)

    return run


def extended_reference(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """What makes mamba_ssm's kernel know resets and states, around a scan that is not told of them."""

    def plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(u, delta, A, B, C, backend="reference")[0]

    u, delta, A, B, C, *skip = args
    y, last = extended(plain, u, delta, A, B, C, options.get("resets"), options.get("state"))
    return (y + u * skip[0] if skip else y), last


def naive(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one step after another."""
    h = u.new_zeros(len(u), *A.shape) if state is None else state
    ys = []
    for t in range(u.shape[1]):
        if resets is not None:
            h = torch.where(resets[:, t, None, None], 0.0, h)
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1)
    return (y if D is None else y + D * u), h


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch: int, length: int, channels: int, n: int, *, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D and a first state, random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    delta = torch.nn.functional.softplus(normal(batch, length, channels) - 1)
    A = -torch.arange(1.0, n + 1).expand(channels, n) * torch.exp(0.3 * normal(channels, n))
    made = [normal(batch, length, channels), delta, A, normal(batch, length, n), normal(batch, length, n)]
    return [x.to(DEVICE) for x in (*made, normal(channels), normal(batch, channels, n))]


def resets_at(batch: int, length: int, *positions: tuple[int, int]) -> Tensor:
    resets = torch.zeros(batch, length, dtype=torch.bool)
    for row, t in positions:
        resets[row, t] = True
    return resets.to(DEVICE)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


CASES = {
    "one step": (2, 1, 3, 4, [], True),
    "no state, no resets": (2, 37, 2, 4, [], False),
    "length that folds evenly": (1, 16, 2, 8, [(0, 4)], True),
    "resets": (2, 50, 2, 4, [(0, 1), (0, 20), (0, 21), (1, 49)], True),
    "reset at the first token drops the state": (2, 23, 2, 4, [(0, 0), (1, 7)], True),
    "jamba's state size": (1, 40, 2, 16, [(0, 33)], True),
    "resets around the borders of tiles": (
        2,
        4 * TILE + 13,
        2,
        4,
        [(0, TILE - 1), (0, TILE), (1, 0), (1, TILE + 1), (1, 2 * TILE), (0, 4 * TILE + 12)],
        True,
    ),
    "tiles that are full": (1, 4 * TILE, 2, 4, [], False),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_equal_the_recurrence_in_float64(scan: Scan, case: str) -> None:
    batch, length, channels, n, positions, stateful = CASES[case]
    resets = resets_at(batch, length, *positions) if positions else None
    leaves = inputs(batch, length, channels, n)[: 7 if stateful else 6]
    ours = [x.clone().requires_grad_() for x in leaves]
    exact = [x.double().requires_grad_() for x in leaves]
    weights = inputs(batch, length, channels, n, seed=1)
    results = []
    for function, x in ((scan, ours), (naive, exact)):
        y, last = function(*x[:6], resets=resets, state=x[6] if stateful else None)
        (y * weights[0].to(y.dtype)).sum().add((last * weights[6].to(last.dtype)).sum()).backward()
        results.append((y.detach(), last.detach()))
    assert error(results[0][0], results[1][0]) < 2e-6
    assert error(results[0][1], results[1][1]) < 2e-6
    for name, x, true in zip(("u", "delta", "A", "B", "C", "D", "state"), ours, exact, strict=False):
        assert x.grad is not None
        assert true.grad is not None
        assert error(x.grad, true.grad) < 5e-6, name


def test_two_calls_with_the_state_handed_over_equal_one(scan: Scan) -> None:
    u, delta, A, B, C, D, state = inputs(2, 61, 4, 4)
    resets = resets_at(2, 61, (0, 10), (1, 45))
    whole, last = scan(u, delta, A, B, C, D, resets=resets, state=state)
    first = slice(None), slice(0, 40)
    then = slice(None), slice(40, None)
    y1, middle = scan(u[first], delta[first], A, B[first], C[first], D, resets=resets[first], state=state)
    y2, end = scan(u[then], delta[then], A, B[then], C[then], D, resets=resets[then], state=middle)
    assert error(torch.cat([y1, y2], 1), whole.double()) < 2e-6
    assert error(end, last.double()) < 2e-6


def test_nothing_before_a_reset_reaches_what_follows(scan: Scan) -> None:
    u, delta, A, B, C, D, _ = inputs(1, 40, 4, 4)
    u.requires_grad_()
    y, _ = scan(u, delta, A, B, C, D, resets=resets_at(1, 40, (0, 25)))
    y[:, 25:].sum().backward()
    assert u.grad is not None
    assert u.grad[:, :25].abs().max() == 0
    assert u.grad[:, 25:].abs().min() > 0


def test_bfloat16_inputs_are_summed_in_float32(scan: Scan) -> None:
    u, delta, A, B, C, _, state = inputs(1, 200, 4, 4)
    low = [x.bfloat16() for x in (u, delta, B, C)]
    y, last = scan(low[0], low[1], A, low[2], low[3], state=state)
    u, delta, B, C = (x.double() for x in low)
    expected, end = naive(u, delta, A.double(), B, C, state=state.double())
    assert y.dtype == torch.bfloat16
    assert error(y, expected) < 2**-7, "one rounding of the result (Triton's interpreter cuts), none on the way"
    assert error(last, end) < 2e-6


def test_the_kernel_for_gpus_passes_this_suite_in_its_interpreter() -> None:
    those = "triton and (tiles or size or handed or bfloat16)"
    line = [sys.executable, "-m", "pytest", __file__, "-q", "-k", those, "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout
    assert passed
    assert int(passed[1]) == 5, "triton comes with the extra `dev`"


def test_the_reference_passes_gradcheck_in_float64() -> None:
    leaves = [x.double().cpu().requires_grad_() for x in inputs(2, 7, 3, 2)]
    resets = resets_at(2, 7, (0, 3)).cpu()

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*x[:6], resets=resets, state=x[6], backend="reference")

    assert torch.autograd.gradcheck(run, leaves)


def test_the_reference_splits_channels_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [x.cpu().requires_grad_() for x in inputs(2, 30, 6, 4)]

    def gradients() -> list[Tensor]:
        y, last = selective_scan(*leaves[:6], state=leaves[6], backend="reference")
        return [y, last, *torch.autograd.grad(y.square().sum() + last.sum(), leaves)]

    whole = gradients()
    monkeypatch.setattr("model.ops.scan_reference._BLOCK", 1)  # one channel at a time
    for ours, expected in zip(gradients(), whole, strict=True):
        assert error(ours, expected.double()) < 2e-6


def test_the_reference_works_in_the_cpu_default() -> None:
    assert default_backend(torch.device("cpu")) == "reference"


def test_an_absent_backend_is_named_with_its_package() -> None:
    u, delta, A, B, C, _, _ = inputs(1, 3, 2, 2)
    for backend in ("mamba_ssm", "triton"):
        if find_spec(backend) is None:
            with pytest.raises(UsageError, match=f"needs the package {backend}"):
                selective_scan(u, delta, A, B, C, backend=backend)
    with pytest.raises(UsageError, match="no backend 'cuda'"):
        selective_scan(u, delta, A, B, C, backend="cuda")  # type: ignore[arg-type]


def test_a_wrong_shape_is_named() -> None:
    u, delta, A, B, C, _, _ = inputs(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"C is \(2, 4, 4\).*asks? for \(2, 5, 4\)"):
        selective_scan(u, delta, A, B, C[:, :4])
    with pytest.raises(ValueError, match="empty"):
        selective_scan(u[:, :0], delta[:, :0], A, B[:, :0], C[:, :0])
