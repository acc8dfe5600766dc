"""Samples of a finished build made once more, from the upstream files that they go back to; `validate --against`.

No catalog has a part in it: annotation files are read themselves, so that a catalog that lies is found out, too.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarError
from types import TracebackType
from typing import Any, Literal, Self

from formats.catalog import to_row
from formats.errors import BuildError, LongLlavaError, Reject
from formats.manifest import SHARDS
from formats.shard import members_of, safe_shard_name
from pipelines.executor import Executor
from pipelines.finish import origins
from pipelines.ingest import Location
from pipelines.materialise import Settings, render_row
from pipelines.opened import OpenBuild
from pipelines.progress import Progress
from pipelines.sources.base import Rejected
from pipelines.sources.registry import source_named
from pipelines.storage import Root
from pipelines.tools import tool_versions
from recipes.schema import Recipe

_AT_ONCE = 8  # samples that one task makes


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A sample made once more, or why it cannot be.

    Attributes:
        key: of the sample in the build that is checked.
        of: "upstream" if it was made of upstream files, "origin" if it is the sample that this one should copy.
        record, images: as a shard stores them; None if it cannot be made.
        problem: if it cannot be made, why, as the validators call it; else empty.
    """

    key: str
    of: Literal["upstream", "origin"] = "upstream"
    record: bytes | None = None
    images: tuple[bytes, ...] = ()
    problem: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FileTask:
    """Records to look up in one annotation file: ordinals by uid, of samples of one build."""

    build: str
    source: str
    root: str
    file: str
    sha256: str
    ordinals: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FoundRecords:
    """Catalog rows by uid; `problem` and `detail` as in `Rebuilt`, for what is not there."""

    task: FileTask
    rows: Mapping[str, dict[str, Any]]
    problem: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RenderTask:
    """Samples to render: for each its key and its planned row."""

    settings: Settings
    rows: tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A sample of the build that is checked, and build, row and JSON of what goes upstream: it, or what it copies."""

    key: str
    build: OpenBuild
    row: Mapping[str, Any]
    record: Mapping[str, Any]


class Rebuilder:
    """Makes samples of a build once more; a context manager.

    Args:
        build: its folder or URL.
        data: folder or URL that holds a folder for each source.
        executor: what it runs on; it is started when it is needed.
        progress: told of what is done.
    """

    def __init__(self, build: str, data: str, executor: Executor, progress: Progress) -> None:
        self._url, self._data = build, data
        self._executor, self._progress = executor, progress
        self._stack = ExitStack()
        self._settings: dict[str, Settings] = {}
        self._origins: dict[tuple[str, str], OpenBuild] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Rebuilt]:
        """Makes samples once more, in any order; replayed ones are also fetched from the build they were drawn from.

        Args:
            rows: lines of the index, with the sample's JSON as "record".

        Raises:
            LongLlavaError: if the build cannot be opened, or nothing can be run.
        """
        build = OpenBuild(self._url)
        self._stack.enter_context(self._executor)
        self._progress.stage("rebuild", len(rows), "samples")
        if rows:
            yield from _other_tools(rows[0]["key"], build)
        wanted: list[_Wanted] = []
        for row in rows:
            for found in self._traced(_Wanted(row["key"], build, row, row["record"])):
                if isinstance(found, _Wanted):
                    wanted.append(found)
                else:
                    yield found
        ready: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        yield from self._looked_up(wanted, ready)
        yield from self._rendered(ready)

    def _traced(self, wanted: _Wanted) -> Iterator["Rebuilt | _Wanted"]:
        """Follows a replayed sample to the build that made it; its copies on the way are to be compared, too."""
        component = wanted.build.manifest["recipe"]["components"].get(wanted.row["component"])
        if component is None:
            detail = f"its component {wanted.row['component']!r} is none of the recipe of {wanted.build.url}"
            yield Rebuilt(wanted.key, problem="upstream-missing", detail=detail)
            return
        name = component.get("replay")
        if not name:
            yield wanted
            return
        try:
            origin = self._origin(wanted.build, name)
            (row,) = origin.rows("FROM samples WHERE id = $1 ORDER BY key LIMIT 1", [wanted.row["id"]])
            with origin.root.open(f"{SHARDS}/{safe_shard_name(row['shard'])}") as file:
                file.seek(row["offset"])
                _, record, images = members_of(file.read(row["size"]))
        except LongLlavaError as error:
            yield Rebuilt(wanted.key, problem="upstream-missing", detail=f"the build {name}: {error}")
            return
        except (OSError, ValueError, IndexError, TarError) as error:  # no such row, no such shard, no sample there
            detail = f"the build {name} does not hold {wanted.row['id']}: {error}"
            yield Rebuilt(wanted.key, problem="upstream-missing", detail=detail)
            return
        hashes = wanted.build.manifest["builds"][name]
        if origin.manifest["index"]["sha256"] != hashes["index_sha256"]:
            detail = f"the build {name} at {origin.url} is not the one that was drawn from"
            yield Rebuilt(wanted.key, problem="upstream-changed", detail=detail)
        yield Rebuilt(wanted.key, "origin", record, tuple(images))
        yield from self._traced(_Wanted(wanted.key, origin, row, json.loads(record)))

    def _origin(self, build: OpenBuild, name: str) -> OpenBuild:
        """An earlier build: where the recipe says, from here or from the recipe, or beside the build."""
        if (build.url, name) not in self._origins:
            places = [f"{build.url.rpartition('/')[0] or '.'}/{name}"]
            if named := build.manifest["recipe"].get("builds", {}).get(name):
                folder = build.manifest["environment"].get("recipe_folder", ".")
                places = [named, str(Path(folder) / named), *places]
            found = [place for place in places if Root(place).is_file("manifest.json")]
            if not found:
                raise BuildError(f"is not at {' or '.join(places)}")
            self._origins[build.url, name] = OpenBuild(found[0])
        return self._origins[build.url, name]

    def _looked_up(
        self, wanted: Sequence[_Wanted], ready: dict[str, list[tuple[str, dict[str, Any]]]]
    ) -> Iterator[Rebuilt]:
        """Finds the upstream records; adds planned rows to `ready`, by build."""
        users: dict[tuple[str, str, str], list[_Wanted]] = defaultdict(list)
        for one in wanted:
            users[one.build.url, str(one.row["source"]), str(one.record["provenance"]["file"])].append(one)
        tasks = [self._file_task(*place, mine) for place, mine in users.items()]
        for found in self._executor.map(find_records, tasks):
            task = found.task
            mine = users[task.build, task.source, task.file]
            for one in mine:
                uid = str(one.row["id"])
                if found.problem:
                    yield Rebuilt(one.key, problem=found.problem, detail=found.detail)
                if uid in found.rows:
                    ready[one.build.url].append((one.key, _planned(one, found.rows[uid])))
                elif found.problem != "upstream-missing":
                    detail = f"{task.source}/{task.file} holds no usable record {uid}"
                    yield Rebuilt(one.key, problem="upstream-missing", detail=detail)

    def _file_task(self, build: str, source: str, file: str, wanted: Sequence[_Wanted]) -> FileTask:
        settings = self._settings_of(wanted[0].build)
        known = _hashes(wanted[0].build, source)
        ordinals = {str(one.row["id"]): int(one.record["provenance"]["ordinal"]) for one in wanted}
        return FileTask(build, source, settings.annotation_roots[source], file, known.get(file, ""), ordinals)

    def _rendered(self, ready: Mapping[str, Sequence[tuple[str, dict[str, Any]]]]) -> Iterator[Rebuilt]:
        tasks = [
            RenderTask(self._settings[url], tuple(rows[at : at + _AT_ONCE]))
            for url, rows in ready.items()
            for at in range(0, len(rows), _AT_ONCE)
        ]
        for rebuilt in self._executor.map(render_again, tasks):
            self._progress.advance(len(rebuilt), images=sum(len(one.images) for one in rebuilt))
            yield from rebuilt

    def _settings_of(self, build: OpenBuild) -> Settings:
        if build.url not in self._settings:
            recipe = Recipe.model_validate(build.manifest["recipe"])
            held = build.rows("SELECT DISTINCT source FROM samples")
            names = {*build.manifest["sources"], *(row["source"] for row in held)}
            places = [Location.below(self._data, name, recipe.sources.get(name)) for name in sorted(names)]
            tokenizer = self._stack.enter_context(build.tokenizer())
            self._settings[build.url] = Settings(
                recipe=recipe,
                work="",
                tokenizer=str(tokenizer.file),
                media_roots={place.source: place.media for place in places},
                annotation_roots={place.source: place.annotations for place in places},
                builds={},
                build_hashes={name: known["recipe_sha256"] for name, known in build.manifest["builds"].items()},
                tools=tool_versions(),
            )
        return self._settings[build.url]


def _other_tools(key: str, build: OpenBuild) -> Iterator[Rebuilt]:
    made_by, here = build.manifest.get("tools", {}), tool_versions()
    changed = [name for name, version in here.items() if made_by.get(name) != version]
    other = [f"{name} {made_by.get(name)}, here {here[name]}" for name in changed]
    if other:
        yield Rebuilt(key, problem="tools-changed", detail=f"the build was made with {'; '.join(other)}")


def _hashes(build: OpenBuild, source: str) -> dict[str, str]:
    """sha256 of a source's annotation files, as a build states them for itself and the builds that it draws from."""
    return origins(build.manifest).get(source, {})


