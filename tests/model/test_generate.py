import pytest
import torch
from torch import Tensor

from model.cache import KeyValues
from model.generate import Settings, choose, generate, prefill
from model.longllava import LongLlavaForConditionalGeneration

Model = LongLlavaForConditionalGeneration
IMAGE = 300


@pytest.fixture
def prompt() -> tuple[Tensor, Tensor]:
    """37 words with five images of four tokens among them."""
    torch.manual_seed(5)
    pieces = torch.randint(3, 290, (6, 6))
    image = torch.full((4,), IMAGE)
    ids = torch.cat([torch.cat([words, image]) for words in pieces[:5]] + [pieces[5], torch.tensor([1])])
    return ids[None], torch.randint(0, 256, (5, 3, 56, 56), dtype=torch.uint8)


@pytest.mark.parametrize(("chunk", "at_once"), [(1, 1), (3, 2), (8, 32), (56, 1), (57, 2), (8192, 32)])
def test_a_prompt_read_in_chunks_gives_what_one_go_gives(
    small: Model, prompt: tuple[Tensor, Tensor], chunk: int, at_once: int
) -> None:
    ids, pixels = prompt
    with torch.no_grad():
        whole = small(ids, pixels).logits[0, -1]
    cache = small.new_cache(ids.shape[1])
    chunked = prefill(small, ids, pixels, cache, Settings(prefill_chunk=chunk, images_at_once=at_once))
    assert float((chunked - whole).abs().max() / whole.abs().max()) < 1e-5
    assert cache.length == ids.shape[1]


def test_a_cache_keeps_states_and_keys_and_nothing_else_of_what_was_read(
    small: Model, prompt: tuple[Tensor, Tensor]
) -> None:
    cache = small.new_cache(prompt[0].shape[1] + 1)
    prefill(small, *prompt, cache, Settings(prefill_chunk=20))
    with torch.inference_mode():
        small(torch.ones(1, 1, dtype=torch.long), cache=cache)
    for layer in cache.layers:
        kept = (layer.keys, layer.values) if isinstance(layer, KeyValues) else (layer.conv, layer.ssm)
        for tensor in kept:
            assert tensor is not None
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_greedy_tokens_are_those_of_whole_passes_without_a_cache(small: Model, prompt: tuple[Tensor, Tensor]) -> None:
    ids, pixels = prompt
    small.config.text_config.eos_token_id = None
    generated = generate(small, ids, pixels, Settings(max_new_tokens=6, prefill_chunk=10), keep_scores=True)
    with torch.no_grad():
        for i, token in enumerate(generated.tokens):
            logits = small(ids, pixels).logits[0, -1]
            assert int(logits.argmax()) == int(token)
            assert generated.scores is not None
            torch.testing.assert_close(generated.scores[i], logits, rtol=1e-4, atol=1e-4)
            ids = torch.cat([ids, token[None, None]], 1)


def test_writing_ends_with_the_end_of_text(small: Model) -> None:
    ids = torch.arange(3, 20)[None]
    first = int(generate(small, ids, settings=Settings(max_new_tokens=1)).tokens[0])
    small.config.text_config.eos_token_id = [first]
    assert generate(small, ids, settings=Settings(max_new_tokens=9)).tokens.tolist() == [first]


def test_keys_and_values_lie_where_their_layer_is(small: Model) -> None:
    small.model.language_model.layers[3].to("meta")  # stands for a second GPU
    held = [layer for layer in small.new_cache(8).layers if isinstance(layer, KeyValues)]
    assert [(layer.keys.device.type, layer.values.device.type) for layer in held] == [("cpu", "cpu"), ("meta", "meta")]


def test_transformers_options_that_mean_something_here_are_taken(small: Model) -> None:
    ids = torch.arange(3, 20)[None]
    small.config.text_config.eos_token_id = None
    plain = small.generate(ids, max_new_tokens=5)
    same = {"do_sample": False, "use_cache": True, "num_beams": 1, "top_k": None}
    assert torch.equal(small.generate(ids, max_new_tokens=5, **same), plain)
    second = int(plain[0, 18])
    for end in (second, [second], (second, 7)):
        shorter = small.generate(ids, max_new_tokens=5, eos_token_id=end)
        assert torch.equal(shorter, plain[:, : plain[0, 17:].tolist().index(second) + 18])
    drawn = small.generate(ids, max_new_tokens=5, do_sample=True, seed=3)
    assert torch.equal(drawn, small.generate(ids, max_new_tokens=5, temperature=1.0, seed=3))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"num_beams": 4}, "num_beams is 4; only 1 is supported"),
        ({"use_cache": False}, "use_cache is False; only True"),
        ({"max_length": 9}, "no option max_length; it has max_new_tokens, temperature"),
    ],
)
def test_transformers_options_that_are_not_here_are_named(small: Model, option: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small.generate(torch.arange(3, 20)[None], **option)


def test_rows_of_a_batch_are_written_as_if_alone(small: Model, prompt: tuple[Tensor, Tensor]) -> None:
    ids, pixels = prompt
    small.config.text_config.eos_token_id = None
    alone = small.generate(ids, pixels, max_new_tokens=4)
    padded = torch.cat([torch.zeros(1, 40, dtype=torch.long), torch.arange(3, 20)[None]], 1)
    mask = torch.ones(2, 57, dtype=torch.long)
    mask[0, :40] = 0
    both = small.generate(torch.cat([padded, ids]), pixels, mask, max_new_tokens=4)
    assert both[1].tolist() == alone[0].tolist()
    assert both[0, 57:].tolist() == small.generate(torch.arange(3, 20)[None], max_new_tokens=4)[0, 17:].tolist()


def test_the_same_seed_draws_the_same_text_and_another_another(small: Model) -> None:
    ids = torch.arange(3, 20)[None]
    small.config.text_config.eos_token_id = None
    drawn = [small.generate(ids, max_new_tokens=12, temperature=3.0, seed=seed).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampling_follows_the_probabilities_that_are_left() -> None:
    logits = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15]))
    drawn = torch.Generator().manual_seed(0)

    def shares(**options: float) -> list[float]:
        settings = Settings(temperature=1.0, **options)  # type: ignore[arg-type]
        tokens = torch.tensor([choose(logits, settings, drawn) for _ in range(4000)])
        return (tokens.bincount(minlength=4) / 4000).tolist()

    assert shares() == pytest.approx([0.05, 0.5, 0.3, 0.15], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(top_p=0.6) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(top_p=0.5) == [0, 1, 0, 0]


def test_prompts_and_images_that_disagree_are_refused_before_anything_is_read(
    small: Model, prompt: tuple[Tensor, Tensor]
) -> None:
    ids, pixels = prompt
    with pytest.raises(ValueError, match="20 image positions, but 4 images of 4 tokens"):
        generate(small, ids, pixels[:4])
    with pytest.raises(ValueError, match=r"the prompts have \[5\] images, but 0"):
        small.generate(ids)
    with pytest.raises(ValueError, match="at least one token"):
        generate(small, ids[:, :0])


def test_a_full_cache_says_so(small: Model) -> None:
    with pytest.raises(ValueError, match="holds 8 tokens; these would be 9"):
        small(torch.ones(1, 9, dtype=torch.long), cache=small.new_cache(8))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"prefill_chunk": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|not below 0"):
        Settings(**wrong)  # type: ignore[arg-type]
