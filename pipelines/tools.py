"""Versions of what decides the bytes of a build: the same wherever a shard is made."""

import importlib.metadata
import socket
from collections.abc import Mapping
from functools import cache

from formats.errors import BuildError

_TOOLS = ("longllava", "pillow", "simplejpeg", "numpy", "av", "tokenizers", "pyarrow", "duckdb", "pycld2")


@cache
def tool_versions() -> Mapping[str, str]:
    """Version by name of distribution, of this process's machine."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


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
