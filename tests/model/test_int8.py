from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.generate import Settings, generate
from model.hybrid import Experts
from model.int8 import Int8Experts, Int8Linear, quantise, quantised
from model.longllava import LongLlavaForConditionalGeneration


def test_a_weight_is_kept_to_half_a_step_of_its_channel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7, 33) * torch.logspace(-3, 3, 7)[:, None]
    weight[2, 3] = 0
    numbers, scales = quantised(weight)
    assert numbers.dtype == torch.int8
    assert scales.shape == (5, 7, 1)
    assert bool(((numbers * scales - weight).abs() <= scales * 0.5001).all())
    assert bool((numbers.abs().amax(-1)[scales.squeeze(-1) > 0] == 127).all()), "each channel uses its whole range"
    assert bool((numbers[2, 3] == 0).all())


def test_a_linear_layer_in_eight_bits_is_the_layer_of_its_rounded_weight() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 30)
    numbers, scales = quantised(linear.weight.detach())
    x = torch.randn(6, 40)
    expected = torch.nn.functional.linear(x, numbers * scales, linear.bias)
    torch.testing.assert_close(Int8Linear(linear)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 32, 33, 200])
@pytest.mark.parametrize("inputs", [64, 40, 33])
def test_few_tokens_and_many_get_the_same_products_and_few_read_the_bytes_as_they_are(
    inputs: int, tokens: int, dtype: torch.dtype, watched: Callable[[], Any]
) -> None:
    torch.manual_seed(0)
    linear = Int8Linear(torch.nn.Linear(inputs, 31).to(dtype))
    x = torch.randn(2, inputs, tokens, dtype=dtype).transpose(1, 2)[1]
    with torch.no_grad(), watched() as calls:
        found = linear(x)
    weight = linear.weight.double() * linear.scales.double()[:, None]
    expected = x.double() @ weight.T + linear.bias.detach().double()
    assert float((found.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 5e-3)
    as_they_are = any("_weight_int8pack_mm" in name for name, *_ in calls.seen)
    assert as_they_are == (inputs == 64 and tokens <= (2 if dtype == torch.float32 else 32))


def test_experts_scale_results_and_no_matrix(watched: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    wide = Experts(2, 64, 96)
    for parameter in wide.parameters():
        parameter.data.normal_()
    narrow = Int8Experts(wide)
    tokens, chosen = torch.randn(20, 64), torch.tensor([[0, 1]]).expand(20, 2)
    with torch.no_grad(), watched() as calls:
        found = narrow(tokens, chosen, torch.full((20, 2), 0.5))
    exact = wide(tokens, chosen, torch.full((20, 2), 0.5)).detach()
    assert float((found - exact).norm() / exact.norm()) < 0.02
    matrix = 4 * 64 * 96
    assert [name for name, size, _ in calls.seen if name.startswith("mul") and size >= matrix] == []
    assert max(size for _, size, _ in calls.seen) == 2 * matrix, "one matrix is wide at a time"


def test_a_model_in_eight_bits_hands_gradients_on(small: LongLlavaForConditionalGeneration) -> None:
    quantise(small.model.language_model)
    small(torch.tensor([[5, 6]])).logits.sum().backward()
    gradient = small.get_input_embeddings().weight.grad
    assert gradient is not None
    assert bool((gradient[5] != 0).any())


@pytest.mark.parametrize("linears", [False, True])
def test_logits_move_by_less_than_a_few_percent(small: LongLlavaForConditionalGeneration, linears: bool) -> None:
    ids = torch.randint(3, 290, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = small(ids).logits
        quantise(small.model.language_model, linears=linears)
        found = small(ids).logits
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.1


def test_experts_and_large_matrices_shrink_to_a_byte_a_number(small: LongLlavaForConditionalGeneration) -> None:
    text = small.model.language_model
    wide = sum(p.numel() for name, p in text.named_parameters() if ".experts." in name)
    quantise(text)
    narrow = {name: b for name, b in text.named_buffers() if b.dtype == torch.int8}
    assert sum(b.numel() for name, b in narrow.items() if ".experts." in name) == wide
    left = {name.split(".")[-2] for name, p in text.named_parameters() if p.ndim == 2}
    assert left == {"embed_tokens", "mamba", "x_proj", "dt_proj", "router"}


def test_a_model_in_eight_bits_writes(small: LongLlavaForConditionalGeneration) -> None:
    quantise(small.model.language_model)
    small.config.text_config.eos_token_id = None
    assert len(generate(small, torch.arange(3, 20)[None], settings=Settings(max_new_tokens=3)).tokens) == 3
