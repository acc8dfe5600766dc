"""The whole model: saved and loaded, packed and apart, and as transformers computes it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from formats.errors import UsageError
from formats.tokens import IGNORED
from model.config import LongLlavaConfig, folder_config, named_config
from model.longllava import LongLlavaForConditionalGeneration
from model.packing import Packing
from model.sharding import checkpoint_activations

Model = LongLlavaForConditionalGeneration
IMAGE = 300


def sample(seed: int, text: int, images: int) -> tuple[Tensor, Tensor]:
    """Ids with images of four tokens after the first few words, and their pixels."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 290, (text,), generator=generator)
    ids = torch.cat([words[:3], torch.full((4 * images,), IMAGE), words[3:]])
    return ids[None], torch.randint(0, 256, (images, 3, 56, 56), dtype=torch.uint8, generator=generator)


def labels_of(ids: Tensor) -> Tensor:
    """The second half of the words is to be learnt."""
    labels = torch.where(ids == IMAGE, IGNORED, ids)
    labels[:, : ids.shape[1] // 2] = IGNORED
    return labels


SAMPLES = [sample(1, 20, 2), sample(2, 33, 1), sample(3, 9, 0)]


def packed() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The three samples in one row: ids, pixels, labels, boundaries."""
    ids = torch.cat([ids for ids, _ in SAMPLES], 1)
    bounds = [0]
    for one, _ in SAMPLES:
        bounds.append(bounds[-1] + one.shape[1])
    labels = torch.cat([labels_of(one) for one, _ in SAMPLES], 1)
    return ids, torch.cat([pixels for _, pixels in SAMPLES]), labels, bounds


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def test_packed_samples_have_the_logits_that_they_have_alone(small: Model) -> None:
    ids, pixels, _, bounds = packed()
    together = small(ids, pixels, packing=Packing.of(bounds)).logits[0]
    for (own, images), start, end in zip(SAMPLES, bounds, bounds[1:], strict=False):
        alone = small(own, images if len(images) else None).logits[0]
        assert relative(together[start:end], alone) < 1e-5


def test_packed_gradients_and_loss_are_those_of_the_samples_alone(small: Model) -> None:
    ids, pixels, labels, bounds = packed()
    output = small(ids, pixels, labels, packing=Packing.of(bounds))
    output.token_losses.sum().backward()
    together = {name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None}
    small.zero_grad()
    total = torch.tensor(0.0)
    for own, images in SAMPLES:
        losses = small(own, images if len(images) else None, labels_of(own)).token_losses
        losses.sum().backward()
        total += losses.detach().sum()
    assert relative(output.token_losses.sum(), total) < 1e-5
    for name, parameter in small.named_parameters():
        if parameter.grad is not None and not name.endswith("k_proj.bias"):  # whose true gradient is 0
            assert relative(together[name], parameter.grad) < 1e-4, name


def test_without_isolation_the_first_sample_reaches_the_last(small: Model) -> None:
    ids, pixels, _, bounds = packed()
    assert Packing.of(bounds, isolate=False) is None
    apart, through = (small(ids, pixels, packing=Packing.of(bounds, isolate=i)).logits[0] for i in (True, False))
    assert relative(through[: bounds[1]], apart[: bounds[1]]) < 1e-5
    assert relative(through[bounds[2] :], apart[bounds[2] :]) > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(small: Model, side: str) -> None:
    short, long = (torch.randint(3, 290, (1, n)) for n in (9, 15))
    pad = torch.zeros(1, 6, dtype=torch.long)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    batch = torch.cat([row, long])
    mask = torch.ones_like(batch)
    own = slice(6, None) if side == "left" else slice(0, 9)
    mask[0] = 0
    mask[0, own] = 1
    logits = small(batch, attention_mask=mask).logits
    assert relative(logits[0, own], small(short).logits[0]) < 1e-5
    assert relative(logits[1], small(long).logits[0]) < 1e-5


def test_the_loss_is_torchs_over_the_supervised_tokens(small: Model) -> None:
    ids, pixels = SAMPLES[0]
    labels = labels_of(ids)
    output = small(ids, pixels, labels, logits_to_keep=0)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:], ignore_index=IGNORED)
    torch.testing.assert_close(output.loss, expected)
    assert output.token_positions.tolist() == (labels[0] != IGNORED).nonzero().flatten().tolist()
    assert small(ids, pixels, labels).logits is None


def test_a_long_loss_in_chunks_is_the_loss_in_one(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, pixels = SAMPLES[0]
    whole = small(ids, pixels, labels_of(ids)).token_losses
    monkeypatch.setattr("model.loss.CHUNK", 3)
    torch.testing.assert_close(small(ids, pixels, labels_of(ids)).token_losses, whole)


def test_nothing_to_learn_is_a_loss_of_zero_with_gradients(small: Model) -> None:
    ids, pixels = SAMPLES[0]
    loss = small(ids, pixels, torch.full_like(ids, IGNORED)).loss
    loss.backward()
    assert loss.item() == 0


def test_activation_checkpointing_changes_no_gradient(small: Model) -> None:
    ids, pixels = SAMPLES[0]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            renamed = getattr(small, "activation_checkpointing_enable", None)  # its name since transformers 5.23
            (renamed or small.gradient_checkpointing_enable)({"use_reentrant": False})
        small.train().zero_grad()
        small(ids, pixels, labels_of(ids)).loss.backward()
        gradients.append([p.grad.clone() for p in small.model.language_model.parameters()])
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_checkpoints_of_layers_and_of_mixers_within_them_change_no_gradient(small: Model) -> None:
    ids, pixels, labels, bounds = packed()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(small)
        small.train().zero_grad()
        output = small(ids, pixels, labels, packing=Packing.of(bounds))
        (output.loss + output.balance).backward()
        gradients.append({name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, before in gradients[0].items():
        assert torch.equal(gradients[1][name], before), name


def test_saved_and_loaded_it_is_the_same_bit_by_bit(small: Model, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    for (name, ours), (other, theirs) in zip(small.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name
    assert folder_config(tmp_path).to_dict() == small.config.to_dict()
    ids, pixels = SAMPLES[0]
    assert torch.equal(loaded(ids, pixels).logits, small(ids, pixels).logits)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "model.language_model.layers.1.feed_forward.experts.3.up_proj.weight" in file.keys()  # noqa: SIM118


def test_a_and_d_stay_in_float32_when_the_rest_is_loaded_in_bfloat16(small: Model, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name.rsplit(".", 1)[1] for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D"}
    ids, pixels = SAMPLES[0]
    exact = small(ids, pixels).logits.detach()
    difference = loaded(ids, pixels).logits.detach() - exact
    assert float(difference.norm() / exact.norm()) < 0.15, "a token near a tie may take another expert, but few do"


@pytest.mark.filterwarnings("ignore")  # transformers tells that it goes the slow way
def test_transformers_own_llava_with_jamba_reads_the_files_and_says_the_same(small: Model, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    composed = LlavaConfig(
        vision_config=small.config.vision_config, text_config=small.config.text_config, image_token_index=IMAGE
    )
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path, config=composed).eval()
    ids = SAMPLES[2][0]
    assert relative(small(ids).logits, theirs(input_ids=ids).logits) < 1e-5


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_transformers_auto_classes_know_the_model(small: Model, tmp_path: Path, auto: type) -> None:
    small.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LongLlavaConfig)
    loaded = auto.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert isinstance(loaded, Model)
    assert torch.equal(loaded.lm_head.weight, small.lm_head.weight)


def test_what_transformers_callers_pass_is_taken_or_refused_in_words(small: Model) -> None:
    ids = SAMPLES[2][0]
    plain = small(ids).logits
    assert torch.equal(small(ids, use_cache=False, return_dict=True, inputs_embeds=None).logits, plain)
    for option, said in (
        ({"use_cache": True}, "pass cache=model.new_cache"),
        ({"return_dict": False}, r"result\.to_tuple"),
        ({"inputs_embeds": torch.zeros(1, 9, 32)}, "embeddings are made of input_ids"),
    ):
        with pytest.raises(ValueError, match=said):
            small(ids, **option)


def test_images_that_do_not_match_the_ids_are_an_error_with_both_counts(small: Model) -> None:
    ids, pixels = SAMPLES[0]
    with pytest.raises(ValueError, match=r"8 image positions \(2 images of 4 tokens\), but 1 images"):
        small(ids, pixels[:1])
    with pytest.raises(ValueError, match="but 0 images"):
        small(ids)


def test_packing_and_cache_exclude_each_other(small: Model) -> None:
    with pytest.raises(ValueError, match="one sample a row"):
        small(torch.ones(1, 4, dtype=torch.long), packing=Packing.of([0, 2, 4]), cache=small.new_cache(8))


@pytest.mark.parametrize("rows", [([0, 3], [0, 4]), ([1, 3],), ([0, 3, 3],), ([],)])
def test_boundaries_that_do_not_cut_rows_are_refused(rows: tuple[list[int], ...]) -> None:
    with pytest.raises(ValueError, match="boundaries must rise"):
        Packing.of(*rows)


@pytest.mark.parametrize("name", ["53b", "9b", "tiny"])
def test_the_configurations_have_jambas_rhythm(name: str) -> None:
    text = named_config(name).text_config
    assert text.layers_block_type.count("mamba") == 7 * text.layers_block_type.count("attention")
    assert set(text.layers_num_experts) == ({1} if name == "9b" else {1, text.num_experts})


@pytest.mark.parametrize(("name", "billions"), [("53b", 51.57), ("9b", 9.3)])
def test_a_configuration_has_as_many_parameters_as_its_name_says(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = Model(named_config(name))
    text = sum(p.numel() for p in (*model.model.language_model.parameters(), *model.lm_head.parameters()))
    assert text / 1e9 == pytest.approx(billions, abs=0.2)


def test_pooling_that_cannot_leave_so_many_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match=r"image_seq_length 100 .* 576 patches .* None"):
        LongLlavaConfig(token_pooling=None, image_seq_length=100)
    with pytest.raises(UsageError, match="token_pooling is '3d'"):
        LongLlavaConfig(token_pooling="3d")  # type: ignore[arg-type]


def test_an_unknown_model_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="53b, 9b, tiny"):
        named_config("13b")
    (tmp_path / "config.json").write_text('{"model_type": "llava_jamba"}')
    with pytest.raises(UsageError, match=r"'llava_jamba', not 'longllava'.*longllava convert"):
        named_config(str(tmp_path))
