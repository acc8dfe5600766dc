"""Checkpoints in the authors' layout, here made from a model's own weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.errors import UsageError
from model.convert import convert, convert_config, load_weights, read_tensors
from model.longllava import LongLlavaForConditionalGeneration
from model.saved import load_tokenizer

Model = LongLlavaForConditionalGeneration


def upstream(model: Model) -> dict[str, Tensor]:
    """A model's weights under the authors' names."""
    tensors: dict[str, Tensor] = {}
    for ours, tensor in file_tensors(model).items():
        name = ours.replace("model.language_model.", "model.").replace("pre_ff_layernorm", "pre_moe_layernorm")
        name = re.sub(r"([bc])_layernorm", lambda match: f"{match[1].upper()}_layernorm", name)
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
        name = re.sub(r"feed_forward\.(\w+_proj)\.weight", r"moe.experts.0.\1.weight", name)
        name = name.replace("feed_forward", "moe")
        tensors[name] = tensor
    return tensors


def file_tensors(model: Model) -> dict[str, Tensor]:
    """A model's weights as today's files have them, experts apart."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            for i, fused in enumerate(tensor):
                for part, half in zip(("gate", "up"), fused.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{i}.{part}_proj.weight")] = half.clone()
        elif name.endswith("experts.down_proj"):
            for i, down in enumerate(tensor):
                tensors[name.replace("down_proj", f"{i}.down_proj.weight")] = down.clone()
        else:
            tensors[name] = tensor
    return tensors


def blank(model: Model) -> Model:
    return Model(model.config).eval()


def test_every_weight_arrives(small: Model) -> None:
    loaded = blank(small)
    load_weights(loaded, upstream(small).items())
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_folder_is_converted_to_one_that_loads(small: Model, tmp_path: Path) -> None:
    source, vision = tmp_path / "source", tmp_path / "vision"
    source.mkdir()
    vision.mkdir()
    save_file(upstream(small), source / "model.safetensors")
    text = small.config.text_config.to_dict() | {"model_type": "llava_jamba", "resamplePooling": "2d"}
    (source / "config.json").write_text(json.dumps(text))
    (vision / "config.json").write_text(small.config.vision_config.to_json_string())
    convert(source, vision, tmp_path / "out", image_token_id=300, dtype=torch.float32)
    loaded = Model.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, small(ids).logits)


def test_jambas_own_weights_fill_the_text_side_only(small: Model) -> None:
    ours = upstream(small).items()
    text = {name: tensor for name, tensor in ours if "vision_tower" not in name and "mm_projector" not in name}
    loaded = blank(small)
    before = loaded.model.multi_modal_projector.linear_1.weight.clone()
    load_weights(loaded, text.items(), text_only=True)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    assert torch.equal(loaded.model.multi_modal_projector.linear_1.weight, before)


def test_jamba_and_a_tower_become_what_training_begins_with(small: Model, tmp_path: Path) -> None:
    jamba, clip = tmp_path / "jamba", tmp_path / "clip"
    for folder, prefix, to in (
        (jamba, "model.language_model.", "model."),
        (clip, "model.vision_tower.", "vision_model."),
    ):
        folder.mkdir()
        own = {name: x for name, x in file_tensors(small).items() if name.startswith(prefix)}
        save_file({name.replace(prefix, to): x for name, x in own.items()}, folder / "model.safetensors")
    save_file({"lm_head.weight": small.lm_head.weight.detach()}, jamba / "model-2.safetensors")
    (jamba / "config.json").write_text(small.config.text_config.to_json_string(use_diff=False))
    (clip / "config.json").write_text(json.dumps({"vision_config": small.config.vision_config.to_dict()}))
    with pytest.raises(UsageError, match="is Jamba, which sees nothing yet; say with --vision"):
        convert(jamba, None, tmp_path / "out")
    for out in ("out", "again"):
        convert(jamba, clip, tmp_path / out, image_token_id=300, dtype=torch.float32)
    loaded, again = (Model.from_pretrained(tmp_path / out).state_dict() for out in ("out", "again"))
    for name, tensor in small.state_dict().items():
        read = torch.equal(loaded[name], again[name]) and torch.equal(loaded[name], tensor) == ("projector" not in name)
        assert read, name
    pixels = torch.rand(1, 3, 56, 56)
    assert Model.from_pretrained(tmp_path / "out").model.image_features(pixels).isfinite().all()


