"""`longllava retry`: a build as if the files that were mended since had been right from the start.

The plan is drawn again, and the notes that the build had when it was finished are written anew from its index and
ledger (`pipelines.past`). Then every rejected record is tried alone. Shards that hold one which now fares otherwise
lose their notes, and the build goes on as one that was interrupted: it makes those shards again, and those of later
rounds that replace fewer records now, and finishes. Samples that the build holds already are copied into them; only
what was rejected is rendered. The finished build stays whole, by hard links, until all shards are made.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from formats.errors import BuildError, Reject, UsageError
from formats.manifest import MANIFEST, SHARDS, TOKENIZER, read_manifest
from pipelines import overlaps
from pipelines.build import (
    REQUEST,
    WORK,
    Request,
    Site,
    alone,
    earlier_builds,
    go_on,
    locations,
    refuse_changed_origins,
    rounds,
    settings_of,
    tokenizer_of,
)
from pipelines.duplicates import Curator
from pipelines.executor import Executor
from pipelines.faults import told
from pipelines.guard import Guard
from pipelines.ingest import ingested
from pipelines.materialise import RECORD_MEMORY, RECORD_SECONDS, Settings, ShardTask, render_row
from pipelines.notes import BEFORE, ShardNote, forget, load_note, load_rejects, shard_file
from pipelines.past import Past
from pipelines.plan import read_rows
from pipelines.progress import Progress
from recipes.schema import Recipe

_AT_ONCE = 16  # records that one task tries


@dataclass(frozen=True, slots=True)
class Trial:
    """Rejected records of one shard, to be tried again; `rejects` as their note has them."""

    settings: Settings
    number: int
    round_file: str
    start: int
    stop: int
    rejects: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a rejected record fares now.

    Attributes:
        number: of its shard.
        was: reason and detail of its rejection.
        now: the same today; None if it can be used.
    """

    number: int
    uid: str
    component: str
    was: tuple[str, str]
    now: tuple[str, str] | None

    def as_dict(self) -> dict[str, Any]:
        """For people and JSON."""
        reason, detail = self.was
        now = dict(zip(("now", "now_detail"), self.now, strict=True)) if self.now else {"now": None}
        return {"uid": self.uid, "component": self.component, "reason": reason, "detail": detail, **now}


def request_of(
    out: Path,
    data: str | None = None,
    catalog: Path | None = None,
    workers: int | None = None,
    address: str | None = None,
) -> Request:
    """What a finished or interrupted build was asked for; `data` and `catalog` if they lie elsewhere now.

    Raises:
        BuildError: if the directory is no build, or its data are not where they were.
    """
    known = _known(out)
    places = known["environment"]
    root = data or places["data"]
    if "://" not in root and not Path(root).is_dir():
        raise BuildError(f"{out} was built from {root}, which is not there; say with --data where its sources lie")
    if catalog is None:
        moved = data is not None and "://" not in data
        catalog = Path(data or "") / "catalog" if moved else Path(places.get("catalog") or Path(root) / "catalog")
    own = out / TOKENIZER / "tokenizer.json"
    finished = (out / MANIFEST).exists() or (out / WORK / BEFORE).exists()
    return Request(
        recipe=_recipe(known["recipe"]),
        recipe_folder=Path(places.get("recipe_folder", "")),
        data=root,
        out=out,
        catalog=catalog.resolve(),
        workers=workers,
        address=address,
        tokenizer=own if finished else None,
    )


def _recipe(resolved: Mapping[str, Any]) -> Recipe:
    """The recipe of a manifest, which names defaults too, as it was given: some keys may not stand beside others."""
    return Recipe.model_validate(Recipe.model_validate(resolved).model_dump(exclude_defaults=True))


def _known(out: Path) -> dict[str, Any]:
    """The manifest, or what an interrupted run has noted in its place."""
    if not (out / MANIFEST).exists():
        with suppress(FileNotFoundError, ValueError):
            known: dict[str, Any] = json.loads((out / WORK / REQUEST).read_bytes())
            return known
    return read_manifest(out)


def retry(request: Request, progress: Progress) -> dict[str, Any]:
    """Tries the rejected records of a build again, and makes the build anew where that changes it.

    Returns:
        As `rehearse`, and "shards": how many were made anew and how many are as they were; "totals" of the build.

    Raises:
        UsageError: if sources, earlier builds or tools are not those that the build was made of.
    """
    out = request.out
    before = _shards(out)
    if (out / MANIFEST).exists():
        (out / WORK / "inputs.json").unlink(missing_ok=True)  # the manifest knows them, and says so better
    again = _Again(out, progress)
    try:
        manifest = go_on(request, progress, again.reopen)
    except UsageError:
        _leave_alone(out)
        raise
    new = [shard["sha256"] for shard in manifest["shards"]]
    kept = sum(sha256 in before for sha256 in new)
    shards = {"rewritten": len(new) - kept, "kept": kept}
    return {**again.summary(), "shards": shards, "totals": manifest["totals"], "components": manifest["components"]}


