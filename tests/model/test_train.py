"""What training must hold, with a model of four layers and builds of noise."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.errors import DamageError, TrainingError, UsageError
from formats.manifest import file_sha256
from formats.tokens import ChatTokenizer
from model.budget import Shape
from model.config import named_config
from model.learner import memory_explained
from model.longllava import LongLlavaForConditionalGeneration
from model.metrics import read_metrics
from model.packing import Packing
from model.prepare import prepare
from model.processor import Processor
from model.sharding import flatten_experts, freeze, optimiser_of, shard, whole
from model.stage import TrainSettings
from model.train import opened, train
from model.training_budget import held
from model.world import joined

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def build(make_build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_build(tmp_path_factory.mktemp("builds") / "noise", 24)


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json: two Mamba and two attention layers, two of them of experts."""
    config = named_config("tiny").to_dict()
    config["vision_config"] |= {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    config["text_config"] |= {
        "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_experts": 3,
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 2,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def settings(build: Path, shape: Path) -> TrainSettings:
    """Two sequences a step, of which the builds give three steps and a half."""
    return TrainSettings(
        builds=(str(build),),
        out=Path(),
        model=str(shape),
        trainable=("projector", "llm"),
        learning_rate=1e-2,
        tokens_per_batch=2 * 1024,
        sequence_length=1024,
        drop_oversize=True,
        isolate=True,
        tensorboard=False,
        threads=1,
    )


@pytest.fixture(scope="session")
def whole_run(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end in one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(replace(settings, out=out))
    return out


Curve = list[tuple[int, float, float, dict[str, float]]]


def curve(out: Path) -> Curve:
    """What must be equal bit for bit."""
    return [(line["step"], line["loss"], line["norm"], line["loss_by_source"]) for line in read_metrics(out)]


_PROGRAM = """
import sys, json, pathlib, torch
torch.set_num_threads(1)
from model.train import TrainSettings, train
for fields in json.loads(sys.argv[1]):
    fields |= {"out": pathlib.Path(fields["out"])} | {n: tuple(fields[n]) for n in ("builds", "trainable")}
    train(TrainSettings(**fields))
"""


def launched(folder: Path, runs: Sequence[TrainSettings], processes: int) -> subprocess.Popen[bytes]:
    """Runs one after another, in processes of their own."""
    fields = [{name: v for name in run.__slots__ if (v := getattr(run, name)) is not None} for run in runs]
    program = folder / "program.py"
    program.write_text(_PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line = [sys.executable, *(torchrun if processes > 1 else []), str(program), json.dumps(fields, default=str)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="session")
def killed(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its second step."""
    folder = tmp_path_factory.mktemp("killed")
    out = folder / "run"
    process = launched(folder, [replace(settings, out=out, save_every=1, keep=9)], 1)
    while process.poll() is None and not (out / "checkpoints/step-00000002").is_dir():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for later in sorted((out / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(later)  # had it come further
    (out / "checkpoints/step-00000003.partial").mkdir(exist_ok=True)
    return out


@pytest.fixture(scope="session")
def uneven(
    settings: TrainSettings, make_build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> TrainSettings:
    """A stage that trains the projector alone, with steps of a sequence with a picture and one without."""
    folder = tmp_path_factory.mktemp("uneven")
    builds = (str(make_build(folder / "text", 1, seed=4)), str(make_build(folder / "both", 2, seed=14)))
    return replace(settings, builds=builds, trainable=("projector",), sequence_length=256, tokens_per_batch=512)


@pytest.fixture(scope="session")
def by_two(
    settings: TrainSettings, killed: Path, uneven: TrainSettings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What two processes made: `fresh`, a whole run; `resumed`, what a killed process left; `uneven`."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(killed, folder / "resumed")
    runs = [replace(settings, out=folder / name, save_every=1, keep=1) for name in ("fresh", "resumed")]
    process = launched(folder, [*runs, replace(uneven, out=folder / "uneven")], 2)
    said, _ = process.communicate()
    assert process.returncode == 0, said.decode()
    return folder


def test_two_processes_learn_what_one_learns(whole_run: Path, by_two: Path) -> None:
    assert len(curve(whole_run)) > 3
    assert_alike(curve(whole_run), curve(by_two / "fresh"))
    assert_close(whole_run, by_two / "fresh")


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    settings: TrainSettings, whole_run: Path, killed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    assert not (out / "final").exists()
    train(replace(settings, out=out))
    assert curve(out) == curve(whole_run)
    assert not list((out / "checkpoints").glob("*.partial"))
    one, again = (load_file(folder / "final/model.safetensors") for folder in (whole_run, out))
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_a_launch_into_a_run_that_is_at_work_is_refused(settings: TrainSettings, killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    with (out / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another launch trains there"):
            train(replace(settings, out=out))
    assert list((out / "checkpoints").glob("*.partial"))


def test_sigterm_leaves_a_checkpoint_of_the_last_step(settings: TrainSettings, tmp_path: Path) -> None:
    long = replace(settings, out=tmp_path / "run", epochs=50)
    process = launched(tmp_path, [long], 1)
    metrics = long.out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGINT, said.decode()
    steps = len(read_metrics(long.out))
    assert [path.name for path in (long.out / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    train(replace(long, steps=steps + 1))
    assert [line["step"] for line in read_metrics(long.out)] == [*range(1, steps + 2)]


def test_biases_norms_and_the_states_of_mamba_do_not_decay(small: LongLlavaForConditionalGeneration) -> None:
    optimiser = optimiser_of(small, 1e-3, 0.1, 0.95, torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    decayed = {name for name, p in small.named_parameters() if decay[id(p)] == 0.1}
    matrices = {name for name, p in small.named_parameters() if p.dim() > 1 and not name.endswith(".A_log")}
    assert decayed - {"model.vision_tower.embeddings.class_embedding"} == matrices
    assert set(decay.values()) == {0.0, 0.1}


def test_two_processes_go_on_where_one_was_killed(whole_run: Path, by_two: Path) -> None:
    assert curve(by_two / "resumed")[:2] == curve(whole_run)[:2]
    assert_alike(curve(by_two / "resumed"), curve(whole_run))
    assert_close(whole_run, by_two / "resumed")


def test_one_process_goes_on_where_two_stopped(
    settings: TrainSettings, whole_run: Path, by_two: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(by_two / "fresh", out)
    shutil.rmtree(out / "final")
    (kept,) = (out / "checkpoints").iterdir()
    train(replace(settings, out=out))
    steps = int(kept.name.removeprefix("step-"))
    assert 0 < steps < len(curve(out))
    assert curve(out)[:steps] == curve(by_two / "fresh")[:steps]
    assert_alike(curve(out), curve(whole_run))


def test_one_process_with_pictures_and_one_without_take_the_same_step(
    uneven: TrainSettings, by_two: Path, tmp_path: Path
) -> None:
    train(replace(uneven, out=tmp_path / "run"))
    assert any(line["images"] == 1 for line in read_metrics(tmp_path / "run")), "one process has it, one has none"
    assert_alike(curve(tmp_path / "run"), curve(by_two / "uneven"))


def test_a_run_that_stopped_early_goes_on_with_more_steps(
    settings: TrainSettings, whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(replace(settings, out=out, steps=1))
    assert json.loads((out / "final/builds.json").read_text())["steps"] == 1
    train(replace(settings, out=out))
    assert curve(out) == curve(whole_run)
    before = (out / "final/model.safetensors").stat().st_mtime_ns
    train(replace(settings, out=out))
    assert (out / "final/model.safetensors").stat().st_mtime_ns == before


def test_only_the_parts_that_are_to_learn_change(settings: TrainSettings, whole_run: Path, tmp_path: Path) -> None:
    before = load_file(whole_run / "final/model.safetensors")
    parts = {"vision": "model.vision_tower.", "projector": "model.multi_modal_projector.", "llm": ""}
    for trainable in (("projector",), ("llm",), ("projector", "llm")):
        out = tmp_path / "-".join(trainable)
        kind: Any = trainable
        train(replace(settings, out=out, model=None, init=whole_run / "final", trainable=kind, steps=1))
        after = load_file(out / "final/model.safetensors")
        for name, tensor in before.items():
            part = next(part for part, prefix in parts.items() if name.startswith(prefix))
            read = name in after and tensor.dtype == after[name].dtype
            assert read, name
            if part not in trainable:
                assert torch.equal(tensor, after[name]), name
            elif "experts" not in name:  # one that no token goes to learns nothing
                assert not torch.equal(tensor, after[name]), name
        assert before.keys() == after.keys()


def test_a_stage_that_trains_the_projector_alone_reads_text_without_pictures(
    settings: TrainSettings, make_build: Callable[..., Path], tmp_path: Path
) -> None:
    text = make_build(tmp_path / "text", 1)  # the first sample has no picture
    out = tmp_path / "run"
    train(replace(settings, builds=(str(text),), out=out, trainable=("projector",), sequence_length=None))
    (line,) = read_metrics(out)
    assert line["images"] == 0
    assert line["norm"] == 0
    assert line["targets"] > 0


def test_the_final_folder_opens_with_from_pretrained_and_names_all_builds(
    settings: TrainSettings, whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "next"
    train(replace(settings, out=out, model=None, init=whole_run / "final", steps=1))
    final = out / "final"
    model, loading = LongLlavaForConditionalGeneration.from_pretrained(final, output_loading_info=True)
    assert not any(loading.values())
    processor = Processor.of(model.config, ChatTokenizer.load(str(final)))
    inputs = processor([{"role": "user", "content": "What colour is the circle?"}])
    assert model.generate(**inputs.as_dict(), max_new_tokens=2).shape[1] > inputs.input_ids.shape[1]
    seen = json.loads((final / "builds.json").read_text())
    (build,) = seen["builds"]
    assert build["path"] == settings.builds[0]
    assert build["manifest_sha256"] == file_sha256(Path(build["path"]) / "manifest.json")
    assert seen["before"] == json.loads((whole_run / "final/builds.json").read_text())


def test_activation_checkpointing_and_a_model_written_and_read_again_change_no_loss(
    settings: TrainSettings, shape: Path, whole_run: Path, tmp_path: Path
) -> None:
    train(replace(settings, out=tmp_path / "kept", activation_checkpointing=True))
    assert curve(tmp_path / "kept") == curve(whole_run)
    torch.manual_seed(settings.seed)
    config = named_config(str(shape))
    config.image_token_id = ChatTokenizer.load(str(whole_run / "final")).image_token_id
    LongLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "first")
    train(replace(settings, out=tmp_path / "read", init=tmp_path / "first", steps=1))
    assert curve(tmp_path / "read") == curve(whole_run)[:1]


def test_the_loss_weighs_each_target_token_of_the_whole_batch_alike(
    settings: TrainSettings, whole_run: Path, shape: Path
) -> None:
    feed, stage = opened(settings)
    torch.manual_seed(settings.seed)
    config = named_config(str(shape))
    config.image_token_id = feed.tokenizer.image_token_id
    model = LongLlavaForConditionalGeneration(config)
    losses = []
    for sequence in islice(feed, stage.global_batch):
        packing = Packing.of(sequence.cu_seqlens.tolist(), isolate=True)
        pixels = sequence.images.permute(0, 3, 1, 2) if len(sequence.images) else None
        losses.append(
            model(sequence.input_ids[None], pixels, sequence.labels[None], packing=packing).token_losses.detach()
        )
    every = torch.cat(losses)
    first = read_metrics(whole_run)[0]
    assert len({len(one) for one in losses}) > 1, "sequences with as many targets would prove nothing"
    assert first["targets"] == len(every)
    assert first["loss"] == pytest.approx(float(every.mean()), rel=1e-5)
    assert first["loss"] != pytest.approx(float(torch.stack([one.mean() for one in losses]).mean()), rel=1e-5)


def test_a_loss_that_is_not_a_number_names_the_samples(
    settings: TrainSettings, whole_run: Path, build: Path, tmp_path: Path
) -> None:
    tokenizer = ChatTokenizer.load(str(whole_run / "final"))
    samples = [sample["json"] for sample in stored(build)]
    tokens = [set(tokenizer.encode(sample["conversations"]).ids.tolist()) for sample in samples]
    rare = min(set.union(*tokens), key=lambda token: (sum(token in t for t in tokens), token))
    broken = tmp_path / "broken"
    shutil.copytree(whole_run / "final", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.language_model.embed_tokens.weight"][rare] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="the loss is nan, which began in these samples") as caught:
        train(replace(settings, out=tmp_path / "run", model=None, init=broken, keep=1))
    wrong = {sample["id"].split(":")[1] for sample, t in zip(samples, tokens, strict=True) if rare in t}
    named = re.findall(r"(\d{9}) in train-", str(caught.value))
    assert named
    assert {str(int(key)) for key in named} <= wrong
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_damaged_sample_stops_a_run_or_is_left_out_and_named(
    settings: TrainSettings, build: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(build, broken)
    damaged = min((broken / "shards").glob("*.tar"))
    content = bytearray(damaged.read_bytes())
    content[600] ^= 1  # in its first sample
    damaged.write_bytes(content)
    run = replace(settings, builds=(str(broken),), out=tmp_path / "run")
    with pytest.raises(DamageError, match="go on without such samples"):
        train(run)
    train(replace(run, skip_damaged=True))
    named = [text for line in read_metrics(run.out) for text in line["damaged"]]
    assert len(named) == 1
    assert f"sample 000000000 in {damaged.name}" in named[0]


def test_a_checkpoint_for_which_there_is_no_room_is_refused_in_words(settings: TrainSettings, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # bytes of a file
    try:
        with pytest.raises(TrainingError, match=r"step-00000001\.partial cannot be written .* make room"):
            train(replace(settings, out=tmp_path / "run", save_every=1, steps=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(replace(settings, out=tmp_path / "run", save_every=1, steps=2))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_running_out_of_memory_says_what_to_change() -> None:
    with pytest.raises(TrainingError, match="--activation-checkpointing") as caught, memory_explained(4096, False, 2):
        torch.empty(1 << 60)
    assert "4,096" in str(caught.value)
    with pytest.raises(RuntimeError, match="inconsistent"), memory_explained(4096, False, 2):
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize("trainable", [("llm",), ("projector",), ("projector", "llm")])
def test_what_training_holds_is_as_the_arithmetic_says(
    settings: TrainSettings, shape: Path, trainable: tuple[Any, ...]
) -> None:
    feed, stage = opened(replace(settings, trainable=trainable))
    with joined() as world:
        made = prepare(settings, stage, feed.tokenizer, world)
        trained = [p for p in made.model.parameters() if p.requires_grad]
        moments = [s[name] for s in made.optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
        frozen = [p for p in made.model.parameters() if not p.requires_grad]
        expected = held(Shape.named(str(shape)), trainable, 1, frozen_bytes=4)
        assert [sum(t.numel() * 4 for t in kind) for kind in (trained, moments, frozen)] == [
            expected.trained,
            expected.optimiser,
            expected.frozen,
        ]


def test_what_is_not_sharded_goes_to_the_device_too(settings: TrainSettings, shape: Path) -> None:
    torch.manual_seed(0)
    model = LongLlavaForConditionalGeneration(named_config(str(shape)))
    flatten_experts(model)
    freeze(model, ("projector",))
    with joined() as world:
        shard(model, replace(world, device=torch.device("meta")), torch.float32)  # stands for a GPU
    assert {parameter.device.type for parameter in whole(model)} == {"meta"}


def test_a_folder_of_another_run_is_refused(settings: TrainSettings, whole_run: Path) -> None:
    with pytest.raises(UsageError, match=r"another run \(learning_rate was 0.01 and is 0.02\)"):
        train(replace(settings, out=whole_run, learning_rate=2e-2))


def test_builds_of_another_tokenizer_than_the_weights_are_refused(
    settings: TrainSettings, whole_run: Path, make_build: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_build(tmp_path / "other", 2, words=["entirely other words", "and some more of them"])
    with pytest.raises(UsageError, match="counted with another tokenizer"):
        train(replace(settings, builds=(str(other),), out=tmp_path / "run", model=None, init=whole_run / "final"))


def test_the_report_draws_each_source(whole_run: Path) -> None:
    page = (whole_run / "report.html").read_text()
    assert page.count("<svg") == 4
    assert all(source in page for source in ("pictures", "clips", "texts"))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", page)


def assert_alike(one: Curve, two: Curve) -> None:
    """Sums are made in another order, so that the last digits differ."""
    assert [line[0] for line in one] == [line[0] for line in two]
    assert one
    for a, b in zip(one, two, strict=True):
        assert a[1] == pytest.approx(b[1], rel=2e-5)
        assert a[2] == pytest.approx(b[2], rel=1e-3)
        assert a[3] == pytest.approx(b[3], rel=2e-5)


def assert_close(one: Path, two: Path) -> None:
    """The weights that two runs left; AdamW divides small gradients by themselves, so a few differ more than most."""
    first, second = (load_file(out / "final/model.safetensors") for out in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert float((tensor - second[name]).abs().median()) < 1e-6, name


def stored(build: Path) -> list[dict[str, Any]]:
    """A build's samples in the order of its index."""
    samples = []
    for file in sorted((build / "shards").glob("*.tar")):
        with tarfile.open(file) as opened_shard:
            for member in opened_shard.getmembers():
                if member.name.endswith(".json"):
                    content = opened_shard.extractfile(member)
                    assert content
                    samples.append({"json": json.loads(content.read())})
    return samples
