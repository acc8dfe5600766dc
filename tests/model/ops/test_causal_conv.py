import pytest
import torch
from torch import Tensor

from model.ops.causal_conv import causal_conv


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


RESETS = [[], [(0, 5)], [(0, 0), (0, 1), (0, 3), (1, 11)], [(1, 4), (1, 6)]]


@pytest.mark.parametrize("positions", RESETS)
def test_each_output_sees_four_inputs_of_its_own_sample(
    inputs: tuple[Tensor, Tensor, Tensor], positions: list[tuple[int, int]]
) -> None:
    x, weight, bias = inputs
    resets = torch.zeros(2, 12, dtype=torch.bool)
    for at in positions:
        resets[at] = True
    y, _ = causal_conv(x, weight, bias, resets=resets)
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
    whole, last = causal_conv(x, weight, bias, resets=resets)
    y1, middle = causal_conv(x[:, :cut], weight, bias, resets=resets[:, :cut])
    y2, end = causal_conv(x[:, cut:], weight, bias, resets=resets[:, cut:], state=middle)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_handed_on_keeps_no_more_than_itself(
    inputs: tuple[Tensor, Tensor, Tensor], length: int, apart: bool
) -> None:
    x, weight, bias = inputs
    resets = torch.zeros(2, length, dtype=torch.bool) if apart else None
    _, last = causal_conv(x[:, :length], weight, bias, resets=resets)
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()
