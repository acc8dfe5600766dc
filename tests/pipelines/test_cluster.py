"""A cluster with several nodes, an S3 server on loopback, and the files that start clusters."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from formats.manifest import read_manifest
from pipelines.demo.tokenizer import train_tokenizer
from pipelines.report import rejects
from validators.run import validate

REPOSITORY = Path(__file__).parents[2]
MIX = "llava_v1_5_mix665k.json"


def test_a_build_that_loses_a_node_comes_to_the_same_bytes() -> None:
    line = [sys.executable, REPOSITORY / "benchmarks/cluster.py", "--nodes", 2, "--lose", 1, "--pictures", 60]
    result = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert (report["lost"], report["exit_code"], report["identical"], report["left_behind"]) == (1, 0, True, [])


# S3 ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """An S3 server of this machine's, as environment variables."""
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = next(line.split(" on ")[1].split()[0] for line in server.stderr if "Running on" in line)
        keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
        yield {"AWS_ENDPOINT_URL": url, **keys}
        server.kill()


UPLOAD = """
import sys, s3fs
fs = s3fs.S3FileSystem()
fs.mkdir("corpora")
fs.put(sys.argv[1], "corpora/data", recursive=True)
"""


def write_corpus(folder: Path) -> None:
    media = folder / "data/llava15/coco"
    media.mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A colour."}]
    rows = [{"id": i, "image": f"coco/{i}.jpg", "conversations": turns} for i in range(13)]
    for i in range(12):
        Image.new("RGB", (400, 300), (20 * i, 90, 200)).save(media / f"{i}.jpg")
    (folder / "data/llava15" / MIX).write_text(json.dumps(rows))
    train_tokenizer(["What? A colour."], folder / "tokenizer")
    recipe = {"name": "r", "tokenizer": "tokenizer", "components": {"a": {"source": "llava15", "count": "all"}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def longllava(folder: Path, data: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    line = ["build", folder / "recipe.yaml", "--data", data, "--out", folder / "out", "--catalog", folder / "catalog"]
    return subprocess.run(
        [sys.executable, "-m", "longllava", *map(str, line), "--workers", "2"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
    )


def test_annotations_and_media_are_read_from_s3(s3: dict[str, str], tmp_path: Path) -> None:
    write_corpus(tmp_path)
    line = [sys.executable, "-c", UPLOAD, str(tmp_path / "data")]
    subprocess.run(line, check=True, env={**os.environ, **s3}, capture_output=True)
    deaf = longllava(tmp_path, "s3://corpora/data", {**s3, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"})
    assert deaf.returncode == 2
    assert "s3://corpora/data/llava15: EndpointConnectionError" in deaf.stderr
    assert "Traceback" not in deaf.stderr
    result = longllava(tmp_path, "s3://corpora/data", s3)
    assert result.returncode == 0, result.stderr
    assert read_manifest(tmp_path / "out")["totals"]["images"] == 12
    (missing,) = rejects(tmp_path / "out")
    assert (missing["uid"], missing["reason"]) == (f"llava15/{MIX}:12", "media-missing")
    assert validate(str(tmp_path / "out"), deep=True) == []


# Files that start clusters -------------------------------------------------------------------------------------------


def checked(config: dict[str, Any]) -> None:
    """Raises if Ray would not take a cluster's configuration."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    return config


def test_the_cluster_file_is_one_that_ray_takes(cluster: dict[str, Any]) -> None:
    checked(cluster)
    workers = cluster["available_node_types"]["worker"]
    assert workers["min_workers"] == 0 < workers["max_workers"] <= cluster["max_workers"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_the_cluster_file_installs_all_that_the_project_depends_on(tmp_path: Path, cluster: dict[str, Any]) -> None:
    """Its command runs as on a node, with a pip that tells what it was asked for."""
    for there, here in cluster["file_mounts"].items():
        mounted = tmp_path / there.removeprefix("~/")
        mounted.parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / here, mounted)
    programs = tmp_path / "venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    (programs / "pip").write_text('#!/bin/sh\ncat requirements.txt; test -s constraints.txt && echo "$@"\n')
    (programs / "pip").chmod(0o755)
    [command] = [line for line in cluster["setup_commands"] if "pip install" in line]
    result = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    *asked, arguments = result.stdout.splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert sorted(asked) == sorted([*project["dependencies"], *project["optional-dependencies"]["s3"]])
    assert arguments == "install -q -c constraints.txt -r requirements.txt ray[default]"


@pytest.mark.parametrize("mistake", ["max_worker", "head_node_type", "resources"])
def test_a_mistake_in_the_cluster_file_would_be_noticed(mistake: str, cluster: dict[str, Any]) -> None:
    if mistake == "max_worker":
        cluster["max_worker"] = cluster.pop("max_workers")
    elif mistake == "head_node_type":
        cluster["head_node_type"] = "heads"
    else:
        cluster["available_node_types"]["worker"]["resources"] = "64 CPUs"
    with pytest.raises(Exception, match=r"max_worker|head_node_type|64 CPUs"):
        checked(cluster)


def test_the_kuberay_manifest_runs_the_command_of_the_documents() -> None:
    text = (REPOSITORY / "docs/cluster.md").read_text()
    manifest = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest["spec"]["entrypoint"].startswith("python -m longllava build ")
    groups = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for template in (manifest["spec"]["rayClusterSpec"]["headGroupSpec"], *groups):
        spec = template["template"]["spec"]
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_what_is_submitted_with_a_job_is_small() -> None:
    ignored = (REPOSITORY / ".rayignore").read_text().split()
    assert {"/.git/", "/.venv/", "/demo/", "/builds/", "/data/", "/tests/"} <= set(ignored)
