"""How long, and in how much memory, are millions of records planned and their index and ledger written?

    python benchmarks/plan.py [--records 3000000] [--drawn 2600000] [--record-bytes 700] [--repeats 1]

Writes a synthetic catalog of RECORDS conversations of RECORD-BYTES characters, and an earlier build's index of a tenth
as many samples. Then plans a recipe that draws DRAWN samples: most of them from the catalog, the rest by replay and as
sub-images of the earlier build, which have to be disjoint. Last, the index and the ledger of a build of that size are
written, from shard notes as workers leave them; no media and no shards. Each phase in a process of its own.
"""

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
from measure import measured, median

PLAN = """
import json, sys, time
from contextlib import closing
from pathlib import Path
from formats.manifest import canonical_json
from pipelines.ingest import Catalog, Location, Part
from pipelines.plan import EarlierBuild, Planner
from recipes.schema import Recipe
folder, records, drawn = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
part = Part("part-00000", "x.json", "", 0, records, records, 0, records)
catalog = Catalog(Location("evol_instruct", "", ""), folder / "catalog", (part,))
subimages = replayed = drawn // 26
recipe = Recipe.model_validate({"name": "all", "tokenizer": "t", "components": {
    "a": {"source": "evol_instruct", "count": drawn // 2, "filters": {"files": ["a/*"]}},
    "b": {"source": "evol_instruct", "count": drawn - drawn // 2 - 2 * replayed, "filters": {"files": ["b/*"]}},
    "again": {"replay": "early", "count": replayed},
    "tiles": {"subimage": "early", "count": subimages}}})
early = EarlierBuild("early", folder / "early", {})
with closing(Planner(recipe, [catalog], {"early": early}, folder / "plan")) as planner:
    drawn = planner.draw(0, {name: pool.asked for name, pool in planner.pools.items()}, 0)
    pools = {name: pool.size for name, pool in planner.pools.items()}
print(json.dumps({"rows": drawn.rows, "pools": pools}))
"""

FINISH = """
import json, sys, time
from collections import Counter
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from formats.manifest import SHARDS
from pipelines.finish import Finisher, Tally
from pipelines.notes import load_note
out, shards = Path(sys.argv[1]) / "out", int(sys.argv[2])
class Pool: pass
class Planner:
    pools = {"a": None}
finisher = Finisher(out, out / ".build", Planner, [], {}, None, {}, dict)
notes = [load_note(out / ".build", number) for number in range(shards)]
assert all(notes)
tallies = {"a": Tally()}
summaries = finisher._index(notes, tallies)
print(json.dumps({"rows": sum(s.samples for s in summaries), "kept": tallies["a"].kept}))
"""


def write_catalog(folder: Path, records: int, size: int) -> None:
    """A catalog as ingest writes them: half of its records of either annotation file, some `size` characters each."""
    folder.mkdir()
    turn = "{role: '%s', text: '%s ' || i || repeat(' and so on', %d), slots: []::INTEGER[]}"
    turns = f"[{turn % ('human', 'What is', 10)}, {turn % ('gpt', 'It is', size // 10 - 15)}]"
    media = '[]::STRUCT(kind VARCHAR, path VARCHAR, roots VARCHAR[], start DOUBLE, "end" DOUBLE)[]'
    with duckdb.connect() as db:
        db.execute("SET enable_progress_bar = false")
        rows: Any = db.sql(
            f"""SELECT 'evol_instruct/' || f || ':' || i AS uid, 'evol_instruct' AS source, 'text' AS modality,
                f AS file, i AS ordinal, i::VARCHAR AS upstream_id, NULL::VARCHAR AS "language", []::VARCHAR[] AS flags,
                2::INTEGER AS n_turns, 0::INTEGER AS n_media, {size}::BIGINT AS n_chars, {turns} AS turns,
                {media} AS media
                FROM (SELECT i, if(i % 2 = 0, 'a/x.json', 'b/x.json') AS f FROM range({records}) t(i))"""
        ).to_arrow_reader(min(2_000, max(1, (16 << 20) // size)))
        with pq.ParquetWriter(folder / "part-00000.parquet", rows.schema, compression="zstd") as file:
            for batch in rows:
                file.write_batch(batch)


def write_index(folder: Path, samples: int) -> None:
    """The index of an earlier build, of single pictures that the catalog has as well."""
    folder.mkdir()
    duckdb.sql(
        f"""COPY (SELECT lpad(i::VARCHAR, 9, '0') AS key, 'evol_instruct/a/x.json:' || 2 * i AS id,
            'train-000000.tar' AS shard, i * 1024 AS "offset", 1024::BIGINT AS size, md5(i::VARCHAR) AS sha256,
            'evol_instruct' AS source, 'c' AS component, 'image' AS modality, 1::INTEGER AS n_images,
            20::INTEGER AS n_text_tokens, 170::INTEGER AS n_tokens, 9::INTEGER AS n_target_tokens,
            2::INTEGER AS n_turns FROM range({samples}) t(i)) TO '{folder}/index.parquet' (FORMAT parquet)"""
    )


NOTES = """
import sys
from pathlib import Path
from pipelines.notes import leave_note, shard_file
work, shards, size = Path(sys.argv[1]) / "out/.build", int(sys.argv[2]), int(sys.argv[3])
(work / "shards").mkdir(parents=True)
for number in range(shards):
    rows = [{"key": f"{number * size + i:09d}", "id": f"evol_instruct/a/x.json:{number * size + i}", "offset": 2048 * i,
             "size": 2048, "sha256": f"{i:064x}", "source": "evol_instruct", "component": "a", "modality": "text",
             "n_images": 0, "n_text_tokens": 99, "n_tokens": 99, "n_target_tokens": 60, "n_turns": 2}
            for i in range(size)]
    shard_file(work, number).write_bytes(b"x")
    leave_note(work, number, "0" * 64, 1, rows, [])
print("null")
"""


def main() -> None:
    """Prints one JSON object with medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=3_000_000)
    parser.add_argument("--drawn", type=int, default=2_600_000)
    parser.add_argument("--record-bytes", type=int, default=700)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    size = 1_000
    plans, ends = [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # Elsewhere, since a child's peak begins with what its parent has.
            with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
                elsewhere.submit(write_catalog, folder / "catalog", options.records, options.record_bytes).result()
                elsewhere.submit(write_index, folder / "early", options.records // 10).result()
            plans.append(measured(PLAN, folder, options.records, options.drawn))
            shards = options.drawn // size
            measured(NOTES, folder, shards, size)
            ends.append(measured(FINISH, folder, shards))
    keys = ("wall_s", "cpu_s", "peak_mb")
    result = {
        "plan": {**{key: median(plans, key) for key in keys}, **plans[0]["result"]},
        "index": {**{key: median(ends, key) for key in keys}, **ends[0]["result"]},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