def rehearse(request: Request, progress: Progress) -> dict[str, Any]:
    """Tries the rejected records of a build again and says how they fare; changes nothing.

    Returns:
        "tried", "mended" (records that can be used now), "changed" (those rejected for something else), both as
        `Verdict.as_dict`, and "failing": the others by reason.

    Raises:
        UsageError: as `retry`.
    """
    shared = request.catalog if request.address else None  # workers on other machines see no temporary folder of ours
    with told(shared or Path(tempfile.gettempdir()), scratch=True):
        return _rehearse(request, shared, progress)


def _rehearse(request: Request, shared: Path | None, progress: Progress) -> dict[str, Any]:
    tokenizer = tokenizer_of(request)
    earlier = earlier_builds(request, tokenizer)
    prints = overlaps.prints_of(request.recipe, request.recipe_folder)
    again = _Again(request.out, progress)
    with (
        Executor(request.workers, request.address) as executor,
        ingested(locations(request, earlier), request.catalog, executor, progress) as catalogs,
        tempfile.TemporaryDirectory(prefix="longllava-", dir=shared) as folder,
    ):
        refuse_changed_origins(request.recipe, catalogs, earlier)
        (Path(folder) / SHARDS).mkdir()
        settings = settings_of(request, Path(folder), tokenizer.file, catalogs, earlier)
        curator = Curator(catalogs, Path(folder), executor, progress)
        with closing(overlaps.planned(request.recipe, curator, earlier, prints, Path(folder) / "plan")) as planner:
            again.look(Site(Path(folder), planner, settings, catalogs, earlier, executor))
    return again.summary()


def _shards(out: Path) -> set[str]:
    """sha256 of the shards that a build has before records of it are tried again; none if it is not finished yet."""
    folders = [folder for folder in (out, out / WORK / BEFORE) if (folder / MANIFEST).exists()]
    return {shard["sha256"] for folder in folders[:1] for shard in read_manifest(folder)["shards"]}


def _leave_alone(out: Path) -> None:
    """Removes the work folder of a retry that was refused, unless an interrupted one has left something there."""
    with suppress(BuildError), alone(out) as work:
        if (out / MANIFEST).exists() and not (work / BEFORE).exists():
            shutil.rmtree(work)


class _Unfinished(Exception):
    """Not all shards of a round are made, so that the next round cannot be known."""


