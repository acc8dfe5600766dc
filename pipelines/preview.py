"""`longllava build --dry-run`: the plan of a recipe, with sizes estimated from a few samples that are really built."""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from formats.manifest import SHARDS
from formats.tokens import ChatTokenizer
from pipelines import overlaps
from pipelines.build import Request, earlier_builds, locations, refuse_changed_origins, settings_of
from pipelines.curate import PICTURE_REASONS, drop_share
from pipelines.duplicates import Curator
from pipelines.executor import Executor
from pipelines.faults import told
from pipelines.ingest import ingested
from pipelines.materialise import Settings, ShardTask, build_shard
from pipelines.notes import ShardNote, load_rows
from pipelines.plan import Pool, Round
from pipelines.progress import Progress

_PROBE = 200


def preview(request: Request, progress: Progress) -> dict[str, Any]:
    """Plans a build without writing to its directory.

    Returns:
        For each component its pool, what filters drop, what would be drawn and whether it falls short; and an
        estimate of samples, images, tokens, bytes, shards and seconds, from the first samples of the plan, which
        are a fair draw of the whole.

    Raises:
        UsageError: as `pipelines.build.build`.
    """
    shared = request.catalog if request.address else None  # workers on other machines see no temporary folder of ours
    with told(shared or Path(tempfile.gettempdir()), scratch=True):
        return _preview(request, shared, progress)


def _preview(request: Request, shared: Path | None, progress: Progress) -> dict[str, Any]:
    tokenizer = ChatTokenizer.load(request.recipe.tokenizer, request.recipe_folder)
    earlier = earlier_builds(request, tokenizer)
    with (
        Executor(request.workers, request.address) as ray,
        ingested(locations(request, earlier), request.catalog, ray, progress) as catalogs,
        tempfile.TemporaryDirectory(prefix="longllava-", dir=shared) as folder,
    ):
        work = Path(folder)
        (work / SHARDS).mkdir()
        refuse_changed_origins(request.recipe, catalogs, earlier)
        prints = overlaps.prints_of(request.recipe, request.recipe_folder)
        curator = Curator(catalogs, work, ray, progress)
        with closing(overlaps.planned(request.recipe, curator, earlier, prints, work / "plan")) as planner:
            drawn = planner.draw(0, {name: pool.asked for name, pool in planner.pools.items()}, 0)
            settings = settings_of(request, work, tokenizer.file, catalogs, earlier)
            notes, seconds = _probe(settings, drawn, ray, progress)
            index = [row for note in notes for row in load_rows(work, note.number).to_pylist()]
            components = {
                name: _component(pool, index, request.recipe.budget(name), _dropped_pictures(name, notes))
                for name, pool in planner.pools.items()
            }
            estimate = _scale_up(notes, drawn.rows, seconds, request.recipe.samples_per_shard)
    return {"recipe": request.recipe.name, "components": components, "estimate": estimate}


def _dropped_pictures(name: str, notes: Sequence[ShardNote]) -> dict[str, int]:
    """How many of a component's probed records its steps on pictures drop, by step."""
    dropped = sum((note.dropped for note in notes), Counter())
    return {
        step: dropped[f"{name}/{reason}"] for reason, step in PICTURE_REASONS.items() if dropped[f"{name}/{reason}"]
    }


def _component(
    pool: Pool, index: Sequence[Mapping[str, Any]], budget: float, pictures: Mapping[str, int]
) -> dict[str, Any]:
    """What a component would draw, and how much that is by the mean of its probed samples; None if there are none."""
    probed = [row for row in index if row["component"] == pool.name]
    means = {key: sum(row[key] for row in probed) / len(probed) for key in ("n_images", "n_tokens")} if probed else {}
    return {
        "origin": pool.component.origin,
        "asked": pool.asked,
        "pool": pool.size,
        "filtered": pool.filtered,
        "dropped": pool.dropped,
        "drop_share": drop_share(pool.size, pool.dropped),
        "max_drop": budget,
        "dropped_pictures": pictures,
        "drawn": pool.drawn,
        "short": pool.asked - pool.drawn,
        "on_short": pool.component.on_short,
        "images": round(pool.drawn * means["n_images"]) if means else None,
        "tokens": round(pool.drawn * means["n_tokens"]) if means else None,
    }


def _probe(settings: Settings, drawn: Round, executor: Executor, progress: Progress) -> tuple[list[ShardNote], float]:
    """Builds the first samples of a plan; returns what came of them and the seconds that it took."""
    rows = min(_PROBE, drawn.rows)
    size = max(1, -(-rows // executor.cpus))
    tasks = [
        ShardTask(settings, i, str(drawn.file), start, min(start + size, rows), start)
        for i, start in enumerate(range(0, rows, size))
    ]
    started = time.monotonic()
    progress.stage("probe", rows, "samples")
    notes = []
    for note in executor.map(build_shard, tasks):
        progress.advance(note.samples + note.failed.total(), images=note.images, rejected=note.reasons)
        notes.append(note)
    return notes, time.monotonic() - started


def _scale_up(notes: Sequence[ShardNote], total: int, seconds: float, shard: int) -> dict[str, Any]:
    rejected = sum(note.failed.total() for note in notes)
    probed = rejected + sum(note.samples for note in notes)
    factor = total / max(probed, 1)
    return {
        "probed": probed,
        "rejected": rejected,
        "samples": total,
        "images": round(factor * sum(note.images for note in notes)),
        "tokens": round(factor * sum(note.tokens for note in notes)),
        "bytes": round(factor * sum(note.bytes for note in notes)),
        "shards": -(-total // shard),
        "seconds": round(factor * seconds),
    }
