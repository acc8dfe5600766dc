"""The processes of a run: who they are, whatever launched them (torchrun, Slurm, Ray, or nothing at all)."""

import atexit
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from formats.errors import UsageError

_PATIENCE = timedelta(minutes=30)  # loading 100 GB from a slow file system is no failure


@dataclass(frozen=True, slots=True)
class World:
    """All processes, and this one's place among them.

    Attributes:
        rank: of this process, and `size`, the number of all.
        device: where it computes.
        mesh: all processes in one row.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """Numbers of all processes added up, in float64."""
        total = numbers.to(self.device, torch.float64)
        dist.all_reduce(total)
        return total.cpu()

    def most(self, *numbers: float) -> list[float]:
        """The largest of each number."""
        most = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        values: list[float] = most.tolist()
        return values

    def gathered(self, mine: Any) -> list[Any]:
        """What each process has."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def told(self, by_first: Any) -> Any:
        """What the first process says."""
        said = [by_first]
        dist.broadcast_object_list(said, src=0)
        return said[0]


@contextmanager
def joined() -> Iterator[World]:
    """Joins the others: those of a process group that is there (Ray Train makes one), else those that `torchrun` or
    Slurm launched, else none.

    Processes that were launched together stay together until they end: a second group in the same launch would find
    the addresses of the first.

    Raises:
        UsageError: if the launcher says something that cannot be understood.
    """
    place = placement(os.environ)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local % max(1, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    started = not dist.is_initialized()
    if started:
        _start(place, "cpu:gloo,cuda:nccl" if cuda else "gloo")
        if place.size > 1:
            atexit.register(_leave)
    try:
        size = dist.get_world_size()
        yield World(dist.get_rank(), size, device, init_device_mesh(device.type, (size,)))
    finally:
        if started and place.size == 1:
            dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Placement:
    """What a launcher says: this process's number, how many there are, its number on its machine, where to meet."""

    rank: int = 0
    size: int = 1
    local: int = 0
    address: str = ""
    port: int = 0


def placement(env: Mapping[str, str]) -> Placement:
    """Reads torchrun's variables, or Slurm's where those are absent.

    Raises:
        UsageError: if Slurm's do not say where to meet.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local = (int(env.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Placement(rank, size, local, env.get("MASTER_ADDR", "localhost"), int(env.get("MASTER_PORT", 29500)))
    # SLURM_NTASKS will not do: a batch script and an interactive shell have the job's, and are one process.
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_PROCID" not in env or size == 1:
        return Placement(local=int(env.get("LOCAL_RANK", 0)))
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    address = env.get("MASTER_ADDR") or first_host(nodes)
    port = int(env.get("MASTER_PORT", 20_000 + int(env.get("SLURM_JOB_ID", 0)) % 20_000))
    return Placement(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), address, port)


def first_host(nodes: str) -> str:
    """The first of Slurm's node list, such as node03 of "node[03-07,12],other1".

    Raises:
        UsageError: if the list is empty or of another form.
    """
    found = re.match(r"([^\[,\s]+)(?:\[(\w+)[^\]]*\]([^,\s]*))?", nodes)
    if not found:
        raise UsageError(f"Slurm's node list is {nodes!r}; set MASTER_ADDR to the host of the first task")
    return "".join(part or "" for part in found.groups())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _start(place: Placement, backend: str) -> None:
    if place.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    method = f"tcp://{place.address}:{place.port}"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has a store of its own
        method = "env://"
    dist.init_process_group(backend, init_method=method, rank=place.rank, world_size=place.size, timeout=_PATIENCE)
