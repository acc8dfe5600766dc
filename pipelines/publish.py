"""Shards to their final names. A kill between any two steps leaves each where the next run finds it.

A shard is in the work folder or, if it is not, under the name that `names.json` gives it. That holds throughout: those
that get another name are brought back before the names are written, and only then is any moved to its place. What else
lies under a name then is of an earlier build, or of a shard that was made anew since.
"""

from collections.abc import Sequence
from pathlib import Path

from formats.errors import BuildError
from formats.manifest import SHARDS
from formats.shard import Place, shard_name
from pipelines.notes import ShardNote, forget, load_rows, published_as, shard_file, write_names


def name_shards(work: Path, filled: Sequence[ShardNote]) -> dict[int, str]:
    """Numbers the shards that hold samples without gaps, and writes the names down.

    Raises:
        BuildError: if a shard is gone; its note is removed, so that the next run makes it again.
    """
    names = {note.number: shard_name(i) for i, note in enumerate(filled)}
    gone = []
    for note in filled:
        own = shard_file(work, note.number)
        if own.exists():
            continue
        place = published_as(work, note.number)
        if place is None or not _holds(place, work, note):
            forget(work, note.number)
            gone.append(str(place or own))
        elif place.name != names[note.number]:
            place.replace(own)
    if gone:
        more = f" and {len(gone) - 5:,} more" if len(gone) > 5 else ""
        raise BuildError(
            f"{', '.join(gone[:5])}{more}: not there any more, or not what was put there; run the same command again,"
            " which makes what is missing anew"
        )
    write_names(work, names)
    return names


def publish(out: Path, work: Path, number: int, name: str) -> Path:
    """Moves a shard that `name_shards` has named to its place, if it is not there yet, and says where that is."""
    own, target = shard_file(work, number), out / SHARDS / name
    target.parent.mkdir(exist_ok=True)
    if own.exists():
        own.replace(target)
    return target


def _holds(path: Path, work: Path, note: ShardNote) -> bool:
    """Whether a file is the shard of a note: by its size and its first and last sample. Keys tell shards apart."""
    rows = load_rows(work, note.number).select(["offset", "size", "sha256"])
    try:
        if path.stat().st_size != note.bytes:
            return False
        with path.open("rb") as file:
            for row in (*rows.slice(0, 1).to_pylist(), *rows.slice(rows.num_rows - 1).to_pylist()):
                file.seek(row["offset"])
                if Place.of(row["offset"], file.read(row["size"])) != Place(**row):
                    return False
    except FileNotFoundError:
        return False
    return True
