"""The data side's main loop: one recipe to one directory of shards."""

import fcntl
import json
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from formats.errors import BuildError
from formats.manifest import MANIFEST, SHARDS, TOKENIZER, file_sha256, read_manifest, write_atomically
from formats.tokens import ChatTokenizer
from pipelines import overlaps
from pipelines.curate import PictureBudget, refuse_overdrawn
from pipelines.duplicates import Curator
from pipelines.executor import Executor
from pipelines.faults import told
from pipelines.finish import Finisher, origins
from pipelines.glimpses import thumbnails
from pipelines.ingest import Catalog, Location, ingested
from pipelines.locks import flock
from pipelines.materialise import Settings, ShardTask, build_shard
from pipelines.notes import ShardNote, load_note
from pipelines.plan import EarlierBuild, Planner, Pool, Round, fingerprints
from pipelines.progress import Progress
from pipelines.storage import absolute, refuse_odd_bytes
from pipelines.tools import tool_versions
from recipes.schema import Recipe

WORK = ".build"
REQUEST = "request.json"  # in the work folder: recipe and places, for whoever goes on


@dataclass(frozen=True, slots=True)
class Request:
    """What `longllava build` was asked for.

    Attributes:
        recipe: what to build.
        recipe_folder: where the recipe lies; its tokenizer and builds may be named from there.
        data: folder or URL with a folder for each source.
        out: the build directory.
        catalog: where catalogs are kept.
        workers, address: see `Executor`.
        tokenizer: its file, if not where the recipe says.

    Raises:
        UsageError: if a path is not UTF-8.
    """

    recipe: Recipe
    recipe_folder: Path
    data: str
    out: Path
    catalog: Path
    workers: int | None = None
    address: str | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for path in (absolute(self.data), self.out.absolute(), self.catalog.absolute(), self.recipe_folder.absolute()):
            refuse_odd_bytes(path)

    def location(self, source: str) -> Location:
        """Where a source lies: as the recipe says, or below `data`."""
        return Location.below(self.data, source, self.recipe.sources.get(source))


@dataclass(frozen=True, slots=True)
class Site:
    """A build directory that is being worked on, and what it takes."""

    work: Path
    planner: Planner
    settings: Settings
    catalogs: Sequence[Catalog]
    earlier: Mapping[str, EarlierBuild]
    executor: Executor


def build(request: Request, progress: Progress) -> dict[str, Any]:
    """Builds a recipe, or goes on with an unfinished build of it, and returns the manifest.

    Raises:
        UsageError: if recipe, sources, tokenizer or output directory cannot be used as they are.
    """
    _refuse_url(request.out)
    if (request.out / MANIFEST).exists():
        return _already_built(request, progress)
    return go_on(request, progress, None)


def go_on(request: Request, progress: Progress, reopen: Callable[[Site], bool] | None) -> dict[str, Any]:
    """Goes on from what the work folder holds, once `reopen` has looked at it; if that is False, all is left as it is.

    Without `reopen`, a finished build is refused.

    Raises:
        UsageError: as `build`.
    """
    with told(request.out):
        return _build(request, progress, reopen)


