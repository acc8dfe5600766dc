"""What a disk that is full or fails, and memory that runs out, mean for the user."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from formats.errors import BuildError

_GOES_ON = "run the same command again"
_MEMORY_FOR_PLANNING = "2 GB"


@contextmanager
def told(place: Path, *, scratch: bool = False) -> Iterator[None]:
    """Turns faults of disk, network and memory into words.

    Args:
        place: where files are written.
        scratch: whether that is a folder for temporary files, of which nothing is kept.

    Raises:
        BuildError: instead of the fault.
    """
    try:
        yield
    except (OSError, duckdb.IOException, duckdb.OutOfMemoryException) as error:
        what, remedy = _said(error)
        if scratch:
            remedy = remedy.replace("free some space", "free some space or set TMPDIR to a folder on a larger disk")
        kept = "" if scratch else " what is done is kept:"
        why = str(error).partition("\n")[0]  # below, DuckDB names settings that the user has no hand in
        raise BuildError(f"{place}: {what} ({why});{kept} {remedy}") from error


def _said(error: Exception) -> tuple[str, str]:
    """What has happened, and what to do."""
    full = ("No space left", "max_temp_directory_size")  # the latter: DuckDB takes nine tenths of what is free
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in full):
        return "the disk is full", f"free some space, then {_GOES_ON}"
    if isinstance(error, duckdb.OutOfMemoryException):
        return "planning ran out of memory", (
            f"end other work on this machine or take one with {_MEMORY_FOR_PLANNING} more, see that the disk has room"
            f" for what does not fit into memory, then {_GOES_ON}"
        )
    return "disk or network failed", _GOES_ON
