"""Where commands print."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from formats.errors import UsageError


def stdout() -> Any:
    """A rich console on standard output."""
    from longllava.console import PlainConsole

    return PlainConsole() if sys.stdout.isatty() else PlainConsole(width=140)  # not cut to 80 columns in a log


def stderr() -> Any:
    """A rich console on standard error."""
    from longllava.console import PlainConsole

    return PlainConsole(stderr=True)


def printable(value: str) -> str:
    """Text in which characters that would steer a terminal are made visible."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in value)


def print_json(value: Any) -> None:
    """One JSON document on standard output; what would steer a terminal is escaped in it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(re.sub(r"[^\n -~]", _escaped, text))  # noqa: T201


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def print_error(error: object) -> None:
    """What went wrong, on standard error."""
    print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201


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
