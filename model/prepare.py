"""Makes the model of a run: its configuration, its weights, spread over the processes, and its optimiser."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.errors import UsageError
from formats.tokens import TOKENS_PER_IMAGE, ChatTokenizer
from model.budget import Shape
from model.config import LongLlavaConfig, folder_config, named_config
from model.longllava import LongLlavaForConditionalGeneration
from model.processor import Processor
from model.sharding import checkpoint_activations, flatten_experts, freeze, optimiser_of, shard
from model.stage import Stage, TrainSettings
from model.weights import Folder, file_names, fill_buffers, load
from model.world import World


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that can learn.

    Attributes:
        dtypes: what each parameter is written in at the end, by name: what it was read in.
        balance: weight of the load balance in the loss.
        processor: that belongs to it.
        init: the folder of its first weights, if it had one.
    """

    model: LongLlavaForConditionalGeneration
    optimiser: torch.optim.AdamW
    dtypes: Mapping[str, torch.dtype]
    balance: float
    shape: Shape
    processor: Processor
    init: Path | None


def starting_folder(settings: TrainSettings) -> Path | None:
    """The folder that a run's first weights come from: `init`, or `model` if that is a folder with weights."""
    if settings.init is not None:
        return settings.init
    folder = Path(settings.model or "")
    return folder if settings.model and any(folder.glob("*.safetensors")) else None


def configuration(settings: TrainSettings, tokenizer: ChatTokenizer) -> LongLlavaConfig:
    """The configuration of a run's model; a new model takes the tokenizer's word for an image.

    Raises:
        UsageError: if model, weights and builds do not belong together.
    """
    init = starting_folder(settings)
    if init is not None and not (init / "config.json").is_file():
        raise UsageError(f"--init {init}: no config.json there; give a folder such as another run's OUT/final")
    config = folder_config(init) if init else named_config(str(settings.model))
    if init and settings.model and shape_of(named_config(settings.model)) != shape_of(config):
        raise UsageError(f"--init {init} is a model of another shape than --model {settings.model}; leave --model out")
    if not init:
        config.image_token_id = tokenizer.image_token_id
    Processor.of(config, tokenizer)
    if config.image_seq_length != TOKENS_PER_IMAGE:
        raise UsageError(
            f"the model makes {config.image_seq_length} tokens of an image, the builds count {TOKENS_PER_IMAGE}"
        )
    return config


def prepare(settings: TrainSettings, stage: Stage, tokenizer: ChatTokenizer, world: World) -> Prepared:
    """Makes the model.

    Raises:
        UsageError: if model, weights and builds do not belong together.
    """
    config = configuration(settings, tokenizer)
    init = starting_folder(settings)
    compute = compute_dtype(settings, world.device)
    if init is None:
        model, dtypes = _random(config, settings.seed), dict[str, torch.dtype]()
        _spread(model, stage, world, compute)
    else:
        with Folder(init) as folder:
            model, dtypes = _empty(config, folder)
            _spread(model, stage, world, compute)
            model.to_empty(device=world.device)
            fill_buffers(model)
            load(model, folder)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    model.train()
    optimiser = optimiser_of(model, stage.learning_rate, stage.weight_decay, settings.beta2, world.device)
    coefficient = settings.balance if settings.balance is not None else config.text_config.router_aux_loss_coef
    return Prepared(
        model=model,
        optimiser=optimiser,
        dtypes=dtypes,
        balance=coefficient if "llm" in stage.trainable else 0.0,
        shape=shape_of(config),
        processor=Processor.of(config, tokenizer),
        init=init,
    )


def compute_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """What matrix products are made in."""
    named = settings.precision or ("bf16" if device.type == "cuda" else "fp32")
    return torch.bfloat16 if named == "bf16" else torch.float32


def _random(config: LongLlavaConfig, seed: int) -> LongLlavaForConditionalGeneration:
    """A new model, the same in every process, its experts flat."""
    torch.manual_seed(seed)
    model = LongLlavaForConditionalGeneration(config)
    flatten_experts(model)
    return model


def _empty(config: LongLlavaConfig, folder: Folder) -> tuple[LongLlavaForConditionalGeneration, dict[str, torch.dtype]]:
    """A model without memory that is as a folder's weights are, experts flat, and what each of those is stored in."""
    experts = config.text_config.num_experts
    with torch.device("meta"):
        model = LongLlavaForConditionalGeneration(config)
    flatten_experts(model)
    folder.check(model, experts)
    dtypes = {name: folder.dtype(file_names(name, experts)[0]) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return model, dtypes


def _spread(model: LongLlavaForConditionalGeneration, stage: Stage, world: World, compute: torch.dtype) -> None:
    freeze(model, stage.trainable)
    shard(model, world, compute)


def shape_of(config: LongLlavaConfig) -> Shape:
    """The numbers of a configuration that costs depend on."""
    return Shape.of(json.loads(config.to_json_string(use_diff=False)))
