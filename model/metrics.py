"""What a run tells of itself: metrics.jsonl always, TensorBoard and Weights & Biases where they are."""

import importlib.util
import json
import re
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from formats.manifest import write_atomically

METRICS = "metrics.jsonl"
Watch = Callable[[Mapping[str, Any]], None]
"""Called with what `metrics.jsonl` says of a step, and with `steps`, how many there are, and `eta` in seconds."""

_PEAK = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}
"""Dense bf16 operations a second that makers promise, by what a GPU's name contains."""


def peak_flops(device: torch.device) -> float | None:
    """What a device could do at most; None where nobody says."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at one time, on the GPU or, without one, of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Log:
    """The first process's record of a run.

    Args:
        out: the run's folder.
        step: where it goes on; what metrics.jsonl says of later steps was lost in a crash and is removed.
        tensorboard: write events, if that package is installed.
        wandb: a Weights & Biases project, or None.
        about: the run's settings, for Weights & Biases.

    Raises:
        ModuleNotFoundError: if wandb is asked for and not installed.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool, wandb: str | None, about: Mapping[str, Any]) -> None:
        self._file = out / METRICS
        _cut(self._file, step)
        self._writer: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self._run: Any = None
        if wandb:
            self._run = importlib.import_module("wandb").init(
                project=wandb, dir=str(out), config=dict(about), id=run_name(out), resume="allow"
            )

    def write(self, step: Mapping[str, Any]) -> None:
        """Adds a step."""
        with self._file.open("a") as file:
            file.write(json.dumps(step) + "\n")
        flat = dict(_flat(step))
        if self._writer is not None:
            for name, value in flat.items():
                self._writer.add_scalar(name, value, step["step"])
        if self._run is not None:
            self._run.log(flat, step=step["step"])

    def close(self) -> None:
        """Ends it."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The steps of a run so far; a line that a crash cut off is left out."""
    file = out / METRICS
    steps = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return steps


def _cut(file: Path, step: int) -> None:
    kept = [line for line in read_metrics(file.parent) if line["step"] <= step]
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _flat(step: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Numbers by name; those of each source as loss_by_source/NAME."""
    found = []
    for name, value in step.items():
        if isinstance(value, Mapping):
            found += [(f"{name}/{part}", float(number)) for part, number in value.items()]
        elif isinstance(value, int | float) and name != "step":
            found.append((name, float(value)))
    return found


def run_name(out: Path) -> str:
    """A name by which the service finds the run again: the folder's, and a few letters of its whole path."""
    from formats.manifest import fingerprint

    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', out.name)}-{fingerprint(str(out.resolve()))[:8]}"
