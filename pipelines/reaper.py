"""Ends the Ray of a driver that was killed, and removes its folder: a process that waits for the driver's death.

Ray's own processes notice that by themselves, but its agents then look for the dead gcs_server for a minute or more.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def watch(pids: Iterable[int], folder: Path) -> "subprocess.Popen[bytes]":
    """Starts the process; it acts when the caller ends or closes its `stdin`, and spares pids that others have by then.

    Args:
        pids: what to end.
        folder: what to remove.
    """
    known = [f"{pid}:{born}" for pid in pids if (born := _born(pid))]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(folder), *known],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C does not reach it
    )


def with_descendants(pids: Iterable[int]) -> set[int]:
    """The processes themselves and all below them."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])  # a name may be cut within a letter
            children.setdefault(parent, []).append(int(path.parent.name))
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += [child for child in children.get(pid, ()) if child not in found]
    return found


def kill(pid: int) -> None:
    """Ends a process if it is there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _born(pid: int) -> str:
    """When a process was started, in clock ticks; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return ""


def _main(folder: str, *known: str) -> None:
    sys.stdin.buffer.read()  # until the driver is gone
    for pid, _, born in (entry.partition(":") for entry in known):
        if _born(int(pid)) == born:
            kill(int(pid))
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
