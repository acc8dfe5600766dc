"""What a whole run does: sound builds pass, no file can make it raise, and it reads from anywhere."""

import hashlib
import json
import random
import tarfile

import fsspec
import pytest

from validators.findings import Finding
from validators.run import findings, summary, validate


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_build_has_no_findings(deep, build):
    assert validate(str(build), deep=deep) == []


def test_a_build_without_side_files_is_sound(build):
    for file in [*build.glob("shards/*.idx"), build / ".nv-meta/.info.json"]:
        file.unlink()
    assert validate(str(build)) == []


def test_reports_and_cards_belong_to_a_build(build):
    for name in ("README.md", "report.html", ".nv-meta/dataset.yaml"):
        (build / name).write_text("")
    assert validate(str(build)) == []


def test_a_tar_may_end_in_just_two_blocks(build):
    manifest = json.loads((build / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = build / shard["file"]
        data = path.read_bytes().rstrip(b"\0")
        data += bytes(-len(data) % 512 + 1024)
        path.write_bytes(data)
        shard.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    manifest["totals"]["bytes"] = sum(shard["bytes"] for shard in manifest["shards"])
    (build / "manifest.json").write_text(json.dumps(manifest))
    assert validate(str(build)) == []


def test_a_recipe_hash_may_read_an_accepted_shortfall_as_an_error(plan, tmp_path):
    recipe = json.loads(json.dumps(plan.recipe))
    recipe["components"]["caption"]["on_short"] = "error"
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    plan.manifest = lambda manifest: manifest.update(recipe_sha256=hashlib.sha256(text.encode()).hexdigest())
    assert validate(str(plan.write(tmp_path / "build"))) == []


def test_records_may_repeat_where_the_recipe_says_so(plan, tmp_path):
    plan.recipe["components"]["caption"]["on_short"] = "repeat"
    plan.entry("multi").record["id"] = plan.entry("single").record["id"]
    assert validate(str(plan.write(tmp_path / "build"))) == []


def test_any_flipped_byte_of_a_shard_is_found(build):
    path = build / "shards/train-000000.tar"
    sound = path.read_bytes()
    chance = random.Random(0)
    for offset in chance.sample(range(len(sound)), 60):
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert validate(str(build)), offset


@pytest.mark.parametrize("file", ["manifest.json", "index.parquet", "rejects.jsonl", "tokenizer/tokenizer.json"])
def test_any_damage_of_another_file_is_found_and_never_raises(file, build):
    sound = (build / file).read_bytes()
    chance = random.Random(0)
    for _ in range(12):
        start = chance.randrange(len(sound))
        (build / file).write_bytes(sound[:start] + chance.randbytes(30) + sound[start + 30 :])
        assert validate(str(build)), start
        (build / file).write_bytes(sound[:start])
        assert validate(str(build)), start


def test_what_follows_a_damaged_header_is_still_read(build):
    path = build / "shards/train-000000.tar"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    keys = {finding.key for finding in validate(str(build)) if finding.code == "index-rows"}
    assert keys == set()


def test_pax_and_gnu_extensions_are_reported_and_read_past(plan, tmp_path):
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        plan.tar_format = kind
        plan.entries[0].key = "0" * 120
        found = validate(str(plan.write(tmp_path / str(kind))))
        assert {finding.code for finding in found} == {"tar-format"}


def test_a_remote_build_is_read_like_a_local_one(build):
    memory = fsspec.filesystem("memory")
    memory.put(str(build), "/remote", recursive=True)
    try:
        assert validate("memory://remote") == []
        memory.rm("/remote/shards/train-000001.tar")
        assert "shard-missing" in summary(validate("memory://remote"))
    finally:
        memory.rm("/remote", recursive=True)


def test_a_folder_that_is_not_there_is_a_finding(tmp_path):
    assert summary(validate(str(tmp_path / "nowhere"))) == {"manifest-missing": 1}
    assert summary(validate("nosuchscheme://bucket/build")) == {"not-run": 1}


def test_progress_counts_every_sample(build):
    calls = []
    validate(str(build), progress=lambda what, done, total: calls.append((what, done, total)))
    assert [done for _, done, _ in calls] == list(range(1, 11))
    assert calls[-1] == ("shards/train-000002.tar", 10, 10)


def test_findings_come_before_the_run_is_over(build):
    (build / "rejects.jsonl").unlink()
    shards = []
    for finding in findings(str(build), progress=lambda what, done, total: shards.append(what)):
        assert finding.code == "ledger-missing"
        assert shards == []


def test_a_summary_counts_codes_in_order():
    found = [Finding(code, "error", None, None, "") for code in ("tar-end", "over-long", "tar-end")]
    assert list(summary(found).items()) == [("over-long", 1), ("tar-end", 2)]
