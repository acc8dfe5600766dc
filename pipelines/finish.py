"""Finished shards to a finished build: names, index, ledger, manifest."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from formats.errors import BuildError
from formats.manifest import FORMAT, INDEX, MANIFEST, REJECTS, SHARDS, file_sha256, write_atomically, write_manifest
from formats.protocol import VERSION
from formats.shard import INDEX_SCHEMA, ShardSummary
from formats.tokens import IMAGE_TOKEN, TOKENS_PER_IMAGE, ChatTokenizer
from pipelines.card import CARD, card
from pipelines.energon import write_meta, write_offsets
from pipelines.ingest import Catalog
from pipelines.notes import ShardNote, load_rejects, load_rows
from pipelines.opened import OpenBuild
from pipelines.overlaps import LEDGER, write_ledger
from pipelines.page import REPORT, report_page
from pipelines.plan import EarlierBuild, Planner, Pool
from pipelines.publish import name_shards, publish

_GROUP_ROWS = 100_000
_REJECTS = pa.schema(
    [(name, pa.string()) for name in ("uid", "component", "reason", "detail")] + [("rank", pa.int64())]
)


@dataclass(slots=True)
class Tally:
    """What one component has come to."""

    kept: int = 0
    images: int = 0
    tokens: int = 0
    target_tokens: int = 0
    rejects: Counter[str] = field(default_factory=Counter)


@dataclass
class Finisher:
    """Writes what makes a directory of shards a build.

    `glimpses` gives, of a table of rejects, thumbnails in base64 by component and uid.
    """

    out: Path
    work: Path
    planner: Planner
    catalogs: Sequence[Catalog]
    earlier: Mapping[str, EarlierBuild]
    tokenizer: ChatTokenizer
    tools: Mapping[str, str]
    glimpses: Callable[[pa.Table], dict[tuple[str, str], str]]

    def finish(self, notes: Sequence[ShardNote], environment: Mapping[str, Any]) -> dict[str, Any]:
        """Publishes the shards and writes index, ledger and, last, the manifest.

        Raises:
            BuildError: if a component is short of what the recipe insists on.
        """
        (self.out / MANIFEST).unlink(missing_ok=True)  # of a build that is retried; from here on it is unfinished
        tallies = {name: Tally() for name in self.planner.pools}
        shards = self._index(notes, tallies)
        rejected = self._ledger(notes, tallies)
        components = {name: self._component(pool, tallies[name]) for name, pool in self.planner.pools.items()}
        self._refuse_short(components)
        recipe = self.planner.recipe
        manifest = {
            "format": FORMAT,
            "protocol": VERSION,
            "recipe": recipe.model_dump(mode="json"),
            "recipe_sha256": recipe.sha256,
            "tools": self.tools,
            "tokenizer": {
                "name": recipe.tokenizer,
                "sha256": self.tokenizer.fingerprint,
                "image_token": IMAGE_TOKEN,
                "tokens_per_image": TOKENS_PER_IMAGE,
            },
            "sources": {catalog.location.source: catalog.summary() for catalog in self.catalogs},
            "builds": {name: _origin(build) for name, build in self.earlier.items()},
            "components": components,
            "totals": _totals(components, shards),
            "shards": [shard.as_dict() for shard in shards],
            "index": {"file": INDEX, "sha256": file_sha256(self.out / INDEX), "rows": sum(s.samples for s in shards)},
            "rejects": {"file": REJECTS, "sha256": file_sha256(self.out / REJECTS), "rows": rejected},
            "environment": environment,
        }
        if self.planner.passed_over is not None:
            manifest["overlaps"] = write_ledger(self.planner.passed_over, self.out / LEDGER)
        write_meta(self.out, shards)
        self._present(manifest)
        write_manifest(self.out, manifest)
        return manifest

    def _present(self, manifest: Mapping[str, Any]) -> None:
        """Writes what people read: the dataset card and the report. Neither tells time or place."""
        build = OpenBuild(self.out, manifest)
        write_atomically(self.out / CARD, card(build))
        write_atomically(self.out / REPORT, report_page([build]))

    def _index(self, notes: Sequence[ShardNote], tallies: Mapping[str, Tally]) -> list[ShardSummary]:
        """Names the shards that hold samples, without gaps, and writes their rows as one index."""
        filled = [note for note in notes if note.samples]
        names = name_shards(self.work, filled)
        with _replacing(self.out / INDEX) as temporary, _IndexWriter(temporary) as index:
            for note in filled:
                rows = load_rows(self.work, note.number)
                index.add(_with_shard(rows, names[note.number]))
                _count(tallies, rows)
                shard = publish(self.out, self.work, note.number, names[note.number])
                write_offsets(shard, rows["offset"].to_pylist(), rows["size"].to_pylist())
        self._remove_strays(set(names.values()))
        return [ShardSummary(f"{SHARDS}/{names[n.number]}", n.sha256, n.bytes, n.samples) for n in filled]

    def _remove_strays(self, names: set[str]) -> None:
        """Shards of an earlier build whose manifest was removed; readers of train-*.tar would take them for ours."""
        for path in (self.out / SHARDS).glob("train-*.tar*"):
            if path.name.split(".tar")[0] + ".tar" not in names:
                path.unlink()

    def _ledger(self, notes: Sequence[ShardNote], tallies: Mapping[str, Tally]) -> int:
        """Writes every record that was drawn and not written, with the one that took its place."""
        tables = [
            pa.Table.from_pylist(load_rejects(self.work, note.number), schema=_REJECTS)
            for note in notes
            if note.failed.total()
        ]
        rejects = pa.concat_tables(tables) if tables else _REJECTS.empty_table()
        rejects = rejects.sort_by([("component", "ascending"), ("rank", "ascending")])
        thumbnails = self.glimpses(rejects)
        with _replacing(self.out / REJECTS) as temporary, temporary.open("wb") as file:
            for name, pool in self.planner.pools.items():
                mine = rejects.filter(pc.field("component") == name)
                tallies[name].rejects.update(mine["reason"].to_pylist())
                file.writelines(_ledger_lines(mine, self._replacements(pool, mine.num_rows), thumbnails))
        return int(rejects.num_rows)

    def _replacements(self, pool: Pool, count: int) -> pa.ChunkedArray:
        """The records that took the place of failed ones, in order: those past the first draw."""
        first = pool.asked if pool.repeats else min(pool.asked, pool.size)
        return self.planner.uids(pool.name, first, min(pool.drawn, first + count))

    def _component(self, pool: Pool, tally: Tally) -> dict[str, Any]:
        return {
            "origin": pool.component.origin,
            "asked": pool.asked,
            "pool": pool.size,
            "filtered": dict(sorted(pool.filtered.items())),
            "dropped": dict(sorted(pool.dropped.items())),
            "drawn": pool.drawn,
            "kept": tally.kept,
            "rejected": tally.rejects.total(),
            "short": pool.asked - tally.kept,
            "rejects": dict(sorted(tally.rejects.items())),
            "images": tally.images,
            "tokens": tally.tokens,
            "target_tokens": tally.target_tokens,
        }

    def _refuse_short(self, components: Mapping[str, Mapping[str, Any]]) -> None:
        recipes = self.planner.recipe.components
        lines = [
            f"components.{name}: asked {c['asked']:,}, got {c['kept']:,} of {c['drawn']:,} drawn;"
            f" rejected {', '.join(f'{count:,} {reason}' for reason, count in c['rejects'].items())}"
            for name, c in components.items()
            if c["short"] and recipes[name].on_short != "accept" and recipes[name].count != "all"
        ]
        if lines:
            lines.append(f"{self.out / REJECTS} says why.")
            lines += [
                f"What is built is kept: the same command with `--set components.{name}.on_short=accept` finishes it."
                for name, c in components.items()
                if c["short"] and recipes[name].on_short == "error"
            ]
            raise BuildError("\n".join(lines))


def _ledger_lines(
    rejects: pa.Table, replacements: pa.ChunkedArray, thumbnails: dict[tuple[str, str], str]
) -> Iterator[bytes]:
    """Lines of the ledger; a thumbnail goes to the first line of its record, and is gone then."""
    at = 0
    for batch in rejects.select(["uid", "component", "reason", "detail"]).to_batches(max_chunksize=1_000):
        instead = replacements.slice(at, batch.num_rows).to_pylist()
        for i, line in enumerate(batch.to_pylist()):
            line["replaced_by"] = instead[i] if i < len(instead) else None
            if thumbnail := thumbnails.pop((line["component"], line["uid"]), None):
                line["thumbnail"] = thumbnail
            yield json.dumps(line, ensure_ascii=False).encode() + b"\n"
        at += batch.num_rows


def _with_shard(rows: pa.Table, name: str) -> pa.Table:
    at = INDEX_SCHEMA.get_field_index("shard")
    return rows.set_column(at, INDEX_SCHEMA.field(at), pa.repeat(name, rows.num_rows))


def _count(tallies: Mapping[str, Tally], rows: pa.Table) -> None:
    sums = [("key", "count"), ("n_images", "sum"), ("n_tokens", "sum"), ("n_target_tokens", "sum")]
    for row in rows.group_by("component").aggregate(sums).to_pylist():
        tally = tallies[row["component"]]
        tally.kept += row["key_count"]
        tally.images += row["n_images_sum"]
        tally.tokens += row["n_tokens_sum"]
        tally.target_tokens += row["n_target_tokens_sum"]


def _origin(build: EarlierBuild) -> dict[str, Any]:
    manifest = build.manifest
    hashes = {"recipe_sha256": manifest["recipe_sha256"], "index_sha256": manifest["index"]["sha256"]}
    return {**hashes, "sources": origins(manifest)}


def origins(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """sha256 of every annotation file that a build goes back to, through the builds that it drew from as well."""
    found: dict[str, dict[str, str]] = {}
    for build in manifest["builds"].values():
        found.update(build["sources"])
    for name, source in manifest["sources"].items():
        found[name] = {file["file"]: file["sha256"] for file in source["files"]}
    return found


def _totals(components: Mapping[str, Mapping[str, Any]], shards: Sequence[ShardSummary]) -> dict[str, int]:
    keys = {"samples": "kept", "images": "images", "tokens": "tokens", "target_tokens": "target_tokens"}
    totals = {key: sum(c[name] for c in components.values()) for key, name in keys.items()}
    rejected = sum(c["rejected"] for c in components.values())
    return {**totals, "rejected": rejected, "bytes": sum(shard.bytes for shard in shards)}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's place if all goes well."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class _IndexWriter:
    """Tables to index.parquet, in row groups of one size, whatever the sizes of the tables."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, INDEX_SCHEMA, compression="zstd")
        self._waiting = INDEX_SCHEMA.empty_table()

    def __enter__(self) -> "_IndexWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._waiting.num_rows:
            self._writer.write_table(self._waiting)
        self._writer.close()

    def add(self, rows: pa.Table) -> None:
        self._waiting = pa.concat_tables([self._waiting, rows])
        while self._waiting.num_rows >= _GROUP_ROWS:
            self._writer.write_table(self._waiting.slice(0, _GROUP_ROWS), row_group_size=_GROUP_ROWS)
            self._waiting = self._waiting.slice(_GROUP_ROWS)
