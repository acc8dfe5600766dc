"""The packages have short names that others use too: they must all come from this project."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

PACKAGES = ["longllava", "formats", "recipes", "pipelines", "validators", "model"]


def test_all_packages_come_from_one_folder() -> None:
    folders = {Path(str(importlib.import_module(name).__file__)).parents[1] for name in PACKAGES}
    assert len(folders) == 1, f"another distribution has put packages of the same names first: {folders}"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_its_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert Path(str(module.__file__)).read_text().count('"""') == 2


def test_the_gpu_extra_is_what_the_scans_ask_for() -> None:
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {re.split(r"[^\w-]", package)[0].replace("-", "_") for package in extras["gpu"]}
    asked = set(re.findall(r'_require\("(\w+)"', (root / "model/ops/selective_scan.py").read_text()))
    assert named == asked | {"longllava"}
