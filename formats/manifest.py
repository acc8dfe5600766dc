"""What a finished build says of itself.

    OUT/manifest.json   written last, atomically: a directory without it is unfinished
    OUT/index.parquet   one row a sample
    OUT/rejects.jsonl   every record that was drawn and not written
    OUT/shards/         train-000000.tar …
    OUT/tokenizer/      what the tokens were counted with

Two builds of the same recipe and sources differ at most in the manifest's `environment`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.errors import BuildError

FORMAT = "longllava.build/1"
MANIFEST, INDEX, REJECTS, SHARDS, TOKENIZER = "manifest.json", "index.parquet", "rejects.jsonl", "shards", "tokenizer"


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def fingerprint(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when the context ends well, and goes when it does not.

    The file's content is on the disk before it has its name, also if the machine loses power.
    """
    name = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield name
        with name.open("rb") as written:
            os.fsync(written.fileno())
        name.replace(path)
    finally:
        name.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old one, or none, but never half of one."""
    with temporary(path) as name:
        name.write_bytes(data)


def write_manifest(build: Path, manifest: Mapping[str, Any]) -> None:
    """Finishes a build."""
    write_atomically(build / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")


def read_manifest(build: Path) -> dict[str, Any]:
    """The manifest of a finished build in a local folder.

    Raises:
        BuildError: if the directory is no build, is unfinished, or was made by another version of the format.
    """
    path = build / MANIFEST
    return parse_manifest(path.read_bytes() if path.is_file() else None, str(build), begun=(build / SHARDS).is_dir())


def parse_manifest(content: bytes | None, build: str, *, begun: bool) -> dict[str, Any]:
    """As `read_manifest`, for builds that lie anywhere.

    Args:
        content: of its manifest.json; None if there is none.
        build: where it lies, for messages.
        begun: whether there are shards.
    """
    path = f"{build}/{MANIFEST}"
    if content is None:
        if begun:
            raise BuildError(
                f"{build} is unfinished (no {MANIFEST}); run the same `longllava build` again to resume it"
            )
        raise BuildError(f"{build} is not a build: it has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise BuildError(f"{path} is not JSON ({error}); it was changed after the build") from error
    if manifest.get("format") != FORMAT:
        raise BuildError(f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT!r}")
    return manifest
