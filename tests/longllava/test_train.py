"""`longllava train` as a user calls it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from formats.errors import UsageError
from longllava.cli import app

REPOSITORY = Path(__file__).parents[2]


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def build(make_build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_build(tmp_path_factory.mktemp("builds") / "noise", 6)


SHORT: Sequence[str] = ("--sequence-length", "1200", "--tokens-per-batch", "1200")


def test_a_build_is_trained_on_and_the_steps_are_shown(build: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = json.loads((REPOSITORY / "model/configs/tiny.json").read_text())
    config["text_config"] |= {"vocab_size": 2048, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = ("train", str(build), "--model", str(tmp_path), "--out", str(out), "--steps", "1", *SHORT)
    result = call(*line)
    assert "step 1/1  loss 7." in result.stderr
    assert "tokens/s" in result.stderr
    assert (out / "final/model.safetensors").is_file()
    assert "report.html" in result.stdout
    again = call(*line, "--json")
    assert json.loads(again.stdout)["last"]["step"] == 1


def test_a_dry_run_says_what_memory_each_process_needs_and_leaves_nothing(build: Path, tmp_path: Path) -> None:
    arguments = ("train", str(build), "--model", "53b", "--out", str(tmp_path / "run"), "--dry-run", "--json")
    outline = json.loads(call(*arguments, "--gpus", "24", "--tokens-per-batch", str(24 * 2048)).stdout)
    assert outline["processes"] == 24
    assert 34e9 < sum(size for name, size in outline["memory"].items() if name.endswith("held")) < 35e9
    (kept,) = (size for name, size in outline["memory"].items() if name == "images")
    assert kept == outline["run"]["most_images_of_a_sequence"] * 144 * (2 * 1024 + 6 * 4096) > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "tiny", "--schedule", "linear"], "--schedule linear: one of cosine, constant"),
        (["--model", "tiny", "--trainable", "projector,head"], "--trainable head: one of vision, projector, llm"),
        (["--model", "huge"], "model 'huge': neither one of 53b, 9b, tiny"),
        ([], "no model: say --model"),
        (["--model", "tiny", "--weight-decay", "-1"], "--weight-decay -1.0: at least 0"),
        (["--model", "tiny", "--warmup-ratio", "3"], "--warmup-ratio 3.0: from 0 to below 1"),
        (["--model", "tiny", "--balance", "nan"], "--balance nan: at least 0"),
        (["--model", "tiny", "--sequence-length", "0"], "--sequence-length 0: at least 1"),
        (["--model", "tiny", "--wandb", "project"], "--wandb: that package is not installed; pip install wandb"),
        (["--model", "tiny", "--dry-run", "--gpus", "5"], "cannot be shared by 5 processes"),
    ],
)
def test_what_cannot_be_is_refused_in_words(build: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        call("train", str(build), "--out", str(tmp_path / "run"), *options)
    assert message in str(caught.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()
