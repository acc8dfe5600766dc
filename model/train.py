"""Training: a stage's builds in, a model in Hugging Face layout out. `train` is the main loop.

OUT/run.json          settings that decide what is learnt; another run is refused
OUT/metrics.jsonl     a line a step
OUT/checkpoints/      see `model.checkpoint`
OUT/tensorboard/      if that package is installed
OUT/report.html       loss and speed, drawn
OUT/final/            config.json, model*.safetensors, tokenizer, builds.json: what it has seen
"""

import fcntl
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from formats.errors import UsageError
from formats.manifest import write_atomically
from model.checkpoint import Checkpoints
from model.feed import Feed, PackedSequence
from model.final import BUILDS, FINAL, write_final
from model.learner import Learner, memory_explained
from model.metrics import Log, Watch
from model.prepare import Prepared, prepare, starting_folder
from model.speed import Speedometer
from model.stage import Stage, TrainSettings, identity, stage_of
from model.training_report import write_report
from model.world import World, joined

__all__ = ["TrainSettings", "train"]

RUN = "run.json"


def train(settings: TrainSettings, watch: Watch | None = None) -> Path:
    """Trains a model on builds, or goes on where an earlier call was cut off.

    1. The builds are opened and put into sequences; their recipes say what to do.
    2. The model is made and spread over the processes.
    3. Each step reads a batch, learns from it and writes down what it saw; checkpoints are written meanwhile.
    4. The model is written in Hugging Face layout.

    Every process of a launch calls it with the same settings. It sets torch's random seed.

    Args:
        settings: what to do.
        watch: told of steps, in the first process.

    Returns:
        OUT/final.

    Raises:
        UsageError: if builds, model and settings do not fit together.
        TrainingError: if the loss is not finite or memory runs out.
        KeyboardInterrupt: after a SIGTERM, once the step at work is done and a checkpoint written.
    """
    with joined() as world, ExitStack() as held:
        feed, stage = opened(settings, world.rank, world.size)  # 1
        _claim(settings, stage, feed, world)
        held.enter_context(_alone(settings.out, world))
        run = _Run(settings, stage, world, feed, math.ceil(_sequences(feed, stage) / stage.global_batch))
        if run.finished:
            return settings.out / FINAL
        with memory_explained(stage.sequence_length, settings.activation_checkpointing, world.size):
            made = prepare(settings, stage, feed.tokenizer, world)  # 2
            _learn(run, made, watch)  # 3
        write_final(settings, stage, made, feed, world, run.last)  # 4
        if world.first:
            write_report(settings.out)
    return settings.out / FINAL


def opened(settings: TrainSettings, rank: int = 0, world_size: int = 1) -> tuple[Feed, Stage]:
    """The builds as a feed, and what they are trained on for.

    Raises:
        UsageError: if builds, model and settings do not fit together.
    """
    init = starting_folder(settings)
    options: dict[str, Any] = {
        "weights": settings.weights,
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
        "max_images": settings.max_images,
        "oversize": "drop" if settings.drop_oversize else "refuse",
        "on_damage": "skip" if settings.skip_damaged else "raise",
        "rank": rank,
        "world_size": world_size,
        "threads": settings.threads,
        "prefetch": settings.prefetch,
        "tokenizer": init if init and (init / "tokenizer.json").is_file() else None,
        "cache": settings.cache,
    }
    feed = Feed(settings.builds, **options)
    manifests = [(part.name, part.manifest) for part in feed.blend.parts]
    stage = stage_of(settings, manifests, feed.blend.packing.sequence_length)
    stage.rounds(world_size)
    return (feed if stage.epochs == 1 else Feed(settings.builds, epochs=stage.epochs, **options)), stage


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's fixed facts; `steps` are those of the whole schedule."""

    settings: TrainSettings
    stage: Stage
    world: World
    feed: Feed
    steps: int

    @property
    def last(self) -> int:
        """The step after which it stops."""
        return min(self.steps, self.settings.steps or self.steps)

    @property
    def finished(self) -> bool:
        """Whether OUT/final has seen that many steps."""
        file = self.settings.out / FINAL / BUILDS
        return bool(self.world.told(file.is_file() and json.loads(file.read_text())["steps"] >= self.last))


