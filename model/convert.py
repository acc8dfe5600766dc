"""From the authors' checkpoints to this project's, and from Jamba's own.

The authors' layout is an early Jamba's: every feed-forward is called `moe`, a dense one its expert 0; norms are called
`pre_moe_layernorm`, `B_layernorm`, `C_layernorm`; the tower hangs twice under its name. Their configuration is flat.
Jamba's checkpoints on the hub have today's names, and no image side.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPVisionConfig, JambaConfig

from formats.errors import UsageError
from formats.tokens import ChatTokenizer
from model.config import CLIP, LongLlavaConfig
from model.longllava import LongLlavaForConditionalGeneration
from model.saved import quiet

_TEXT = "model.language_model."
_RENAMED = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(embed_tokens|layers|final_layernorm)\b", rf"{_TEXT}\1"),
    (r"\.pre_moe_layernorm\.", ".pre_ff_layernorm."),
    (r"\.mamba\.([BC])_layernorm\.", lambda match: f".mamba.{match[1].lower()}_layernorm."),
    (r"\.moe\.", ".feed_forward."),
)
_EXPERT = re.compile(r"^(.*\.feed_forward)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def renamed(name: str) -> str:
    """A parameter's name in transformers' layout, experts still apart."""
    for pattern, to in _RENAMED:
        name = re.sub(pattern, to, name)
    return name


def convert_config(upstream: Mapping[str, Any], vision: Mapping[str, Any], image_token_id: int) -> LongLlavaConfig:
    """The configuration that the authors' flat one means.

    Args:
        upstream: their config.json.
        vision: the config.json of the CLIP tower that it names; their checkpoint does not repeat it.
        image_token_id: the id that stands for image tokens from now on (theirs is -200, one for each image).

    Raises:
        UsageError: if it asks for something that this model does not do.
    """
    asked = {
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mamba_inner_layernorms": True,
        "sliding_window": None,
        "hidden_act": "silu",
    }
    for key, only in asked.items():
        if upstream.get(key, only) != only:
            raise UsageError(f"config.json: {key} is {upstream[key]!r}; only {only!r} can be converted")
    if upstream.get("model_type") == LongLlavaConfig.model_type:
        raise UsageError(
            "config.json: model_type is 'longllava', so this is no checkpoint of the authors'; use it as it is"
        )
    known = JambaConfig().to_dict().keys() - {"architectures", "model_type", "transformers_version", "dtype"}
    text = {key: value for key, value in upstream.items() if key in known}
    tower = dict(vision.get("vision_config", vision))
    tower.pop("model_type", None)
    pooling = upstream.get("resamplePooling")
    patches = (int(tower["image_size"]) // int(tower["patch_size"])) ** 2
    return LongLlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=JambaConfig(**text),
        token_pooling=pooling,
        image_seq_length=patches if pooling is None else patches // 4,
        image_token_id=image_token_id,
    )


def load_weights(
    model: LongLlavaForConditionalGeneration,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    text_only: bool = False,
    tower_elsewhere: bool = False,
) -> bool:
    """Fills a model with a checkpoint in the authors' or Jamba's names, every parameter of it exactly once.

    Position ids, which older transformers saved with a tower, are no weights and are passed over.

    Args:
        model: of the same shape.
        tensors: names and tensors, one at a time: no second copy of the checkpoint is held.
        text_only: the checkpoint is Jamba's: tower and projector keep what they have.
        tower_elsewhere: a checkpoint without any weight of the tower will do.

    Returns:
        Whether the tower came with it.

    Raises:
        UsageError: if names or shapes do not match; lists all of them, in the checkpoint's names.
    """
    targets = _targets(model)
    if text_only:
        targets = {name: place for name, place in targets.items() if name.startswith((_TEXT, "lm_head."))}
    problems = []
    missing = set(targets)
    for name, tensor in tensors:
        ours = renamed(name)
        if ours.startswith(_TOWER) and ours.endswith(".position_ids"):
            continue
        if ours not in targets and (dense := ours.replace(".experts.0.", ".")) in targets:
            ours = dense
        if ours not in targets:
            problems.append(f"unknown: {name}")
        elif ours not in missing:
            problems.append(f"twice: {name}")
        elif targets[ours].shape != tensor.shape:
            problems.append(f"shape: {name} is {tuple(tensor.shape)}, the model has {tuple(targets[ours].shape)}")
            missing.discard(ours)
        else:
            with torch.no_grad():
                targets[ours].copy_(tensor)
            missing.discard(ours)
    tower = {name for name in targets if name.startswith(_TOWER)}
    came = bool(tower) and not tower <= missing
    if tower_elsewhere and not came:
        missing -= tower
    problems += [f"missing: {name}" for name in sorted(missing)]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        without = tower and tower <= missing
        hint = "\nIt has no tower; say with --vision which folder holds the tower's *.safetensors" if without else ""
        raise UsageError(f"the checkpoint does not fit the model ({len(problems)} tensors):\n  {shown}{more}{hint}")
    return came


def _targets(model: LongLlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: the parameters, with views of each expert instead of the fused ones."""
    targets: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name.endswith(".experts.gate_up_proj"):
            for i, gate_up in enumerate(parameter):
                gate, up = gate_up.chunk(2)
                targets[name.replace("gate_up_proj", f"{i}.gate_proj.weight")] = gate
                targets[name.replace("gate_up_proj", f"{i}.up_proj.weight")] = up
        elif name.endswith(".experts.down_proj"):
            for i, down in enumerate(parameter):
                targets[name.replace("down_proj", f"{i}.down_proj.weight")] = down
        else:
            targets[name.replace("vision_tower.vision_model.", "vision_tower.")] = parameter
    return targets


