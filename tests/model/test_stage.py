"""What recipes and options together ask of a run."""

from pathlib import Path
from typing import Any

import pytest

from formats.errors import UsageError
from model.stage import Stage, TrainSettings, stage_of
from model.world import Placement, first_host, placement


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(builds=("b",), out=Path(), model="tiny", **changes)


def recipe(**training: Any) -> dict[str, Any]:
    return {"recipe": {"training": training}}


def test_the_recipe_decides_what_no_option_does() -> None:
    manifest = recipe(trainable=["projector"], learning_rate=1e-4, global_batch=8)
    stage = stage_of(settings(epochs=3), [("b", manifest)], 4096)
    assert (stage.trainable, stage.learning_rate, stage.epochs, stage.global_batch) == (("projector",), 1e-4, 3, 8)
    assert stage_of(settings(tokens_per_batch=10_000), [("b", manifest)], 4096).global_batch == 2


def test_builds_whose_recipes_disagree_are_refused_unless_an_option_decides() -> None:
    two = [("one", recipe(learning_rate=1e-4)), ("two", recipe(learning_rate=1e-5))]
    with pytest.raises(
        UsageError, match=r"one says learning_rate: 0.0001, that of two 1e-05; say which with --learning"
    ):
        stage_of(settings(), two, 4096)
    assert stage_of(settings(learning_rate=2.0), two, 4096).learning_rate == 2.0


def test_the_rate_rises_to_its_top_and_falls_to_nothing() -> None:
    stage = stage_of(settings(learning_rate=1.0, warmup_ratio=0.1), [("b", recipe())], 4096)
    rates = [stage.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8, 12, 24])
def test_a_batch_is_shared_evenly(processes: int) -> None:
    assert batch(24).rounds(processes) * processes == 24


def test_a_batch_that_cannot_be_shared_is_refused_with_ones_that_can() -> None:
    with pytest.raises(UsageError, match="--tokens-per-batch 81,920 or 122,880"):
        batch(24).rounds(10).bit_length()


def batch(size: int) -> Stage:
    return stage_of(settings(tokens_per_batch=size * 4096), [("b", recipe())], 4096)


def test_torchrun_goes_before_slurm() -> None:
    slurm = {
        "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "24", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu[03-05]",
    }  # fmt: skip
    assert placement(slurm) == Placement(9, 24, 1, "gpu03", 20_000 + 123456 % 20_000)
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert placement(slurm | torchrun) == Placement(3, 8, 3, "here", 1)
    assert placement({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == placement({}) == Placement()


def test_a_batch_script_that_slurm_gave_many_tasks_is_one_process_itself() -> None:
    assert placement({"SLURM_PROCID": "0", "SLURM_NTASKS": "24", "SLURM_JOB_NODELIST": "gpu[03-05]"}) == Placement()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("node[03-07,12],x", "node03"),
        ("r[1,2]-ib", "r1-ib"),
        ("gpu-a-[1-3]", "gpu-a-1"),
    ],
)
def test_the_first_host_of_a_node_list_is_where_to_meet(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_node_list_that_says_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        first_host("")
