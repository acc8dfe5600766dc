"""pipelines.faults: what a full disk and a lack of memory mean, in words that say what to do."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import BuildError
from pipelines import plan
from pipelines.build import Request, build
from pipelines.executor import Executor
from pipelines.faults import told
from pipelines.preview import preview
from pipelines.progress import Progress
from recipes.schema import Recipe


@pytest.mark.parametrize(("act", "kept"), [(build, "; what is done is kept: "), (preview, "; ")])
def test_a_plan_that_runs_out_of_memory_says_what_would_help(
    act: Callable[..., Any],
    kept: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    executor: Executor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "data/llava15").mkdir(parents=True)
    turns = [{"from": "human", "value": "Say something"}, {"from": "gpt", "value": "Something."}]
    rows = [{"id": i, "model": "", "conversations": turns} for i in range(3)]
    (tmp_path / "data/llava15/llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    content = {"tokenizer": str(tokenizer_folder), "components": {"all": {"source": "llava15", "count": "all"}}}
    wanted = Recipe.model_validate({"name": "r", **content})
    request = Request(wanted, Path(), str(tmp_path / "data"), tmp_path / "out", tmp_path / "catalog")
    monkeypatch.setattr(plan, "_MEMORY", "1MB")
    with pytest.raises(BuildError, match="planning ran out of memory") as raised:
        act(request, Progress())
    assert f"{kept}end other work on this machine" in str(raised.value)
    assert "SET threads" not in str(raised.value)


def test_a_full_disk_for_temporary_files_is_named_with_the_way_to_another(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(BuildError) as raised, told(tmp_path, scratch=True):
        raise full
    assert str(raised.value) == (
        f"{tmp_path}: the disk is full ([Errno 28] No space left on device); free some space or set TMPDIR to a folder"
        " on a larger disk, then run the same command again"
    )
    with pytest.raises(BuildError, match="what is done is kept: free some space, then run"), told(tmp_path):
        raise full
