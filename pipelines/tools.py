"""Versions of what decides the bytes of a build: the same wherever a shard is made."""

import importlib.metadata
import socket
from collections.abc import Iterator, Mapping
from functools import cache
from hashlib import sha256
from importlib import resources
from importlib.resources.abc import Traversable

import av
from PIL import features

from formats.errors import BuildError
from formats.manifest import fingerprint

VERSION = "0.1.0"
"""The project's; pyproject.toml takes it from here, so that a checkout that is not installed knows it too."""

_TOOLS = ("pillow", "simplejpeg", "numpy", "av", "tokenizers", "pyarrow", "duckdb", "pycld2")
_FFMPEG = ("libavcodec", "libavformat", "libavutil", "libswscale")
_CODECS = ("avif", "jpg", "jpg_2000", "libjpeg_turbo", "libtiff", "littlecms2", "webp", "zlib", "zlib_ng")
_PACKAGES = ("formats", "recipes", "pipelines")
ONLY_TELL = frozenset(
    f"pipelines/{name}"
    for name in (
        *("card.py", "charts.py", "compare.py", "demo", "export.py", "gallery.py", "inventory.py", "overlap_report.py"),
        *("page.py", "preview.py", "progress.py", "report.py", "templating.py"),
    )
)
"""Sources that say what was built, and have no part in what is."""


@cache
def tool_versions() -> Mapping[str, str]:
    """Version by name of distribution, of this process's machine; of this project with a hash of its sources.

    Then those of the libraries that PyAV and Pillow decode with: packagers build the same version with others.
    """
    return {
        "longllava": _own_version(),
        **{name: importlib.metadata.version(name) for name in _TOOLS},
        "ffmpeg": ", ".join(f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in _FFMPEG),
        "pillow's codecs": ", ".join(
            f"{name} {features.version(name)}" for name in _CODECS if name in features.get_supported()
        ),
    }


def _own_version() -> str:
    """The version, and a hash of what decides bytes: sources change more often than versions do.

    Where they are, in what order they are listed and how their lines end makes no difference. Where only compiled
    files are installed there is nothing to hash, and the version stands alone.
    """
    found = sorted(
        (name, sha256(text.replace(b"\r\n", b"\n")).hexdigest())
        for package in _PACKAGES
        for name, text in _sources(resources.files(package), package)
    )
    return f"{VERSION}+{fingerprint(found)[:12]}" if found else VERSION


def _sources(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the modules in a package and the packages below it."""
    for entry in folder.iterdir():
        name = f"{path}/{entry.name}"
        if name in ONLY_TELL:
            continue
        if entry.name.endswith(".py") and entry.is_file():
            yield name, entry.read_bytes()
        elif entry.is_dir() and (entry / "__init__.py").is_file():
            yield from _sources(entry, name)


def refuse_other_tools(wanted: Mapping[str, str]) -> None:
    """Stops where other versions are installed than where the build was planned.

    Raises:
        BuildError: with the machine and the versions.
    """
    differing = [
        f"{name} {here}, not {wanted.get(name)}" for name, here in tool_versions().items() if wanted.get(name) != here
    ]
    if differing:
        raise BuildError(
            f"{socket.gethostname()} has {', '.join(differing)} as where the build was started, so its shards would"
            " differ; install the same on every machine, and run the same command again"
        )
