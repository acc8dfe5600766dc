"""Damage done to the files of a sound build, and exactly what has to be said of it."""

import io
import json
import shutil
import tarfile

import pyarrow.parquet as pq
import pytest

from validators.run import summary, validate

SHARD = "shards/train-000000.tar"
BYTES = {"shard-hash", "index-sample-hash"}
"""What every changed byte of a sample yields."""


def flip(path, offset, bits=0x01):
    """Flips bits of one byte; a negative offset counts from the end."""

    def change(build):
        data = bytearray((build / path).read_bytes())
        data[offset] ^= bits
        (build / path).write_bytes(data)

    return change


def flip_at(path, text, bits=0x01):
    """Flips bits of the first byte of some text."""
    return lambda build: flip(path, (build / path).read_bytes().index(text), bits)(build)


def cut(path, keep):
    return lambda build: (build / path).write_bytes((build / path).read_bytes()[:keep])


def add(path, data):
    def change(build):
        (build / path).parent.mkdir(parents=True, exist_ok=True)
        with (build / path).open("ab") as file:
            file.write(data)

    return change


def remove(path):
    return lambda build: (build / path).unlink()


def retar(change):
    """Unpacks the first shard, changes its list of members, and packs it again."""

    def damage(build):
        with tarfile.open(build / SHARD) as tar:
            members = [(info, tar.extractfile(info).read()) for info in tar]
        with tarfile.open(build / SHARD, "w", format=tarfile.USTAR_FORMAT) as tar:
            for info, data in change(members):
                tar.addfile(info, io.BytesIO(data))

    return damage


def swap_contents(members, a, b):
    """Two members of the same length change places, but not their names."""
    names = [info.name.partition(".")[0] for info, _ in members]
    assert names[a] == names[b]
    (one, first), (two, second) = members[a], members[b]
    one.size, two.size = len(second), len(first)
    members[a], members[b] = (one, second), (two, first)
    return members


def with_folder(members):
    folder = tarfile.TarInfo("folder")
    folder.type, folder.mode = tarfile.DIRTYPE, 0o755
    return [*members, (folder, b"")]


def without_end(build):
    data = (build / SHARD).read_bytes().rstrip(b"\0")
    (build / SHARD).write_bytes(data + bytes(-len(data) % 512))


def interrupt(build):
    """Leaves what a retry leaves that is killed after the point from which only it can finish the build."""
    (build / ".build/before").mkdir(parents=True)
    (build / "manifest.json").rename(build / ".build/before/manifest.json")


def edit_ledger(build):
    lines = (build / "rejects.jsonl").read_text().splitlines()
    (build / "rejects.jsonl").write_text(lines[0] + "\n")


def edit_index(build):
    table = pq.read_table(build / "index.parquet")
    pq.write_table(table.slice(0, 9), build / "index.parquet")


def edit_manifest(build):
    content = json.loads((build / "manifest.json").read_text())
    content["components"]["caption"]["tokens"] = "many"
    (build / "manifest.json").write_text(json.dumps(content))


JPEG = b"\xff\xd8\xff\xe0"