def _planned(wanted: _Wanted, record: Mapping[str, Any]) -> dict[str, Any]:
    """The row of the plan that the sample was made of."""
    return {
        "component": wanted.row["component"],
        "uid": wanted.row["id"],
        "copy": wanted.record["provenance"].get("copy", 0),
        "replayed": False,
        "record": record,
    }


def find_records(task: FileTask) -> FoundRecords:
    """Reads an annotation file up to the last record that is wanted."""
    rows: dict[str, dict[str, Any]] = {}
    last = max(task.ordinals.values())
    try:
        source, root = source_named(task.source), Root(task.root)
        if task.file not in source.annotation_files(root):
            return FoundRecords(task, {}, "upstream-missing", f"{task.source}/{task.file} is no annotation file of it")
        for ordinal, outcome in enumerate(source.samples(root, task.file)):
            if not isinstance(outcome, Rejected):
                rows.update({sample.uid: to_row(sample) for sample in outcome if sample.uid in task.ordinals})
            if ordinal >= last:
                break
        same = not task.sha256 or root.sha256(task.file) == task.sha256
    except (ConnectionError, TimeoutError):
        raise
    except (LongLlavaError, OSError) as error:
        return FoundRecords(task, rows, "upstream-missing", f"{task.source}/{task.file}: {error}")
    if not same:
        detail = f"{task.source}/{task.file} is not the file that the build was made of"
        return FoundRecords(task, rows, "upstream-changed", detail)
    return FoundRecords(task, rows)


def render_again(task: RenderTask) -> list[Rebuilt]:
    """Renders samples; one that is rejected now is told with its reason."""
    found = []
    for key, row in task.rows:
        try:
            ready = render_row(row, task.settings)
        except Reject as reject:
            found.append(Rebuilt(key, problem="rebuilt-rejected", detail=f"{row['uid']}: {reject}"))
        else:
            found.append(Rebuilt(key, record=ready.record, images=tuple(ready.images)))
    return found
