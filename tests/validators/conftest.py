"""A small but complete build, written with `tarfile`, pyarrow and hand-made JSON, and told apart piece by piece.

Nothing here comes from the packages under test, nor from what writes real builds.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count as count_from
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

IMAGE = "<img><image></img>"
PER_SHARD = 4
PER_IMAGE = 144
SEED = 0
Json = dict[str, Any]


@dataclass
class Entry:
    """One sample: `record` and `images` are stored, `row` overrides what the index says, `name` the members' key."""

    key: str
    record: Json
    images: list[bytes]
    row: Json = field(default_factory=dict)
    index_component: str = ""


@dataclass
class Plan:
    """What a build is written from; a test changes one thing in it and writes it."""

    entries: list[Entry]
    ledger: list[Json]
    recipe: Json
    tokenizer: Tokenizer
    pictures: list[bytes]
    header: Callable[[tarfile.TarInfo], None] = lambda info: None
    rows: Callable[[list[Json]], None] = lambda rows: None
    table: Callable[[pa.Table], pa.Table] = lambda table: table
    manifest: Callable[[Json], None] = lambda manifest: None
    tar_format: int = tarfile.USTAR_FORMAT
    overlaps: list[Json] | None = None

    def entry(self, name: str) -> Entry:
        """The sample whose id starts with a name."""
        return next(entry for entry in self.entries if entry.record["id"].startswith(name))

    def write(self, folder: Path) -> Path:
        """Writes the build, consistent in everything that was not overridden."""
        (folder / "shards").mkdir(parents=True)
        (folder / "tokenizer").mkdir()
        (folder / ".nv-meta").mkdir()
        self.tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
        (folder / "tokenizer/tokenizer_config.json").write_text("{}")
        rows: list[Json] = []
        for start in range(0, len(self.entries), PER_SHARD):
            self._shard(folder, f"train-{start // PER_SHARD:06d}.tar", self.entries[start : start + PER_SHARD], rows)
        self.rows(rows)
        pq.write_table(self.table(pa.Table.from_pylist(rows)), folder / "index.parquet")
        (folder / "rejects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.ledger))
        manifest = self._manifest(folder, rows)
        self.manifest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    def _shard(self, folder: Path, name: str, entries: list[Entry], rows: list[Json]) -> None:
        path = folder / "shards" / name
        places = []
        with tarfile.open(path, "w", format=self.tar_format) as tar:
            for entry in entries:
                start = tar.offset
                members = [("json", json.dumps(entry.record).encode())]
                members += [(f"{i:04d}.jpg", data) for i, data in enumerate(entry.images)]
                for part, data in members:
                    info = tarfile.TarInfo(f"{entry.key}.{part}")
                    info.size = len(data)
                    self.header(info)
                    tar.addfile(info, io.BytesIO(data))
                places.append((start, tar.offset))
        blob = path.read_bytes()
        for entry, (start, end) in zip(entries, places, strict=True):
            rows.append(self._row(entry, name, start, blob[start:end]))
        ends = [places[0][0], *(end for _, end in places)]
        path.with_name(f"{name}.idx").write_bytes(b"".join(end.to_bytes(8, "little") for end in ends))

    def _row(self, entry: Entry, shard: str, offset: int, data: bytes) -> Json:
        record = entry.record
        text, target = count(self.tokenizer, record["conversations"])
        images = len(record["images"])
        row = {
            **{"key": entry.key, "id": record["id"], "shard": shard, "offset": offset, "size": len(data)},
            **{"sha256": hashlib.sha256(data).hexdigest(), "source": record["source"]},
            **{"component": entry.index_component or record["component"], "modality": record["modality"]},
            **{"n_images": images, "n_text_tokens": text, "n_tokens": text + PER_IMAGE * images},
            **{"n_target_tokens": target, "n_turns": len(record["conversations"])},
        }
        return {**row, **entry.row}

    def _manifest(self, folder: Path, rows: list[Json]) -> Json:
        components = {name: self._component(name, rows) for name in self.recipe["components"]}
        shards = []
        for path in sorted(folder.glob("shards/*.tar")):
            entry = {"file": f"shards/{path.name}", "sha256": sha256(path), "bytes": path.stat().st_size}
            shards.append({**entry, "samples": sum(row["shard"] == path.name for row in rows)})
        sums = {name: sum(c[name] for c in components.values()) for name in ("images", "tokens", "target_tokens")}
        counts = {Path(shard["file"]).name: shard["samples"] for shard in shards}
        (folder / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": counts}))
        run = f"shards/train-{{000000..{len(shards) - 1:06d}}}.tar"
        (folder / ".nv-meta/split.yaml").write_text(json.dumps({"split_parts": {"train": [run]}, "exclude": []}))
        if self.overlaps is not None:
            lines = "".join(json.dumps(line) + "\n" for line in self.overlaps)
            (folder / "overlaps.jsonl").write_text(lines)
        totals = {"samples": len(rows), **sums, "bytes": sum(shard["bytes"] for shard in shards)}
        tally = {"records": 30, "usable": 28, "rejected": 2}
        return {
            **{"format": "longllava.build/1", "protocol": "longllava.protocol/1", "recipe": self.recipe},
            "recipe_sha256": fingerprint(self.recipe),
            "tokenizer": {
                **{"name": "toy", "sha256": sha256(folder / "tokenizer/tokenizer.json")},
                **{"image_token": "<|reserved_0|>", "tokens_per_image": PER_IMAGE},
            },
            "sources": {
                "llava15": {
                    **tally,
                    "files": [
                        {"file": "a.json", "bytes": 9, "records": 10, "usable": 8, "rejected": 2},
                        {"file": "b.json", "bytes": 9, "records": 20, "usable": 20, "rejected": 0},
                    ],
                }
            },
            "components": components,
            "totals": {**totals, "rejected": len(self.ledger)},
            "shards": shards,
            "index": {"file": "index.parquet", "sha256": sha256(folder / "index.parquet"), "rows": len(rows)},
            "rejects": {
                **{"file": "rejects.jsonl", "sha256": sha256(folder / "rejects.jsonl")},
                "rows": len(self.ledger),
            },
            **self._passed_over(folder),
            "environment": {"started": "2024-10-12T00:00:00Z"},
        }

    def _passed_over(self, folder: Path) -> Json:
        if self.overlaps is None:
            return {}
        file = {"file": "overlaps.jsonl", "sha256": sha256(folder / "overlaps.jsonl"), "rows": len(self.overlaps)}
        return {"overlaps": file}

    def _component(self, name: str, rows: list[Json]) -> Json:
        mine = [row for row in rows if row["component"] == name]
        lost = Counter(line["reason"] for line in self.ledger if line["component"] == name)
        short = sum(line["replaced_by"] is None for line in self.ledger if line["component"] == name)
        kept = len(mine)
        overlaps = Counter(line["reason"] for line in self.overlaps or () if line["component"] == name)
        return {
            **{"origin": "llava15", "asked": kept + short, "pool": 20, "filtered": {"language": 8, **overlaps}},
            **{"drawn": kept + lost.total(), "kept": kept, "rejected": lost.total(), "short": short},
            **{"rejects": dict(lost), "images": sum(row["n_images"] for row in mine)},
            "tokens": sum(row["n_tokens"] for row in mine),
            "target_tokens": sum(row["n_target_tokens"] for row in mine),
        }


def count(tokenizer: Tokenizer, conversations: list[Json]) -> tuple[int, int]:
    """Text and target tokens as upstream counts them: by the lengths of prefixes."""

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    names = {"human": "User", "gpt": "Assistant", "system": "System"}
    text = "".join(f"<|startoftext|><|{names.get(t['from'])}|>\n{t['value']}\n" for t in conversations)
    text = text[:-1] + "<|endoftext|>" if conversations[-1]["from"] == "gpt" else text
    head = "<|Assistant|>\n"
    answers = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
    target = sum(length(head + answer) - length(head) + 1 for answer in answers)
    return sum(length(chunk) for chunk in text.split("<image>")), target


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(recipe: Json) -> str:
    """Of a recipe's canonical JSON."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def record(uid: str, component: str, modality: str, turns: list[tuple[str, str]], images: list[Json]) -> Json:
    """A sample's JSON."""
    return {
        **{"id": uid, "source": "llava15", "component": component, "modality": modality},
        "conversations": [{"from": role, "value": value} for role, value in turns],
        "images": [
            {"file": f"{i:04d}.jpg", "width": 336, "height": 336, "source_size": [640, 480], **image}
            for i, image in enumerate(images)
        ],
        **{"escaped": 0, "provenance": {"file": "a.json", "ordinal": 3, "upstream_id": None}},
    }


def grid(rows: int, columns: int, size: tuple[int, int]) -> list[Json]:
    """The image list of a patched picture."""
    tiles = [{"role": "tile", "tile": [r, c]} for r in range(rows) for c in range(columns)]
    return [{**image, "source_size": list(size)} for image in [{"role": "main"}, *tiles]]


def clip(*times: float | None) -> list[Json]:
    """The image list of a clip."""
    return [{"role": "frame", **({} if time is None else {"time": time})} for time in times]


def sample_records() -> list[Json]:
    """One sample of each kind, and the odd ones."""
    picture = {"role": "image"}
    chat = [
        ("system", "Be kind."),
        ("human", "Café? 你好"),
        ("gpt", "Yes.\n\nOf course."),
        ("human", "?"),
        ("gpt", "No"),
    ]
    turns = [("human", "Is < image> a tag?"), ("gpt", "It is.")]
    interleaved = f"{IMAGE}\nThis is a cat. {IMAGE}\nThis is a:"
    two_clips = f"<vid>{IMAGE}<t>{IMAGE}</vid>\n<vid>{IMAGE}<t>{IMAGE}</vid>\nCompare with {IMAGE}"
    split = f"{IMAGE}\n{IMAGE}{IMAGE}\n{IMAGE}{IMAGE}\nWhat is there?"
    return [
        record("single", "caption", "image", [("human", f"{IMAGE}\nWhat is this?"), ("gpt", "A cat.")], [picture]),
        record("multi", "caption", "multi_image", [("human", interleaved), ("gpt", "dog")], [picture] * 2),
        record("chat", "caption", "text", chat, []),
        {**record("escaped", "caption", "text", turns, []), "escaped": 1},
        record(
            *(
                "video",
                "caption",
                "video",
                [("human", f"<vid>{IMAGE}<t>{IMAGE}<t>{IMAGE}</vid>\nWho?"), ("gpt", "She.")],
            ),
            clip(0.0, 1.0, 2.5),
        ),
        record(
            *("clips", "caption", "video", [("human", two_clips), ("gpt", "Both.")]),
            [*clip(0, 1), *clip(None, None), picture],
        ),
        record("answer", "caption", "image", [("human", "Draw."), ("gpt", f"See {IMAGE}\nthere.")], [picture]),
        record("grid", "tiles", "subimage", [("human", split), ("gpt", "A map.")], grid(2, 2, (500, 400))),
        record("capped", "tiles", "subimage", [("human", split), ("gpt", "A map.")], grid(2, 2, (4000, 3000))),
        record("replayed", "earlier", "image", [("human", f"Who? {IMAGE}"), ("gpt", "Me.")], [picture]),
    ]


def md5(text: str) -> str:
    """Hex digest."""
    return hashlib.md5(text.encode()).hexdigest()


def number(name: str, component: str, *, late: bool, place: float | None = None) -> str:
    """An id of a record that seed 0 draws early or late, and lays out near a place between 0 and 1."""
    for i in count_from(0):
        uid = f"{name}:{i}"
        drawn_late = md5(f"{SEED}/draw/{component}/{uid}") >= "8"
        laid = int(md5(f"{SEED}/order/{component}/{uid}/0")[:8], 16) / 16**8
        if drawn_late == late and (place is None or place <= laid < place + 0.1):
            return uid
    raise AssertionError


@pytest.fixture(scope="session")
def toy_tokenizer() -> Tokenizer:
    """A byte-level BPE with the special tokens of Jamba's, and its kind of reserved token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [turn["value"] for sample in sample_records() for turn in sample["conversations"]]
    tokenizer.train_from_iterator([*texts, "<|User|>\n", "<|Assistant|>\n"], trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["<|reserved_0|>"] = tokenizer.get_vocab_size()
    return Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Different JPEGs of the right size."""
    found = []
    for i in range(8):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((336, 336)).rotate(i * 10).convert("RGB").save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


@pytest.fixture
def plan(toy_tokenizer: Tokenizer, pictures: list[bytes]) -> Plan:
    """A sound build, not yet written."""
    entries = []
    for i, sample in enumerate(deepcopy(sample_records())):
        images = [pictures[j % len(pictures)] for j in range(len(sample["images"]))]
        component = "replayed" if sample["component"] == "earlier" else sample["component"]
        sample["id"] = number(sample["id"], component, late=sample["id"] == "video", place=i / 10)
        entries.append(Entry(f"{i * 3:09d}", sample, images))
    entries[-1].index_component = "replayed"
    lost = {"component": "caption", "detail": "no such file"}
    gone, long = (number(name, "caption", late=False) for name in ("gone", "long"))
    ledger = [
        {"uid": gone, "reason": "media-missing", "replaced_by": entries[4].record["id"], **lost},
        {"uid": long, "reason": "too-long", "replaced_by": None, **lost},
    ]
    common = {"on_short": "error", "replay": None, "subimage": None, "source": None}
    components = {
        "caption": {**common, "count": 8, "source": "llava15", "on_short": "accept"},
        "tiles": {**common, "count": 2, "subimage": "single_image", "max_tiles": 4},
        "replayed": {**common, "count": "all", "replay": "single_image"},
    }
    recipe = {"name": "toy", "seed": SEED, "sequence_length": 2048, "components": components}
    return Plan(entries, ledger, recipe, toy_tokenizer, pictures)


@pytest.fixture
def build(plan: Plan, tmp_path: Path) -> Path:
    """A sound build."""
    return plan.write(tmp_path / "build")