class _Again:
    """One go at a build's rejected records."""

    def __init__(self, out: Path, progress: Progress) -> None:
        self._out = out
        self._progress = progress
        self._trials: list[Trial] = []
        self._verdicts: list[Verdict] = []
        self._walked = 0  # shards below this number have been looked at

    def summary(self) -> dict[str, Any]:
        """What came of it."""
        mended = [verdict for verdict in self._verdicts if verdict.now is None]
        changed = [verdict for verdict in self._verdicts if verdict.now not in (None, verdict.was)]
        failing = Counter(verdict.now[0] for verdict in self._verdicts if verdict.now)
        return {
            "build": str(self._out),
            "tried": len(self._verdicts),
            "mended": [verdict.as_dict() for verdict in mended],
            "changed": [verdict.as_dict() for verdict in changed],
            "failing": dict(sorted(failing.items())),
        }

    def look(self, site: Site) -> Past | None:
        """Tries the rejected records, and forgets nothing; the past is that of a finished build."""
        past = None
        if (self._out / MANIFEST).exists():
            past = told = Past(self._out, site.work)
            told.refuse_changes(site.catalogs, site.earlier)
            rounds(site.settings, site.planner, lambda tasks: self._seen(told.notes(tasks), tasks, site), Progress())
            told.refuse_rest()
        else:
            self._look_at_notes(site, (self._out / WORK).resolve())
        self._try(site)
        site.planner.rewind()
        return past

    def reopen(self, site: Site) -> bool:
        """Makes a build that has changed an unfinished one again; False if nothing has changed."""
        work = site.work
        finished = (self._out / MANIFEST).exists()
        if finished and not _same(work / BEFORE / MANIFEST, self._out / MANIFEST):
            _clear(work)
            past = self.look(site)
            if past is None or all(verdict.now == verdict.was for verdict in self._verdicts):
                return False
            _link(self._out, work, past)
        else:  # interrupted
            self._look_at_notes(site, work)
            self._try(site)
            site.planner.rewind()
            for number in range(self._walked, 1 + max(_numbers(work), default=-1)):
                if load_note(work, number) is None or load_rejects(work, number):
                    forget(work, number)
        changed = {verdict.number for verdict in self._verdicts if verdict.now != verdict.was}
        for number in sorted(changed, reverse=True):  # if this is cut short, the shards before have still to be tried
            forget(work, number)
        if (work / BEFORE).exists():
            site.planner.made = sorted(work.glob("made-*.parquet"))
        mended = sum(verdict.now is None for verdict in self._verdicts)
        self._progress.note(f"{mended:,} of {len(self._verdicts):,} rejected records can be used now")
        return True

    def _look_at_notes(self, site: Site, work: Path) -> None:
        """Looks at what an interrupted build has made."""

        def notes(tasks: list[ShardTask]) -> list[ShardNote]:
            found = [load_note(work, task.number) for task in tasks]
            whole = [n for n, task in zip(found, tasks, strict=True) if n is not None and n.plan == task.plan]
            self._seen(whole, tasks, site, work)
            if len(whole) < len(tasks):
                raise _Unfinished
            return whole

        with suppress(_Unfinished):
            rounds(site.settings, site.planner, notes, Progress())

    def _seen(
        self, notes: Sequence[ShardNote], tasks: Sequence[ShardTask], site: Site, work: Path | None = None
    ) -> Sequence[ShardNote]:
        """Remembers which records of a round's shards are to be tried."""
        by_number = {task.number: task for task in tasks}
        for note in notes:
            rejects = load_rejects(work or site.work, note.number) if note.failed.total() else []
            task = by_number[note.number]
            for at in range(0, len(rejects), _AT_ONCE):
                some = tuple(rejects[at : at + _AT_ONCE])
                self._trials.append(Trial(site.settings, task.number, task.round_file, task.start, task.stop, some))
        self._walked = max(self._walked, *(task.number + 1 for task in tasks)) if tasks else self._walked
        return notes

    def _try(self, site: Site) -> None:
        self._progress.stage("try again", sum(len(trial.rejects) for trial in self._trials), "records")
        for verdicts in site.executor.map(try_again, self._trials):
            self._verdicts += verdicts
            self._progress.advance(len(verdicts), rejected=Counter(v.now[0] for v in verdicts if v.now))
        self._verdicts.sort(key=lambda verdict: (verdict.number, verdict.uid))


def try_again(trial: Trial) -> list[Verdict]:
    """Renders rejected records, each alone in a process that may die over it, and throws away what comes out."""
    wanted = {(reject["component"], reject["rank"]): reject for reject in trial.rejects}
    verdicts = []
    for row in read_rows(Path(trial.round_file), trial.start, trial.stop):
        known = wanted.pop((row["component"], row["rank"]), None)
        if known is None:
            continue
        now = None
        try:
            _guard().call(render_row, row, trial.settings)
        except Reject as reject:
            now = (reject.reason, reject.detail)
        was = (known["reason"], known["detail"])
        verdicts.append(Verdict(trial.number, row["uid"], row["component"], was, now))
    return verdicts


@cache
def _guard() -> Guard:
    return Guard(RECORD_SECONDS, RECORD_MEMORY)


# The work folder ------------------------------------------------------------------------------------------------------


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.read_bytes() == other.read_bytes()


def _numbers(work: Path) -> Iterator[int]:
    return (int(path.stem) for path in (work / SHARDS).glob("[0-9]*.json"))


def _clear(work: Path) -> None:
    """Removes what an earlier run has left; the build itself lies beside it."""
    for folder in (work / SHARDS, work / BEFORE):
        shutil.rmtree(folder, ignore_errors=True)
    for path in (*work.glob("made-*.parquet"), work / "names.json"):
        path.unlink(missing_ok=True)
    (work / SHARDS).mkdir()


def _link(out: Path, work: Path, past: Past) -> None:
    """Gives the finished build's shards second names in the work folder, the manifest last."""
    before = work / BEFORE
    (before / SHARDS).mkdir(parents=True)
    for number, name in past.names.items():
        _link_file(out / SHARDS / name, before / SHARDS / name)
        _link_file(out / SHARDS / name, shard_file(work, number))
    _link_file(out / MANIFEST, before / MANIFEST)


def _link_file(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copy2(old, new)
