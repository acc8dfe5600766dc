"""Fingerprints of benchmarks in one file, made once: of their questions, and of their pictures and frames."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import Reject, UsageError
from formats.likeness import LOOK, VERSION, grams, words
from formats.manifest import temporary
from formats.sample import Media
from pipelines.evaluations import BENCHMARKS, Item, benchmark_files, benchmark_named, read_items
from pipelines.executor import Executor
from pipelines.fingerprints import medium_print
from pipelines.progress import Progress
from pipelines.storage import Root, absolute

FORMAT = "longllava.fingerprints/1"
GRAM = 13
"""Words of a run that is a hit by itself."""
WHOLE = 8
"""Words of the shortest question that is a hit by itself, as a whole."""
SHARED = 3
"""Items that may have a run or a question before it counts as a template."""

PRINTS = pa.schema(
    [
        ("benchmark", pa.string()),
        ("item", pa.string()),
        ("question", pa.string()),
        ("n_words", pa.int32()),
        ("key", pa.uint64()),
        ("alone", pa.bool_()),
        ("grams", pa.list_(pa.uint64())),
        ("files", pa.list_(pa.string())),
        ("path", pa.string()),
        ("looks", pa.binary()),
    ]
)
"""A row for each question, without `path` and `looks`, then one for each picture or clip, without `question`. `key`
stands for all words of a question, `alone` says whether it is a hit by itself, `files` are names of its media."""


# Making the file ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FileTask:
    benchmark: str
    root: str
    layout: int
    file: str


def write_fingerprints(folder: str, out: Path, executor: Executor, progress: Progress) -> dict[str, Any]:
    """Fingerprints the benchmarks below a folder into one Parquet file; the same benchmarks give the same bytes.

    Args:
        folder: holds a folder for each benchmark.
        out: the file.
        executor, progress: who does it, and who hears of it.

    Returns:
        By benchmark: items, questions that are hits by themselves, media, and media that could not be read, by reason.

    Raises:
        SourceError: if a file is not what its name says, or has other fields than expected.
        UsageError: if the folder holds no benchmark that is known, or the file's own folder is not there.
    """
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no folder; make it first")
    tasks = _file_tasks(absolute(folder), progress)
    progress.stage("fingerprint benchmarks", len(tasks), "files")
    found: dict[_FileTask, tuple[list[dict[str, Any]], dict[str, int]]] = {}
    for task, rows, missing in executor.map(_print_file, tasks):
        found[task] = rows, missing
        progress.advance(1, rejected=missing)
    rows = [row for task in tasks for row in found[task][0]]
    _settle(rows)
    rows = _once(rows)
    table = pa.Table.from_pylist(rows, schema=PRINTS.with_metadata({"format": FORMAT, "likeness": str(VERSION)}))
    with temporary(out) as name:
        pq.write_table(table, name, compression="zstd")
    return {name: _benchmark_summary(name, rows, found) for name in sorted({task.benchmark for task in tasks})}


def _file_tasks(folder: str, progress: Progress) -> list[_FileTask]:
    root = Root(folder)
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir()) if root.is_local else []
    known = {name: benchmark for name in names if (benchmark := benchmark_named(name))}
    for name in names:
        if name not in known:
            progress.note(f"{folder}/{name} is no benchmark that is known here; left out")
    if not known:
        raise UsageError(f"{folder} has no folder named after a benchmark; known are {', '.join(sorted(BENCHMARKS))}")
    return [
        _FileTask(benchmark, f"{folder}/{name}", layout, file)
        for name, benchmark in known.items()
        for layout, file in benchmark_files(benchmark, Root(f"{folder}/{name}"))
    ]


def _print_file(task: _FileTask) -> tuple[_FileTask, list[dict[str, Any]], dict[str, int]]:
    """Rows of one file's questions and media, and how many media cannot be read, by reason."""
    rows: list[dict[str, Any]] = []
    missing: Counter[str] = Counter()
    seen: set[str] = set()
    root = Root(task.root)
    for item in read_items(task.benchmark, task.layout, root, task.file):
        if item.question:
            rows.append(_question(task.benchmark, item))
        for path, media, content in _media_of(item, root):
            if path in seen:
                continue
            seen.add(path)
            try:
                _, looks = medium_print(media, task.root, content)
            except Reject as reject:
                missing[reject.reason] += 1
                continue
            rows.append({"benchmark": task.benchmark, "item": item.name, "path": path, "looks": looks})
    return task, rows, dict(missing)


