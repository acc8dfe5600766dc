"""The command line, run as users run it: on what the demo leaves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

COMMANDS = ["build", "chat", "convert", "decontaminate", "demo", "diff", "duplicates", "export", "generate", "ingest"]
COMMANDS += ["pack", "plan-memory", "retry", "show", "sources", "stats", "train", "validate"]


def longllava(*arguments: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "longllava", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_help_lists_every_command_with_one_line() -> None:
    result = longllava("--help")
    assert result.returncode == 0
    listed = [line.split() for line in result.stdout.split("Commands:")[1].splitlines() if line.startswith("  ")]
    assert sorted(words[0] for words in listed if len(words) > 1 and words[0] in COMMANDS) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = longllava(command, "--help")
    assert result.returncode == 0
    assert f"longllava {command}" in result.stdout.split("Usage:")[1].split("Example:")[1]


def test_the_command_imports_nothing_heavy() -> None:
    heavy = ["ray", "torch", "webdataset", "transformers", "duckdb", "pyarrow", "av", "PIL", "numpy", "rich.progress"]
    code = f"import longllava.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_demo_leaves_what_other_commands_read(demo: Path) -> None:
    assert sorted(p.name for p in (demo / "builds").iterdir()) == ["align", "multi_image", "single_image", "text"]
    assert sorted(p.stem for p in (demo / "recipes").iterdir()) == ["align", "multi_image", "single_image", "text"]
    assert len(list((demo / "data").glob("*/"))) == 9


def test_the_third_stage_has_the_papers_mix(demo: Path) -> None:
    manifest = json.loads((demo / "builds/multi_image/manifest.json").read_text())
    assert {name: c["kept"] for name, c in manifest["components"].items()} == {
        "mantis": 200,
        "videochat2": 200,
        "sharegpt4video": 50,
        "single_image_replay": 200,
        "text_replay": 50,
        "sub_image": 50,
    }


def test_a_second_demo_changes_nothing(demo: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (demo / "builds").rglob("*") if p.is_file()}
    again = longllava("demo", "--out", demo, "--workers", 2)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in (demo / "builds").rglob("*") if p.is_file()} == before


def test_stats_are_json_on_stdout_alone(demo: Path) -> None:
    result = longllava("stats", demo / "builds/text", "--json")
    statistics = json.loads(result.stdout)
    assert statistics["total"]["samples"] == 278
    assert statistics["by_component"]["longalign"]["samples"] == 10
    both = json.loads(longllava("stats", demo / "builds/text", demo / "builds/align", "--json").stdout)
    assert [s["recipe"] for s in both] == ["text", "align"]
    assert "evol_instruct" in longllava("stats", demo / "builds/text").stdout


def test_show_prints_samples_by_component_and_key(demo: Path) -> None:
    build = demo / "builds/multi_image"
    result = longllava("show", build, "--component", "sub_image", "-n", 1, "--json")
    (sample,) = json.loads(result.stdout)
    assert sample["record"]["images"][0]["role"] == "main"
    shown = longllava("show", build, sample["key"]).stdout
    assert "<img><image></img>" in shown
    assert sample["id"] in shown
    missing = longllava("show", build, "nothing")
    assert missing.returncode == 2
    assert "has no sample nothing" in missing.stderr
    assert "it has mantis, videochat2" in longllava("show", build, "--component", "x").stderr


def test_show_does_not_pass_on_terminal_escapes() -> None:
    from longllava.display_samples import protocol_text

    assert protocol_text("a\x1b[2Jb\r\x07").plain == "a\\x1b[2Jb\\x0d\\x07"


def test_validate_tells_a_sound_build_from_a_damaged_one(demo: Path, tmp_path: Path) -> None:
    build = tmp_path / "align"
    shutil.copytree(demo / "builds/align", build)
    assert longllava("validate", build).returncode == 0
    shard = build / "shards/train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[3_000] ^= 1
    shard.write_bytes(data)
    result = longllava("validate", build, "--json")
    assert result.returncode == 1
    assert "shard-hash" in json.loads(result.stdout)["codes"]


@pytest.mark.parametrize("command", ["stats", "show"])
def test_what_is_no_build_is_a_usage_error(command: str, tmp_path: Path) -> None:
    result = longllava(command, tmp_path)
    assert result.returncode == 2
    assert "is not a build: it has no manifest.json" in result.stderr


def test_a_dry_run_writes_no_build_and_tells_what_is_short(demo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    content = yaml.safe_load((demo / "recipes/text.yaml").read_text())
    content["tokenizer"] = str(demo / "tokenizer")
    content["components"]["longalign"]["count"] = 500
    recipe.write_text(yaml.safe_dump(content))
    arguments = ("build", recipe, "--data", demo / "data", "--out", tmp_path / "out", "--dry-run", "--workers", 2)
    plan = json.loads(longllava(*arguments, "--json").stdout)
    assert plan["components"]["longalign"]["short"] > 400
    assert plan["components"]["wildchat"]["filtered"]["toxic"] > 0
    assert plan["estimate"]["tokens"] > 0
    assert not (tmp_path / "out").exists()
    assert "longalign is short by" in longllava(*arguments).stdout


def test_a_bad_recipe_is_told_with_its_line(demo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\ntokenizer: t\ncomponents:\n  a: {source: llava15, cout: 3}\n")
    result = longllava("build", recipe, "--data", demo / "data", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert f"{recipe}:4:24: components.a.cout: unknown key; did you mean count?" in result.stderr


def test_an_unknown_source_names_the_nearest(demo: Path, tmp_path: Path) -> None:
    result = longllava("ingest", "--data", demo / "data", "--out", tmp_path, "--source", "llava")
    assert result.returncode == 2
    assert "did you mean allava, llava15?" in result.stderr


def test_sources_tells_what_is_there_and_how_to_get_the_rest(demo: Path, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads(longllava("sources", "--data", demo / "data", "--json").stdout)}
    assert len(rows) == 9
    assert all(e["found"] for e in rows["evol_instruct"]["expected"] if e["required"])
    absent = longllava("sources", "--data", tmp_path).stdout
    assert "llava15: missing: llava_v1_5_mix665k.json" in absent
    assert "hf download" in absent


def test_folders_that_hold_nothing_are_usage_errors(tmp_path: Path) -> None:
    for arguments in (("ingest", "--data", tmp_path, "--out", tmp_path / "c"), ("validate", tmp_path / "nothing")):
        result = longllava(*arguments)
        assert result.returncode == 2
        assert "error: " in result.stderr


def test_ingest_prints_counts(demo: Path, tmp_path: Path) -> None:
    result = longllava("ingest", "--data", demo / "data", "--out", tmp_path, "--source", "wildchat", "--json")
    counts = json.loads(result.stdout)["wildchat"]
    assert counts["records"] == counts["usable"] + counts["rejected"] > 0


def test_every_sample_leads_back_to_a_record_of_an_upstream_file(demo: Path) -> None:
    manifests = [json.loads((demo / "builds" / n / "manifest.json").read_text()) for n in ("text", "single_image")]
    manifests.append(json.loads((demo / "builds/multi_image/manifest.json").read_text()))
    records = {
        (name, file["file"]): file["records"]
        for manifest in manifests
        for name, source in manifest["sources"].items()
        for file in source["files"]
    }
    index = pq.read_table(demo / "builds/multi_image/index.parquet", columns=["id", "source"]).to_pylist()
    for row in index:
        file, ordinal = row["id"].removeprefix(f"{row['source']}/").split(":")[:2]
        assert (demo / "data" / row["source"] / file).is_file()
        assert int(ordinal) < records[row["source"], file]


def test_pack_writes_a_plan_that_it_finds_again(demo: Path, tmp_path: Path) -> None:
    builds = (demo / "builds/text", demo / "builds/multi_image")
    result = longllava("pack", *builds, "--out", tmp_path / "plan.parquet", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["samples"] == 278 + 750
    assert figures["records_in_several_builds"] == 50  # the third stage replays them
    again = longllava("pack", *builds, "--check", tmp_path / "plan.parquet")
    assert again.returncode == 0
    assert "no differences" in again.stdout
    other = longllava("pack", *builds, "--check", tmp_path / "plan.parquet", "--seed", 1)
    assert other.returncode == 1
    assert "seed was 0 and is 1" in other.stdout


def test_pack_refuses_samples_that_fit_nowhere_unless_told_to_leave_them_out(demo: Path) -> None:
    build = demo / "builds/text"
    refused = longllava("pack", build, "--sequence-length", 4096)
    assert refused.returncode == 2
    assert "samples fit in no sequence of 4,096 tokens" in refused.stderr
    result = longllava("pack", build, "--sequence-length", 4096, "--drop-oversize", "--json")
    figures = json.loads(result.stdout)
    assert figures["oversize"]["samples"] == 278 - figures["samples"] > 0