def _build(request: Request, progress: Progress, reopen: Callable[[Site], bool] | None) -> dict[str, Any]:
    started = time.time()
    tokenizer = tokenizer_of(request)
    earlier = earlier_builds(request, tokenizer)
    prints = overlaps.prints_of(request.recipe, request.recipe_folder)
    with alone(request.out) as work:
        if reopen is None and (request.out / MANIFEST).exists():  # by a build that was there first
            raise BuildError(f"{request.out}: another build was finished there meanwhile; choose another --out")
        with (
            Executor(request.workers, request.address, work / "ray") as executor,
            ingested(locations(request, earlier), request.catalog, executor, progress) as catalogs,
        ):
            refuse_changed_origins(request.recipe, catalogs, earlier)
            _refuse_changed_inputs(work, _inputs(request.recipe, tokenizer, catalogs, earlier, prints))
            write_atomically(work / REQUEST, json.dumps(_asked(request)).encode())
            tokenizer.copy_to(request.out / TOKENIZER)
            curator = Curator(catalogs, work, executor, progress)
            with closing(overlaps.planned(request.recipe, curator, earlier, prints, work / "plan")) as planner:
                refuse_overdrawn(request.recipe, planner.drops())
                refuse_shortfall(planner)
                settings = settings_of(request, work, request.out / TOKENIZER / "tokenizer.json", catalogs, earlier)
                if reopen is None or reopen(Site(work, planner, settings, catalogs, earlier, executor)):
                    notes = _materialise(settings, work, planner, executor, progress)
                    look = partial(thumbnails, settings=settings, planner=planner, run=executor.map)
                    finisher = Finisher(request.out, work, planner, catalogs, earlier, tokenizer, tool_versions(), look)
                    manifest = finisher.finish(notes, _environment(request, started, executor))
                else:
                    manifest = read_manifest(request.out)
        shutil.rmtree(work, ignore_errors=True)  # while no other build can begin in it
    return manifest


def _materialise(
    settings: Settings, work: Path, planner: Planner, executor: Executor, progress: Progress
) -> list[ShardNote]:
    """Builds shards until nothing that failed is left to replace."""
    progress.stage("build", sum(pool.asked for pool in planner.pools.values()), "samples")
    return rounds(settings, planner, lambda tasks: _run(tasks, work, executor, progress), progress)


def rounds(
    settings: Settings, planner: Planner, run: Callable[[list[ShardTask]], Iterable[ShardNote]], progress: Progress
) -> list[ShardNote]:
    """Draws round after round, each replacing what failed in the one before; `run` gives the notes of its shards."""
    notes: list[ShardNote] = []
    wanted: Mapping[str, int] = {name: pool.asked for name, pool in planner.pools.items()}
    kept: Counter[str] = Counter()
    budget = PictureBudget(settings.recipe, planner.drops())
    position = number = 0
    for round_number in range(1_000_000):
        drawn = planner.draw(round_number, wanted, position)
        budget.expect(wanted)
        tasks = _tasks(settings, drawn, number)
        round_notes = []
        for note in run(tasks):
            budget.saw(note.kept + note.failed, note.dropped)
            round_notes.append(note)
        notes += round_notes
        position, number = position + drawn.rows, number + len(tasks)
        kept += sum((note.kept for note in round_notes), Counter())
        wanted = _replacements(planner.pools, round_notes, kept)
        if not wanted:
            break
        progress.note(f"replacing {sum(wanted.values()):,} records that could not be used")
    return sorted(notes, key=lambda note: note.number)


def settings_of(
    request: Request, work: Path, tokenizer: Path, catalogs: list[Catalog], earlier: Mapping[str, EarlierBuild]
) -> Settings:
    """What every shard task needs to know; paths are absolute, since workers have folders of their own."""
    places = [catalog.location for catalog in catalogs]
    return Settings(
        recipe=request.recipe,
        work=str(work),
        tokenizer=str(tokenizer.resolve()),
        media_roots={place.source: place.media for place in places},
        annotation_roots={place.source: place.annotations for place in places},
        builds={name: str(build.folder) for name, build in earlier.items()},
        build_hashes={name: build.manifest["recipe_sha256"] for name, build in earlier.items()},
        tools=tool_versions(),
    )


def _tasks(settings: Settings, drawn: Round, number: int) -> list[ShardTask]:
    size = settings.recipe.samples_per_shard
    starts = range(0, drawn.rows, size)
    return [
        ShardTask(
            settings, number + i, str(drawn.file), start, min(start + size, drawn.rows), drawn.first + start, plan
        )
        for i, (start, plan) in enumerate(zip(starts, fingerprints(drawn.file, size), strict=True))
    ]