@pytest.fixture
def towerless(small: Model, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in the authors' layout without the tower, and the tower's own folder."""
    source, clip = tmp_path / "source", tmp_path / "clip"
    for folder in (source, clip):
        folder.mkdir()
    tower = {name: x for name, x in file_tensors(small).items() if name.startswith("model.vision_tower.")}
    save_file({name: x for name, x in upstream(small).items() if "vision_tower" not in name}, source / "a.safetensors")
    moved = {name.replace("model.vision_tower.", "vision_model."): x for name, x in tower.items()}
    save_file(moved, clip / "model.safetensors")
    text = small.config.text_config.to_dict() | {"model_type": "llava_jamba", "resamplePooling": "2d"}
    (source / "config.json").write_text(json.dumps(text))
    (clip / "config.json").write_text(small.config.vision_config.to_json_string())
    return source, clip


def test_a_tower_that_the_checkpoint_lacks_comes_from_its_own_folder(
    small: Model, towerless: tuple[Path, Path], tmp_path: Path
) -> None:
    source, clip = towerless
    with pytest.raises(UsageError, match=r"(?s)missing: model\.vision_tower.*\nIt has no tower; say with --vision"):
        load_weights(blank(small), read_tensors(source))
    convert(source, clip, tmp_path / "out", image_token_id=300, dtype=torch.float32)
    loaded = Model.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_half_a_tower_in_a_checkpoint_is_refused_by_name(
    small: Model, towerless: tuple[Path, Path], tmp_path: Path
) -> None:
    source, clip = towerless
    names = [name for name in upstream(small) if "vision_tower" in name]
    save_file({names[0]: upstream(small)[names[0]].clone()}, source / "b.safetensors")
    with pytest.raises(UsageError, match=rf"\({len(names) - 1} tensors\):\n  missing: model.vision_tower"):
        convert(source, clip, tmp_path / "out", image_token_id=300)


def test_position_ids_of_older_checkpoints_are_passed_over(small: Model) -> None:
    name = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    loaded = blank(small)
    load_weights(loaded, {**upstream(small), name: torch.arange(17)[None]}.items())
    assert torch.equal(loaded.lm_head.weight, small.lm_head.weight)
    with pytest.raises(UsageError, match=r"\(1 tensors\):\n  unknown: model.layers.0.position_ids"):
        load_weights(blank(small), {**upstream(small), "model.layers.0.position_ids": torch.zeros(1)}.items())


def test_every_tensor_that_does_not_fit_is_named(small: Model) -> None:
    tensors = upstream(small)
    del tensors["model.layers.1.moe.experts.2.up_proj.weight"]
    tensors["model.layers.9.mamba.D"] = torch.ones(4)
    tensors["lm_head.weight"] = torch.ones(3, 3)
    with pytest.raises(UsageError) as caught:
        load_weights(blank(small), tensors.items())
    assert "unknown: model.layers.9.mamba.D" in str(caught.value)
    assert "shape: lm_head.weight is (3, 3), the model has (320, 32)" in str(caught.value)
    assert "missing: model.language_model.layers.1.feed_forward.experts.2.up_proj.weight" in str(caught.value)
    assert "(3 tensors)" in str(caught.value)


def test_a_tensor_given_twice_is_named(small: Model) -> None:
    tensors = list(upstream(small).items())
    with pytest.raises(UsageError, match=r"twice: lm_head\.weight"):
        load_weights(blank(small), [*tensors, ("lm_head.weight", small.lm_head.weight)])


@pytest.mark.parametrize(
    ("key", "value"), [("mm_vision_select_layer", -1), ("mm_projector_type", "linear"), ("sliding_window", 512)]
)
def test_a_configuration_that_means_another_function_is_refused(small: Model, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{key} is {value!r}; only"):
        convert_config({key: value}, small.config.vision_config.to_dict(), 300)


def test_a_folder_of_pickles_is_not_opened(small: Model, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(small.config.text_config.to_json_string())
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "config.json").write_text(small.config.vision_config.to_json_string())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        convert(tmp_path, vision, tmp_path / "out")
    with pytest.raises(UsageError, match=r"absent/config\.json"):
        convert(tmp_path / "absent", vision, tmp_path / "out")


def test_the_tower_is_known_by_its_name_or_asked_for(small: Model, tmp_path: Path) -> None:
    text = small.config.text_config.to_dict() | {"model_type": "llava_jamba", "mm_vision_tower": "siglip-so400m"}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(UsageError, match=r"mm_vision_tower is 'siglip-so400m', not clip-vit.*; say with --vision"):
        convert(tmp_path, None, tmp_path / "out")
    text["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):  # the tower is not what is missing
        convert(tmp_path, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_checkpoint_are_named(small: Model, tmp_path: Path) -> None:
    tower = small.config.vision_config.to_dict()
    with pytest.raises(UsageError, match="this is no checkpoint of the authors'; use it as it is"):
        convert_config({"model_type": "longllava"}, tower, 300)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"config\.json: holds no JSON object"):
        convert(tmp_path, None, tmp_path / "out")
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UsageError, match=r"model\.safetensors: cannot be read .*; fetch it again"):
        list(read_tensors(tmp_path))


def test_the_tokenizer_of_a_checkpoint_comes_along(small: Model, tmp_path: Path, tokenizer_folder: Path) -> None:
    source, vision = tmp_path / "source", tmp_path / "vision"
    source.mkdir()
    vision.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.json", source)
    save_file(upstream(small), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(small.config.text_config.to_dict() | {"resamplePooling": "2d"}))
    (vision / "config.json").write_text(small.config.vision_config.to_json_string())
    config = convert(source, vision, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").image_token_id == config.image_token_id
    with pytest.raises(UsageError, match="is there already"):
        convert(source, vision, tmp_path / "out")
