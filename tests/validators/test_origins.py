"""Builds that are sound in themselves, but not what their seed, their ledgers or their sources give."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import normalizers

from validators.against import Against, Rebuilt
from validators.run import summary, validate


def swapped(plan, a, b):
    """Two samples change places, under keys that ascend all the same."""
    one, two = plan.entries[a], plan.entries[b]
    one.key, two.key = two.key, one.key
    plan.entries[a], plan.entries[b] = two, one


def another_replacement(plan):
    """A record that the seed draws early stands for a rejected one."""
    plan.ledger[0]["replaced_by"] = plan.entry("chat").record["id"]


def from_file(name, file):
    return lambda plan: plan.entry(name).record["provenance"].update(file=file)


def ordinal(plan):
    plan.entry("chat").record["provenance"]["ordinal"] = 10


def of_an_earlier_build(plan):
    """A replayed record is of a source that only the earlier build has read, and of no file of it."""
    sources = {"allava": {"laion.json": "0" * 64}}
    builds = {"single_image": {"recipe_sha256": "0" * 64, "index_sha256": "0" * 64, "sources": sources}}
    plan.manifest = lambda manifest: manifest.update(builds=builds)
    plan.entry("replayed").record["source"] = "allava"


DRAWS = {
    "samples in another order": ({"mixture-order"}, lambda plan: swapped(plan, 0, 2)),
    "another seed": ({"mixture-order", "mixture-draw"}, lambda plan: plan.recipe.update(seed=1)),
    "another replacement than the next in line": ({"mixture-draw"}, another_replacement),
    "a sample of a file that nobody has read": ({"sample-provenance"}, from_file("chat", "c.json")),
    "a sample beyond the end of its file": ({"sample-provenance"}, ordinal),
    "a sample of no file of an earlier build": ({"sample-provenance"}, of_an_earlier_build),
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_the_seed_or_the_sources_do_not_give_is_found(name, plan, tmp_path):
    expected, change = DRAWS[name]
    change(plan)
    found = validate(str(plan.write(tmp_path / "build")))
    assert set(summary(found)) == expected, found


def test_a_record_of_an_earlier_builds_file_is_sound(plan, tmp_path):
    of_an_earlier_build(plan)
    plan.entry("replayed").record["provenance"]["file"] = "laion.json"
    assert validate(str(plan.write(tmp_path / "build"))) == []


def overlapping(change=lambda lines, plan: None, **recipe):
    """A build that passes over a copy and a benchmark's question; `change` gets the lines that say so."""

    def write(plan):
        plan.recipe.update({"duplicates": "exact", "decontaminate": "prints.parquet", **recipe})
        copy = {"kept": plan.entry("chat").record["id"], "kept_component": "caption", "exact": True}
        hit = {"benchmark": "mvbench", "item": "12", "how": "words", "matched": "", "path": "", "other": "", "bits": 0}
        plan.overlaps = [
            {"uid": "copy:0", "component": "caption", "reason": "duplicate", **copy},
            {"uid": "hit:0", "component": "caption", "reason": "contaminated", **hit},
        ]
        change(plan.overlaps, plan)

    return write


def line(number, **fields):
    return overlapping(lambda lines, plan: lines[number].update(fields))


def passed_over_but_kept(lines, plan):
    lines[0]["uid"] = plan.entry("single").record["id"]


def in_favour_of_what_goes(lines, plan):
    lines[0].update(kept="hit:0")


def patched(patch):
    return overlapping(lambda lines, plan: setattr(plan, "manifest", patch))


def untold(manifest):
    del manifest["overlaps"]


def filtered(**counts):
    return patched(lambda manifest: manifest["components"]["caption"]["filtered"].update(counts))