def _run(tasks: list[ShardTask], work: Path, executor: Executor, progress: Progress) -> Iterator[ShardNote]:
    """Builds the shards that an earlier run has not made of the same rows, and yields the notes of all."""
    missing = []
    for task in tasks:
        note = load_note(work, task.number)
        if note is None or note.plan != task.plan:
            missing.append(task)
            continue
        progress.advance(note.samples, rejected=note.reasons, new=False)
        yield note
    for note in executor.map(build_shard, missing):
        progress.advance(note.samples, images=note.images, rejected=note.reasons)
        yield note


def _replacements(pools: Mapping[str, Pool], notes: list[ShardNote], kept: Counter[str]) -> dict[str, int]:
    """How many further records each component needs for what failed in a round; `kept` is of all rounds."""
    failed: Counter[str] = sum((note.failed for note in notes), Counter())
    wanted = {
        name: count if pools[name].repeats else min(count, pools[name].left)
        for name, count in failed.items()
        if pools[name].component.backfill
    }
    # A component that goes round and round must not do so for ever over records of which none can be used.
    hopeless = {name for name, pool in pools.items() if pool.repeats and pool.drawn >= pool.size and not kept[name]}
    return {name: count for name, count in wanted.items() if count and name not in hopeless}


# Before the work ------------------------------------------------------------------------------------------------------


def _already_built(request: Request, progress: Progress) -> dict[str, Any]:
    manifest = read_manifest(request.out)
    recipe = request.recipe.model_dump(mode="json")
    differing = [key for key, value in recipe.items() if manifest["recipe"].get(key) != value]
    if differing:
        raise BuildError(
            f"{request.out} holds a finished build of another recipe ({', '.join(differing)} differ);"
            " choose another --out or remove it"
        )
    progress.note(f"{request.out} was finished {manifest['environment']['started']}; nothing to do")
    shutil.rmtree(request.out / WORK, ignore_errors=True)  # left by a run that was killed while it removed it
    return manifest


def _refuse_url(out: Path) -> None:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(out)):
        raise BuildError(
            f"--out {out} is a URL; a build is written to a local disk, or on a cluster to one that all nodes share."
            " Upload the finished directory, manifest.json last; docs/cluster.md shows how"
        )


@contextmanager
def alone(out: Path) -> Iterator[Path]:
    """The work folder of a build directory, held against other builds; goes when the process does."""
    work = out / WORK
    try:
        (work / SHARDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{out}: cannot be made ({error})") from error
    with (work / "lock").open("w") as lock:
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, "--out")
        except BlockingIOError as error:
            raise BuildError(f"{out}: another build is at work there; wait for it or choose another --out") from error
        for stray in (*out.glob(".*.tmp"), *out.glob("*/.*.tmp")):
            stray.unlink(missing_ok=True)
        yield work.resolve()


def tokenizer_of(request: Request) -> ChatTokenizer:
    """The tokenizer that a request names."""
    if request.tokenizer is not None:
        return ChatTokenizer(request.tokenizer)
    return ChatTokenizer.load(request.recipe.tokenizer, request.recipe_folder)


def earlier_builds(request: Request, tokenizer: ChatTokenizer) -> dict[str, EarlierBuild]:
    """The builds that replay and sub-image components draw from.

    Raises:
        BuildError: if one is absent, unfinished, or counted its tokens with another tokenizer.
    """
    names = {c.origin for c in request.recipe.components.values() if not c.source} | {*request.recipe.apart_from}
    builds = {}
    for name in sorted(names):
        folder = _folder_of(name, request)
        try:
            manifest = read_manifest(folder)
        except BuildError as error:
            raise BuildError(
                f"{error}. The recipe draws from the build {name!r}: build it there, or name its folder with"
                f" --set builds.{name}=FOLDER"
            ) from error
        if manifest["tokenizer"]["sha256"] != tokenizer.fingerprint:
            raise BuildError(f"{folder} was built with another tokenizer; rebuild it with {request.recipe.tokenizer!r}")
        builds[name] = EarlierBuild(name, folder.resolve(), manifest)
    return builds


