"""The only file that knows Ray: runs functions as tasks, on this machine or a cluster, and outlives what may die.

Ray core tasks rather than Ray Data: with one task a shard, the same bytes come out serially, on any number of workers
and after kills; Ray Data's writers gave other shards with other CPU counts, and its checkpoint lost records.

Retries are made here and not by Ray, which tries at once again and stops after a fixed number: a worker or node that
died and a storage that did not answer cost their tasks a pause, and if a local Ray itself dies, a new one is started.
"""

import atexit
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from formats.errors import BuildError, LongLlavaError
from pipelines.reaper import kill, watch, with_descendants

In = TypeVar("In")
Out = TypeVar("Out")

_TRIES = 10  # of a task whose worker died; a spot node that is taken away counts, too
_STORAGE_TRIES = 5  # of a task whose storage failed, after 1, 2, 4 and 8 s
_RAY_STARTS = 4  # of a local Ray, the first one included
_IN_FLIGHT_PER_CPU = 3  # enough to keep workers busy, few enough that the driver holds no long queue
_LOOK_SECONDS = 0.5  # between two looks at whether Ray still lives
_PREFIX = "longllava-ray-"


@dataclass(slots=True)
class _Work:
    """An item and what has happened to it."""

    item: Any
    deaths: int = 0
    storage_faults: int = 0
    not_before: float = 0.0


class _RayDied(Exception):
    """Ray itself does not answer any more."""


