import ctypes
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from formats.errors import Reject
from formats.imaging import ImageSettings, decode
from pipelines.guard import Guard


@pytest.fixture
def guard():
    with Guard(deadline=20) as guard:
        yield guard


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended but that nobody has asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def ended(pid: int, seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not lives(pid)


def test_a_result_comes_back_from_another_process(guard):
    assert guard.call(math.hypot, 3.0, 4.0) == 5.0
    assert guard.call(os.getpid) == guard.call(os.getpid) != os.getpid()


def test_a_reject_keeps_its_reason_and_detail(guard):
    with pytest.raises(Reject) as caught:
        guard.call(decode, b"text", ImageSettings())
    assert caught.value.reason == "unknown-format"
    assert "b'text'" in caught.value.detail


def test_another_exception_keeps_its_type_and_says_where_it_was_raised(guard):
    with pytest.raises(ValueError, match="invalid literal") as caught:
        guard.call(int, "x")
    assert "pipelines/guard.py" in caught.value.__notes__[0]


def test_an_exception_that_cannot_travel_becomes_a_plain_one(guard):
    with pytest.raises(RuntimeError, match="Odd: 1"):
        guard.call(exec, "class Odd(Exception): pass\nraise Odd(1)")


def test_a_function_that_the_child_cannot_import_is_an_error_not_a_reject(guard, monkeypatch):
    module = types.ModuleType("only_here")
    exec("def function(): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(ModuleNotFoundError, match="only_here"):
        guard.call(module.function)
    assert guard.call(abs, -1) == 1


def test_a_call_that_hangs_is_cut_off_and_the_next_one_works():
    with Guard(deadline=0.3) as guard:
        child = guard.call(os.getpid)
        with pytest.raises(Reject, match=r"timeout: sleep took more than 0.3 s"):
            guard.call(time.sleep, 60)
        assert ended(child)
        assert guard.call(abs, -1) == 1


def test_a_cancelled_calls_answer_is_not_taken_for_that_of_the_next(guard):
    guard.call(abs, -1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ray cancels a task
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            guard.call(time.sleep, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert guard.call(math.hypot, 3.0, 4.0) == 5.0


@pytest.mark.parametrize(
    ("crash", "arguments", "how"),
    [(os.abort, (), "SIGABRT"), (ctypes.string_at, (0,), "SIGSEGV"), (os._exit, (3,), "exit status 3")],
)
def test_a_crash_is_noticed_at_once_and_the_next_call_works(guard, crash, arguments, how):
    guard.call(abs, -1)
    begun = time.monotonic()
    with pytest.raises(Reject, match=f"decoder-crash: .* ended the process: {how}"):
        guard.call(crash, *arguments)
    assert time.monotonic() - begun < 2
    assert guard.call(abs, -1) == 1


def test_a_call_that_needs_too_much_memory_is_too_large():
    with Guard(memory=1 << 30) as guard:
        with pytest.raises(Reject, match="too-large: bytearray needs more than 1024 MiB"):
            guard.call(bytearray, 2 << 30)
        assert guard.call(abs, -1) == 1


def test_arguments_that_do_not_fit_into_the_child_are_too_large():
    with Guard(memory=1 << 28) as guard:
        with pytest.raises(Reject, match="too-large: len needs more than 256 MiB"):
            guard.call(len, bytes(300 << 20))
        assert guard.call(len, b"abc") == 3


def test_the_child_dies_with_its_parent_even_in_the_middle_of_a_call():
    program = (
        "import os, time; from pipelines.guard import Guard; guard = Guard()\n"
        "print(guard.call(os.getpid), flush=True); guard.call(time.sleep, 60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        assert lives(child)
        parent.kill()
    assert ended(child)


def test_what_a_native_library_prints_reaches_neither_the_answer_nor_the_terminal(guard, capfd):
    assert guard.call(os.write, 1, b"noise") == 5
    assert guard.call(os.write, 2, b"noise") == 5
    assert guard.call(os.read, 0, 1) == b""
    assert capfd.readouterr() == ("", "")


def test_the_child_carries_nothing_of_its_parents_modules(guard):
    import numpy as np

    assert np.__name__ in sys.modules
    loaded = guard.call(eval, "sorted(__import__('sys').modules)")
    assert not {"numpy", "ray", "torch", "pytest"} & set(loaded)


def test_a_child_is_replaced_after_its_share_of_calls():
    with Guard(calls=2) as guard:
        children = [guard.call(os.getpid) for _ in range(5)]
    assert children[0] == children[1] != children[2] == children[3] != children[4]
    assert all(ended(child) for child in children)


def test_a_child_that_died_between_two_calls_is_replaced_without_blaming_the_second(guard):
    child = guard.call(os.getpid)
    os.kill(child, signal.SIGKILL)
    assert ended(child)
    assert guard.call(os.getpid) != child


def test_closing_twice_is_fine_and_a_closed_guard_starts_again(guard):
    child = guard.call(os.getpid)
    guard.close()
    guard.close()
    assert ended(child)
    assert guard.call(os.getpid) != child


def test_a_call_costs_less_than_a_millisecond(guard):
    guard.call(abs, -1)
    spent = []
    for _ in range(200):
        begun = time.perf_counter()
        guard.call(abs, -1)
        spent.append(time.perf_counter() - begun)
    assert sorted(spent)[20] < 0.001
