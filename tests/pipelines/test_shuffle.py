"""pipelines.shuffle: records come to the rows that are laid out for them, in memory that has a bound."""

import io
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats.catalog import CATALOG_SCHEMA
from pipelines import plan, shuffle
from pipelines.ingest import Catalog, Location, Part
from pipelines.plan import Planner, read_rows
from pipelines.shuffle import Shuffle
from recipes.schema import Recipe

SCHEMA = pa.schema([("name", pa.string()), ("parts", pa.list_(pa.struct([("text", pa.string())])))])
ROWS = 500


def records(numbers: Sequence[int], length: int = 100) -> pa.Table:
    rows = [{"name": f"{i}", "parts": [{"text": "x" * (i % length)}] * (i % 3)} for i in numbers]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.mark.parametrize("estimate", [1, 10_000, 10_000_000])
def test_records_come_out_by_row_however_badly_their_size_was_estimated(
    estimate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "_MEMORY", 4_000)
    rows = np.random.default_rng(5).permutation(ROWS)
    rows = rows[rows % 7 != 3]  # those have none
    made = Shuffle(io.BytesIO(), SCHEMA, ROWS, estimate)
    for some in np.array_split(rows, 20):
        made.add(some, records(some.tolist()))
    blocks = list(made.blocks())
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    found = [record for block in blocks for record in block.records.to_pylist()]
    assert found == [None if i % 7 == 3 else records([i]).to_pylist()[0] for i in range(ROWS)]
    assert max(block.records.nbytes for block in blocks) < 16_000


def long_catalog(folder: Path, count: int, length: int) -> Catalog:
    """Records of some length, a second file among them."""
    folder.mkdir()
    for number, file in enumerate(("one", "two")):
        rows = [
            {
                "uid": f"evol_instruct/{file}:{i}",
                "source": "evol_instruct",
                "modality": "text",
                "file": file,
                "turns": [{"role": "gpt", "text": f"{file}{i:06d}" * (length // 9), "slots": []}],
            }
            for i in range(count // 2)
        ]
        table = pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=64)
    parts = tuple(Part(f"part-{i}", file, "", 0, 1, 1, 0, "") for i, file in enumerate(("one", "two")))
    return Catalog(Location("evol_instruct", "", ""), folder, parts)


ALL = Recipe.model_validate(
    {"name": "r", "tokenizer": "t", "components": {"a": {"source": "evol_instruct", "count": "all"}}}
)


def test_long_records_are_planned_in_less_memory_than_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_MEMORY", "40MB")
    monkeypatch.setattr(shuffle, "_MEMORY", 4 << 20)
    catalog = long_catalog(tmp_path / "catalog", 1_000, 60_000)
    with closing(Planner(ALL, [catalog], {}, tmp_path / "plan")) as planner:
        drawn = planner.draw(0, {"a": 1_000}, 0)
        assert sorted(path.name for path in planner.folder.glob("*.*")) == ["pool-a.parquet", "round-0.parquet"]
    seen = 0
    for row in read_rows(drawn.file, 0, 1_000):
        _, file, number = row["uid"].replace(":", "/").split("/")
        assert row["record"]["turns"][0]["text"].startswith(f"{file}{int(number):06d}{file}")
        seen += 1
    assert seen == drawn.rows == 1_000
    groups = pq.ParquetFile(drawn.file).metadata
    assert groups.row_group(0).num_rows < 400  # 24 MB, not the 60 of all
