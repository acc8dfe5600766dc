"""Files of one JSON object a line."""

from typing import TypeVar

from pydantic import ValidationError

from validators.findings import Check, error
from validators.folder import Folder
from validators.manifest import Block

T = TypeVar("T", bound=Block)


def read_lines(folder: Folder, name: str, shape: type[T], code: str) -> Check[tuple[list[tuple[int, T]], int]]:
    """The well-formed lines, each with its number, and the number of all lines; others are findings with that code."""
    lines: list[tuple[int, T]] = []
    number = 0
    with folder.open(name) as file:
        for number, line in enumerate(file, 1):
            try:
                lines.append((number, shape.model_validate_json(line)))
            except ValidationError as problems:
                shown = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'all'}: {p['msg']}" for p in problems.errors())
                yield error(code, f"line {number}: {shown}", file=name)
    return lines, number
