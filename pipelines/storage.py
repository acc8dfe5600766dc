"""Reading files below a root that may be a local folder or any fsspec URL."""

import hashlib
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from formats.errors import SourceError, UsageError
from formats.faults import blaming_storage


@dataclass(frozen=True)
class Root:
    """A folder, local ("data/llava15") or remote ("s3://bucket/llava15"), read by paths relative to it.

    A remote one that fails, whatever its library raises, raises `ConnectionError`; so does a local one whose disk does
    not answer (`formats.faults`).
    """

    url: str

    @cached_property
    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if "://" in self.url:
            fs, base = fsspec.core.url_to_fs(self.url)
        else:  # a path, in which "::" has no meaning
            fs, base = fsspec.filesystem("file"), str(Path(self.url).expanduser().absolute())
        return fs, base.rstrip("/")

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The file system below, for libraries that read through fsspec themselves."""
        return self._fs[0]

    def full(self, path: str) -> str:
        """The path as the file system below knows it."""
        base = self._fs[1]
        return f"{base}/{path}" if path else base

    @property
    def is_local(self) -> bool:
        """Whether `full` gives paths that other programs on this machine can open."""
        return "file" in self._fs[0].protocol

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there."""
        return (self._local_mode(path) is not None) if self.is_local else self._remote_type(path) is not None

    def is_file(self, path: str) -> bool:
        """Whether a file is there."""
        return stat.S_ISREG(self._local_mode(path) or 0) if self.is_local else self._remote_type(path) == "file"

    def _local_mode(self, path: str) -> int | None:
        """What `os.path.exists` looks at, which takes a disk that does not answer for a file that is absent."""
        try:
            with blaming_storage(self.full(path)):
                return Path(self.full(path)).stat().st_mode
        except (ConnectionError, TimeoutError):
            raise
        except OSError:
            return None
        except ValueError:  # a null byte in the name
            return None

    def _remote_type(self, path: str) -> str | None:
        """What is there, if anything; fsspec's own `exists` takes a network that fails for a file that is absent."""
        try:
            return str(self.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def info(self, path: str) -> dict[str, Any]:
        """Size and, where the file system has them, modification time or entity tag."""
        with self._network():
            return cast(dict[str, Any], self._fs[0].info(self.full(path)))

    def glob(self, pattern: str) -> list[str]:
        """Files that match a pattern ("**" allowed), relative and sorted."""
        cut = len(self._fs[1]) + 1
        base = "".join(f"[{c}]" if c in "*?[" else c for c in self._fs[1])
        with self._network():
            found = self._fs[0].glob(f"{base}/{pattern}", detail=True)
        return sorted(path[cut:] for path, info in found.items() if info["type"] == "file")

    def list(self, path: str) -> list[str]:
        """Names of the files in one folder, sorted; empty if there is no such folder."""
        try:
            with self._network():
                entries = self._fs[0].ls(self.full(path), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file")

    def open(self, path: str) -> BinaryIO:
        """Opens a file for reading."""
        with self._network():
            file = self._fs[0].open(self.full(path), "rb")
        return cast(BinaryIO, file if self.is_local else io.BufferedReader(_RemoteFile(file, self.url), _BUFFER))

    def read(self, path: str, limit: int | None = None) -> bytes:
        """The bytes of a file, at most `limit`."""
        with self.open(path) as f:
            return f.read() if limit is None else f.read(limit)

    def sha256(self, path: str) -> str:
        """sha256 of a file's bytes."""
        digest = hashlib.sha256()
        with self.open(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    @contextmanager
    def _network(self) -> Iterator[None]:
        with nullcontext() if self.is_local else _blaming_the_network(self.url):
            yield


_BUFFER = 1 << 20


@contextmanager
def _blaming_the_network(url: str) -> Iterator[None]:
    """Makes whatever a remote storage raises a `ConnectionError`, unless it says that there is no such file.

    Each kind of storage has exceptions of its own. None of them says anything about a record, so none may cost one.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if (fault := _hidden_fault(error)) is None:
            raise
        raise ConnectionError(f"{url}: {type(fault).__name__}: {fault}") from error
    except Exception as error:
        raise ConnectionError(f"{url}: {type(error).__name__}: {error}") from error


def _hidden_fault(error: BaseException) -> BaseException | None:
    """Why a file was said to be absent, if nobody has looked: fsspec says so of HTTP servers that do not answer."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is None or isinstance(cause, LookupError) or _http_status(cause) in (404, 410):
        return None  # not in a table of contents; not on the server
    return _hidden_fault(cause) if isinstance(cause, (FileNotFoundError, NotADirectoryError)) else cause


def _http_status(error: BaseException) -> int | None:
    """What a server has answered, as aiohttp, requests, Azure's and botocore's exceptions hold it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return cast(int | None, response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(holder, name, None), int):
                return status
    return None


class _RemoteFile(io.RawIOBase):
    """An open remote file whose storage's failures cannot be taken for damage of its content."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._remote, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _blaming_the_network(self._url):
            data = self._remote.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._remote.seek(offset, whence)

    def tell(self) -> int:
        return self._remote.tell()

    def close(self) -> None:
        self._remote.close()
        super().close()


def absolute(url: str) -> str:
    """A URL as it is, a local path made absolute."""
    return url if "://" in url else str(Path(url).resolve())


def refuse_odd_bytes(path: str | Path) -> None:
    """Raises `UsageError` for a path that is not UTF-8, of which Python keeps the odd bytes as lone surrogates."""
    text = str(path)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(
            f"{text.encode('utf-8', 'backslashreplace').decode()}: this path is not UTF-8, and neither Ray nor a"
            " manifest can hold it; rename what is marked by \\udc"
        )


def refuse_stand_in(head: bytes, where: str) -> None:
    """Raises `SourceError` if a file's first bytes show that it is not the data but what a failed download leaves."""
    if head.startswith(b"version https://git-lfs"):
        raise SourceError(f"{where} is a git-LFS pointer, not the data; run `git lfs pull` in the download")
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or head.lstrip().startswith(b"<html"):
        raise SourceError(f"{where} is a web page, not the data; the download failed or asked for a login")
    if not head:
        raise SourceError(f"{where} is empty; download it again")
