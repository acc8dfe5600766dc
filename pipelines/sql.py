"""Names and values as DuckDB's SQL spells them."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def parquet(files: Sequence[str | Path], *options: str) -> str:
    """A table of Parquet files, with options for reading them.

    Folders named "modality=video" or "[1]" on the way are just folders.
    """
    names = ["".join(f"[{c}]" if c in "*?[" else c for c in str(file)) for file in files]
    return f"read_parquet({', '.join((texts(names), 'hive_partitioning = false', *options))})"


def text(value: str) -> str:
    """A string."""
    return "'" + value.replace("'", "''") + "'"


def texts(values: Iterable[str]) -> str:
    """A list of strings."""
    return "[" + ", ".join(text(value) for value in values) + "]"
