"""How many planted copies among a million records are found, how many others are taken for copies, at what cost?

    python benchmarks/duplicates.py [--records 1000000] [--repeats 1]

Writes a synthetic catalog: conversations of 20 to 200 words from a skewed vocabulary; a third have a picture of their
own, a third share pictures and ask another question, a third have none. Then plants copies of records: of a twentieth
the very same, of a twentieth with a word in sixty changed, at least one, and 8 of the 256 bits of its picture's hash.
As many decoys have the text of another record but another picture. Two processes are measured: one fingerprints the
texts (a sample of them, by themselves, and beside datasketch if that is installed), one groups the records; pictures'
hashes are written as if they had been decoded, which `print_media` does and costs what decoding costs.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import measured, median

MAKE = """
import json, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from formats.catalog import CATALOG_SCHEMA
from formats.likeness import LOOK
from pipelines.fingerprints import MEDIA
folder, records = sys.argv[1], int(sys.argv[2])
random = np.random.default_rng(7)
vocabulary = np.array([f"{chr(97 + i % 26)}{i:x}" for i in range(50_000)])
def text():
    # squares of uniform numbers make small ones frequent, as words are
    return vocabulary[(random.random(random.integers(20, 200)) ** 2 * len(vocabulary)).astype(int)]
def hashed(n):
    return random.integers(0, 256, (n, LOOK), dtype=np.uint8)
def flipped(look, bits=8):
    values = np.unpackbits(look); values[random.permutation(256)[:bits]] ^= 1
    return np.packbits(values)
originals = records * 17 // 20
kinds = np.arange(originals) % 3  # 0: a picture of its own, 1: a shared one, 2: none
pictures = hashed(originals)
group = originals // 30
number = 0
rows, media, refs, planted = [], [], [], []
catalog = pq.ParquetWriter(f"{folder}/catalog.parquet", CATALOG_SCHEMA.remove_metadata(), compression="zstd")
def flush():
    global rows
    empty = {name: None for name in CATALOG_SCHEMA.names}
    catalog.write_table(pa.Table.from_pylist([{**empty, **row} for row in rows], schema=CATALOG_SCHEMA))
    rows = []
def add(words, look, pixels):
    global number
    uid = f"s:{number:08d}"; half = len(words) // 3
    turns = [{"role": "human", "text": " ".join(words[:half]), "slots": []},
             {"role": "gpt", "text": " ".join(words[half:]), "slots": []}]
    rows.append({"uid": uid, "turns": turns, "n_media": 0 if look is None else 1, "flags": [], "media": []})
    if look is not None:
        media.append({"ref": uid, "exact": pixels, "looks": look.tobytes()})
        refs.append({"uid": uid, "place": 1, "ref": uid})
    if len(rows) == 2000: flush()
    number += 1
    return uid