def _question(benchmark: str, item: Item) -> dict[str, Any]:
    found = words(item.question)
    return {
        "benchmark": benchmark,
        "item": item.name,
        "question": item.question,
        "n_words": len(found),
        "key": question_key(found),
        "grams": grams(found, GRAM).tolist() if len(found) >= GRAM else [],
        "files": sorted({stem_of(media.path) for media in item.media}),
    }


def _media_of(item: Item, root: Root) -> Iterator[tuple[str, Media, bytes | None]]:
    """What names a medium, what it is and, if it came inside the file, its bytes."""
    for media in item.media:
        there = tuple(place for place in media.roots if _is_there(root, place))
        yield media.path, replace(media, roots=there or media.roots[:1]), None
    for column, content in item.embedded:
        yield f"{item.name}/{column}", Media(kind="image", path=column), content


@cache
def _is_there(root: Root, place: str) -> bool:
    """Whether media can be found at a place at all; most benchmarks can lie in several, and do in one."""
    return bool(root.glob(place)) if "*" in place else root.exists(place)


def _settle(rows: Sequence[dict[str, Any]]) -> None:
    """Decides, once all questions are known, which of them and of their runs are hits by themselves."""
    questions = [row for row in rows if "question" in row]
    asked = Counter(row["key"] for row in questions)
    runs = Counter(gram for row in questions for gram in set(row["grams"]))
    for row in questions:
        row["alone"] = row["n_words"] >= WHOLE and asked[row["key"]] <= SHARED
        row["grams"] = sorted({gram for gram in row["grams"] if runs[gram] <= SHARED})


def _once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions and then media, each in order of benchmark and name, none twice."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        is_medium = "looks" in row
        key = (is_medium, row["benchmark"], row["path"] if is_medium else row["item"], row.get("key"), row.get("looks"))
        kept.setdefault(key, row)
    return [kept[key] for key in sorted(kept, key=lambda key: (*key[:3], key[3] or 0, key[4] or b""))]


def _benchmark_summary(name: str, rows: Sequence[Mapping[str, Any]], found: Mapping[_FileTask, Any]) -> dict[str, Any]:
    mine = [row for row in rows if row["benchmark"] == name]
    missing = sum((Counter(part[1]) for task, part in found.items() if task.benchmark == name), Counter())
    questions = [row for row in mine if "question" in row]
    return {
        "questions": len(questions),
        "alone": sum(bool(row["alone"] or row["grams"]) for row in questions),
        "media": len(mine) - len(questions),
        "missing": dict(sorted(missing.items())),
    }


# Reading it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prints:
    """A fingerprint file, ready for looking things up."""

    rows: list[dict[str, Any]]
    grams: np.ndarray
    gram_rows: np.ndarray
    whole: Mapping[int, int]
    by_file: Mapping[tuple[int, str], int]
    looks: np.ndarray
    look_rows: np.ndarray
    sizes: np.ndarray


def read_prints(path: str) -> Prints:
    """Opens a fingerprint file.

    Raises:
        UsageError: if it is none, or of another version.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(
            f"{path} is no fingerprint file ({error}); `longllava decontaminate BENCHMARKS --out {path}` makes one"
        ) from error
    about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if about.get("format") != FORMAT or about.get("likeness") != str(VERSION):
        raise UsageError(f"{path} is of another version; make it anew with `longllava decontaminate`")
    rows = table.drop_columns(["looks"]).to_pylist()
    pairs = sorted((gram, i) for i, row in enumerate(rows) for gram in row["grams"] or ())
    looks = [np.frombuffer(value or b"", np.uint8).reshape(-1, LOOK) for value in table["looks"].to_pylist()]
    sizes = np.array([len(look) for look in looks], np.int64)
    return Prints(
        rows=rows,
        grams=np.array([gram for gram, _ in pairs], np.uint64),
        gram_rows=np.array([i for _, i in pairs], np.int64),
        whole={row["key"]: i for i, row in enumerate(rows) if row["alone"]},
        by_file={(row["key"], file): i for i, row in enumerate(rows) for file in row["files"] or ()},
        looks=np.concatenate([*looks, np.zeros((0, LOOK), np.uint8)]),
        look_rows=np.repeat(np.arange(len(rows)), sizes),
        sizes=sizes,
    )


def question_key(found: Sequence[str]) -> int:
    """A number for all words of a text."""
    return int.from_bytes(hashlib.blake2b(" ".join(found).encode(), digest_size=8).digest(), "little")


def stem_of(path: str) -> str:
    """A file's name without folder and suffix, which upstream sets change freely."""
    return PurePosixPath(path).stem.lower()
