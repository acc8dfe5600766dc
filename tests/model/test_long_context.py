"""The benchmark that gives the headline figures on a GPU, in short on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from model.budget import Shape, weight_bytes

REPOSITORY = Path(__file__).parents[2]


def report_of(*arguments: object) -> dict[str, Any]:
    line = [sys.executable, REPOSITORY / "benchmarks/long_context.py", "--model", "tiny", "--device", "cpu", *arguments]
    result = subprocess.run(
        list(map(str, line)),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_prompts_that_fit_are_timed_and_one_that_does_not_is_told_as_a_result() -> None:
    prompts = ("--images", 2, "--image-tokens", 144, 36, "--tokens", 300_000, 40)
    report = report_of(*prompts, "--write", 3, "--chunk", 300_000, "--memory", "350MB")
    assert report["weight_bytes"] == sum(weight_bytes(Shape.named("tiny"), "int8").values())
    *images, long, short = report["prompts"]
    assert [(row["images"], row["image_tokens"], row["tokens"]) for row in images] == [(2, 144, 302), (2, 36, 86)]
    for row in (*images, short):
        assert min(row["prefill_s"], row["prefill_tokens_per_s"], row["tokens_per_s"], row["peak_bytes"]) > 0
        assert row["planned_bytes"] > report["weight_bytes"]
    assert "memory" in long["out_of_memory"]
    assert long["planned_bytes"] > report["memory"]
    assert short["tokens"] == 40, "and the next prompt runs"


def test_a_model_that_does_not_fit_is_told_as_a_result() -> None:
    report = report_of("--memory", "1MB")
    assert "memory" in report["out_of_memory"]
    assert "prompts" not in report
