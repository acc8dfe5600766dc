"""Runs decoders in a child process that may hang, crash or eat memory without taking the job with it.

Written here because, measured in a Ray worker on two cores, pebble's process pool needs 0.36 s for a new child (its
`spawn` imports the parent's main module, and so Ray, anew) and notices a crash after 13 to 100 ms; this one takes
0.09 s and 1 ms, and a call costs 0.05 ms against 0.2 ms.
"""

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from formats.errors import Reason, Reject

P = ParamSpec("P")
T = TypeVar("T")

_START_SECONDS = 60.0
_STARTS = 3  # a child that does not come to life may have been killed by somebody else
_OUT_OF_MEMORY = 77  # exit status of a child that cannot even take in its arguments
_PR_SET_PDEATHSIG = 1
_PATIENCE = 3  # clock time over computing time, so that what is rejected does not depend on how busy the machine is


class _Failed(Exception):
    """The child is gone, or out of memory.

    Args:
        final: whether another child could fare no better.
    """

    def __init__(self, reason: Reason, detail: str, *, final: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail
        self.final = final


class Guard:
    """One child process that runs pure functions for this one, and can be killed.

    The child starts at the first call, is replaced after a failure or `calls` calls, and dies with this process, even
    if that is killed. What it or a native library in it prints is thrown away. Use it from one thread, and from the
    one that lives longest: Linux counts the end of the thread that started the child as its parent's death.

        with Guard() as guard:
            images = guard.call(render, media, data, settings, None)

    Args:
        deadline: seconds that one call may compute; waiting, or kept from computing, it may take thrice that.
        memory: bytes of address space the child may use, shared libraries (about 0.3 GiB) included.
        calls: after so many a fresh child is started, so that leaks stay small.
    """

    def __init__(self, deadline: float = 120.0, memory: int = 4 << 30, calls: int = 1000) -> None:
        self._deadline = deadline
        self._memory = memory
        self._calls = calls
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._left = 0

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function, which the child must be able to import, and returns its result.

        Raises:
            Reject: "timeout", "decoder-crash" if the child dies twice over it (once may be somebody else's doing),
                "too-large" if it runs out of memory in a fresh child (in another, earlier calls' leftovers count).
            Exception: whatever the function raises, a `Reject` among others.
        """
        for last in (False, True):
            try:
                return self._attempt(function, args, kwargs)
            except _Failed as failure:
                if last or failure.final:
                    raise Reject(failure.reason, failure.detail) from failure
        raise AssertionError("unreachable")

    def _attempt(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        name = getattr(function, "__name__", "the function")
        try:
            succeeded, result = self._exchange((function, args, kwargs))
        except (EOFError, ConnectionError) as error:
            raise self._death(name) from error
        except TimeoutError as error:
            self.close()
            raise Reject("timeout", f"{name} took more than {self._deadline:g} s") from error
        except BaseException:  # cancelled in the middle: its late answer would be taken for that of the next call
            self.close()
            raise
        if succeeded:
            return result  # type: ignore[no-any-return]
        if isinstance(result, MemoryError):
            raise self._out_of_memory(name)
        raise result

    def _exchange(self, call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> tuple[bool, Any]:
        """Sends a call and receives whether it succeeded, and its result or error."""
        if self._left <= 0 or self._child is None or self._child.poll() is not None:
            self._start()
        assert self._pipe is not None
        self._left -= 1
        self._pipe.send(call)
        if not self._answers():
            raise TimeoutError
        return self._pipe.recv()  # type: ignore[no-any-return]

    def _answers(self) -> bool:
        """Waits for the answer: `deadline` seconds of the child's own time, or a few times that by the clock."""
        assert self._pipe is not None
        assert self._child is not None
        clock = (~self._child.pid << 3) | 2  # clock_getcpuclockid(3)
        with suppress(OSError):  # it has ended, and the pipe says so
            computed, started = time.clock_gettime(clock), time.monotonic()
            while (left := started + _PATIENCE * self._deadline - time.monotonic()) > 0:
                left_to_compute = self._deadline - (time.clock_gettime(clock) - computed)
                if left_to_compute <= 0:
                    return False
                if self._pipe.poll(min(left, max(left_to_compute, 0.01))):
                    return True
            return False
        return True

    def close(self) -> None:
        """Ends the child, if there is one."""
        if self._child is not None and self._pipe is not None:
            self._pipe.close()
            self._child.kill()
            self._child.wait()
        self._child = self._pipe = None
        self._left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        for _ in range(_STARTS):
            self.close()
            if self._starts():
                return
        self.close()
        raise RuntimeError(f"the decoder process does not start; see: {sys.executable} -c 'import pipelines.guard'")

    def _starts(self) -> bool:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "pipelines.guard"]
        command += [str(theirs.fileno()), str(os.getpid()), str(self._memory)]
        self._child = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # so that Ctrl-C reaches this process first
        )
        theirs.close()
        self._left = self._calls
        try:
            return self._pipe.poll(_START_SECONDS) and bool(self._pipe.recv())
        except (EOFError, ConnectionError):
            return False

    def _death(self, name: str) -> Exception:
        assert self._child is not None
        code = self._child.wait()
        if code == _OUT_OF_MEMORY:
            return self._out_of_memory(name)
        self.close()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return _Failed("decoder-crash", f"{name} ended the process: {how}")

    def _out_of_memory(self, name: str) -> _Failed:
        fresh = self._left == self._calls - 1
        self.close()  # what is left of its memory is in pieces
        return _Failed("too-large", f"{name} needs more than {self._memory >> 20} MiB", final=fresh)


def _serve(pipe: "Connection[Any, Any]") -> None:
    """The child's life: take a call, make it, answer."""
    pipe.send(True)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)  # half of the arguments are still in the pipe
        try:
            function, args, kwargs = pickle.loads(call)
            answer = (True, function(*args, **kwargs))
        except Exception as error:
            answer = (False, _portable(error))
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The error itself, with its traceback as a note, or a plain one if it would not survive the trip."""
    if not isinstance(error, Reject):
        error.add_note("In the decoder process:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # exceptions with arguments of their own often cannot be unpickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _main(fd: str, parent: str, memory: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it died before the line above
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(Connection(int(fd)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
