import pytest
import torch
from torch import Tensor

from model.ops.causal_conv import Starts, causal_conv


def naive(x: Tensor, weight: Tensor, bias: Tensor, resets: Tensor) -> Tensor:
    """Every output by its definition, in float64."""
    y = bias.double().expand(x.shape).clone()
    taps = weight.shape[1]
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            for j in range(min(taps, t + 1)):
                if not resets[row, t - j + 1 : t + 1].any():
                    y[row, t] += weight[:, taps - 1 - j].double() * x[row, t - j].double()
    return y


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 12, 3), torch.randn(3, 4), torch.randn(3)


def starts_of(resets: Tensor) -> Starts:
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in resets)


RESETS = [[], [(0, 5)], [(0, 0), (0, 1), (0, 3), (1, 11)], [(1, 4), (1, 6)]]


@pytest.mark.parametrize("positions", RESETS)
def test_each_output_sees_four_inputs_of_its_own_sample(
    inputs: tuple[Tensor, Tensor, Tensor], positions: list[tuple[int, int]]
) -> None:
    x, weight, bias = inputs
    resets = torch.zeros(2, 12, dtype=torch.bool)
    for at in positions:
        resets[at] = True
    y, _ = causal_conv(x, weight, bias, starts=starts_of(resets))
    torch.testing.assert_close(y.double(), naive(x, weight, bias, resets), rtol=1e-5, atol=1e-6)


def test_without_resets_it_is_the_depthwise_convolution_of_torch(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = inputs
    y, _ = causal_conv(x, weight, bias)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3).transpose(1, 2)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("positions", RESETS)
@pytest.mark.parametrize("cut", [1, 2, 6, 11])
def test_two_calls_with_the_state_handed_over_equal_one(
    inputs: tuple[Tensor, Tensor, Tensor], positions: list[tuple[int, int]], cut: int
) -> None:
    x, weight, bias = inputs
    resets = torch.zeros(2, 12, dtype=torch.bool)
    for at in positions:
        resets[at] = True
    whole, last = causal_conv(x, weight, bias, starts=starts_of(resets))
    y1, middle = causal_conv(x[:, :cut], weight, bias, starts=starts_of(resets[:, :cut]))
    y2, end = causal_conv(x[:, cut:], weight, bias, starts=starts_of(resets[:, cut:]), state=middle)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_handed_on_keeps_no_more_than_itself(
    inputs: tuple[Tensor, Tensor, Tensor], length: int, apart: bool
) -> None:
    x, weight, bias = inputs
    _, last = causal_conv(x[:, :length], weight, bias, starts=((0,), ()) if apart else None)
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()


@pytest.mark.parametrize("positions", RESETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_those_of_the_definition_whatever_the_precision(
    inputs: tuple[Tensor, Tensor, Tensor], positions: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    resets = torch.zeros(2, 12, dtype=torch.bool)
    for at in positions:
        resets[at] = True
    given = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in given]
    y, _ = causal_conv(*given, starts=starts_of(resets))
    expected = naive(*exact, resets)
    wanted = torch.randn(2, 12, 3, dtype=dtype)
    found = [y, *torch.autograd.grad(y, given, wanted)]
    for one, other in zip(found, [expected, *torch.autograd.grad(expected, exact, wanted.double())], strict=True):
        error = float((one.double() - other).detach().norm() / other.detach().norm())
        assert error < (1e-12 if dtype == torch.float64 else 4e-3), "bfloat16 rounds to 2⁻⁸, and sums are wider"


def test_a_number_that_is_none_stays_in_its_sample(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = inputs
    x[:, 4] = torch.nan
    y, last = causal_conv(x, weight, bias, starts=((0, 5, 7), (0, 5, 11)))
    assert y[:, 4].isnan().all()
    assert not y[:, 5:].isnan().any()
    assert not last.isnan().any()


def test_time_is_last_in_memory_and_the_scan_need_not_copy(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    for starts in (None, ((0, 5), (0,))):
        y, _ = causal_conv(*inputs, starts=starts)
        assert y.transpose(1, 2).is_contiguous()


def test_packed_rows_are_convolved_without_reading_anything_off_the_device() -> None:
    x, weight = torch.empty(2, 12, 3, device="meta"), torch.empty(3, 4, device="meta")
    y, _ = causal_conv(x, weight, None, starts=((0, 5), (0, 11)))
    assert y.shape == x.shape