class Executor:
    """A connection to Ray, started locally unless an address is given.

    SIGTERM ends what runs inside as Ctrl-C does, by `KeyboardInterrupt`.

    Args:
        workers: CPUs of a local Ray; all of this machine's by default. Ignored on a cluster.
        address: of a running cluster ("auto", "ray://host:10001"); RAY_ADDRESS is honoured too.
        log: folder for what Ray has to say; thrown away if None.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, log: Path | None = None) -> None:
        self._workers = workers
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._log = log
        self._owns_ray = False
        self._starts = self._cpus = 0
        self._folder: _SessionFolder | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._before: Any = None

    def __enter__(self) -> "Executor":
        # Ray runs workers at nice 15 and reports usage to its makers unless told otherwise.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if ray.is_initialized():
            return self
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGTERM)
        self._owns_ray = True
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns_ray:
            self._stop()
            self._owns_ray = False
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    @property
    def cpus(self) -> int:
        """How many tasks run at once."""
        if self._address or not self._cpus:
            import ray

            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            self._cpus = max(1, int(resources.get("CPU", 1)))
        return self._cpus  # of a local Ray they never change, and to ask one that has died takes a minute

    def map(self, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        """Runs `function` on every item, each as one task, and yields results as they come.

        A task whose worker or node dies, or that raises `ConnectionError` or `TimeoutError`, is tried again.

        Raises:
            LongLlavaError: what a task raised.
            OSError: what a task raised, a full disk among others.
            BuildError: if a task was tried too often, or Ray itself is gone.
        """
        import ray

        waiting = (_Work(item) for item in items)
        again: list[_Work] = []
        running: dict[Any, _Work] = {}
        task = ray.remote(num_cpus=1, max_retries=0)(function)
        try:
            while True:
                try:
                    self._submit(task, waiting, again, running)
                    if not running and not again:
                        return
                    for reference in self._finished(running):
                        result, failed = _outcome(reference, running[reference])
                        again += failed
                        del running[reference]
                        yield from result
                except _RayDied as death:
                    again += running.values()
                    running.clear()
                    self._start_again(death)
                    task = ray.remote(num_cpus=1, max_retries=0)(function)
        finally:
            self._cancel(running)

    def _submit(self, task: Any, waiting: Iterator[_Work], again: list[_Work], running: dict[Any, _Work]) -> None:
        """Fills the queue: first with what is due to be tried again, then with new work."""
        if _dead_parts():  # to ask them anything takes a minute, and then Ray ends this process
            raise _RayDied(f"its {' and '.join(_dead_parts())} died")
        room = self.cpus * _IN_FLIGHT_PER_CPU - len(running)
        due = [work for work in again if work.not_before <= time.monotonic()][: max(0, room)]
        for work in due:
            again.remove(work)
            running[task.remote(work.item)] = work
        for _, work in zip(range(room - len(due)), waiting, strict=False):
            running[task.remote(work.item)] = work

    def _finished(self, running: dict[Any, _Work]) -> list[Any]:
        """References that can be asked now; after a short while none, so that the rest of the loop gets its turn."""
        import ray

        if not running:
            time.sleep(_LOOK_SECONDS)
            return []
        done, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS)
        return list(done)

    def _cancel(self, running: dict[Any, _Work]) -> None:
        """Ends tasks that nobody waits for any more; those of a Ray of our own end with it, just after."""
        import ray

        if self._owns_ray and not self._address:
            return
        for reference in running:
            with suppress(ray.exceptions.RayError):
                ray.cancel(reference)  # by force, Ray 2.60 may abort this process when the task ends meanwhile

    # Ray's life -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        import ray

        self._starts += 1
        self._folder = None if self._address else _SessionFolder()
        local: dict[str, Any] = {}
        if self._folder:
            local = {"num_cpus": self._workers, "object_store_memory": 256 << 20, "_temp_dir": str(self._folder.path)}
        try:
            ray.init(
                address=self._address or "local",
                include_dashboard=None if self._address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        except (ConnectionError, ValueError, TimeoutError) as error:
            where = f"no Ray cluster at {self._address!r} ({error}); leave --address out to run here"
            raise BuildError(where if self._address else f"Ray does not start on this machine: {error}") from error
        except Exception as error:  # Ray raises plain ones if its processes die or are too slow
            raise BuildError(f"Ray does not start on this machine: {error}; is it out of memory or disk?") from error
        if self._before is not None:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray puts its own there
        _redirect_chatter(self._log)
        if self._folder:
            self._reaper = watch(with_descendants(_started()), self._folder.path)

    def _start_again(self, death: _RayDied) -> None:
        if "gcs_server" in _dead_parts():
            _abandon()
        if not self._owns_ray or self._address or self._starts >= _RAY_STARTS or not _connected():
            raise BuildError(f"Ray is gone: {death}. What is done is kept, so run the same command again") from death
        logging.getLogger("ray").error("Ray is started again: %s", death)
        self._stop()
        self._start()

    def _stop(self) -> None:
        import ray

        if _connected():
            with suppress(Exception):  # it may be half dead
                ray.shutdown()
        if self._folder:
            self._folder.remove(self._log)
            self._folder = None
        if self._reaper:
            self._reaper.communicate()
            self._reaper = None


def _outcome(reference: Any, work: _Work) -> tuple[list[Any], list[_Work]]:
    """A task's result, or the work to try again, in a list each.

    Raises:
        LongLlavaError, OSError: what the task raised.
        BuildError: if it was tried too often.
        _RayDied: if there is no Ray to ask.
    """
    import ray

    errors = ray.exceptions
    deaths = (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError)
    one_node = (errors.RuntimeEnvSetupError, errors.OutOfDiskError)  # others may be well
    try:
        return [ray.get(reference)], []
    except errors.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return [], [_after_storage_fault(work, cause)]
        if isinstance(cause, (LongLlavaError, OSError)):
            raise cause from None
        raise
    except (*deaths, *one_node) as error:
        return [], [_after_death(work, error)]
    except (errors.LocalRayletDiedError, errors.RaySystemError, errors.TaskCancelledError) as error:
        raise _RayDied(str(error)) from error


def _after_death(work: _Work, error: Exception) -> _Work:
    work.deaths += 1
    if work.deaths >= _TRIES:
        what, remedy = _told(error, work.item)
        raise BuildError(f"{what}; what is done is kept, so {remedy}") from error
    work.not_before = time.monotonic() + min(5.0, 0.1 * 2**work.deaths)
    return work


def _told(error: Exception, item: Any) -> tuple[str, str]:
    """What ended a task's workers, and what to do."""
    kind, why = type(error).__name__, str(error).strip().rpartition("\n")[2]
    if kind == "RuntimeEnvSetupError":
        return f"a node could not be prepared for tasks {_TRIES} times ({why})", (
            "see that every node can fetch the working folder and the packages of the job's runtime environment, then"
            " run the same command again"
        )
    if kind == "OutOfDiskError":
        return f"the disk of a node was full {_TRIES} times ({why})", (
            "free some space where Ray keeps its files (RAY_TMPDIR, or /tmp), then run the same command again"
        )
    return f"a worker died {_TRIES} times ({kind}) over {item}", (
        "run the same command again, with fewer --workers if memory ran out"
    )


