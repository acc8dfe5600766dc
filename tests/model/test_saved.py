import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.errors import UsageError
from model.int8 import Int8Linear
from model.saved import load_model, load_tokenizer


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_saved_model_says_what_it_said_before(saved: Path, copy: Path) -> None:
    ids = torch.arange(40, 60)[None]
    assert torch.equal(load_model(saved)(ids).logits, load_model(copy, device="cpu")(ids).logits)


def test_eight_bits_move_what_a_model_says_a_little(saved: Path) -> None:
    exact, small = load_model(saved), load_model(saved, int8=True)
    ids = torch.arange(40, 99)[None]
    with torch.no_grad():
        before, after = exact(ids).logits, small(ids).logits
    difference = (after - before).norm() / before.norm()
    assert 0 < float(difference) < 0.3  # two models that have nothing in common differ by 1.4
    assert sum(isinstance(module, Int8Linear) for module in small.modules()) > 4


def test_a_folder_that_is_no_model_says_what_to_give(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UsageError, match="absent: no such folder; give a folder that"):
        load_model(tmp_path / "absent")
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match=r"run holds no config\.json"):
        load_model(tmp_path / "run")
    copy.rename(tmp_path / "run/final")
    with pytest.raises(UsageError, match=r"run is a training run; its model is .*final"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "llava_jamba"}, "'llava_jamba', not 'longllava'; `longllava convert`"),
        ({"image_seq_length": 7}, "image_seq_length 7 cannot come from"),
        ({"text_config": 7}, r"config\.json cannot be read"),
    ],
)
def test_a_configuration_of_something_else_is_named(copy: Path, fields: dict[str, object], complaint: str) -> None:
    change(copy, **fields)
    with pytest.raises(UsageError, match=complaint):
        load_model(copy)


def test_a_configuration_that_is_no_json_is_named(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json"):
        load_model(copy)


def test_weights_that_are_cut_off_are_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="copy: its weights cannot be read"):
        load_model(copy)
    weights.unlink()
    with pytest.raises(UsageError, match=r"holds no model\.safetensors or"):
        load_model(copy)


def test_weights_that_are_missing_or_too_many_are_never_made_up(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["extra"] = torch.ones(2)
    del tensors["lm_head.weight"]
    norm = "model.language_model.final_layernorm.weight"
    tensors[norm] = torch.ones(3)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError) as caught:
        load_model(copy)
    said = str(caught.value)
    assert "do not belong together" in said
    assert [line.strip() for line in said.splitlines()[1:]] == [
        "1 missing: lm_head.weight",
        "1 unknown: extra",
        f"1 of another shape: {norm}",
    ]


def test_a_device_that_is_not_there_is_named(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"--device cuda:99: .*; try cpu"):
        load_model(saved, device="cuda:99")
    with pytest.raises(UsageError, match=r"--device toaster: .*; try cpu"):
        load_model(saved, device="toaster")


def test_the_tokenizer_lies_with_the_model_or_below_or_where_one_says(copy: Path, tmp_path: Path) -> None:
    own = load_tokenizer(copy).fingerprint
    (copy / "tokenizer").mkdir()
    (copy / "tokenizer.json").rename(copy / "tokenizer/tokenizer.json")
    assert load_tokenizer(copy).fingerprint == own
    (copy / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"copy holds no tokenizer\.json; say with --tokenizer"):
        load_tokenizer(copy)
    assert load_tokenizer(copy, tmp_path / "elsewhere").fingerprint == own
    (tmp_path / "elsewhere/tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be read .*; copy it again"):
        load_tokenizer(copy, tmp_path / "elsewhere")
