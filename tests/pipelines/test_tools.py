import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import av
import pytest
from PIL import features

from formats.errors import BuildError
from pipelines.materialise import Settings, ShardTask, build_shard
from pipelines.tools import ONLY_TELL, VERSION, refuse_other_tools, tool_versions
from recipes.schema import Recipe

REPOSITORY = Path(__file__).parents[2]


def own_version(place: Path) -> str:
    """What the sources in a folder or zip file call themselves where nothing of the project is installed."""
    code = """
import importlib.metadata as metadata
installed = metadata.version
metadata.version = lambda name: 1 / 0 if name == "longllava" else installed(name)
from pipelines.tools import tool_versions
print(tool_versions()["longllava"])
"""
    line = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    result = subprocess.run(line, env=environment, cwd=place.parent, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the packages that decide bytes."""
    for name in ("formats", "recipes", "pipelines"):
        shutil.copytree(REPOSITORY / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def test_the_version_is_the_one_that_is_installed():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    [line] = [
        line
        for line in (REPOSITORY / project["tool"]["hatch"]["version"]["path"]).read_text().splitlines()
        if line.startswith("VERSION")
    ]
    assert line == f'VERSION = "{VERSION}"'
    assert tool_versions()["longllava"].startswith(VERSION + "+")


def test_the_same_sources_have_one_version_however_they_are_installed(sources: Path):
    whole = shutil.make_archive(str(sources.parent / "zipped"), "zip", sources)
    for file in sources.rglob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert {own_version(sources), own_version(Path(whole))} == {tool_versions()["longllava"]}


def test_only_sources_that_decide_bytes_change_the_version(sources: Path):
    for told in ONLY_TELL:
        if told.endswith(".py"):
            with (sources / told).open("a") as file:
                file.write("# told in other words\n")
    assert own_version(sources) == tool_versions()["longllava"]
    with (sources / "pipelines/sources/mantis.py").open("a") as file:
        file.write("# read in another way\n")
    assert own_version(sources) != tool_versions()["longllava"]


def test_what_makes_shards_asks_nothing_of_what_only_tells():
    makers = "materialise, plan, ingest, curate, duplicates, overlaps, media, render, guard"
    code = f"import sys; from pipelines import {makers}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    asked = {f"{name.replace('.', '/')}.py" for name in result.stdout.split()} & ONLY_TELL
    assert asked == {"pipelines/progress.py"}  # to which it speaks


def test_a_machine_with_the_same_tools_is_taken():
    refuse_other_tools(dict(tool_versions()))


def test_a_machine_with_another_decoder_is_named():
    pillow = tool_versions()["pillow"]
    with pytest.raises(BuildError, match=f"{socket.gethostname()} has pillow {pillow}, not 9.0.0"):
        refuse_other_tools({**tool_versions(), "pillow": "9.0.0"})


def test_a_machine_whose_av_and_pillow_hold_other_libraries_is_named(monkeypatch: pytest.MonkeyPatch):
    elsewhere = dict(tool_versions())
    monkeypatch.setitem(av.library_versions, "libavcodec", (61, 19, 101))
    monkeypatch.setattr(features, "version", lambda name: {"libjpeg_turbo": "2.1.5"}.get(name, "1"))
    tool_versions.cache_clear()
    try:
        with pytest.raises(BuildError, match=r"has ffmpeg libavcodec 61\.19\.101, .*, pillow's codecs .*turbo 2\.1\.5"):
            refuse_other_tools(elsewhere)
    finally:
        tool_versions.cache_clear()


def test_no_shard_is_made_with_other_tools(tmp_path):
    recipe = Recipe.model_validate(
        {"name": "r", "tokenizer": "t", "components": {"a": {"source": "llava15", "count": "all"}}}
    )
    settings = Settings(recipe, str(tmp_path), "", {}, {}, {}, {}, tools={})
    with pytest.raises(BuildError, match="install the same on every machine"):
        build_shard(ShardTask(settings, 0, "", 0, 1, 0))
    assert not list(tmp_path.iterdir())
