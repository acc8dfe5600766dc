"""Where commands print."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from formats.errors import UsageError


def stdout() -> Any:
    """A rich console on standard output."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)  # not cut to 80 columns in a log


def stderr() -> Any:
    """A rich console on standard error."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def program() -> str:
    """How this program can be called again: by name if it is on the PATH."""
    if shutil.which("longllava"):
        return "longllava"
    called = Path(sys.argv[0])
    return f"{sys.executable} -m longllava" if called.name == "__main__.py" else shlex.quote(str(called))


def default_catalog(data: str) -> Path:
    """Where catalogs are if nobody says: beside the sources.

    Raises:
        UsageError: if those are remote.
    """
    if "://" in data:
        raise UsageError(f"--data {data} is remote: say with --catalog where on this machine catalogs are kept")
    return Path(data) / "catalog"