DAMAGES = {
    "a byte of an image": (BYTES, lambda b: flip(SHARD, (b / SHARD).read_bytes().index(JPEG) + 4000)(b)),
    "the start of an image": (BYTES | {"image-undecodable"}, flip_at(SHARD, JPEG)),
    "a byte of the text": (BYTES | {"token-count"}, flip_at(SHARD, b"What is this")),
    "a byte of the JSON": (BYTES | {"sample-json"}, flip_at(SHARD, b'{"id"')),
    "a byte of the id": (BYTES | {"index-column"}, flip_at(SHARD, b"single:")),
    "a byte of a header": (
        {"shard-hash", "tar-header", "image-count", "index-offset", "index-sample-hash"},
        flip_at(SHARD, b"000000003.0001.jpg"),
    ),
    "a byte of the first header": (
        {
            "shard-hash",
            "tar-header",
            "member-order",
            "index-offset",
            "index-sample-hash",
            "energon-index",
            "sample-json",
        },
        flip(SHARD, 0),
    ),
    "a length in a header": (
        {
            "shard-hash",
            "tar-header",
            "member-order",
            "index-offset",
            "index-sample-hash",
            "energon-index",
            "sample-json",
        },
        flip(SHARD, 130),
    ),
    "a byte of padding": (BYTES | {"tar-metadata"}, lambda b: flip(SHARD, 1023)(b)),
    "the last byte": ({"shard-hash", "tar-end"}, flip(SHARD, -1)),
    "a shard without its end": ({"shard-hash", "shard-size", "tar-end"}, without_end),
    "a shard that ends inside an image": (
        {"shard-hash", "shard-size", "shard-samples", "tar-truncated", "energon-index"}
        | {"index-rows", "index-offset", "index-sample-hash", "image-count"},
        cut(SHARD, 5000),
    ),
    "an empty shard": (
        {"shard-hash", "shard-size", "shard-samples", "tar-end", "index-rows", "energon-index"},
        cut(SHARD, 0),
    ),
    "data after the end": ({"shard-hash", "shard-size", "tar-end"}, add(SHARD, b"x" * 512)),
    "a shard gone": ({"shard-missing", "index-rows", "energon-index"}, remove(SHARD)),
    "a shard put in place of another": (
        {"shard-hash", "shard-size", "key-order", "key-duplicate", "index-rows", "energon-index"},
        lambda b: shutil.copy(b / "shards/train-000001.tar", b / SHARD),
    ),
    "a member dropped": (
        {"shard-hash", "shard-size", "energon-index", "index-offset", "index-sample-hash"}
        | {"member-order", "image-count"},
        retar(lambda members: [m for m in members if m[0].name != "000000003.0000.jpg"]),
    ),
    "a JSON member dropped": (
        {"shard-hash", "member-order", "sample-json", "index-offset", "index-sample-hash", "energon-index"},
        retar(lambda members: members[1:]),
    ),
    "a sample dropped": (
        {"shard-hash", "shard-size", "shard-samples", "index-offset", "index-rows", "energon-index"},
        retar(lambda members: members[2:]),
    ),
    "two images swapped": (BYTES, retar(lambda members: swap_contents(members, 3, 4))),
    "members out of order": (
        {"shard-hash", "member-order", "index-sample-hash"},
        retar(lambda members: [members[1], members[0], *members[2:]]),
    ),
    "a folder in a tar": ({"shard-hash", "tar-format"}, retar(with_folder)),
    "a stray shard": ({"shard-stray"}, add("shards/train-000009.tar", b"")),
    "a stray file": ({"file-stray"}, add("notes.txt", b"todo")),
    "work left behind": ({"file-stray"}, add(".build/inputs.json", b"{}")),
    "an offset of the side index": ({"energon-index"}, flip(f"{SHARD}.idx", 8)),
    "half a side index": ({"energon-index"}, cut(f"{SHARD}.idx", 12)),
    "side counts": ({"energon-index"}, lambda b: (b / ".nv-meta/.info.json").write_text('{"shard_counts": {}}')),
    "side counts that are no JSON": ({"not-run"}, cut(".nv-meta/.info.json", 3)),
    "a side index gone": ({"energon-index"}, remove(f"{SHARD}.idx")),
    "side counts of a shard under another name": ({"energon-index"}, flip_at(".nv-meta/.info.json", b"000001")),
    "a split without the last shard": ({"energon-index"}, flip_at(".nv-meta/split.yaml", b"2}", 3)),
    "a split with a shard twice": (
        {"energon-index"},
        lambda b: (b / ".nv-meta/split.yaml").write_text(
            "split_parts: {train: ['shards/train-{000000..000002}.tar'], val: [shards/train-000001.tar]}"
        ),
    ),
    "a split of endless shards": ({"energon-index"}, flip_at(".nv-meta/split.yaml", b"2}", 0x0B)),
    "a split without parts": ({"not-run"}, lambda b: (b / ".nv-meta/split.yaml").write_text("parts: {}")),
    "an interrupted retry": ({"manifest-missing"}, interrupt),
    "what a retry keeps": ({"file-stray"}, add(".build/before/manifest.json", b"{}")),
    "no index": ({"index-missing"}, remove("index.parquet")),
    "an index row gone": ({"index-hash", "index-rows", "mixture-count"}, edit_index),
    "half an index": ({"index-hash", "index-unreadable"}, cut("index.parquet", 600)),
    "no ledger": ({"ledger-missing"}, remove("rejects.jsonl")),
    "a ledger line gone": ({"ledger-hash", "reject-ledger"}, edit_ledger),
    "a ledger line that is no JSON": (
        {"ledger-hash", "ledger-row", "reject-ledger"},
        add("rejects.jsonl", b"{]\n"),
    ),
    "no tokenizer": ({"not-run"}, remove("tokenizer/tokenizer.json")),
    "half a tokenizer": ({"tokenizer-hash", "not-run"}, cut("tokenizer/tokenizer.json", 500)),
    "no manifest": ({"manifest-missing"}, remove("manifest.json")),
    "half a manifest": ({"manifest-field"}, cut("manifest.json", 500)),
    "a count in words": ({"manifest-field"}, edit_manifest),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_found(name, build):
    expected, change = DAMAGES[name]
    change(build)
    found = validate(str(build))
    assert set(summary(found)) == expected, found
