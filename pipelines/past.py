"""What a finished build was when its last shard was made: the notes of its shards, from manifest, index and ledger."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb

from formats.errors import BuildError
from formats.manifest import INDEX
from formats.shard import SCORES
from pipelines.ingest import Catalog
from pipelines.materialise import ShardTask
from pipelines.notes import ShardNote, leave_note
from pipelines.opened import OpenBuild
from pipelines.plan import EarlierBuild, as_stored
from pipelines.tools import tool_versions


class Past:
    """A finished build, told back round by round.

    Leaves notes in the work folder, and for each round `made-N.parquet`: which samples lie where, so that they can be
    copied.

    Attributes:
        names: of the shards in the build, by number.
    """

    def __init__(self, out: Path, work: Path) -> None:
        self._out, self._work = out, work
        self._build = OpenBuild(out)
        self._shards = deque(self._build.manifest["shards"])
        self._rows = groupby(self._build.in_order(), key=itemgetter("shard"))
        self._ledger: dict[tuple[str, str], deque[tuple[str, str]]] = defaultdict(deque)
        for line in self._build.rejects():
            self._ledger[line["component"], line["uid"]].append((line["reason"], line["detail"]))
        self._round = 0
        self.names: dict[int, str] = {}

    def refuse_changes(self, catalogs: Sequence[Catalog], earlier: Mapping[str, EarlierBuild]) -> None:
        """Raises `BuildError` if something else than media may differ from what the build was made of."""
        manifest = self._build.manifest
        changed = [f"the version of {name}" for name, v in tool_versions().items() if manifest["tools"].get(name) != v]
        for catalog in catalogs:
            before = manifest["sources"].get(catalog.location.source, {})
            files = {file["file"]: file["sha256"] for file in before.get("files", [])}
            now = catalog.hashes
            differing = [name for name in sorted({*files, *now}) if files.get(name) != now.get(name)]
            changed += [f"{catalog.location.source}/{name}" for name in differing]
            if not differing and catalog.summary() != before:
                changed.append(f"what is read from {catalog.location.source}")
        for name, build in earlier.items():
            if build.manifest["index"]["sha256"] != manifest["builds"][name]["index_sha256"]:
                changed.append(f"the build {name}")
        if changed:
            shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise BuildError(
                f"{self._out}: {shown} changed since it was built, which decides what is drawn. Only media can be"
                " mended for a retry: undo that, or build anew into another directory"
            )

    def notes(self, tasks: Sequence[ShardTask]) -> list[ShardNote]:
        """The notes of one round's shards."""
        rejects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        if tasks:
            for row in self._lost(tasks[0].round_file):
                rejects[tasks[0].number + (row["position"] - tasks[0].position) // _rows_of(tasks[0])].append(row)
        return [self._note(task, rejects[task.number]) for task in tasks]

    def refuse_rest(self) -> None:
        """Raises `BuildError` if the build holds more than its plan."""
        if self._shards or any(True for _ in self._rows) or any(self._ledger.values()):
            raise self._unlike("it holds more than is drawn")

    def _note(self, task: ShardTask, lost: list[dict[str, Any]]) -> ShardNote:
        kept = task.stop - task.start - len(lost)
        known: dict[str, Any] = {"file": "", "sha256": "", "bytes": 0}
        rows: list[dict[str, Any]] = []
        if kept:
            name, lines = next(self._rows, ("", iter(())))
            rows = list(lines)
            known = self._shards.popleft() if self._shards else known
            last = task.position + task.stop - task.start
            if len(rows) != kept or known["file"].rpartition("/")[2] != name or int(rows[-1]["key"]) >= last:
                raise self._unlike(f"shard {name} holds other samples")
            self.names[task.number] = name
        for row in sorted(lost, key=itemgetter("position")):
            del row["position"]
        return leave_note(self._work, task.number, known["sha256"], known["bytes"], rows, lost, task.plan)

    def _lost(self, round_file: str) -> list[dict[str, Any]]:
        """The records of a round that are not in the build, with why, in the order of their ranks."""
        index = self._out / INDEX
        with duckdb.connect() as db:
            db.execute("SET memory_limit = '1GB'")
            db.execute("SET temp_directory = $1", [str(self._work / "plan" / "spill")])
            for name, file in (("drawn", round_file), ("held", index)):
                db.read_parquet(str(file)).create_view(name)
            joined = "drawn LEFT JOIN held ON held.key = printf('%09d', drawn.position)"
            made = str(self._work / f"made-{self._round}.parquet")
            row = as_stored([name for name, _ in SCORES])
            db.sql(
                f"SELECT drawn.component, uid, copy, {row} AS made FROM {joined} WHERE key IS NOT NULL"
            ).write_parquet(made)
            other = db.sql(f"FROM {joined} WHERE id <> uid OR held.component <> drawn.component LIMIT 1").fetchall()
            rows = db.sql(
                f"SELECT position, drawn.component, uid, rank FROM {joined} WHERE key IS NULL ORDER BY 2, rank"
            ).fetchall()
        if other:
            raise self._unlike("another record is drawn in the place of one that it holds")
        self._round += 1
        return [self._explained(*row) for row in rows]

    def _explained(self, position: int, component: str, uid: str, rank: int) -> dict[str, Any]:
        waiting = self._ledger[component, uid]
        if not waiting:
            raise self._unlike(f"{uid} is drawn, but neither in the index nor in the ledger")
        reason, detail = waiting.popleft()
        known = {"uid": uid, "component": component, "reason": reason, "detail": detail, "rank": rank}
        return {"position": position, **known}

    def _unlike(self, what: str) -> BuildError:
        return BuildError(
            f"{self._out} is not what its recipe and sources give: {what}; build anew into another directory"
        )


def _rows_of(task: ShardTask) -> int:
    return task.settings.recipe.samples_per_shard
