"""What a run tells of itself."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

from model.budget import Shape
from model.flops import exact_flops, training_flops
from model.hybrid import load_balance
from model.metrics import METRICS, Log, read_metrics, run_name


def test_lines_of_steps_that_a_crash_lost_are_removed(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = Log(tmp_path, 2, False, None, {})
    log.write({"step": 3, "loss": 1.0})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_tensorboard_gets_each_number(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, True, None, {})
    for step in (1, 2):
        log.write({"step": step, "loss": 1 / step, "loss_by_source": {"a": 2.0}, "mfu": None})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert events.Tags()["scalars"] == ["loss", "loss_by_source/a"]


def test_any_folder_gives_a_name_that_weights_and_biases_takes(tmp_path: Path) -> None:
    names = [run_name(tmp_path / name) for name in ("run: a#1/", "run; a#1", "plain-1.2")]
    assert not any(set(":;,#?/' ") & set(name) for name in names)
    assert len(set(names)) == 3
    assert names[2].startswith("plain-1.2-")


def test_the_load_balance_is_transformers() -> None:
    logits = torch.randn(50, 4, generator=torch.manual_seed(0))
    probabilities = logits.softmax(-1)
    ours = load_balance(probabilities, probabilities.topk(2, dim=-1).indices)
    theirs = load_balancing_loss_func((logits,), 4, 2)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    even = torch.full((8, 4), 0.25)
    assert float(load_balance(even, torch.arange(16).remainder(4).view(8, 2))) == pytest.approx(2)


def test_training_costs_a_forward_pass_and_one_for_each_gradient() -> None:
    shape = Shape.named("tiny")
    head = 2 * shape.hidden * shape.vocabulary
    text = exact_flops(shape, 100).text - head
    assert training_flops(shape, [100], 0, 7, ["llm"]) == 3 * (text + 7 * head)
    assert training_flops(shape, [100], 0, 7, ["projector"]) == 2 * (text + 7 * head)
    assert training_flops(shape, [50, 50], 0, 7, ["llm"]) < training_flops(shape, [100], 0, 7, ["llm"])
    frozen = training_flops(shape, [300], 1, 0, ["llm"])
    learning = training_flops(shape, [300], 1, 0, ["vision", "projector", "llm"])
    assert learning - frozen == 2 * exact_flops(shape, 300, 1).vision
