import json
import re
from typing import cast

import pytest
import torch
from typer.testing import CliRunner

from formats.errors import UsageError
from longllava.cli import app
from model.budget import Shape, Weights, instead, parameters, parse_size, plan_memory, weight_bytes
from model.config import named_config
from model.flops import exact_flops, paper_flops
from model.longllava import LongLlavaForConditionalGeneration

GIB = 1 << 30
BIG = Shape.named("53b")


@pytest.mark.parametrize("name", ["53b", "9b", "tiny"])
def test_parameters_are_those_of_the_model_to_the_last(name: str) -> None:
    with torch.device("meta"):
        model = LongLlavaForConditionalGeneration(named_config(name))
    counted = parameters(Shape.named(name))
    vision = ("model.vision_tower.", "model.multi_modal_projector.")
    sizes = {parameter: p.numel() for parameter, p in model.named_parameters()}
    assert counted.vision == sum(n for parameter, n in sizes.items() if parameter.startswith(vision))
    assert counted.experts == sum(n for parameter, n in sizes.items() if ".experts." in parameter)
    assert counted.kept_wide == sum(n for parameter, n in sizes.items() if parameter.endswith(("A_log", "mamba.D")))
    assert counted.text + counted.vision == sum(sizes.values())


@pytest.mark.parametrize(("images", "paper"), [(1, "1.52 T"), (54, "0.09 P"), (128, "0.22 P")])
def test_the_papers_figures_come_out_by_the_papers_counting(images: int, paper: str) -> None:
    number, unit = paper.split()
    assert f"{paper_flops(BIG, images) / {'T': 1e12, 'P': 1e15}[unit]:.2f}" == number


def test_exact_operations_are_what_torch_counts(small: LongLlavaForConditionalGeneration) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape.of(json.loads(small.config.to_json_string(use_diff=False)))
    ids = torch.cat([torch.full((1, 8), 300), torch.randint(3, 290, (1, 32))], 1)
    pixels = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        small(ids, pixels, logits_to_keep=1)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    recurrences = shape.mamba * 40 * shape.channels * 9 * shape.state
    scores = shape.attention * 4 * shape.hidden * (40 * 41 // 2) + 2 * 4 * 17 * 17 * shape.vision_width
    assert products == exact_flops(shape, 40, 2).total - recurrences - scores, "torch counts neither of these on a CPU"


def test_exact_operations_of_the_papers_prompts() -> None:
    assert exact_flops(BIG, 144, 1).text / 1e12 == pytest.approx(3.4, abs=0.2)
    assert exact_flops(BIG, 54 * 144, 54).total / 1e15 == pytest.approx(0.203, abs=0.01)
    assert exact_flops(BIG, 100_000).text / 1e15 == pytest.approx(2.64, abs=0.1)
    with pytest.raises(ValueError, match="more than 100"):
        exact_flops(BIG, 100, 1)


def test_memory_of_the_large_model_is_counted_by_kind() -> None:
    totals = {kind: sum(weight_bytes(BIG, kind).values()) / GIB for kind in ("bf16", "int8-experts", "int8")}
    assert totals["bf16"] == pytest.approx(96.7, abs=0.3)
    assert totals["int8-experts"] == pytest.approx(54.7, abs=0.3)
    assert totals["int8"] == pytest.approx(49.2, abs=0.5)
    plan = plan_memory(BIG, parse_size("80GB"))
    assert plan.kv_per_token == 16 * 1024
    assert plan.state / 2**20 == pytest.approx(15.3, abs=0.1)
    assert plan.images > 1000
    assert plan.images_in_context == (262_144 - 1024) // 151


def test_what_fits_uses_the_memory_and_no_more() -> None:
    plan = plan_memory(BIG, parse_size("80GB"))
    fixed = sum(plan.weights.values()) + plan.reserve + plan.state + plan.chunk + plan.images_at_once
    assert fixed + plan.tokens * plan.kv_per_token <= plan.gpu < fixed + (plan.tokens + 1) * plan.kv_per_token
    assert plan_memory(BIG, parse_size("80GB"), "bf16").images == 0, "bf16 does not fit into 80 GB"


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("79.5 GiB", 79.5 * GIB), ("512mb", 512 * 10**6)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_size(text) == int(size)


@pytest.mark.parametrize("text", ["80", "GB", "1.2.3GB", "-4GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no size of memory"):
        parse_size(text)


def test_the_command_says_how_many_images_fit_and_why() -> None:
    arguments = ["plan-memory", "--model", "53b", "--gpu", "80GB"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0
    plan = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert f"{plan['memory']['images']:,}" in told.stdout
    assert "experts" in told.stdout
    assert plan["flops"]["54"]["paper"] == paper_flops(BIG, 54)
    assert plan["flops"]["54"]["exact"] == exact_flops(BIG, 54 * 144, 54).total


def told(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan-memory", "--model", "53b", *arguments])
    assert result.exit_code == 0
    return result.stdout


def test_weights_that_do_not_fit_are_said_to_be_what_does_not_with_what_would() -> None:
    small = told("--gpu", "40GB")
    assert "the weights alone, 49.28 GiB in int8, are more than the GPU's 37.25 GiB" in small
    assert "what fits: a GPU of 80GB with these; no --weights is small enough here" in small
    assert re.search(r"needed +│ +53\.\d\d", small), "rows add up to what is called needed"
    assert "│ all" not in small
    wide = told("--gpu", "80GB", "--weights", "bf16")
    assert "what fits: --weights int8-experts here or a GPU of 141GB with these" in wide
    assert "the weights leave" in told("--gpu", "50GiB")
    assert "no image fits" not in told("--gpu", "80GB")


@pytest.mark.parametrize(("gpu", "weights"), [("40GB", "int8"), ("80GB", "bf16"), ("24GB", "int8-experts")])
def test_what_is_said_to_fit_instead_does(gpu: str, weights: Weights) -> None:
    other = instead(BIG, parse_size(gpu), weights, 8192)
    assert other["gpu"] is not None
    assert plan_memory(BIG, parse_size(other["gpu"]), weights).images
    if other["weights"]:
        assert plan_memory(BIG, parse_size(gpu), cast(Weights, other["weights"])).images
