"""A saved model and its tokenizer, or an error that says which file is wrong and what to do.

transformers fills weights that a checkpoint lacks with random numbers and a warning; here that is an error.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from formats.errors import UsageError
from formats.tokens import ChatTokenizer
from model.config import LongLlavaConfig, folder_config
from model.int8 import quantise
from model.longllava import LongLlavaForConditionalGeneration

_WHERE_FROM = "give a folder that `longllava train` (OUT/final) or `longllava convert` left"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_LISTED = 5


def load_model(
    folder: Path, *, device: str | None = None, int8: bool = False, dtype: torch.dtype | None = None
) -> LongLlavaForConditionalGeneration:
    """A saved model, ready to write.

    Args:
        folder: in the layout of `save_pretrained`.
        device: such as "cpu" or "cuda:1"; the first GPU by default, the CPU without one.
        int8: whether large matrices of the language model become int8, before they go to the device.
        dtype: of the weights; as they were saved by default.

    Raises:
        UsageError: if there is none, or if it is not whole.
    """
    config = _config(folder)
    chosen = _device(device)
    load: Any = LongLlavaForConditionalGeneration.from_pretrained
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, found = load(folder, config=config, dtype=dtype or "auto", **options)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder}: its weights cannot be read ({error}); copy or convert them again") from error
    _refuse_partial(folder, found)
    if int8:
        quantise(model.model.language_model)
    loaded: LongLlavaForConditionalGeneration = model.to(chosen).eval()
    return loaded


def load_tokenizer(folder: Path, given: Path | None = None) -> ChatTokenizer:
    """A saved model's tokenizer.

    Args:
        folder: of the model; the tokenizer lies there or in tokenizer/ below.
        given: folder of another.

    Raises:
        UsageError: if there is none.
    """
    places = [given] if given else [folder, folder / "tokenizer"]
    for place in places:
        if (place / "tokenizer.json").is_file():
            try:
                return ChatTokenizer(place / "tokenizer.json")
            except UsageError:
                raise
            except Exception as error:  # the library raises bare ones
                raise UsageError(f"{place}/tokenizer.json cannot be read ({error}); copy it again") from error
    raise UsageError(
        f"{places[0]} holds no tokenizer.json; say with --tokenizer which folder does, such as the tokenizer/"
        " of a build that the model was trained on"
    )


def _config(folder: Path) -> LongLlavaConfig:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; {_WHERE_FROM}")
    if not (folder / "config.json").is_file():
        if (folder / "final" / "config.json").is_file():
            raise UsageError(f"{folder} is a training run; its model is {folder / 'final'}")
        raise UsageError(f"{folder} holds no config.json, so it is no saved model; {_WHERE_FROM}")
    try:
        config = folder_config(folder)
    except UsageError:
        raise
    except Exception as error:  # transformers raises many kinds over fields of a wrong type
        raise UsageError(f"{folder}/config.json cannot be read ({error}); copy or convert it again") from error
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UsageError(f"{folder} holds no {' or '.join(_WEIGHTS)}; {_WHERE_FROM}")
    return config


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}; try cpu") from error
    return device


def _refuse_partial(folder: Path, found: dict[str, Any]) -> None:
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "unknown": sorted(found["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
    }
    said = [f"{len(names)} {kind}: {', '.join(names[:_LISTED])}" for kind, names in wrong.items() if names]
    if said:
        raise UsageError(f"{folder}: weights and config.json do not belong together\n  " + "\n  ".join(said))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' report of what it loaded to itself, and its progress bars off what is no terminal."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
