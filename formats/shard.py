"""Shards: tar files whose bytes depend on their samples alone, and the index that finds each sample in them.

A sample is `<key>.json` followed by `<key>.0000.jpg`, `<key>.0001.jpg`, …; plain WebDataset. Headers are USTAR with no
time and no owner. webdataset's own writer stamps the current time, so it never makes the same bytes twice.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from formats.errors import BuildError

_BLOCK = 512

TEXT_SCORES = (
    ("n_words", pa.int32()),
    ("shortest_answer", pa.int32()),
    ("longest_turn", pa.int32()),
    ("repetition", pa.float64()),
    ("n_refusals", pa.int32()),
    ("n_emails", pa.int32()),
    ("n_phones", pa.int32()),
    ("n_cards", pa.int32()),
    ("question_language", pa.string()),
    ("answer_language", pa.string()),
    ("language_mismatch", pa.bool_()),
)
"""Columns for `formats.textscore.TextScores`, in catalogs and indexes."""

SCORES = (
    ("flags", pa.list_(pa.string())),
    *TEXT_SCORES,
    ("min_side", pa.int32()),
    ("max_side", pa.int32()),
    ("max_aspect", pa.float64()),
    ("contrast", pa.int32()),
    ("min_bytes", pa.int64()),
    ("max_bytes", pa.int64()),
    ("width", pa.int32()),
    ("height", pa.int32()),
)
"""Columns of index.parquet that say what may be junk: of the upstream record, before anything was cut, scaled or split.
Those of pictures are null without any; `width` and `height` are of the largest. All are null in samples replayed from a
build that had none."""

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("source", pa.string()),
        ("component", pa.string()),
        ("modality", pa.string()),
        ("n_images", pa.int32()),
        ("n_text_tokens", pa.int32()),
        ("n_tokens", pa.int32()),
        ("n_target_tokens", pa.int32()),
        ("n_turns", pa.int32()),
        *SCORES,
    ]
)
"""Columns of index.parquet. `offset` is where a sample's first tar header starts, `size` reaches to the end of its
last member's padding, `sha256` is of those bytes; `n_tokens` counts all that the model reads."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies in its shard."""

    offset: int
    size: int
    sha256: str

    @classmethod
    def of(cls, offset: int, data: bytes) -> "Place":
        """The place of a sample whose bytes start at `offset`."""
        return cls(offset, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """A finished shard."""

    file: str
    sha256: str
    bytes: int
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def safe_shard_name(name: str) -> str:
    """A shard's name out of an index, which may come from anyone.

    Raises:
        BuildError: if it is no name that `shard_name` gives, such as a path that leads elsewhere.
    """
    if not re.fullmatch(r"train-[0-9]{6,}\.tar", name):
        raise BuildError(
            f"the index names the shard {name!r}, which is no shard's name; the build is damaged or forged"
        )
    return name


def shard_name(number: int) -> str:
    """The file name of a shard; wide enough for a million, sorted by number."""
    return f"train-{number:06d}.tar"


class ShardWriter:
    """Writes one shard under a temporary name; `finish` gives it its own.

    Used as a context manager; leaving it without `finish` removes what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._offset = 0
        self._samples = 0
        self._last_key = ""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:  # on a full disk closing fails, too
            self._temporary.unlink(missing_ok=True)

    def add(self, key: str, record: bytes, images: Sequence[bytes]) -> Place:
        """Appends a sample. Keys must ascend; `record` is its JSON, `images` are JPEG files."""
        if "." in key or key <= self._last_key:
            raise ValueError(f"key {key!r} must have no dot and come after {self._last_key!r}")
        members = [_member(f"{key}.json", record)]
        members += [_member(f"{key}.{i:04d}.jpg", image) for i, image in enumerate(images)]
        data = b"".join(members)
        place = Place.of(self._offset, data)
        self._write(data)
        self._samples += 1
        self._last_key = key
        return place

    def finish(self) -> ShardSummary:
        """Ends the tar, brings it to disk and gives it its name; after a crash there is a whole shard or none."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        return ShardSummary(self.path.name, self._hash.hexdigest(), self._offset, self._samples)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A sample's JSON as a shard stores it."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # mode 0644, time 0, no owner
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)


def members_of(data: bytes) -> tuple[str, bytes, list[bytes]]:
    """Reads the bytes of one sample, as `Place` delimits them.

    Returns:
        Its key, its JSON as it stands and its images' bytes in order.
    """
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * _BLOCK)), mode="r:") as tar:
        members = [(info.name, _content(tar, info)) for info in tar]
    key = members[0][0].removesuffix(".json")
    return key, members[0][1], [content for _, content in members[1:]]


def read_sample(file: BinaryIO, offset: int, size: int) -> tuple[str, dict[str, Any], list[bytes]]:
    """Reads one sample of an open shard by its place in the index: its key, its JSON and its images."""
    file.seek(offset)
    key, record, images = members_of(file.read(size))
    return key, json.loads(record), images


def read_record(file: BinaryIO, offset: int) -> dict[str, Any]:
    """Reads a sample's JSON alone: the first member at its place in the index."""
    file.seek(offset)
    header = tarfile.TarInfo.frombuf(file.read(_BLOCK), tarfile.ENCODING, "strict")
    record: dict[str, Any] = json.loads(file.read(header.size))
    return record


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    member = tar.extractfile(info)
    if member is None:
        raise ValueError(f"{info.name} is not a file")
    return member.read()
