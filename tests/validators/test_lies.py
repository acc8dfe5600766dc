"""Builds that were written wrong, in one thing each, and exactly what has to be said of it.

Files and hashes agree with one another; only what they say is not so.
"""

import io
import tarfile

import pyarrow as pa
import pytest
from PIL import Image

from validators.run import summary, validate

IMAGE = "<img><image></img>"


def in_record(name, **fields):
    return lambda plan: plan.entry(name).record.update(fields)


def without(name, field):
    return lambda plan: plan.entry(name).record.pop(field)


def in_row(name, **fields):
    return lambda plan: plan.entry(name).row.update(fields)


def in_image(name, number, **fields):
    return lambda plan: plan.entry(name).record["images"][number].update(fields)


def in_ledger(line, **fields):
    return lambda plan: plan.ledger[line].update(fields)


def in_recipe(name, **fields):
    return lambda plan: plan.recipe["components"][name].update(fields)


def in_text(name, turn, old, new):
    def change(plan):
        message = plan.entry(name).record["conversations"][turn]
        assert old in message["value"]
        message["value"] = message["value"].replace(old, new)

    return change


def roles(name, *new):
    def change(plan):
        turns = plan.entry(name).record["conversations"]
        turns[:] = [{**turn, "from": role} for turn, role in zip(turns, new, strict=False)]

    return change


def header(**fields):
    def stamp(info):
        for name, value in fields.items():
            setattr(info, name, value)

    return lambda plan: setattr(plan, "header", stamp)


def in_manifest(*path, value):
    def patch(manifest):
        *parents, last = path
        for key in parents:
            manifest = manifest[key]
        manifest[last] = value(manifest[last]) if callable(value) else value

    return lambda plan: setattr(plan, "manifest", patch)


def rows(change):
    return lambda plan: setattr(plan, "rows", change)


def table(change):
    return lambda plan: setattr(plan, "table", change)


SCORE_TYPES = {
    **{"flags": pa.list_(pa.string()), "question_language": pa.string(), "answer_language": pa.string()},
    **{"repetition": pa.float64(), "max_aspect": pa.float64(), "language_mismatch": pa.bool_()},
    **dict.fromkeys(("n_words", "shortest_answer", "longest_turn", "n_refusals", "n_emails"), pa.int32()),
    **dict.fromkeys(("n_phones", "n_cards", "min_side", "max_side", "contrast", "width", "height"), pa.int32()),
    **dict.fromkeys(("min_bytes", "max_bytes"), pa.int64()),
}


def with_scores(found, **types):
    for name, kind in {**SCORE_TYPES, **types}.items():
        if name not in found.schema.names:
            found = found.append_column(name, pa.nulls(found.num_rows, kind))
    return found


def scored(name, **scores):
    """An index with scores: the shapes of all pictures, and some of one sample."""

    def change(plan):
        def fill(found):
            rows = with_scores(found).to_pylist()
            for row, entry in zip(rows, plan.entries, strict=True):
                if sizes := [image["source_size"] for image in entry.record["images"]]:
                    row |= {"min_side": min(map(min, sizes)), "max_side": max(map(max, sizes))}
                    row["max_aspect"] = round(max(max(size) / min(size) for size in sizes), 4)
                    row["width"], row["height"] = max(sizes, key=lambda size: size[0] * size[1])
                row |= scores if entry is plan.entry(name) else {}
            return pa.Table.from_pylist(rows, schema=with_scores(found).schema)

        plan.table = fill

    return change


def dropped(**steps):
    return in_manifest("components", "caption", "dropped", value=steps)


def filtered(max_drop=None, **steps):
    return in_recipe("caption", filters=steps, **({} if max_drop is None else {"max_drop": max_drop}))


def together(*changes):
    def change(plan):
        for one in changes:
            one(plan)

    return change


def picture(name, change):
    return lambda plan: plan.entry(name).images.__setitem__(0, change(plan.entry(name).images[0]))


def jpeg(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "JPEG")
    return buffer.getvalue()


def swap(plan, a, b, field):
    """Swaps one attribute of two neighbouring samples."""
    one, two = plan.entries[a], plan.entries[b]
    first, second = getattr(one, field), getattr(two, field)
    setattr(one, field, second)
    setattr(two, field, first)


