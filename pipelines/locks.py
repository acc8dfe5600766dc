"""Locks on files, which on file systems without them say so."""

import errno
import fcntl
from pathlib import Path
from typing import IO, Any

from formats.errors import BuildError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})


def flock(file: IO[Any], operation: int, option: str) -> None:
    """`fcntl.flock`.

    Args:
        file: an open file.
        operation: as there.
        option: of the command line, that names another place.

    Raises:
        BlockingIOError: as there.
        BuildError: if the file system has no locks.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise BuildError(
            f"{Path(file.name).parent} is on a file system that gives no locks ({error.strerror}), without which two"
            " commands may write the same files. Mount it with locks (Lustre: -o flock; NFS before version 4: its lock"
            f" service running, and not -o nolock), or name another place with {option}"
        ) from error
