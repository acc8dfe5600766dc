"""pipelines.opened: a finished build is read by several users of one machine, and leaves nothing behind."""

import tempfile
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from formats.shard import INDEX_SCHEMA
from pipelines.opened import OpenBuild


def test_each_query_spills_to_a_folder_of_its_own_that_goes_even_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    rows = [{"key": f"{i:09d}", "sha256": f"{i:0100d}"} for i in range(400_000)]
    pq.write_table(INDEX_SCHEMA.empty_table().from_pylist(rows, schema=INDEX_SCHEMA), tmp_path / "index.parquet")
    build = OpenBuild(tmp_path, {})
    folders = []
    with build.samples() as one, build.samples() as other:
        for db in (one, other):
            db.execute("SET threads = 1")
            db.execute("SET memory_limit = '50MB'")
            db.execute("CREATE TEMP TABLE sorted AS SELECT key, sha256 FROM samples ORDER BY sha256 DESC")
            (folder,) = db.execute("SELECT current_setting('temp_directory')").fetchone() or ("",)
            assert list(Path(folder).iterdir())  # so it does spill
            assert Path(folder).parent.stat().st_mode & 0o077 == 0
            folders.append(folder)
    assert len(set(folders)) == 2
    with pytest.raises(duckdb.CatalogException), build.samples() as db:
        db.execute("SELECT nothing_of_the_kind()")
    assert list((tmp_path / "tmp").iterdir()) == []
