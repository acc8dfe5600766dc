"""Reading a build's files, from a local folder or any fsspec URL."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, cast

import fsspec


class Folder:
    """A build directory; every path is relative to it."""

    def __init__(self, url: str) -> None:
        if "://" in url:
            self._fs, base = fsspec.core.url_to_fs(url)
        else:  # a path, in which "::" has no meaning
            self._fs, base = fsspec.filesystem("file"), str(Path(url).expanduser().absolute())
        self._base = base.rstrip("/")

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    @cached_property
    def files(self) -> dict[str, int]:
        """Size in bytes of every file, by path."""
        found = self._fs.find(self._base, detail=True)
        return {path[len(self._base) + 1 :]: info["size"] for path, info in sorted(found.items())}

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""
        try:
            return cast(int, self._fs.info(self._full(path))["size"])
        except FileNotFoundError:
            return None

    def open(self, path: str) -> BinaryIO:
        """Opens a file for reading."""
        return cast(BinaryIO, self._fs.open(self._full(path), "rb"))

    def read(self, path: str) -> bytes:
        """A whole file; for small ones."""
        with self.open(path) as file:
            return file.read()

    def sha256(self, path: str) -> str:
        """Hex digest of a file."""
        digest = hashlib.sha256()
        with self.open(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