def _folder_of(name: str, request: Request) -> Path:
    """Where an earlier build lies: where the recipe says, from here or from the recipe, or beside the output."""
    if name not in request.recipe.builds:
        return request.out.parent / name
    named = Path(request.recipe.builds[name])
    return named if named.exists() else request.recipe_folder / named


def locations(request: Request, earlier: Mapping[str, EarlierBuild]) -> list[Location]:
    """The sources that a recipe needs, those that its sub-images go back to and its copies are looked for in, too."""
    names = overlaps.sources_of(request.recipe, earlier)
    return [request.location(name) for name in sorted(names)]


def refuse_changed_origins(recipe: Recipe, catalogs: Sequence[Catalog], earlier: Mapping[str, EarlierBuild]) -> None:
    """Raises `BuildError` if sub-images would go back to other annotations than those their build was made of."""
    now = {catalog.location.source: catalog.hashes for catalog in catalogs}
    for name in sorted({c.subimage for c in recipe.components.values() if c.subimage}):
        for source, files in origins(earlier[name].manifest).items():
            changed = [file for file, sha256 in files.items() if now.get(source, files).get(file) != sha256]
            if changed:
                raise BuildError(
                    f"{source}/{changed[0]} is not the file that the build {name!r} was made of;"
                    f" bring that one back, or rebuild {name}"
                )


def refuse_shortfall(planner: Planner) -> None:
    """Raises `BuildError` if a pool is too small and the recipe does not say that this is fine."""
    lines = [
        f"components.{pool.name}: asked {pool.asked:,}, but {pool.size:,} pass the filters"
        + "".join(f", {count:,} dropped by {reason}" for reason, count in pool.filtered.items())
        for pool in planner.short()
        if pool.component.on_short == "error" or not pool.size
    ]
    if lines:
        raise BuildError("\n".join([*lines, "Lower the count, widen the filters, or set on_short: accept or repeat."]))


def _inputs(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    catalogs: list[Catalog],
    earlier: Mapping[str, EarlierBuild],
    prints: Path | None,
) -> dict[str, str]:
    """Fingerprints of everything that decides the bytes of a build."""
    return {
        "the recipe": recipe.content_sha256,
        "the tokenizer": tokenizer.fingerprint,
        **{f"the source {catalog.location.source}": catalog.sha256 for catalog in catalogs},
        **{f"the build {name}": build.manifest["index"]["sha256"] for name, build in earlier.items()},
        **({"the benchmarks' fingerprints": file_sha256(prints)} if prints else {}),
        **{f"the version of {name}": version for name, version in tool_versions().items()},
    }


def _refuse_changed_inputs(work: Path, inputs: Mapping[str, str]) -> None:
    path = work / "inputs.json"
    if path.exists():
        before = json.loads(path.read_bytes())
        changed = [name for name in sorted({*before, *inputs}) if before.get(name) != inputs.get(name)]
        if changed:
            raise BuildError(
                f"{work.parent} is an unfinished build, and {', '.join(changed)} changed since it began;"
                " undo that to resume it, or remove the directory to start over"
            )
    write_atomically(path, json.dumps(inputs, indent=2).encode())


def _environment(request: Request, started: float, executor: Executor) -> dict[str, Any]:
    """Time and place: the one part of a manifest in which two equal builds may differ."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "cpus": executor.cpus,
        "host": platform.node(),
        "python": platform.python_version(),
        **_asked(request)["environment"],
    }


def _asked(request: Request) -> dict[str, Any]:
    """What `longllava retry` has to know of a build, in the form of a manifest."""
    places = {"recipe_folder": str(request.recipe_folder.resolve()), "catalog": str(request.catalog)}
    return {
        "recipe": request.recipe.model_dump(mode="json"),
        "environment": {"data": absolute(request.data), **places},
    }