def read_tensors(folder: Path) -> Iterable[tuple[str, Tensor]]:
    """All tensors of a folder's safetensors files.

    Raises:
        UsageError: if there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"{folder}: no *.safetensors; .bin checkpoints are pickles and are not opened: load them with torch where"
            " they are trusted, and save them with safetensors"
        )
    for file in files:
        try:
            opened: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file}: cannot be read ({error}); fetch it again") from error
        with opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                yield name, opened.get_tensor(name)


def convert(
    checkpoint: Path,
    vision: Path | None,
    out: Path,
    *,
    tokenizer: Path | None = None,
    image_token_id: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> LongLlavaConfig:
    """Turns a folder in the authors' layout into one that `from_pretrained` reads.

    A checkpoint of Jamba itself becomes what training begins with: Jamba, the weights of `vision`, and a projector
    that has learnt nothing yet. A checkpoint of the authors' that lacks the tower gets the weights of `vision` too.

    Args:
        checkpoint: with config.json and *.safetensors.
        vision: folder of the CLIP tower's config.json, if it is another than openai/clip-vit-large-patch14-336; with a
            checkpoint that has no tower, of its *.safetensors too.
        out: where to; must not be there yet, and is there only once it is whole.
        tokenizer: folder of the tokenizer, which is copied; that of the checkpoint by default.
        image_token_id: as in `convert_config`; the tokenizer's by default.
        dtype: of the result.

    Returns:
        The configuration.

    Raises:
        UsageError: if something is absent or does not fit.
    """
    if out.exists():
        raise UsageError(f"{out} is there already; name another folder, or remove it")
    upstream = _json(checkpoint / "config.json")
    chat = _tokenizer(checkpoint, tokenizer)
    image = image_token_id if image_token_id is not None else chat.image_token_id if chat else _JAMBAS_IMAGE
    alone = upstream.get("model_type") == "jamba" and "resamplePooling" not in upstream
    if alone and vision is None:
        raise UsageError(
            f"{checkpoint} is Jamba, which sees nothing yet; say with --vision which folder holds the tower's"
            " config.json and *.safetensors"
        )
    pooled = {"resamplePooling": "2d"} if alone else {}
    config = convert_config({**upstream, **pooled}, _tower(upstream, vision, checkpoint), image)
    with torch.device("meta"):
        model = LongLlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device="cpu")
    came = load_weights(model, read_tensors(checkpoint), text_only=alone, tower_elsewhere=vision is not None)
    if vision is not None and not came:
        _fill_tower(model, vision)
    if alone:
        _draw_projector(model)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with quiet():
        model.save_pretrained(unfinished)
    if chat:
        chat.copy_to(unfinished)
    unfinished.replace(out)
    return config


@torch.no_grad()
def _fill_tower(model: LongLlavaForConditionalGeneration, vision: Path) -> None:
    """A tower's weights, from a whole CLIP or its image side alone.

    Raises:
        UsageError: if the weights do not fit; lists those that do not.
    """
    tower = {name: x for name, x in _targets(model).items() if name.startswith(_TOWER)}
    problems, missing = [], set(tower)
    for name, tensor in read_tensors(vision):
        ours = _TOWER + name.removeprefix("vision_model.")
        if ours not in tower:  # the text side of a whole CLIP
            continue
        missing.discard(ours)
        if tower[ours].shape == tensor.shape:
            tower[ours].copy_(tensor)
        else:
            problems.append(f"shape: {name} is {tuple(tensor.shape)}, the model has {tuple(tower[ours].shape)}")
    problems += [f"missing: {name.removeprefix(_TOWER)}" for name in sorted(missing)]
    if problems:
        raise UsageError(f"{vision} does not fit the tower ({len(problems)} tensors):\n  " + "\n  ".join(problems[:20]))


@torch.no_grad()
def _draw_projector(model: LongLlavaForConditionalGeneration) -> None:
    """A new projector, the same each time."""
    drawn = torch.Generator().manual_seed(0)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        bound = layer.in_features**-0.5  # as `torch.nn.Linear` begins
        for parameter in (layer.weight, layer.bias):
            fresh = torch.rand(parameter.shape, generator=drawn) * 2 - 1
            parameter.copy_(fresh * bound)


_TOWER = "model.vision_tower."
_JAMBAS_IMAGE = 516  # `formats.tokens.IMAGE_TOKEN` in Jamba's vocabulary
_KNOWN_TOWER = "clip-vit-large-patch14-336"


def _tower(upstream: Mapping[str, Any], vision: Path | None, checkpoint: Path) -> Mapping[str, Any]:
    """The tower's configuration; the released checkpoints only name it."""
    if vision is not None:
        return _json(vision / "config.json")
    named = str(upstream.get("mm_vision_tower"))
    if named.rstrip("/").rpartition("/")[2] != _KNOWN_TOWER:
        raise UsageError(
            f"{checkpoint}/config.json: mm_vision_tower is {named!r}, not {_KNOWN_TOWER}; say with --vision which"
            " folder holds that tower's config.json"
        )
    return CLIP


def _tokenizer(checkpoint: Path, given: Path | None) -> ChatTokenizer | None:
    if given is None and not (checkpoint / "tokenizer.json").is_file():
        return None
    return ChatTokenizer.load(str(given or checkpoint))


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: holds no JSON object; it is no model's configuration")
    return content
