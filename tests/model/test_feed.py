"""model.feed: what training reads is what the builds hold, once, in the same order for everybody."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from formats.blend import Blend
from formats.errors import BuildError, DamageError, UsageError
from formats.shard import read_sample
from formats.tokens import IGNORED, ChatTokenizer
from model.feed import Feed, PackedSequence, _tasks, pixel_values

SAMPLES = (40, 17)


@pytest.fixture(scope="module")
def builds(make_build, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("feed")
    return [make_build(folder / f"b{seed}", n, seed=seed) for seed, n in enumerate(SAMPLES)]


def same(one: PackedSequence, other: PackedSequence) -> bool:
    names = ("input_ids", "labels", "images", "image_positions", "cu_seqlens", "sources", "rows")
    return (one.epoch, one.sequence) == (other.epoch, other.sequence) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


def all_same(ones: Sequence[PackedSequence], others: Sequence[PackedSequence]) -> bool:
    return len(ones) == len(others) and all(map(same, ones, others))


def sample_of(blend: Blend, row: int) -> tuple[dict, list[bytes]]:
    entry = blend.entry(row)
    with (blend.parts[entry.build].folder / "shards" / entry.shard).open("rb") as file:
        _, record, images = read_sample(file, entry.offset, entry.size)
    return record, images


def flip(build: Path, row: int, at: int = 700) -> str:
    """Flips a bit within a sample; returns its key."""
    line = pq.read_table(build / "index.parquet").slice(row, 1).to_pylist()[0]
    path = build / "shards" / line["shard"]
    data = bytearray(path.read_bytes())
    data[line["offset"] + at] ^= 1
    path.write_bytes(data)
    return line["key"]


def test_every_sample_comes_once_as_the_build_has_it(builds: list[Path], tokenizer: ChatTokenizer) -> None:
    feed = Feed(builds, seed=3)
    rows: list[int] = []
    for sequence in feed:
        assert len(sequence.input_ids) <= 2048
        assert sequence.cu_seqlens[0] == 0
        assert sequence.cu_seqlens[-1] == len(sequence.input_ids)
        shown = 0
        for i, row in enumerate(sequence.rows.tolist()):
            start, end = sequence.cu_seqlens[i : i + 2].tolist()
            record, files = sample_of(feed.blend, row)
            encoded = tokenizer.encode(record["conversations"])
            assert sequence.input_ids[start:end].tolist() == encoded.ids.tolist()
            assert sequence.labels[start:end].tolist() == encoded.labels.tolist()
            assert feed.sources[sequence.sources[i]] == record["source"]
            assert (sequence.token_sources[start:end] == sequence.sources[i]).all()
            pixels = decoded(files)
            assert np.array_equal(sequence.images[shown : shown + len(files)].numpy(), pixels)
            places = sequence.image_positions[shown : shown + len(files)]
            assert all(start <= place and place + 144 <= end for place in places.tolist())
            shown += len(files)
        assert shown == len(sequence.images) == len(sequence.image_positions)
        for place in sequence.image_positions.tolist():
            assert (sequence.input_ids[place : place + 144] == tokenizer.image_token_id).all()
        rows += sequence.rows.tolist()
    assert Counter(rows) == Counter(range(sum(SAMPLES)))


def decoded(files: Sequence[bytes]) -> np.ndarray:
    import io

    return np.array([np.asarray(Image.open(io.BytesIO(file))) for file in files]).reshape(-1, 336, 336, 3)


def test_types_and_shapes_are_as_documented(builds: list[Path]) -> None:
    sequence = next(iter(Feed(builds)))
    assert sequence.images.dtype == torch.uint8
    assert sequence.images.shape[1:] == (336, 336, 3)
    for name in ("input_ids", "labels", "image_positions", "sources", "rows"):
        assert getattr(sequence, name).dtype == torch.int64, name
    assert sequence.cu_seqlens.dtype == torch.int32
    assert len(sequence.cu_seqlens) == len(sequence.rows) + 1 == len(sequence.sources) + 1
    json.dumps(sequence.state)  # plain values


def test_pixel_values_are_what_clips_processor_makes() -> None:
    from transformers import CLIPImageProcessor

    images = np.random.default_rng(0).integers(0, 256, (2, 336, 336, 3), dtype=np.uint8)
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    expected = torch.as_tensor(np.asarray(processor(list(images))["pixel_values"]))
    torch.testing.assert_close(pixel_values(torch.from_numpy(images)), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_ranks_together_read_what_one_reads_alone(builds: list[Path], world_size: int) -> None:
    alone = list(Feed(builds))
    ranks = [list(Feed(builds, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {-(-len(alone) // world_size)}
    together = [rank[i] for i in range(len(ranks[0])) for rank in ranks]
    assert all_same([sequence for sequence in together if not sequence.filler], alone)
    for filler in [sequence for sequence in together if sequence.filler]:
        assert (filler.labels == IGNORED).all()
        assert len(filler.images) == 0


def test_ranks_without_a_sequence_may_stop_earlier(builds: list[Path]) -> None:
    feeds = [Feed(builds, rank=rank, world_size=64, last="stop") for rank in range(64)]
    assert [len(list(feed)) for feed in feeds] == [len(feed) for feed in feeds]
    assert sum(len(feed) for feed in feeds) == len(Feed(builds))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are fewer cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_the_order_of_the_main_process(builds: list[Path], workers: int) -> None:
    loader = DataLoader(Feed(builds, epochs=2), batch_size=None, num_workers=workers)
    assert all_same(list(loader), list(Feed(builds, epochs=2)))


@pytest.mark.parametrize("before", [1, 2, 5])
@pytest.mark.parametrize("after", [1, 3])
def test_a_run_goes_on_exactly_with_another_number_of_ranks(builds: list[Path], before: int, after: int) -> None:
    alone = list(Feed(builds, epochs=2))
    feeds = [Feed(builds, epochs=2, rank=rank, world_size=before) for rank in range(before)]
    iterators = [iter(feed) for feed in feeds]
    for _ in range(3):
        read = [next(iterator) for iterator in iterators]
    states = [feed.state_dict() for feed in feeds]
    assert all(state == states[0] for state in [*states, *(sequence.state for sequence in read)])
    resumed = [Feed(builds, epochs=2, rank=rank, world_size=after) for rank in range(after)]
    for feed in resumed:
        feed.load_state_dict(json.loads(json.dumps(states[0])))
    rest = [list(feed) for feed in resumed]
    together = [rank[i] for i in range(len(rest[0])) for rank in rest]
    assert all_same([sequence for sequence in together if not sequence.filler], alone[3 * before :])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
def test_a_stateful_loader_goes_on_where_it_stopped(builds: list[Path], workers: int) -> None:
    whole = list(Feed(builds))
    loader = StatefulDataLoader(Feed(builds), batch_size=None, num_workers=workers)
    iterator = iter(loader)
    read = [next(iterator) for _ in range(4)]
    state = loader.state_dict()
    resumed = StatefulDataLoader(Feed(builds), batch_size=None, num_workers=workers)
    resumed.load_state_dict(state)
    assert all_same([*read, *resumed], whole)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_loader_goes_on_from_the_state_of_the_last_sequence(builds: list[Path]) -> None:
    whole = list(Feed(builds))
    iterator = iter(DataLoader(Feed(builds), batch_size=None, num_workers=2))
    read = [next(iterator) for _ in range(3)]
    resumed = Feed(builds)
    resumed.load_state_dict(read[-1].state)
    assert all_same([*read, *DataLoader(resumed, batch_size=None, num_workers=3)], whole)


def test_one_workers_state_is_refused_by_another_number_of_workers(builds: list[Path]) -> None:
    feed = Feed(builds)
    state = {**feed.state_dict(), "workers": 3}
    feed.load_state_dict(state)
    with pytest.raises(UsageError, match="saved by one of 3 workers and cannot be loaded into 1"):
        next(iter(feed))


def test_a_state_says_where_the_reader_stands_not_what_was_read_ahead(builds: list[Path]) -> None:
    for prefetch in (0, 3):
        feed = Feed(builds, prefetch=prefetch)
        assert feed.state_dict()["sequence"] == 0
        iterator = iter(feed)
        next(iterator)
        next(iterator)
        assert feed.state_dict()["sequence"] == 2


def test_each_iteration_starts_over(builds: list[Path]) -> None:
    feed = Feed(builds)
    first = next(iter(feed))
    assert all_same([first], list(feed)[:1])


def test_a_state_of_another_mix_is_refused(builds: list[Path]) -> None:
    state = Feed(builds).state_dict()
    with pytest.raises(UsageError, match=r"seed was 0 and is 1"):
        Feed(builds, seed=1).load_state_dict(state)


def test_long_samples_are_made_by_themselves_and_short_ones_a_few_at_a_time(builds: list[Path]) -> None:
    entry = Feed(builds).blend.entry(0)
    entries = [replace(entry, images=n, size=i) for i, n in enumerate([1] * 9 + [64, 40, 20, 20, 20])]
    tasks = list(_tasks((one, np.empty(0)) for one in entries))
    assert [one.size for task in tasks for one, _ in task] == list(range(len(entries)))
    assert [len(task) for task in tasks] == [8, 2, 1, 2, 1]


def test_a_flipped_byte_stops_training_with_its_sample(builds: list[Path], tmp_path: Path) -> None:
    build = shutil.copytree(builds[0], tmp_path / "b")
    key = flip(build, 13)
    with pytest.raises(DamageError, match=rf"{build}: sample {key} in train-000001\.tar at byte .* is damaged"):
        list(Feed([build]))


@pytest.mark.parametrize("threads", [1, 3])
def test_of_several_damaged_samples_the_first_of_the_order_is_named(
    builds: list[Path], tmp_path: Path, threads: int
) -> None:
    build = shutil.copytree(builds[0], tmp_path / "b")
    order = [row for sequence in Feed([build]) for row in sequence.rows.tolist()]
    keys = [flip(build, row) for row in order[2:8]]
    with pytest.raises(DamageError, match=f"sample {keys[0]} "):
        list(Feed([build], threads=threads))


def test_what_a_user_holds_is_never_written_over(builds: list[Path]) -> None:
    held = []
    for sequence in Feed(builds, epochs=3, prefetch=1):
        held = [*held[-4:], (sequence, sequence.images.clone(), sequence.input_ids.clone())]
        assert all(torch.equal(one.images, images) for one, images, _ in held)
        assert all(torch.equal(one.input_ids, ids) for one, _, ids in held)


def test_damaged_samples_are_left_out_and_told_if_so_chosen(builds: list[Path], tmp_path: Path) -> None:
    build = shutil.copytree(builds[0], tmp_path / "b")
    keys = {flip(build, row) for row in (13, 14, 39)}
    whole, rest = list(Feed(builds[:1])), list(Feed([build], on_damage="skip"))
    assert [s.sequence for s in rest] == [s.sequence for s in whole]
    read = Counter(row for sequence in rest for row in sequence.rows.tolist())
    assert read == Counter(set(range(40)) - {13, 14, 39})
    told = [text for sequence in rest for text in sequence.damaged]
    assert {next(key for key in keys if f"sample {key} " in text) for text in told} == keys
    assert len(told) == 3
    for sequence in rest:
        assert len(sequence.images) == len(sequence.image_positions)


def test_a_sequence_of_damaged_samples_alone_is_a_filler(make_build, tmp_path: Path) -> None:
    build = make_build(tmp_path / "one", 1)
    flip(build, 0)
    (sequence,) = Feed([build], on_damage="skip")
    assert sequence.filler
    assert len(sequence.damaged) == 1
    assert sequence.rows.tolist() == [-1]


def rewrite_index(build: Path, **changes: int) -> None:
    """Changes numbers of the first sample, and the manifest's hash of the index with them."""
    from formats.manifest import file_sha256

    table = pq.read_table(build / "index.parquet")
    rows = table.to_pylist()
    rows[0].update({name: rows[0][name] + change for name, change in changes.items()})
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), build / "index.parquet")
    manifest = json.loads((build / "manifest.json").read_text())
    manifest["index"]["sha256"] = file_sha256(build / "index.parquet")
    (build / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n_tokens": 1}, "tokens, but index.parquet says"), ({"n_images": 1}, "images, but index.parquet says 1")],
)
def test_counts_that_disagree_with_the_index_are_errors(
    builds: list[Path], tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    build = shutil.copytree(builds[0], tmp_path / "b")
    rewrite_index(build, **changes)
    with pytest.raises(BuildError, match=message):
        list(Feed([build], on_damage="skip"))


def test_samples_that_fit_nowhere_are_refused_or_left_out(builds: list[Path]) -> None:
    with pytest.raises(UsageError, match="samples fit in no sequence of 600 tokens"):
        Feed(builds, sequence_length=600)
    feed = Feed(builds, sequence_length=600, oversize="drop")
    read = {row for sequence in feed for row in sequence.rows.tolist()}
    assert read == set(np.flatnonzero(feed.blend.samples.tokens <= 600).tolist())


def test_images_of_a_sequence_are_bounded_on_demand(builds: list[Path]) -> None:
    assert max(len(sequence.images) for sequence in Feed(builds)) > 7
    assert max(len(sequence.images) for sequence in Feed(builds, max_images=7)) <= 7


def test_another_models_tokenizer_is_refused(builds: list[Path], make_build, tmp_path: Path) -> None:
    assert len(Feed(builds, tokenizer=builds[0] / "tokenizer")) > 0
    other = make_build(tmp_path / "other", 3, words=["quite another"])
    with pytest.raises(UsageError, match="was counted with another tokenizer"):
        Feed(builds, tokenizer=other / "tokenizer")


@pytest.mark.parametrize("wrong", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"threads": 0}, {"prefetch": -1}])
def test_settings_that_make_no_sense_are_refused(builds: list[Path], wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is"):
        Feed(builds, **wrong)


def test_an_endless_feed_has_no_length_and_goes_past_the_first_epoch(builds: list[Path]) -> None:
    feed = Feed(builds, epochs=None)
    with pytest.raises(TypeError, match="no length"):
        len(feed)
    iterator = iter(feed)
    sequences = [next(iterator) for _ in range(len(Feed(builds)) + 1)]
    assert (sequences[-1].epoch, sequences[-1].sequence) == (1, 0)
    iterator.close()


def test_a_sequence_moves_and_prints_as_one(builds: list[Path]) -> None:
    sequence = next(iter(Feed(builds)))
    assert sequence.to("cpu").images is sequence.images
    assert sequence.to("meta").input_ids.device.type == "meta"
    assert repr(sequence).startswith("<sequence 0 of epoch 0: ")
