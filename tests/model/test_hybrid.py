"""How the layers compute: which kernels they take, and what they leave in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.jamba.modeling_jamba import JambaRMSNorm

from model.hybrid import Attention, RMSNorm
from model.longllava import LongLlavaForConditionalGeneration
from model.packing import Packing

Watched = Callable[[], Any]


@pytest.fixture
def attention(small: LongLlavaForConditionalGeneration) -> Attention:
    return small.model.language_model.layers[1].self_attn


@pytest.mark.parametrize("bounds", [None, (0, 5, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_takes_a_flash_kernel_and_never_cudnns(
    attention: Attention, bounds: tuple[int, ...] | None, dtype: torch.dtype, watched: Watched
) -> None:
    packing = None if bounds is None else Packing.of(bounds)
    with watched() as calls:
        attention.to(dtype)(torch.randn(1, 12, 32, dtype=dtype), packing, None).sum().backward()
    mixed = [(name, cudnn) for name, _, cudnn in calls.seen if "scaled_dot_product" in name and "backward" not in name]
    assert mixed == [("_scaled_dot_product_flash_attention_for_cpu.default", False)] * (2 if bounds else 1)
    assert torch.backends.cuda.cudnn_sdp_enabled(), "elsewhere it may be taken as before"


def test_a_written_token_never_takes_cudnns_kernel(small: LongLlavaForConditionalGeneration, watched: Watched) -> None:
    cache = small.new_cache(12)
    with torch.no_grad():
        small(torch.arange(3, 14)[None], cache=cache)
        with watched() as calls:
            small(torch.ones(1, 1, dtype=torch.long), cache=cache)
    mixed = [cudnn for name, _, cudnn in calls.seen if "scaled_dot_product" in name]
    assert mixed
    assert not any(mixed)


def test_the_backward_pass_of_packed_attention_moves_no_more_for_more_samples(
    attention: Attention, watched: Watched
) -> None:
    def made(bounds: tuple[int, ...]) -> int:
        mixed = attention(torch.randn(1, 256, 32, requires_grad=True), Packing.of(bounds), None).sum()
        with watched() as calls:
            mixed.backward()
        return sum(size for _, size, _ in calls.seen)

    assert made(tuple(range(0, 257, 8))) < 1.5 * made((0, 128, 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(512, 1e-6).to(dtype), JambaRMSNorm(512, 1e-6).to(dtype)
    weight = torch.rand(512).to(dtype) + 0.5
    ours.weight.data, theirs.weight.data = weight, weight
    x = (torch.randn(64, 512) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_images_are_put_between_words_by_rows_and_both_get_their_gradients(
    small: LongLlavaForConditionalGeneration, watched: Watched
) -> None:
    image = small.config.image_token_id
    ids = torch.tensor([[5, image, image, 6], [image, 7, 5, image]])
    features = torch.randn(4, 32, requires_grad=True)
    with watched() as calls:
        embeds = small.model.embed(ids, features)
    words = small.get_input_embeddings().weight
    expected = torch.stack([words[5], *features[:2], words[6], features[2], words[7], words[5], features[3]])
    assert torch.equal(embeds.flatten(0, 1), expected)
    wanted = torch.randn_like(embeds)
    found = torch.autograd.grad((embeds * wanted).sum(), (features, words))
    for one, other in zip(
        found, torch.autograd.grad((expected * wanted.flatten(0, 1)).sum(), (features, words)), strict=True
    ):
        torch.testing.assert_close(one, other)
    masks = [name for name, *_ in calls.seen if "masked_scatter" in name]
    assert not masks, "which counts all elements on GPUs, in 64 bits"
