"""Builds that are interrupted, damaged, starved of disk, or lose the Ray beneath them come to the same bytes."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from formats.errors import BuildError
from formats.manifest import read_manifest
from pipelines.build import Request, build, locations, settings_of
from pipelines.demo.tokenizer import train_tokenizer
from pipelines.executor import Executor
from pipelines.guard import Guard
from pipelines.ingest import ingested
from pipelines.materialise import ShardTask, build_shard
from pipelines.notes import index_file, note_file, shard_file
from pipelines.plan import Planner
from pipelines.progress import NOTHING, Progress
from pipelines.report import rejects
from recipes.schema import Recipe, load_recipe

PICTURES = 40
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of pictures, two of them broken, and recipe.yaml, which takes all but two of the rest."""
    folder = tmp_path_factory.mktemp("place")
    media = folder / "data/llava15/coco"
    media.mkdir(parents=True)
    rows = []
    for i in range(PICTURES):
        Image.new("RGB", (1200 + i, 900), (6 * i, 90, 200)).save(media / f"{i}.jpg")
        turns = [{"from": "human", "value": f"<image>\nWhat is in {i}?"}, {"from": "gpt", "value": "A colour."}]
        rows.append({"id": i, "image": f"coco/{i}.jpg", "conversations": turns})
    (media / "7.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (media / "23.jpg").write_bytes((media / "23.jpg").read_bytes()[:-900])
    (folder / "data/llava15/llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    train_tokenizer(["What is in 0 1 2 3 4 5 6 7 8 9?", "A colour."], folder / "tokenizer")
    component = {"source": "llava15", "count": PICTURES - 4}
    recipe = {"name": "r", "tokenizer": "tokenizer", "samples_per_shard": 4, "components": {"a": component}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder


def request(place: Path, out: Path) -> Request:
    return Request(load_recipe(place / "recipe.yaml"), place, str(place / "data"), out, place / "catalog")


def digests(out: Path) -> dict[str, Any]:
    """Every file of a build, of the manifest all but its time and place."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["environment"]
    return {**files, "manifest": manifest}


@pytest.fixture(scope="module")
def undisturbed(place: Path, executor: Executor) -> dict[str, Any]:
    build(request(place, place / "undisturbed"), Progress())
    found = digests(place / "undisturbed")
    assert found["rejects.jsonl"].count(b'"thumbnail"') == 1
    return found


class StopsAfter(Progress):
    """Presses Ctrl-C when some samples are built."""

    def __init__(self, samples: int) -> None:
        self._left = samples

    def advance(self, amount: int, *, images: int = 0, rejected: Mapping[str, int] = NOTHING, new: bool = True) -> None:
        self._left -= amount if images else 0
        if self._left <= 0:
            signal.raise_signal(signal.SIGINT)


class Counts(Progress):
    """Counts what is built anew."""

    def __init__(self) -> None:
        self.images = 0

    def advance(self, amount: int, *, images: int = 0, rejected: Mapping[str, int] = NOTHING, new: bool = True) -> None:
        self.images += images if new else 0


def interrupted(place: Path, out: Path, samples: int = 16) -> Path:
    """An unfinished build; returns its work folder."""
    with pytest.raises(KeyboardInterrupt):
        build(request(place, out), StopsAfter(samples))
    assert not (out / "manifest.json").exists()
    return out / ".build"


def whole_shards(work: Path) -> list[int]:
    numbers = [int(path.stem) for path in (work / "shards").glob("*.tar")]
    return sorted(number for number in numbers if note_file(work, number).exists())


def test_a_resumed_build_redoes_only_what_is_unfinished_or_not_whole(
    place: Path, undisturbed: dict[str, Any], executor: Executor, tmp_path: Path
) -> None:
    work = interrupted(place, tmp_path / "out", samples=24)
    half_a_note, half_a_shard, half_an_index, no_shard, a_note_of_nothing, *whole = whole_shards(work)
    for path in (note_file(work, half_a_note), shard_file(work, half_a_shard), index_file(work, half_an_index)):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shard_file(work, no_shard).unlink()
    note_file(work, a_note_of_nothing).write_bytes(b"{}")
    names = (".manifest.json.99.tmp", ".index.parquet.tmp", "shards/.train-000000.tar.idx.9.tmp", ".nv-meta/.x.tmp")
    for stray in (*(tmp_path / "out" / name for name in names), place / "catalog/llava15/.part.99.tmp"):
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"half")
    counts = Counts()
    build(request(place, tmp_path / "out"), counts)
    assert counts.images <= 36 - 4 * len(whole) + 2
    assert digests(tmp_path / "out") == undisturbed
    assert not list((place / "catalog").rglob("*.tmp"))
    work.mkdir()  # as if it had been killed while it removed this, too
    build(request(place, tmp_path / "out"), Progress())
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("damaged", [False, True])
def test_a_build_that_stops_while_it_is_published_goes_on(
    damaged: bool, place: Path, undisturbed: dict[str, Any], executor: Executor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "rejects.jsonl").mkdir(parents=True)  # where a file has to go, after the shards have gone to their places
    with pytest.raises(BuildError, match=r"rejects\.jsonl.* run the same command again"):
        build(request(place, out), Progress())
    shards = sorted((out / "shards").glob("*.tar"))
    assert len(shards) >= 9
    assert not list((out / ".build/shards").glob("*.tar"))
    (out / "rejects.jsonl").rmdir()
    if damaged:
        shards[2].write_bytes(shards[2].read_bytes()[:1000])
    counts = Counts()
    build(request(place, out), counts)
    assert counts.images == (4 if damaged else 0)
    assert digests(out) == undisturbed


def test_a_url_as_output_is_refused_in_words(place: Path) -> None:
    with pytest.raises(BuildError, match=r"--out s3:/bucket/x is a URL; .*Upload the finished directory, manifest"):
        build(request(place, Path("s3://bucket/x")), Progress())


def test_a_shard_over_which_a_worker_died_comes_out_the_same(
    place: Path, undisturbed: dict[str, Any], executor: Executor, tmp_path: Path
) -> None:
    """Rendered in a process beside the worker."""
    shards = tmp_path / "out/.build/shards"
    shards.mkdir(parents=True)
    for number in (0, 1, 5):
        (shards / f".{number:06d}.tar.99.tmp").write_bytes(b"as far as it came")
    build(request(place, tmp_path / "out"), Progress())
    assert digests(tmp_path / "out") == undisturbed


def test_records_of_such_a_shard_share_one_process_while_none_kills_it(
    place: Path, executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process for each takes a second a record to start: after Ctrl-C all shards that were at work would crawl."""
    wanted = request(place, tmp_path / "out")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/.000000.tar.99.tmp").write_bytes(b"as far as it came")
    started: list[Guard] = []
    start = Guard._start
    monkeypatch.setattr(Guard, "_start", lambda guard: (started.append(guard), start(guard)))
    with (
        ingested(locations(wanted, {}), wanted.catalog, executor, Progress()) as catalogs,
        closing(Planner(wanted.recipe, catalogs, {}, tmp_path / "plan")) as planner,
    ):
        drawn = planner.draw(0, {"a": PICTURES}, 0)
        settings = settings_of(wanted, tmp_path, place / "tokenizer/tokenizer.json", catalogs, {})
        note = build_shard(ShardTask(settings, 0, str(drawn.file), 0, PICTURES, 0))
    assert (note.samples, note.failed.total()) == (PICTURES - 2, 2)
    assert len(started) == 1


# In processes and with a Ray of their own ---------------------------------------------------------------------------


def command(place: Path, out: Path) -> list[str]:
    line = ["build", place / "recipe.yaml", "--data", place / "data", "--out", out, "--workers", 2]
    return [sys.executable, "-m", "longllava", *map(str, line)]


def start(line: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def family(process: "subprocess.Popen[str]", work: Path) -> list[psutil.Process]:
    """The processes below a build that has just been started, once it has finished a shard."""
    deadline = time.monotonic() + 90
    before = len(list((work / "shards").glob("*.json")))
    while len(list((work / "shards").glob("*.json"))) == before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return psutil.Process(process.pid).children(recursive=True)


def named(processes: list[psutil.Process], name: str) -> psutil.Process:
    return next(p for p in processes if p.is_running() and name in p.name())


def all_ended(processes: list[psutil.Process], seconds: float = 120) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_ctrl_c_and_sigterm_stop_within_seconds_and_leave_nothing_running(place: Path, tmp_path: Path) -> None:
    for how in (signal.SIGINT, signal.SIGTERM):
        process = start(command(place, tmp_path / "out"))
        children = family(process, tmp_path / "out/.build")
        began = time.monotonic()
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        printed, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert process.returncode == 130, printed
        assert "the same command goes on from here" in printed
        assert "Traceback" not in printed
        assert all_ended(children)
    assert (tmp_path / "out/.build").is_dir()


def test_sigterm_is_heard_before_ray_is_up(place: Path, tmp_path: Path) -> None:
    process = start(command(place, tmp_path / "out"))
    status, heard = Path(f"/proc/{process.pid}/status"), 1 << signal.SIGTERM - 1
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & heard:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert not (tmp_path / "out/.build/shards").exists()


def test_a_build_outlives_raylet_and_can_be_resumed_after_gcs_server_died(
    place: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start(command(place, out))
    children = family(first, out / ".build")
    named(children, "gcs_server").kill()
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 2
    assert "Ray is gone: its gcs_server died. What is done is kept, so run the same command again" in printed
    assert all_ended(children)

    second = start(command(place, out))
    children = family(second, out / ".build")
    named(children, "raylet").kill()
    printed, _ = second.communicate(timeout=90)
    assert second.returncode == 0, printed
    assert "(raylet)" not in printed
    assert all_ended(children)
    assert digests(out) == undisturbed
    assert not list(Path(os.environ.get("RAY_TMPDIR", "/tmp")).glob(f"longllava-ray-*/*_{second.pid}"))


KILLER = """
import os, sys
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith(("/coco/11.jpg", "/coco/30.jpg")):
        os.abort()
sys.addaudithook(watch)
"""


def test_records_that_kill_their_worker_are_rejected_and_cost_nothing_else(place: Path, tmp_path: Path) -> None:
    """As a native library's bug in an archive would: the process that opens one of two pictures aborts."""
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    path = f"{tmp_path}:{REPOSITORY}"
    line = [*command(place, tmp_path / "out"), "--set", "components.a.count=all"]
    process = start(line, PYTHONPATH=path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    ledger = {reject["uid"].rpartition(":")[2]: reject["reason"] for reject in rejects(tmp_path / "out")}
    crashes = dict.fromkeys(("11", "30"), "decoder-crash")
    assert ledger == {"7": "broken-image", "23": "broken-image", **crashes}
    assert read_manifest(tmp_path / "out")["totals"]["samples"] == PICTURES - 4
    assert not list((tmp_path / "out").rglob("*.tmp"))


SMALL_DISK = """
set -e
mount -t tmpfs -o size=400k tmpfs "$OUT"
cd "$REPOSITORY"
"$@" && exit 1 || echo "first run: $?"
find "$OUT" -name '*.tmp' -size +0
mount -o remount,size=20m "$OUT"
"$@"
cp -r "$OUT" "$SAVED"
"""


def test_a_full_disk_is_told_and_the_build_goes_on_when_there_is_space(
    place: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs a mount of its own, and this machine does not allow it")
    line = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", *command(place, tmp_path / "out")]
    process = start(line, OUT=str(tmp_path / "out"), SAVED=str(tmp_path / "saved"), REPOSITORY=str(REPOSITORY))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "first run: 2" in printed
    assert "error: " in printed
    assert "the disk is full (" in printed
    assert "free some space, then run the same command again" in printed
    assert printed.count(".tmp") <= 2  # a worker that is ended amid its shard leaves that, and no other
    assert digests(tmp_path / "saved") == undisturbed
    assert os.strerror(errno.ENOSPC) in printed


def test_a_recipe_may_not_ask_for_less_memory_than_a_decoder_needs() -> None:
    with pytest.raises(ValueError, match=r"limits\.memory_mb"):
        Recipe.model_validate({"name": "x", "tokenizer": "t", "components": {}, "limits": {"memory_mb": 1}})