OVERLAPS = {
    "a recipe that passes over copies, and no ledger": (
        {"overlaps-missing"},
        lambda plan: plan.recipe.update(duplicates="near"),
    ),
    "a ledger of copies that the manifest does not state": ({"overlaps-missing", "file-stray"}, patched(untold)),
    "another hash of the ledger of copies": (
        {"overlaps-hash"},
        patched(lambda manifest: manifest["overlaps"].update(sha256="0" * 64)),
    ),
    "a line of copies too few": (
        {"overlaps-count"},
        patched(lambda manifest: manifest["overlaps"].update(rows=3)),
    ),
    "a copy less than the manifest counts": ({"overlaps-count"}, filtered(duplicate=2)),
    "a benchmark's question more than the manifest counts": ({"overlaps-count"}, filtered(contaminated=0)),
    "a copy passed over for an unknown reason": ({"overlaps-row"}, line(1, reason="ugly")),
    "a copy of nobody's component": ({"overlaps-row"}, line(0, component="nobody's")),
    "a copy without the other side": ({"overlaps-row"}, line(0, kept=None)),
    "a benchmark's question without its benchmark": ({"overlaps-row"}, line(1, benchmark=None)),
    "a copy that is in the build": ({"overlaps-kept"}, overlapping(passed_over_but_kept)),
    "a copy of what was passed over itself": ({"overlaps-kept"}, overlapping(in_favour_of_what_goes)),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_ledger_of_copies_that_is_wrong_is_found(name, plan, tmp_path):
    expected, change = OVERLAPS[name]
    change(plan)
    found = validate(str(plan.write(tmp_path / "build")))
    assert set(summary(found)) == expected, found


def test_a_build_that_passed_over_copies_is_sound(plan, tmp_path):
    overlapping()(plan)
    assert validate(str(plan.write(tmp_path / "build"))) == []


def test_a_lost_ledger_of_copies_is_found(plan, tmp_path):
    overlapping()(plan)
    build = plan.write(tmp_path / "build")
    (build / "overlaps.jsonl").unlink()
    assert summary(validate(str(build))) == {"overlaps-missing": 1}


def lower_case(plan):
    """A tokenizer whose tokens do not give back what they were made of."""
    plan.tokenizer = type(plan.tokenizer).from_str(plan.tokenizer.to_str())
    plan.tokenizer.normalizer = normalizers.Lowercase()


def broken_tables(plan):
    """A picture with Huffman tables that no header tells to be broken."""
    entry = plan.entry("single")
    data = bytearray(entry.images[0])
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    entry.images[0] = bytes(data)


DEEP = {
    "a tokenizer that forgets capitals": ({"target-text"}, lower_case),
    "broken Huffman tables": ({"image-undecodable"}, broken_tables),
}


@pytest.mark.parametrize("name", DEEP)
def test_what_only_a_deep_look_finds(name, plan, tmp_path):
    expected, change = DEEP[name]
    change(plan)
    build = str(plan.write(tmp_path / "build"))
    assert validate(build) == []
    found = validate(build, deep=True)
    assert set(summary(found)) == expected, found


@dataclass
class Upstream:
    """Gives samples as they were planned, whatever was written: what `longllava` gives by going back to the files."""

    plan: Any
    asked: tuple[str, ...] = ()

    def __call__(self, rows):
        self.asked = tuple(row["key"] for row in rows)
        by_key = {entry.key: entry for entry in self.plan.entries}
        for row in rows:
            entry = by_key[row["key"]]
            of = "origin" if row["component"] == "replayed" else "upstream"
            yield Rebuilt(entry.key, of, json.dumps(entry.record).encode(), entry.images, "", "")


def with_problem(code):
    return lambda plan, one: Rebuilt(one.key, one.of, None, (), code, "why")


def other(name, **fields):
    """Upstream gives another sample than was stored."""

    def change(plan, one):
        return Rebuilt(**{**{n: getattr(one, n) for n in one.__slots__}, **fields}) if is_of(plan, one, name) else one

    return change


def is_of(plan, one, name):
    return plan.entry(name).key == one.key


def other_turn(name):
    def change(plan, one):
        record = json.loads(one.record)
        record["conversations"][-1]["value"] += "!"
        return other(name, record=json.dumps(record).encode())(plan, one)

    return change


def other_images(name, choose):
    return lambda plan, one: other(name, images=choose(plan, [*one.images]))(plan, one)


AGAINST = {
    "an answer that was edited": ({"rebuilt-json"}, other_turn("chat")),
    "JSON written in another way": ({"rebuilt-json"}, other("single", record=b"{}")),
    "a picture that was exchanged": (
        {"rebuilt-image"},
        other_images("single", lambda plan, images: [plan.pictures[7]]),
    ),
    "two pictures that changed places": (
        {"rebuilt-image"},
        other_images("multi", lambda plan, images: images[::-1]),
    ),
    "a frame that is not in the clip": ({"rebuilt-image"}, other_images("video", lambda plan, images: images[:2])),
    "a replayed answer that was edited": ({"replay-origin"}, other_turn("replayed")),
    "a replayed picture that was exchanged": (
        {"replay-origin"},
        other_images("replayed", lambda plan, images: [plan.pictures[7]]),
    ),
    **{
        f"a rebuild that ends in {code}": ({code}, with_problem(code))
        for code in ("upstream-missing", "upstream-changed", "tools-changed", "rebuilt-rejected")
    },
    "a rebuild that fails": ({"not-run"}, lambda plan, one: other("single", absent=None)(plan, one)),
}


@pytest.mark.parametrize("name", AGAINST)
def test_what_upstream_does_not_give_is_found(name, plan, tmp_path):
    expected, change = AGAINST[name]
    build = str(plan.write(tmp_path / "build"))
    upstream = Upstream(plan)
    found = validate(build, against=Against(lambda rows: (change(plan, one) for one in upstream(rows))))
    assert set(summary(found)) == expected, found


@pytest.mark.parametrize("seed", [0, 5])
def test_of_each_component_eight_are_drawn(seed, plan, tmp_path):
    upstream = Upstream(plan)
    build = str(plan.write(tmp_path / "build"))
    assert validate(build, against=Against(upstream, 0.01, seed)) == []
    assert sorted(upstream.asked) == sorted(entry.key for entry in plan.entries)  # none has more


def test_a_place_beyond_the_shard_is_no_sample(plan, tmp_path):
    plan.entry("chat").row.update(offset=1 << 40)
    plan.entry("single").row.update(offset=-512)
    upstream = Upstream(plan)
    found = validate(str(plan.write(tmp_path / "build")), against=Against(upstream))
    assert set(summary(found)) == {"index-offset"}
    assert len(upstream.asked) == len(plan.entries) - 2
