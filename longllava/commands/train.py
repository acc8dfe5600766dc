"""The command that trains: train."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from formats.errors import UsageError
from longllava.commands.terminal import print_json, program, stderr, stdout

Builds = Annotated[list[str], typer.Argument(help="Folders or URLs of finished builds.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", help="Where to put the run; one that is there goes on.")]
Model = Annotated[
    str | None, typer.Option("--model", help="tiny, 9b, 53b or a folder with a config.json; that of --init by default.")
]
Init = Annotated[
    Path | None, typer.Option("--init", metavar="CKPT", help="Folder of weights to start from, such as RUN/final.")
]


def train(
    builds: Builds,
    out: Out,
    model: Model = None,
    init: Init = None,
    learning_rate: Annotated[float | None, typer.Option(help="At the top of the schedule.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or constant.")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Share of steps in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    trainable: Annotated[str | None, typer.Option(help="Of vision,projector,llm, separated by commas.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often the builds are read.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Most tokens of a sequence.")] = None,
    isolate: Annotated[
        bool | None, typer.Option("--isolate/--no-isolate", help="Keep samples of a sequence apart.")
    ] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="Tokens of a step over all processes.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="How often an epoch reads a build; one for each.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Most images of a sequence.")] = None,
    drop_oversize: Annotated[bool, typer.Option("--drop-oversize", help="Leave out samples that do not fit.")] = False,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out damaged samples; metrics.jsonl names them.")
    ] = False,
    balance: Annotated[float | None, typer.Option(help="Weight of the experts' load balance in the loss.")] = None,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Stop after so many; the same command with more goes on.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(help="Checkpoints that are kept.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between lines where there is no terminal.")] = 10,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, more computing.")
    ] = False,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32; bf16 on GPUs by default.")] = None,
    threads: Annotated[int, typer.Option(help="Threads that read and decode, for each process.")] = 2,
    cache: Annotated[Path | None, typer.Option(help="Folder for copies of builds behind URLs.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write events for TensorBoard, if that is installed.")] = True,
    wandb: Annotated[str | None, typer.Option(metavar="PROJECT", help="Report to Weights & Biases.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done and what memory it takes.")
    ] = False,
    gpus: Annotated[int | None, typer.Option(help="With --dry-run: so many, instead of those of this launch.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Train a stage: what is learnt, and how, is said by the recipes of the builds unless an option says otherwise.

    One process computes on one GPU; `torchrun` and Slurm start many, see docs/training.md.

    Example: longllava train demo/builds/align --model tiny --out runs/align --steps 5 --sequence-length 4096

    Example: torchrun --nproc-per-node 8 -m longllava train builds/single_image --init runs/align/final --out runs/two
    """
    given = dict(locals())
    for name in ("dry_run", "gpus", "json_output", "weight", "builds", "trainable"):
        given.pop(name)
    settings = _settings(builds, trainable, weight, given)
    if dry_run:
        _dry_run(settings, gpus, json_output)
        return
    from model.train import train as run

    with _shown(json_output) as watch:
        final = run(settings, watch)
    if not _first():
        return
    if json_output:
        from model.metrics import read_metrics

        print_json({"final": str(final), "last": read_metrics(out)[-1]})
        return
    stdout().print(f"{final}: model, tokenizer and builds.json; {out}/report.html has the curves", highlight=False)
    stdout().print(f"next: {program()} train BUILD --init {final} --out …", markup=False, highlight=False)


def _settings(builds: list[str], trainable: str | None, weight: list[float] | None, given: Mapping[str, Any]) -> Any:
    from model.stage import TrainSettings

    for name, known in (("schedule", ("cosine", "constant")), ("precision", ("bf16", "fp32"))):
        if given[name] is not None and given[name] not in known:
            raise UsageError(f"--{name} {given[name]}: one of {', '.join(known)}")
    parts: Any = tuple(part.strip() for part in trainable.split(",")) if trainable is not None else None
    return TrainSettings(builds=tuple(builds), trainable=parts, weights=tuple(weight) if weight else None, **given)


def _first() -> bool:
    """Whether this is the process of a launch that speaks to the user."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@contextmanager
def _shown(json_output: bool) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """Shows steps on stderr, in the first process."""
    from longllava.display_training import steps_on

    if not _first() or json_output:
        yield None
        return
    with steps_on(stderr()) as watch:
        yield watch


def _dry_run(settings: Any, gpus: int | None, json_output: bool) -> None:
    from longllava.display_training import outline_tables
    from model.outline import outline

    result = outline(settings, gpus)
    if json_output:
        print_json(result)
        return
    for table in outline_tables(result):
        stdout().print(table)
