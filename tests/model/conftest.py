"""Tiny models for the tests of `model/`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from formats.tokens import ChatTokenizer
from model.config import LongLlavaConfig, named_config
from model.longllava import LongLlavaForConditionalGeneration

IMAGE = 300

torch.set_num_threads(1)  # models this small only lose by more


@pytest.fixture(scope="session")
def small_config() -> LongLlavaConfig:
    """One Mamba and one attention layer with experts, images of four tokens: as small as a whole model gets."""
    config = named_config("tiny").to_dict()
    config["vision_config"] |= {"image_size": 56, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    config["text_config"] |= {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_experts": 4,
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 2,
    }  # fmt: skip
    return LongLlavaConfig(**config | {"image_seq_length": 4, "image_token_id": IMAGE})


@pytest.fixture
def small(small_config: LongLlavaConfig) -> LongLlavaForConditionalGeneration:
    """A random model; weights are spread wide, so that mistakes show."""
    torch.manual_seed(0)
    model = LongLlavaForConditionalGeneration(small_config).eval()
    spread(model)
    return model


def spread(model: LongLlavaForConditionalGeneration) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name and "A_log" not in name:
                parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1)


class Calls(TorchDispatchMode):
    """Every operation's name, the bytes of what it gives, and whether attention might then have taken cuDNN."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor))
        self.seen.append((func.__name__, made, torch.backends.cuda.cudnn_sdp_enabled()))
        return result


@pytest.fixture(scope="session")
def watched() -> type[Calls]:
    return Calls


class Parity:
    """What the authors' own code computed: configuration, weights, images, cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "numeric_meta.json").read_text())

    def json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name).read_text())
        return content


@pytest.fixture(scope="session")
def parity(shared: Path) -> Parity:
    folder = shared / "parity"
    if not (folder / "cases.safetensors").is_file():
        pytest.skip(f"no reference outputs at {folder}")
    return Parity(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, small_config: LongLlavaConfig, tokenizer_folder: Path) -> Path:
    """A small model as it is saved, its tokenizer with it; images are 336 pixels wide, as the processor makes them."""
    tokenizer = ChatTokenizer.load(str(tokenizer_folder))
    fields = small_config.to_dict()
    fields["vision_config"] |= {"image_size": 336, "patch_size": 56}
    fields["text_config"] |= {"vocab_size": tokenizer.vocabulary_size}
    torch.manual_seed(0)
    model = LongLlavaForConditionalGeneration(
        LongLlavaConfig(**fields | {"image_token_id": tokenizer.image_token_id})
    ).eval()
    spread(model)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tokenizer.copy_to(folder)
    return folder
