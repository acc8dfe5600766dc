"""Telling a storage that fails from a file that is damaged: the one is tried again, the other costs a record."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_FAULTS = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
    }
)


def is_storages_fault(error: OSError) -> bool:
    """Whether an error tells of a disk, a shared file system or a machine in need, and nothing of the file."""
    return isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _FAULTS


@contextmanager
def blaming_storage(where: str) -> Iterator[None]:
    """Makes a storage's fault a `ConnectionError`, which says that to try again may help; lets all else through."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        if is_storages_fault(error):
            raise ConnectionError(f"{where}: {error.strerror}") from error
        raise
