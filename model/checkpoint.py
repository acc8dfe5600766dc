"""Checkpoints of a run: trained weights, optimiser states and the place in the data, whole or not there at all.

    OUT/checkpoints/step-00000500/    torch.distributed.checkpoint, and state.json, written last
    OUT/checkpoints/step-00001000.partial/    being written; of no use to anyone after a crash

Frozen weights are not in them: they are those of the checkpoint that the run started from. Nor are random states: each
step sets them from the seed, its number and the rank.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from formats.errors import TrainingError, UsageError
from formats.manifest import write_atomically
from model.world import World

FOLDER, STATE = "checkpoints", "state.json"
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished checkpoint.

    Attributes:
        folder: where it is.
        state: what `Checkpoints.save` was given.
    """

    folder: Path
    state: dict[str, Any]


class Checkpoints:
    """Those of one run.

    Args:
        out: the run's folder.
        keep: how many of the last are kept.
    """

    def __init__(self, out: Path, keep: int, world: World) -> None:
        self.folder, self._keep, self._world = out / FOLDER, keep, world
        # Writing goes on in a thread whose exchanges may not come between those of training: it has a group of its own.
        self._group = dist.new_group(backend="gloo")
        self._writing: tuple[Future[Any], Path, dict[str, Any]] | None = None

    def latest(self) -> Saved | None:
        """The last finished one, the same for all processes; what crashes left is removed."""
        found = self._latest() if self._world.first else None
        told: Saved | None = self._world.told(found)
        return told

    def _latest(self) -> Saved | None:
        for left in self.folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(left)
        finished = self._finished()
        if not finished:
            return None
        return Saved(finished[-1], json.loads((finished[-1] / STATE).read_text()))

    def save(self, model: nn.Module, optimiser: Optimizer, state: dict[str, Any]) -> None:
        """Copies weights and states, and writes them while training goes on. All processes call it together.

        Args:
            state: what else a resumed run needs, for JSON; with `step`.
        """
        self.wait()
        partial = self.folder / f"step-{state['step']:08d}{_PARTIAL}"
        if self._world.first:
            partial.mkdir(parents=True, exist_ok=True)
        self._world.told(None)  # the folder is there
        future = async_save(dict(_tensors(model, optimiser)), checkpoint_id=partial, process_group=self._group)
        self._writing = (future, partial, state)  # type: ignore[assignment]

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            TrainingError: if it could not be written.
        """
        if self._writing is None:
            return
        future, partial, state = self._writing
        _written(future, partial)
        self._writing = None
        if self._world.first:
            self._finish(partial, state)
        self._world.told(None)

    def poll(self) -> None:
        """Finishes a checkpoint whose writing has ended, and returns at once."""
        if self._world.first and self._writing and self._writing[0].done():
            future, partial, state = self._writing
            _written(future, partial)
            self._finish(partial, state)  # `wait` finds it finished

    def restore(self, model: nn.Module, optimiser: Optimizer, saved: Saved) -> None:
        """Loads a checkpoint of any number of processes into a model and its optimiser.

        Raises:
            UsageError: if it is of another model.
        """
        tensors = dict(_tensors(model, optimiser))
        try:
            load(tensors, checkpoint_id=saved.folder)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise UsageError(
                f"{saved.folder} cannot be loaded ({first}); remove it to go on from the one before"
            ) from error
        for state in optimiser.state.values():
            state["step"].fill_(saved.state["step"])

    def _finish(self, partial: Path, state: dict[str, Any]) -> None:
        final = partial.with_name(partial.name.removesuffix(_PARTIAL))
        if not partial.is_dir():
            return
        write_atomically(partial / STATE, json.dumps(state).encode())
        if final.is_dir():  # of a run that was resumed from before it
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self.folder)
        for old in self._finished()[: -self._keep]:
            shutil.rmtree(old)

    def _finished(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE}") if path.parent.suffix != _PARTIAL)


def _tensors(model: nn.Module, optimiser: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, by name; loading fills these very tensors."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                yield f"{moment}.{name}", optimiser.state[parameter][moment]


def _written(future: Future[Any], partial: Path) -> None:
    """Waits for what a thread writes.

    Raises:
        TrainingError: if a process could not write its part, most often for want of room.
    """
    try:
        future.result()
    except (CheckpointException, OSError, RuntimeError) as error:
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        free = shutil.disk_usage(partial.parent).free
        raise TrainingError(
            f"{partial} cannot be written ({str(first).splitlines()[0]}; {free / 1e9:,.1f} GB are free there); make"
            " room, or keep fewer with --keep, and give the same command: it goes on from the last whole checkpoint"
        ) from error


def _sync(folder: Path) -> None:
    """Makes the names in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