def _learn(run: _Run, made: Prepared, watch: Watch | None) -> None:
    settings, stage, world, feed = run.settings, run.stage, run.world, run.feed
    checkpoints = Checkpoints(settings.out, settings.keep, world)
    step = _resumed(checkpoints, made, feed)
    learner = Learner(made.model, made.optimiser, world, feed.blend, stage.isolate, made.balance, settings.clip)
    speed = Speedometer(world, made.shape, stage.trainable, stage.isolate)
    log = (
        Log(settings.out, step, settings.tensorboard, settings.wandb, identity(settings, stage))
        if world.first
        else None
    )
    stop = False
    with _sigterm() as asked:
        for batch in islice(_batches(feed, stage.rounds(world.size), speed), run.last - step):
            torch.manual_seed(hash((settings.seed, step, world.rank)))
            rate = stage.rate(step, run.steps)
            learnt = learner.step(batch, rate)
            step += 1
            line = {"step": step, **asdict(learnt), "learning_rate": rate}
            line |= speed.step(batch, learnt.tokens, learnt.images)
            if settings.skip_damaged:
                line["damaged"] = _damaged(batch, world)
            if log:
                log.write(line)
            if log and watch and (step % settings.log_every == 0 or step in (1, run.last)):
                watch({**line, "steps": run.last, "eta": speed.remaining(run.last - step)})
            checkpoints.poll()
            stop = world.most(asked())[0] > 0  # all processes after the same step
            # A run that stops early can be taken up again; one that is through has no use for its optimiser.
            if step < run.steps and (stop or step % settings.save_every == 0 or step == run.last):
                checkpoints.save(made.model, made.optimiser, {"step": step, "feed": batch[-1].state})
            if stop:
                break
    checkpoints.wait()
    if log:
        log.close()
    if stop and step < run.last:
        raise KeyboardInterrupt


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM came, which schedulers send some time before they take a machine away."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # as under Ray Train, which has ways of its own
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _resumed(checkpoints: Checkpoints, made: Prepared, feed: Feed) -> int:
    """The step that a run goes on from, 0 for a new one."""
    saved = checkpoints.latest()
    if saved is None:
        return 0
    checkpoints.restore(made.model, made.optimiser, saved)
    feed.load_state_dict(saved.state["feed"])
    return int(saved.state["step"])


def _batches(feed: Feed, size: int, speed: Speedometer) -> Iterator[list[PackedSequence]]:
    """This process's share of each step; the last may be smaller, in all processes alike."""
    stream = iter(feed)
    speed.start()
    while True:
        with speed.waiting():
            batch = list(islice(stream, size))
        if not batch:
            return
        yield batch


def _damaged(batch: list[PackedSequence], world: World) -> list[str]:
    """Samples of a step that were left out, of all processes, in words."""
    mine = [text for sequence in batch for text in sequence.damaged]
    return [text for texts in world.gathered(mine) for text in texts]


def _sequences(feed: Feed, stage: Stage) -> int:
    """Of all processes and epochs."""
    return sum(len(feed.blend.epoch(epoch)) for epoch in range(stage.epochs))


def _claim(settings: TrainSettings, stage: Stage, feed: Feed, world: World) -> None:
    """Makes OUT this run's folder.

    Raises:
        UsageError: if it is another run's; says what differs.
    """
    builds = [part.manifest["index"]["sha256"] for part in feed.blend.parts]
    file, mine = settings.out / RUN, {**identity(settings, stage), "builds": builds}
    theirs = world.told(json.loads(file.read_text()) if world.first and file.is_file() else None)
    if theirs is not None and theirs != mine:
        keys = [key for key in mine if theirs.get(key) != mine[key]]
        found = "; ".join(f"{key} was {theirs.get(key)!r} and is {mine[key]!r}" for key in keys)
        raise UsageError(f"{settings.out} holds another run ({found}); give another --out, or remove it")
    if world.first and theirs is None:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(mine, indent=2).encode() + b"\n")


@contextmanager
def _alone(out: Path, world: World) -> Iterator[None]:
    """Holds OUT against another launch, such as a job that was queued again; goes when the first process does.

    Raises:
        UsageError: if another launch trains there.
    """
    with ExitStack() as held:
        taken = False
        if world.first:
            lock = held.enter_context((out / ".lock").open("wb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
        if world.told(taken):
            raise UsageError(f"{out}: another launch trains there; wait for it, or give another --out")
        yield
