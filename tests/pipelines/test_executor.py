"""pipelines.executor on a real Ray."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from formats.errors import BuildError, SourceError
from pipelines.executor import Executor, _after_death, _locked, _outcome, _SessionFolder, _Work


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    raise SourceError(f"number {number} is bad")


def die_at_first(path: str) -> str:
    """Dies by SIGKILL the first time, works the second."""
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_to_connect_at_first(folder: str) -> str:
    """Is refused by a port where nobody listens twice, then finds somebody."""
    tried = len(list(Path(folder).iterdir()))
    (Path(folder) / str(tried)).touch()
    if tried < 2:
        socket.create_connection(("127.0.0.1", 1), timeout=5)
    return "done"


def never_connect(_: int) -> None:
    socket.create_connection(("127.0.0.1", 1), timeout=5)


def fill_the_disk(_: int) -> None:
    with Path("/dev/full").open("wb") as file:
        file.write(b"x")


def niceness(_: int) -> int:
    return os.nice(0)


def test_every_item_has_its_result(executor: Executor) -> None:
    assert sorted(executor.map(square, range(20))) == [n * n for n in range(20)]


def test_no_items_give_no_results(executor: Executor) -> None:
    assert list(executor.map(square, [])) == []


def test_what_a_task_raises_on_purpose_arrives_as_it_is(executor: Executor) -> None:
    with pytest.raises(SourceError, match=r"^number 3 is bad$"):
        list(executor.map(refuse, [3]))


def test_a_task_whose_worker_is_killed_runs_again(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.map(die_at_first, [str(tmp_path / "marker")])) == ["done"]


def test_a_task_that_kills_every_worker_is_told_apart(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.executor._TRIES", 3)
    with pytest.raises(BuildError, match="a worker died 3 times"):
        list(executor.map(die, [1]))
    assert list(executor.map(square, [2])) == [4]


def test_a_node_that_cannot_fetch_what_a_task_needs_costs_it_a_try(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    elsewhere = {"working_dir": "https://127.0.0.1:1/job.zip"}  # where nobody listens
    reference = ray.remote(runtime_env=elsewhere, max_retries=0)(square).remote(2)
    work = _Work(2)
    assert _outcome(reference, work) == ([], [work])
    assert (work.deaths, work.not_before > time.monotonic() - 60) == (1, True)
    monkeypatch.setattr("pipelines.executor._TRIES", 2)
    with pytest.raises(BuildError, match=r"a node could not be prepared for tasks 2 times \(.*every node can fetch"):
        _outcome(reference, work)


def test_a_node_without_disk_space_is_told_when_no_other_takes_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr("pipelines.executor._TRIES", 1)
    error = ray.exceptions.OutOfDiskError()
    with pytest.raises(BuildError, match=r"disk of a node was full 1 times \(.*free some space .* same command again"):
        _after_death(_Work(2), error)


def test_a_new_session_folder_that_another_start_looks_at_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    make = tempfile.mkdtemp

    def looked_at(**named: str) -> str:
        path = make(**named)
        handle = os.open(path, os.O_RDONLY)  # as the other does, to see whether it is stale
        fcntl.flock(handle, fcntl.LOCK_EX)
        threading.Timer(0.2, os.close, (handle,)).start()
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", looked_at)
    folder = _SessionFolder()
    with pytest.raises(BlockingIOError):
        _locked(folder.path)  # it holds the lock now
    folder.remove(None)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_does_not_answer_is_asked_again(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.map(fail_to_connect_at_first, [str(tmp_path)])) == ["done"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_storage_that_never_answers_ends_in_words(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.executor._STORAGE_TRIES", 2)
    with pytest.raises(BuildError, match=r"storage failed 2 times \(ConnectionRefusedError.* same command again"):
        list(executor.map(never_connect, [1]))


def test_a_full_disk_arrives_with_its_number(executor: Executor) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        list(executor.map(fill_the_disk, [1]))
    assert caught.value.errno == errno.ENOSPC


def test_workers_are_not_niced(executor: Executor) -> None:
    assert list(executor.map(niceness, [0])) == [0]


def test_a_second_executor_joins_the_first(executor: Executor) -> None:
    with Executor(workers=1) as second:
        assert second.cpus == 2
    assert list(executor.map(square, [2])) == [4]


def test_a_folder_for_ray_that_is_not_there_is_named_in_words(tmp_path: Path) -> None:
    (tmp_path / "llava15").mkdir()
    (tmp_path / "llava15/llava_v1_5_mix665k.json").write_text("[]")
    line = [sys.executable, "-m", "longllava", "ingest", "--data", str(tmp_path), "--out", str(tmp_path / "catalog")]
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / "nowhere")}
    result = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"error: {tmp_path}/nowhere: no folder can be made there for Ray (No such file" in result.stderr
    assert "Traceback" not in result.stderr