def swap_in_images(name, a, b, field):
    def change(plan):
        images = plan.entry(name).record["images"]
        images[a][field], images[b][field] = images[b][field], images[a][field]

    return change


def one_more_image(plan):
    entry = plan.entry("single")
    entry.record["modality"] = "multi_image"
    entry.record["images"].append({**entry.record["images"][0], "file": "0001.jpg"})
    entry.images.append(plan.pictures[1])


def one_record_twice(plan):
    plan.entry("multi").record["id"] = plan.entry("single").record["id"]


def replay_of_a_split_record(plan):
    plan.entry("replayed").record["id"] = plan.entry("grid").record["id"]


def swap_rows(found):
    found[1], found[2] = found[2], found[1]


def shard_of_rows_too_early(found):
    found[:] = found[4:8] + found[:4] + found[8:]


def retype(found):
    at = found.schema.get_field_index("n_turns")
    return found.set_column(at, "n_turns", found["n_turns"].cast(pa.string()))


def with_null(found):
    at = found.schema.get_field_index("id")
    return found.set_column(at, "id", pa.array([None, *found["id"].to_pylist()[1:]]))


def plus(number):
    return lambda value: value + number


def odd_member(plan):
    plan.header = lambda info: setattr(info, "name", info.name.replace("0000.jpg", "cover.png"))


def component_of_the_recipe_only(plan):
    plan.recipe["components"]["more"] = plan.recipe["components"]["replayed"]
    plan.manifest = lambda manifest: manifest["components"].pop("more")


