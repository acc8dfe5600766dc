"""What a training run is asked to do: the recipe's `training` section, and what the user puts in its place."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from formats.errors import UsageError
from recipes.schema import Training

Part = Literal["vision", "projector", "llm"]
PARTS: tuple[Part, ...] = ("vision", "projector", "llm")
_COUNTS = ("epochs", "steps", "save_every", "keep", "log_every", "tokens_per_batch", "sequence_length", "threads")
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_COUNTS, lambda value: value >= 1, "at least 1"),
    (("learning_rate", "clip"), lambda value: value > 0, "above 0"),
    (("weight_decay", "balance"), lambda value: value >= 0, "at least 0"),
    (("warmup_ratio", "beta2"), lambda value: 0 <= value < 1, "from 0 to below 1"),
)
"""Settings, what holds for each, and how to say it; none holds for what is no number."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """A run of `model.train.train`. What is None is as the recipe of the builds says.

    Attributes:
        builds: finished builds, folders or URLs.
        out: gets metrics.jsonl, checkpoints/, report.html and final/; a run that is there goes on.
        model: a configuration (`tiny`, `9b`, `53b`) or a folder with a config.json; that of `init` if None.
        init: folder of weights to start from, in Hugging Face layout; random ones if None.
        learning_rate: at the top of the schedule.
        schedule: `cosine` (to 0) or `constant`.
        warmup_ratio: share of all steps in which the rate rises to its top.
        weight_decay: of AdamW; biases, norms and Mamba's A and D do not decay.
        trainable: of `vision`, `projector`, `llm`; the rest stays as it is, bit by bit.
        epochs: how often the builds are read.
        sequence_length: most tokens of a sequence.
        isolate: whether samples of a sequence are kept apart.
        tokens_per_batch: of one step over all processes; rounded to whole sequences.
        weights: how often an epoch reads each build; once if None.
        max_images: most images of a sequence, if bounded.
        drop_oversize: leave samples out that fit in no sequence, instead of refusing them.
        skip_damaged: leave samples out that are not what their index says, and name them in metrics.jsonl, instead of
            stopping; may change while a run goes on.
        balance: weight of the routers' load balance in the loss; `router_aux_loss_coef` of the configuration if None.
        clip: largest norm of all gradients together.
        beta2: of AdamW.
        steps: stop after so many, with the schedule of the whole run.
        seed: of weights and order.
        save_every: steps between checkpoints, and `keep`, how many of the last are kept.
        log_every: steps between what is shown; metrics.jsonl has each step.
        activation_checkpointing: compute layers again in the backward pass instead of keeping what they held.
        precision: of matrix products; bf16 on a GPU and fp32 elsewhere if None. Trained weights are held in fp32.
        threads: that read and decode for one process, and `prefetch`, the sequences made ahead.
        cache: folder for copies of remote builds.
        tensorboard: write events to OUT/tensorboard, if that package is installed.
        wandb: name of a Weights & Biases project to report to.
    """

    builds: tuple[str, ...]
    out: Path
    model: str | None = None
    init: Path | None = None
    learning_rate: float | None = None
    schedule: Literal["cosine", "constant"] | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    trainable: tuple[Part, ...] | None = None
    epochs: int | None = None
    sequence_length: int | None = None
    isolate: bool | None = None
    tokens_per_batch: int | None = None
    weights: tuple[float, ...] | None = None
    max_images: int | None = None
    drop_oversize: bool = False
    skip_damaged: bool = False
    balance: float | None = None
    clip: float = 1.0
    beta2: float = 0.999
    steps: int | None = None
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    activation_checkpointing: bool = False
    precision: Literal["bf16", "fp32"] | None = None
    threads: int = 2
    prefetch: int = 2
    cache: Path | None = None
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        if self.model is None and self.init is None:
            raise UsageError("no model: say --model tiny, 9b, 53b or a folder with a config.json, or --init CHECKPOINT")
        if unknown := [part for part in self.trainable or () if part not in PARTS]:
            raise UsageError(f"--trainable {unknown[0]}: one of {', '.join(PARTS)}")
        if self.trainable == ():
            raise UsageError(f"--trainable: name at least one of {', '.join(PARTS)}")
        for names, fits, wanted in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise UsageError(f"--{name.replace('_', '-')} {value}: {wanted}")
        if self.wandb is not None and find_spec("wandb") is None:
            raise UsageError("--wandb: that package is not installed; pip install wandb, or leave the option out")


@dataclass(frozen=True, slots=True)
class Stage:
    """What a run does once recipe and overrides are put together.

    Attributes:
        trainable: parts that learn.
        learning_rate, schedule, warmup_ratio, weight_decay, epochs, isolate: as in `TrainSettings`.
        global_batch: sequences of one step over all processes.
        sequence_length: most tokens of each.
    """

    trainable: tuple[Part, ...]
    learning_rate: float
    schedule: Literal["cosine", "constant"]
    warmup_ratio: float
    weight_decay: float
    epochs: int
    isolate: bool
    global_batch: int
    sequence_length: int

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of so many: rises evenly, then falls like a half cosine."""
        warmup = math.ceil(self.warmup_ratio * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - warmup) / max(1, steps - warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def rounds(self, processes: int) -> int:
        """Sequences of a step that each process reads.

        Raises:
            UsageError: if the batch cannot be shared out evenly.
        """
        if self.global_batch % processes:
            below = self.global_batch - self.global_batch % processes
            fitting = " or ".join(f"{n * self.sequence_length:,}" for n in (below, below + processes) if n)
            raise UsageError(
                f"a batch of {self.global_batch} sequences cannot be shared by {processes} processes;"
                f" try --tokens-per-batch {fitting}, or another number of processes"
            )
        return self.global_batch // processes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


_OF_RECIPE = ("trainable", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "epochs", "isolate")


def stage_of(
    settings: TrainSettings, manifests: Sequence[tuple[str, Mapping[str, Any]]], sequence_length: int
) -> Stage:
    """What the builds' recipes say, with the settings' own values put in their place.

    Args:
        manifests: each build's name and manifest.
        sequence_length: that the feed has chosen.

    Raises:
        UsageError: if the builds' recipes do not agree on something that the settings leave open.
    """
    trainings = [
        (name, Training.model_validate(manifest["recipe"].get("training", {}))) for name, manifest in manifests
    ]
    chosen = {key: getattr(settings, key) for key in _OF_RECIPE}
    if settings.tokens_per_batch is not None:
        chosen["global_batch"] = max(1, round(settings.tokens_per_batch / sequence_length))
    for key in (*_OF_RECIPE, "global_batch"):
        if chosen.get(key) is None:
            chosen[key] = _agreed(key, trainings)
    return Stage(**chosen, sequence_length=sequence_length)


def _agreed(key: str, trainings: Sequence[tuple[str, Training]]) -> Any:
    (first, training), *others = trainings
    for name, other in others:
        if getattr(other, key) != getattr(training, key):
            option = "tokens-per-batch" if key == "global_batch" else key.replace("_", "-")
            raise UsageError(
                f"the recipe of {first} says {key}: {_shown(getattr(training, key))}, that of {name}"
                f" {_shown(getattr(other, key))}; say which with --{option}"
            )
    return getattr(training, key)


def _shown(value: Any) -> str:
    return "[" + ", ".join(value) + "]" if isinstance(value, tuple) else str(value)


_DECIDING = ("model", "init", "weights", "max_images", "drop_oversize", "balance", "clip", "beta2", "seed", "precision")


def identity(settings: TrainSettings, stage: Stage) -> dict[str, Any]:
    """Everything but the data that decides what is learnt, as JSON has it; the rest may change while a run goes on."""
    values = {**stage.as_dict(), **{name: getattr(settings, name) for name in _DECIDING}}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
