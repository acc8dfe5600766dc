"""Samples out of shards: one read by offset each, checked against the index, JPEGs decoded straight into a batch.

Nothing here iterates over a tar file: the index knows where a sample lies, and headers are 512 bytes apart.
"""

import hashlib
import json
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from threading import Lock, local
from typing import Any, Protocol

import numpy as np
import simplejpeg

from formats.blend import Entry
from formats.errors import DamageError
from formats.imaging import SIDE

_BLOCK = 512
_SIZE_FIELD = slice(124, 135)  # of a USTAR header, octal
_OPEN_FILES = 128
_ROOM = 64  # images: blocks have room for a multiple


class ShardSource(Protocol):
    """Where the shards of a build lie."""

    def path(self, shard: str) -> Path:
        """A shard as a file on this machine."""
        ...

    def renew(self, shard: str) -> bool:
        """Whether a shard that turned out damaged could be had anew."""
        ...


class LocalShards:
    """The shards of a build on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, shard: str) -> Path:
        """A shard's file, whether it is there or not."""
        return self._folder / shard

    def renew(self, shard: str) -> bool:
        """Never: there is no other copy."""
        return False


class ReadMemory(local):
    """Where a thread reads one sample after another: memory of its own, in use already and near in the cache."""

    def __init__(self) -> None:
        self._block = bytearray()

    def place(self, size: int) -> memoryview:
        """That many bytes of any content, good until the thread asks again."""
        if len(self._block) < size:
            self._block = bytearray(size)
        return memoryview(self._block)[:size]


class ShardReader:
    """Reads samples by their place in the index; any number of threads may at once.

    Args:
        sources: where the shards of each build lie.
        names: what to call the builds in errors.
    """

    def __init__(self, sources: list[ShardSource], names: list[str]) -> None:
        self._sources = sources
        self._names = names
        self._files: OrderedDict[tuple[int, str], _File] = OrderedDict()
        self._lock = Lock()

    def read(self, entry: Entry, memory: ReadMemory | None = None) -> memoryview:
        """The bytes of a sample.

        Args:
            memory: to read into; the bytes are then good until its next use by the same thread.

        Raises:
            DamageError: if they are not those that the index describes.
        """
        place = memory.place(entry.size) if memory else memoryview(bytearray(entry.size))
        data = self._read(entry, place)
        if _matches(data, entry):
            return data
        if self._sources[entry.build].renew(entry.shard):
            with self._lock:
                self._files.pop((entry.build, entry.shard), None)
            data = self._read(entry, place)
        if _matches(data, entry):
            return data
        found = "the shard ends before it" if len(data) < entry.size else "its sha256 is not the index's"
        raise DamageError(
            f"{self._names[entry.build]}: sample {entry.key} in {entry.shard} at byte {entry.offset:,} is damaged:"
            f" {found}. The shard has changed since the build; copy it again, or go on without such samples"
            f" (--skip-damaged, or on_damage='skip')"
        )

    def _read(self, entry: Entry, place: memoryview) -> memoryview:
        try:
            file = self._file(entry.build, entry.shard)
            return place[: os.preadv(file.descriptor, [place], entry.offset)]
        except OSError as error:
            raise DamageError(
                f"{self._names[entry.build]}: shard {entry.shard} cannot be read ({error}); copy it again"
            ) from error

    def _file(self, build: int, shard: str) -> "_File":
        with self._lock:
            if (found := self._files.get((build, shard))) is not None:
                self._files.move_to_end((build, shard))
                return found
        opened = _File(self._sources[build].path(shard))
        with self._lock:
            self._files[(build, shard)] = opened
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return opened


class _File:
    """An open file that is closed when nobody uses it any more, so that no thread reads from a closed one."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _matches(data: memoryview, entry: Entry) -> bool:
    return len(data) == entry.size and hashlib.sha256(data).hexdigest() == entry.sha256


def members(data: memoryview) -> tuple[dict[str, Any], list[memoryview]]:
    """A sample's JSON and its images' JPEG files, from bytes that match the index; the files are views of them."""
    parts: list[memoryview] = []
    at = 0
    while at < len(data):
        size = int(bytes(data[at:][_SIZE_FIELD]), 8)
        parts.append(data[at + _BLOCK : at + _BLOCK + size])
        at += _BLOCK + size + -size % _BLOCK
    return json.loads(str(parts[0], "utf-8")), parts[1:]


class ImageMemory:
    """Memory for batches of images, used again as soon as nobody holds a batch any more.

    Fresh memory of this size is cleared page by page each time, at a tenth of the cost of decoding into it. So blocks
    have room for a few images more, because sequences differ by a few; what is not written to costs nothing.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def images(self, n: int) -> np.ndarray:
        """uint8[n, 336, 336, 3] of any content; whatever shares its memory must keep this very array alive."""
        self._free.sort(key=len)
        place = next((i for i, block in enumerate(self._free) if len(block) >= n), None)
        if place is None:  # too small: let go of one, so that memory does not grow with the sizes that have been
            del self._free[:1]
        block = np.empty((n + -n % _ROOM, SIDE, SIDE, 3), np.uint8) if place is None else self._free.pop(place)
        batch = block[:n]
        weakref.finalize(batch, self._free.append, block)
        return batch


def decode(jpeg: memoryview, out: np.ndarray) -> None:
    """Decodes a JPEG file into uint8[336, 336, 3] in place, exactly: the same pixels as Pillow's.

    Raises:
        ValueError: if it is no JPEG of that size.
    """
    if simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out).shape != out.shape:
        raise ValueError(f"a JPEG is not {SIDE} x {SIDE}")