LIES = {
    # Members
    "a time": ({"tar-metadata"}, header(mtime=1728691200)),
    "a user": ({"tar-metadata"}, header(uid=1000, uname="someone")),
    "a mode": ({"tar-metadata"}, header(mode=0o600)),
    "GNU headers": ({"tar-format"}, lambda p: setattr(p, "tar_format", tarfile.GNU_FORMAT)),
    "a member of another name": ({"member-name", "member-order"}, odd_member),
    "keys that do not ascend": ({"key-order", "mixture-order"}, lambda p: swap(p, 5, 6, "key")),
    "a key twice": (
        {"key-duplicate", "index-rows", "mixture-order"},
        lambda p: setattr(p.entries[3], "key", p.entries[1].key),
    ),
    "a key again in the next shard": ({"key-duplicate"}, lambda p: setattr(p.entries[4], "key", p.entries[3].key)),
    # JSON
    "JSON without a field": ({"sample-json"}, without("single", "provenance")),
    "a number as a string": ({"sample-json"}, in_record("single", escaped="0")),
    "an unknown modality": ({"sample-json"}, in_record("single", modality="audio")),
    "an unknown role of a turn": ({"sample-json"}, roles("single", "human", "bot")),
    "an impossible source size": ({"sample-json"}, in_image("single", 0, source_size=[0, 480])),
    "turns out of order": ({"sample-roles"}, roles("chat", "system", "gpt", "human", "human", "gpt")),
    "a question without an answer": ({"sample-roles"}, roles("single", "human")),
    "a late system turn": ({"sample-roles"}, roles("chat", "human", "gpt", "system", "human", "gpt")),
    "an empty answer": ({"sample-empty-answer"}, in_text("single", 1, "A cat.", " \n")),
    "the wrong modality": ({"sample-modality"}, in_record("single", modality="multi_image")),
    "a text with an image": ({"sample-modality"}, in_record("single", modality="text")),
    # Images
    "an image of another size": ({"image-size"}, picture("single", lambda _: jpeg("RGB", (336, 335)))),
    "a grey image": ({"image-size"}, picture("single", lambda _: jpeg("L", (336, 336)))),
    "another size in the JSON": ({"image-size"}, in_image("single", 0, width=335)),
    "an image cut short": ({"image-undecodable"}, picture("single", lambda data: data[:-30])),
    "no image at all": ({"image-undecodable"}, picture("single", lambda data: b"GIF89a" + data)),
    "an empty image": ({"image-undecodable"}, picture("single", lambda data: b"")),
    "an image under another number": ({"image-file"}, in_image("multi", 1, file="0002.jpg")),
    "a member too few": ({"image-count"}, lambda p: p.entry("multi").images.pop()),
    "a member too many": ({"image-count"}, lambda p: p.entry("multi").images.append(p.pictures[0])),
    # Protocol
    "an image without a placeholder": ({"placeholder-count"}, one_more_image),
    "a placeholder without an image": ({"placeholder-count"}, in_text("chat", 0, "kind", IMAGE)),
    "a frame too few": ({"placeholder-count"}, in_text("video", 0, "</vid>", f"<t>{IMAGE}</vid>")),
    "a placeholder without tags": ({"protocol-syntax"}, in_text("single", 0, IMAGE, "<image>")),
    "tags without a placeholder": ({"protocol-syntax"}, in_text("chat", 0, "kind", "<img></img>")),
    "a forged video": ({"protocol-syntax"}, in_text("single", 1, "cat", "<vid>cat</vid>")),
    "an image in video tags": ({"image-role"}, in_text("single", 0, IMAGE, f"<vid>{IMAGE}</vid>")),
    "frames without video tags": (
        {"image-role"},
        in_text("clips", 0, f"</vid>\n<vid>{IMAGE}<t>{IMAGE}</vid>", f"</vid>{IMAGE}{IMAGE}"),
    ),
    "a video that is not closed": ({"protocol-syntax", "image-role"}, in_text("video", 0, "</vid>", "")),
    "frames without a <t>": ({"protocol-syntax", "image-role"}, in_text("video", 0, "<t>", "")),
    "a <t> alone": ({"protocol-syntax"}, in_text("multi", 0, "This", "<t>")),
    "a special token": ({"control-string"}, in_text("chat", 3, "?", "<|pad|>?")),
    "a role marker": ({"control-string"}, in_text("chat", 3, "?", "<|Assistant|>")),
    "a system marker": ({"control-string"}, in_text("chat", 3, "?", "<|System|>")),
    "the image token": ({"control-string"}, in_text("chat", 3, "?", "<|reserved_0|>")),
    "frames swapped": ({"frame-order"}, swap_in_images("video", 1, 2, "time")),
    "a frame at the time of another": ({"frame-order"}, in_image("video", 1, time=0.0)),
    "a frame without its time": ({"frame-order"}, in_image("video", 1, time=None)),
    "a picture with a time": ({"image-role"}, in_image("single", 0, time=1.0)),
    "a picture in a grid": ({"image-role"}, in_image("single", 0, tile=[0, 0])),
    "tiles swapped": ({"tile-geometry"}, swap_in_images("grid", 1, 2, "tile")),
    "a tile without its place": ({"tile-geometry"}, in_image("grid", 1, tile=None)),
    "a place far outside": ({"tile-geometry"}, in_image("grid", 4, tile=[10**9, 10**9])),
    "tiles in one line": ({"tile-geometry"}, in_text("grid", 0, f"{IMAGE}{IMAGE}\n{IMAGE}{IMAGE}", IMAGE * 4)),
    "tiles for another picture": ({"tile-geometry"}, in_image("grid", 0, source_size=[500, 300])),
    "more tiles than allowed": ({"tile-geometry"}, in_recipe("tiles", max_tiles=3)),
    "a limit that was not needed": ({"tile-geometry"}, in_recipe("tiles", max_tiles=999)),
    "a tile without a main image": ({"image-role", "sample-modality"}, in_image("single", 0, role="tile", tile=[0, 0])),
    "escapes that are not there": ({"escape-count"}, in_record("escaped", escaped=2)),
    # Index
    "another id": ({"index-column", "mixture-order"}, in_row("single", id="other:0")),
    "another modality in the row": ({"index-column"}, in_row("single", modality="text")),
    "another number of turns": ({"index-column"}, in_row("chat", n_turns=4)),
    "a wrong offset": ({"index-offset"}, in_row("multi", offset=512)),
    "a wrong size": ({"index-offset"}, in_row("multi", size=512)),
    "a wrong hash": ({"index-sample-hash"}, in_row("multi", sha256="0" * 64)),
    "rows swapped": ({"index-order"}, rows(swap_rows)),
    "rows of the second shard first": ({"index-order"}, rows(shard_of_rows_too_early)),
    "a row of another shard": (
        {"index-rows", "index-order", "shard-samples"},
        in_row("multi", shard="train-000001.tar"),
    ),
    "a row of no shard": (
        {"index-rows", "index-order", "shard-samples", "mixture-totals"},
        in_row("multi", shard="train-000009.tar"),
    ),
    "a column missing": ({"index-schema"}, table(lambda t: t.drop_columns(["n_turns"]))),
    "columns in another order": ({"index-schema"}, table(lambda t: t.select([*t.schema.names[1:], "key"]))),
    "a column of another type": ({"index-schema"}, table(retype)),
    "a null": ({"index-schema"}, table(with_null)),
    # Tokens
    "another text count": ({"token-count"}, in_row("chat", n_text_tokens=1)),
    "another token count": ({"token-count"}, in_row("multi", n_tokens=1)),
    "another target count": ({"target-count"}, in_row("chat", n_target_tokens=1)),
    "tokens for an image": ({"token-count"}, in_manifest("tokenizer", "tokens_per_image", value=145)),
    "no such image token": ({"tokenizer-image-token"}, in_manifest("tokenizer", "image_token", value="<|none|>")),
    "a sample that is too long": ({"over-long"}, lambda p: p.recipe.update(sequence_length=700)),
    # Manifest
    "a manifest without a field": ({"manifest-field"}, in_manifest("index", value=None)),
    "another format": ({"manifest-field"}, in_manifest("format", value="longllava.build/2")),
    "a negative count": ({"manifest-field"}, in_manifest("totals", "images", value=-1)),
    "another recipe": ({"recipe-hash"}, in_manifest("recipe", "name", value="other")),
    "a shard's hash": ({"shard-hash"}, in_manifest("shards", 0, "sha256", value="0" * 64)),
    "a shard's length": ({"shard-size", "mixture-totals"}, in_manifest("shards", 0, "bytes", value=plus(512))),
    "a shard's samples": (
        {"shard-samples", "mixture-totals", "energon-index"},
        in_manifest("shards", 0, "samples", value=plus(1)),
    ),
    "shards in another order": (
        {"shard-gap", "index-order", "key-order"},
        in_manifest("shards", value=lambda s: s[::-1]),
    ),
    "a shard that is not listed": (
        {"shard-stray", "file-stray", "mixture-totals", "index-rows", "energon-index"},
        in_manifest("shards", value=lambda s: s[:2]),
    ),
    "index rows": ({"index-rows", "mixture-totals"}, in_manifest("index", "rows", value=plus(1))),
    "ledger rows": ({"reject-ledger", "mixture-totals"}, in_manifest("rejects", "rows", value=plus(1))),
    "a tokenizer's hash": ({"tokenizer-hash"}, in_manifest("tokenizer", "sha256", value="0" * 64)),
    # Mixture
    **{
        f"asked {name}": ({"mixture-conservation"}, in_manifest("components", "caption", name, value=plus(1)))
        for name in ("short", "drawn")
    },
    "asked": ({"mixture-conservation", "mixture-draw"}, in_manifest("components", "caption", "asked", value=plus(1))),
    "kept": (
        {"mixture-conservation", "mixture-count", "mixture-totals"},
        in_manifest("components", "caption", "kept", value=plus(1)),
    ),
    "rejected": (
        {"mixture-conservation", "mixture-totals"},
        in_manifest("components", "caption", "rejected", value=plus(1)),
    ),
    **{
        f"{name} of a component": (
            {"mixture-count", "mixture-totals"},
            in_manifest("components", "caption", name, value=plus(1)),
        )
        for name in ("images", "tokens", "target_tokens")
    },
    **{
        f"total {name}": ({"mixture-totals"}, in_manifest("totals", name, value=plus(1)))
        for name in ("samples", "images", "tokens", "target_tokens", "bytes", "rejected")
    },
    "a draw from nowhere": ({"mixture-conservation"}, in_manifest("components", "caption", "pool", value=8)),
    "a reason's count": (
        {"mixture-conservation", "reject-ledger"},
        in_manifest("components", "caption", "rejects", "too-long", value=2),
    ),
    **{
        f"{name} of a source": ({"mixture-conservation"}, in_manifest("sources", "llava15", name, value=plus(1)))
        for name in ("records", "usable", "rejected")
    },
    "a file's records": (
        {"mixture-conservation"},
        in_manifest("sources", "llava15", "files", 0, "records", value=plus(1)),
    ),
    "more than the recipe asks for": ({"mixture-conservation"}, in_recipe("caption", count=7)),
    "a component too few in the recipe": ({"mixture-components"}, component_of_the_recipe_only),
    "a component of the index only": (
        {"mixture-components", "mixture-totals", "index-column"},
        lambda p: setattr(p.entry("replayed"), "index_component", "nobody's"),
    ),
    "another source": ({"mixture-source"}, in_recipe("caption", source="allava")),
    "a record twice": ({"mixture-duplicate"}, one_record_twice),
    "a replayed record split": ({"mixture-overlap"}, replay_of_a_split_record),
    # Filters
    **{
        f"{column} that cannot be": ({"index-score"}, scored("single", **{column: value}))
        for column, value in {"repetition": 1.5, "n_words": -1, "contrast": 256, "min_bytes": -1}.items()
    },
    "half of the scores": ({"index-schema"}, table(lambda t: with_scores(t).drop_columns(["n_words"]))),
    "a score of another type": ({"index-schema"}, table(lambda t: with_scores(t, repetition=pa.string()))),
    "another side than the sample's": ({"index-column"}, scored("single", min_side=1, max_side=2, max_aspect=2.0)),
    "another shape than its largest picture's": ({"index-column"}, scored("multi", height=7)),
    "a height that cannot be": ({"index-score", "index-column"}, scored("single", height=0)),
    "a drop by nobody's filter": ({"curation-step"}, dropped(max_words=1)),
    "a picture dropped by nobody's filter": ({"curation-step"}, in_ledger(0, reason="min-side")),
    "more pictures dropped than allowed": (
        {"curation-budget"},
        together(in_ledger(0, reason="min-side"), filtered(min_side=99, max_drop=0.1)),
    ),
    "more drops than allowed": (
        {"curation-budget"},
        together(dropped(max_words=6), filtered(max_words=99, max_drop=0.2)),
    ),
    **{
        f"a sample that {step} should have dropped": (
            {"curation-kept"},
            together(scored("single", **row), filtered(**{step: value})),
        )
        for step, value, row in (
            ("min_words", 5, {"n_words": 4}),
            ("max_repetition", 0.3, {"repetition": 0.5}),
            ("max_refusals", 0, {"n_refusals": 1}),
            ("min_contrast", 8, {"contrast": 7}),
            ("drop_flags", ["toxic"], {"flags": ["toxic"]}),
            ("answer_languages", ["en"], {"answer_language": "fr"}),
            ("same_language", True, {"language_mismatch": True}),
        )
    },
    # Ledger
    "an unknown reason": ({"ledger-row"}, in_ledger(0, reason="dog-ate-it")),
    "a component that is not there": (
        {"ledger-row", "reject-ledger", "reject-replacement", "mixture-totals"},
        in_ledger(0, component="nobody's"),
    ),
    "a reject without its uid": ({"ledger-row", "reject-ledger"}, lambda p: p.ledger[0].pop("uid")),
    "a thumbnail that is no JPEG": ({"ledger-row", "reject-ledger"}, in_ledger(0, thumbnail="PHNjcmlwdD4=")),
    "a thumbnail that is no thumbnail": (
        {"ledger-row", "reject-ledger"},
        in_ledger(0, thumbnail="/9j/" + 12_000 * "A"),
    ),
    "a reject that was kept": ({"reject-kept"}, lambda p: p.ledger[0].update(uid=p.entry("single").record["id"])),
    "a replacement that is not there": ({"reject-replacement"}, in_ledger(0, replaced_by="nobody:0")),
    "a replacement of another component": (
        {"reject-replacement"},
        lambda p: p.ledger[0].update(replaced_by=p.entry("grid").record["id"]),
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_told_apart_from_every_other(name, plan, tmp_path):
    expected, change = LIES[name]
    change(plan)
    found = validate(str(plan.write(tmp_path / "build")))
    assert set(summary(found)) == expected, found
