"""model.shards: one sample by one read, checked, its pictures decoded exactly."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.blend import Blend, blend
from formats.errors import DamageError
from formats.shard import read_sample
from model.shards import (
    ImageMemory,
    LocalShards,
    ReadMemory,
    ShardReader,
    decode,
    members,
)


@pytest.fixture
def build(make_build, tmp_path: Path) -> Path:
    return make_build(tmp_path / "build", 20)


def reader(build: Path) -> tuple[Blend, ShardReader]:
    return blend([build]), ShardReader([LocalShards(build / "shards")], ["noise"])


def test_samples_are_what_the_tar_library_reads(build: Path) -> None:
    chosen, shards = reader(build)
    for row in range(20):
        entry = chosen.entry(row)
        record, images = members(shards.read(entry))
        with (build / "shards" / entry.shard).open("rb") as file:
            assert read_sample(file, entry.offset, entry.size) == (entry.key, record, [bytes(i) for i in images])


@pytest.mark.parametrize("at", [0, 130, 600, -1])
def test_a_flipped_bit_anywhere_in_a_sample_is_an_error_that_names_it(build: Path, at: int) -> None:
    chosen, shards = reader(build)
    entry = chosen.entry(8)
    path = build / "shards" / entry.shard
    data = bytearray(path.read_bytes())
    data[entry.offset + at % entry.size] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        DamageError, match=rf"^noise: sample {entry.key} in {entry.shard} at byte {entry.offset:,} is d"
    ):
        shards.read(entry)
    assert len(shards.read(chosen.entry(9))) == chosen.entry(9).size


def test_a_cut_and_a_missing_shard_are_errors(build: Path) -> None:
    chosen, shards = reader(build)
    entry = chosen.entry(8)
    path = build / "shards" / entry.shard
    path.write_bytes(path.read_bytes()[: entry.offset + entry.size - 1])
    with pytest.raises(DamageError, match="the shard ends before it"):
        shards.read(entry)
    (build / "shards" / chosen.entry(0).shard).unlink()
    with pytest.raises(DamageError, match=r"shard train-000000\.tar cannot be read"):
        shards.read(chosen.entry(0))


def test_a_thread_reads_into_the_same_memory_again_and_no_other_thread_does(build: Path) -> None:
    chosen, shards = reader(build)
    memory = ReadMemory()
    entries = sorted(map(chosen.entry, range(20)), key=lambda entry: -entry.size)
    places = set()
    for entry in entries:
        data = shards.read(entry, memory)
        assert data == shards.read(entry)
        places.add(np.asarray(data).ctypes.data)
    assert len(places) == 1
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(shards.read, entries[0], memory).result()
    assert np.asarray(other).ctypes.data not in places
    assert data == shards.read(entries[-1])


def test_what_memory_held_before_does_not_complete_a_sample_that_is_cut(build: Path) -> None:
    chosen, shards = reader(build)
    memory = ReadMemory()
    entry = chosen.entry(8)
    shards.read(entry, memory)
    path = build / "shards" / entry.shard
    path.write_bytes(path.read_bytes()[: entry.offset + entry.size - 512])
    with pytest.raises(DamageError, match="the shard ends before it"):
        shards.read(entry, memory)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [60, 95])
def test_pictures_decode_to_pillows_pixels(quality: int, subsampling: int) -> None:
    noise = np.random.default_rng(quality).integers(0, 256, (42, 42, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((336, 336)).save(file, "JPEG", quality=quality, subsampling=subsampling)
    pixels = np.zeros((336, 336, 3), np.uint8)
    decode(memoryview(file.getvalue()), pixels)
    with Image.open(file) as picture:
        assert np.array_equal(pixels, np.asarray(picture))
    assert pixels.std() > 10


@pytest.mark.parametrize("size", [(336, 300), (400, 336)])
def test_a_picture_of_another_size_is_refused(size: tuple[int, int]) -> None:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "JPEG")
    with pytest.raises(ValueError, match=r"336|buffer"):
        decode(memoryview(file.getvalue()), np.zeros((336, 336, 3), np.uint8))


def test_more_shards_than_may_be_open_are_read(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.shards._OPEN_FILES", 1)
    chosen, shards = reader(build)
    for row in (0, 19, 1, 18):
        assert len(shards.read(chosen.entry(row))) == chosen.entry(row).size


def test_an_entry_of_another_sample_is_not_believed(build: Path) -> None:
    chosen, shards = reader(build)
    with pytest.raises(DamageError, match="its sha256 is not the index's"):
        shards.read(replace(chosen.entry(3), offset=chosen.entry(2).offset))


def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it() -> None:
    import torch

    memory = ImageMemory()
    first = memory.images(3)
    address = first.ctypes.data
    part = torch.from_numpy(first)[1:]
    del first
    other = memory.images(2)
    assert other.ctypes.data != address  # a slice of a tensor still shows it
    part.zero_()
    del part
    assert memory.images(3).ctypes.data == address


def test_memory_does_not_grow_with_the_sizes_that_have_been() -> None:
    memory = ImageMemory()
    for n in range(1, 20):
        assert memory.images(n).shape == (n, 336, 336, 3)
    assert len(memory._free) == 1


def test_a_block_serves_sequences_of_a_few_images_more() -> None:
    memory = ImageMemory()
    address = memory.images(70).ctypes.data
    assert memory.images(100).ctypes.data == address
