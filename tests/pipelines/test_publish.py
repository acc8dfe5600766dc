"""pipelines.publish: shards come to their names, and no shard takes another's place, wherever a run is killed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import BuildError
from formats.shard import ShardWriter
from pipelines.notes import ShardNote, leave_note, load_note, shard_file
from pipelines.publish import name_shards, publish


def make(work: Path, number: int, samples: int = 2) -> ShardNote:
    """A shard with keys of its own, of one size with all others."""
    rows: list[dict[str, Any]] = []
    summary = None
    if samples:
        with ShardWriter(shard_file(work, number)) as shard:
            for i in range(samples):
                key = f"{10 * number + i:09d}"
                place = shard.add(key, json.dumps({"key": key}).encode(), [])
                known = {"key": key, "component": "a", "n_images": 0, "n_tokens": 1}
                rows.append({**known, "offset": place.offset, "size": place.size, "sha256": place.sha256})
            summary = shard.finish()
    return leave_note(work, number, summary.sha256 if summary else "", summary.bytes if summary else 0, rows, [])


def publish_all(out: Path, notes: list[ShardNote]) -> list[bytes]:
    filled = [note for note in notes if note.samples]
    names = name_shards(out / ".build", filled)
    for note in filled:
        publish(out, out / ".build", note.number, names[note.number])
    return [path.read_bytes() for path in sorted((out / "shards").glob("train-*.tar"))]


def short(out: Path) -> Path:
    """A build that was published, with a gap, before it was found short; then its second shard was filled."""
    (out / ".build/shards").mkdir(parents=True)
    publish_all(out, [make(out / ".build", i, 0 if i == 1 else 2) for i in range(5)])
    make(out / ".build", 1)
    return out


def notes_of(out: Path) -> list[ShardNote]:
    found = [load_note(out / ".build", number) for number in range(5)]
    whole = [note for note in found if note is not None]
    assert len(whole) == 5
    return whole


def sound(folder: Path) -> list[bytes]:
    (folder / ".build/shards").mkdir(parents=True)
    return publish_all(folder, [make(folder / ".build", i) for i in range(5)])


def test_a_shard_that_is_filled_later_moves_the_others_along(tmp_path: Path) -> None:
    out = short(tmp_path / "short")
    assert publish_all(out, notes_of(out)) == sound(tmp_path / "sound")


class Killed(BaseException):
    """The process is gone."""


def killed_before(rename: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs `act` until just before some rename; False if it came to its end."""
    left, real = rename, Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        try:
            act()
        except Killed:
            return True
    return False


def test_a_kill_between_any_two_renames_loses_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sound(tmp_path / "sound")
    for rename in range(100):
        out = short(tmp_path / f"{rename}")
        killed = killed_before(rename, lambda: publish_all(out, notes_of(out)), monkeypatch)  # noqa: B023
        assert publish_all(out, notes_of(out)) == expected
        if not killed:
            break
    assert rename == 8  # three back, the names, four to their places


def test_a_neighbour_under_a_shards_name_is_not_taken_for_it(tmp_path: Path) -> None:
    out = short(tmp_path / "short")
    published = out / "shards/train-000002.tar"
    published.write_bytes((out / "shards/train-000001.tar").read_bytes())  # of one size with it
    with pytest.raises(BuildError, match=r"train-000002.tar: not there any more, or not what was put there; run the"):
        publish_all(out, notes_of(out))
    assert [number for number in range(5) if load_note(out / ".build", number) is None] == [3]
    make(out / ".build", 3)
    assert len(set(publish_all(out, notes_of(out)))) == 5