kept = {}
sample = set(random.permutation(originals)[: 3 * (records // 20)].tolist())
chosen = []
for i in range(originals):
    words = text()
    look = None if kinds[i] == 2 else pictures[i % group if kinds[i] == 1 else i]
    pixels = None if look is None else look.tobytes()[:16]
    uid = add(words, look, pixels)
    if i in sample: chosen.append((uid, words, look, pixels))
exact, near, decoy = (chosen[i::3] for i in range(3))
for uid, words, look, pixels in exact:
    planted.append(("exact", uid, add(words, look, pixels)))
for uid, words, look, pixels in near:
    words = words.copy(); words[random.integers(0, len(words), max(1, len(words) // 60))] = "other"
    new = None if look is None else flipped(look)
    planted.append(("near", uid, add(words, new, None if new is None else new.tobytes()[:16])))
for uid, words, look, pixels in decoy:
    if look is None: words = text()
    look = None if look is None else hashed(1)[0]
    planted.append(("decoy", uid, add(words, look, None if look is None else look.tobytes()[:16])))
flush(); catalog.close()
empty = {"state": None, "reason": None}
pq.write_table(pa.Table.from_pylist([{**empty, **row} for row in media], schema=MEDIA), f"{folder}/media.parquet")
pq.write_table(pa.Table.from_pylist(refs), f"{folder}/refs.parquet")
pq.write_table(pa.table({k: [row[i] for row in planted] for i, k in enumerate(("kind", "one", "other"))}),
               f"{folder}/planted.parquet")
print(number)
"""

TEXTS = """
import sys
from pipelines.fingerprints import TextTask, print_texts
print_texts(TextTask(f"{sys.argv[1]}/catalog.parquet", f"{sys.argv[1]}/texts.parquet"))
print("null")
"""

GROUP = """
import json, sys
from pathlib import Path
from pipelines.grouping import group_records, group_texts, opened
from pipelines.sql import parquet
folder, mode = Path(sys.argv[1]), sys.argv[2]
work = opened(folder, mode)
texts = [str(folder / "texts.parquet")]
group_texts(work, texts, parquet(texts))
group_records(work, [str(folder / "media.parquet")], parquet([folder / "refs.parquet"]))
work.db.execute(f"COPY groups TO '{folder}/groups-{mode}.parquet' (FORMAT parquet)")
print("null")
"""

JUDGE = """
import json, sys
import duckdb
folder, mode = sys.argv[1:]
true = ("exact",) if mode == "exact" else ("exact", "near")
db = duckdb.connect()
db.execute(f"CREATE TABLE g AS FROM '{folder}/groups-{mode}.parquet'")
db.execute(f"CREATE TABLE p AS FROM '{folder}/planted.parquet'")
found = dict(db.execute("SELECT kind, count(*) FILTER (a.grouped = b.grouped) / count(*) FROM p"
    " LEFT JOIN g a ON a.uid = one LEFT JOIN g b ON b.uid = other GROUP BY kind").fetchall())
# A group of n records drops n - 1; of these the planted copies are right.
dropped = db.execute("SELECT count(*) - count(DISTINCT grouped) FROM g").fetchone()[0]
right = db.execute(f"SELECT count(*) FROM p JOIN g a ON a.uid = one JOIN g b ON b.uid = other"
    f" WHERE a.grouped = b.grouped AND kind IN {true if len(true) > 1 else '(' + repr(true[0]) + ')'}").fetchone()[0]
print(json.dumps({"found": found, "dropped": dropped, "precision": right / max(dropped, 1)}))
"""

SKETCH = """
import json, sys, time
import pyarrow.parquet as pq
from formats.likeness import minhash, words
rows = pq.ParquetFile(f"{sys.argv[1]}/catalog.parquet").read_row_group(0, columns=["turns"]).to_pylist()
texts = ["\\n".join(turn["text"] for turn in row["turns"]) for row in rows]
started = time.process_time()
for text in texts: minhash(words(text))
result = {"ours_ms": 1000 * (time.process_time() - started) / len(texts), "datasketch_ms": None}
try:
    from datasketch import MinHash
    started = time.process_time()
    for text in texts[:300]:
        found = words(text); sketch = MinHash(num_perm=120)
        sketch.update_batch([" ".join(found[i:i + 3]).encode() for i in range(max(1, len(found) - 2))])
    result["datasketch_ms"] = 1000 * (time.process_time() - started) / len(texts[:300])
except ImportError:
    pass
print(json.dumps(result))
"""


def main() -> None:
    """Prints one JSON object: cost, recall by kind of copy (of decoys: how many were taken for copies), precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"texts": [], "exact": [], "near": []}
    judged: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        records = measured(MAKE, folder, options.records)["result"]
        sketch = measured(SKETCH, folder)["result"]
        for _ in range(options.repeats):
            runs["texts"].append(measured(TEXTS, folder))
            for mode in ("exact", "near"):
                runs[mode].append(measured(GROUP, folder, mode))
                judged[mode] = measured(JUDGE, folder, mode)["result"]
        size = (Path(folder) / "texts.parquet").stat().st_size
    cost = {name: {key: median(found, key) for key in ("wall_s", "cpu_s", "peak_mb")} for name, found in runs.items()}
    result = {
        "records": records,
        "fingerprint_bytes_a_record": round(size / records, 1),
        "minhash_ms_a_text": sketch,
        "texts": cost["texts"],
        **{mode: {**cost[mode], **judged[mode]} for mode in ("exact", "near")},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
