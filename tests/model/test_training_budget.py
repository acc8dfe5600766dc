"""What training takes, against what is alive in real layers; benchmarks/training_memory.py has the tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from model.budget import Shape
from model.stage import Part
from model.training_budget import held, pictures, working

REPOSITORY = Path(__file__).parents[2]
LLM: tuple[Part, ...] = ("projector", "llm")
BIG = Shape.named("53b")


def test_layers_and_tower_hold_what_the_arithmetic_says(tmp_path: Path) -> None:
    line = [sys.executable, REPOSITORY / "benchmarks/training_memory.py", "--layers", "--json", tmp_path / "rows"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(line, check=True, env=environment, capture_output=True)
    rows = json.loads((tmp_path / "rows").read_text())
    assert len(rows) == 4 * 4 * 3 + 2 * 3
    wrong = {name: round(said / found - 1, 3) for name, said, found in rows if not 0.97 < said / found < 1.06}
    assert not wrong


def test_the_large_model_fits_on_32_gpus_of_80_gb_and_not_on_24() -> None:
    step = sum(working(BIG, LLM, 40_960, activation_checkpointing=True).values())
    assert held(BIG, LLM, 24).total + step > 80e9 > held(BIG, LLM, 32).total + step
    assert sum(working(BIG, LLM, 40_960, activation_checkpointing=False).values()) > 10 * step


@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_images_take_more_where_the_tower_learns(checkpointing: bool) -> None:
    one, many = (sum(working(BIG, get_args(Part), 40_960, checkpointing, n).values()) for n in (1, 271))
    assert many - one >= 270 * pictures(BIG, get_args(Part), checkpointing).kept > 0


def test_a_frozen_tower_keeps_nothing_itself() -> None:
    tokens = BIG.image_tokens * (2 * BIG.vision_width + 6 * BIG.hidden)
    assert pictures(BIG, LLM, activation_checkpointing=True).kept == tokens