def _after_storage_fault(work: _Work, error: Exception) -> _Work:
    work.storage_faults += 1
    if work.storage_faults >= _STORAGE_TRIES:
        raise BuildError(
            f"storage failed {_STORAGE_TRIES} times ({type(error).__name__}: {error}); what is done is kept, so run"
            " the same command again when it answers"
        ) from error
    work.not_before = time.monotonic() + 2 ** (work.storage_faults - 1)
    return work


def _dead_parts() -> list[str]:
    """Processes of a local Ray that have died."""
    from ray._private import worker

    node = worker._global_node
    return [] if node is None else sorted({str(kind) for kind, _ in node.dead_processes()})


def _abandon() -> None:
    """Ends what is left of a local Ray whose gcs_server is dead.

    Ray's own shutdown would wait a minute for it and then end this process; and what of it lives in this process
    cannot be taken down in order, so that at its end this process leaves at once, with the exit code of an error.
    """
    from ray._private import worker

    atexit.unregister(worker.shutdown)
    started = _started()
    worker._global_node = None
    for pid in with_descendants(started):
        kill(pid)
    atexit.register(_leave)


def _started() -> list[int]:
    """The processes that a local Ray has started from this one."""
    from ray._private import worker

    node = worker._global_node
    return [] if node is None else [info.process.pid for infos in node.all_processes.values() for info in infos]


def _leave() -> None:
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(2)


def _connected() -> bool:
    """Whether this process has a Ray that can be shut down."""
    from ray._private import worker

    return worker._global_node is not None


def _redirect_chatter(log: Path | None) -> None:
    """Lets what Ray logs and prints in this process go to a file in `log`, or nowhere."""
    logger = logging.getLogger("ray")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    if log is not None:
        log.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log / "driver.log", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    from ray._private import worker

    worker.print_to_stdstream = _log_printed  # Ray's obituaries would go to stdout, where --json prints


def _log_printed(data: dict[str, Any], *_: object, **__: object) -> None:
    logging.getLogger("ray").error("%s: %s", data.get("pid"), "\n".join(map(str, data.get("lines", ()))))


class _SessionFolder:
    """Ray's sockets and logs of one session; a folder of a process that was killed is removed by the next.

    It lies in /tmp, or in RAY_TMPDIR, since the path of a Unix socket has at most 107 characters.

    Raises:
        BuildError: if it cannot be made.
    """

    def __init__(self) -> None:
        base = os.environ.get("RAY_TMPDIR") or "/tmp"
        for stale in Path(base).glob(f"{_PREFIX}*"):
            with suppress(OSError):
                _remove_stale(stale)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            self._lock = _locked(self.path, wait=True)  # goes when this process does
        except OSError as error:
            raise BuildError(
                f"{base}: no folder can be made there for Ray ({error.strerror}); name one by the environment's"
                " RAY_TMPDIR that exists, is local, yours to write and short"
            ) from error

    def remove(self, log: Path | None) -> None:
        """Removes it, after Ray's own logs have been moved to `log`."""
        if log is not None:
            with suppress(OSError):
                log.mkdir(parents=True, exist_ok=True)
                for path in self.path.glob("session_2*/logs/*.*"):
                    if path.is_file() and path.stat().st_size:
                        shutil.move(path, log / path.name)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_stale(folder: Path) -> None:
    """Removes the folder of a process that is gone; an empty one may be of a process that is about to lock it."""
    lock = _locked(folder)
    try:
        if any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(folder: Path, *, wait: bool = False) -> int:
    """An exclusive lock on a folder of this user, as a file descriptor.

    `wait` is for a new folder: another process may hold it for the moment that it takes to see that it is empty.

    Raises:
        OSError: if another process holds it, or it is somebody else's.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(handle).st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
