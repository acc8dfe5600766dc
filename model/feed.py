"""The feed: finished builds as packed sequences for training, the same on any number of ranks and workers.

Reads by offset and checks each sample's sha256, decodes pictures in threads into one uint8 batch, and reads ahead while
the model works. Where it stands is a few numbers (`state_dict`), good for any number of ranks.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from formats.blend import Blend, Entry, blend
from formats.errors import BuildError, DamageError, UsageError
from formats.manifest import SHARDS, TOKENIZER
from formats.tokens import IGNORED, TOKENS_PER_IMAGE, ChatTokenizer, Encoded
from model.course import Assigned, Course, Position, Reader
from model.remote import RemoteBuild, ShardCache, is_remote
from model.shards import ImageMemory, LocalShards, ReadMemory, ShardReader, ShardSource, decode, members

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_SAMPLES, _IMAGES = 8, 32  # a thread makes so many samples in one go, or fewer with so many images


@dataclass(frozen=True, repr=False)
class PackedSequence:
    """A training sequence: whole samples, one after another.

    Attributes:
        input_ids: int64[tokens]; an image is 144 times the image token.
        labels: int64[tokens], not shifted; -100 outside of answers and their ends.
        images: uint8[n, 336, 336, 3], RGB, in the order of their tokens; `pixel_values` makes them the model's input.
        image_positions: int64[n], where each image's 144 tokens start.
        cu_seqlens: int32[samples + 1], where samples start, and where the last ends.
        sources: int64[samples], each sample's source as its place in `Feed.sources`.
        rows: int64[samples], each sample's line in the builds' indexes one after another; -1 in a filler.
        epoch: and `sequence`, its number in the epoch: the same for any number of readers.
        filler: whether it only evens out the last round of ranks: one token, no labels, to be counted as nothing.
        damaged: samples that were left out because they are damaged, in words.
        state: where a run goes on that has read this sequence, and the other ranks theirs of this round.
    """

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    image_positions: Tensor
    cu_seqlens: Tensor
    sources: Tensor
    rows: Tensor
    epoch: int
    sequence: int
    filler: bool
    damaged: tuple[str, ...]
    state: dict[str, Any]

    @property
    def token_sources(self) -> Tensor:
        """int64[tokens]: each token's source."""
        return self.sources.repeat_interleave(self.cu_seqlens.diff())

    def __repr__(self) -> str:
        sizes = f"{len(self.input_ids):,} tokens, {len(self.images):,} images, {len(self.rows):,} samples"
        return f"<sequence {self.sequence:,} of epoch {self.epoch}: {sizes}{', filler' if self.filler else ''}>"

    def pin_memory(self) -> "PackedSequence":
        """With its tensors in page-locked memory; torch's DataLoader calls it."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedSequence":
        """With its tensors on a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _mapped(self, change: Any) -> "PackedSequence":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})


def pixel_values(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalises images as CLIP wants them, on the device where they are.

    Args:
        images: uint8[n, 336, 336, 3].

    Returns:
        dtype[n, 3, 336, 336], in channels-last memory.
    """
    mean = torch.tensor(_CLIP_MEAN, device=images.device) * 255
    scale = 1 / (torch.tensor(_CLIP_DEVIATION, device=images.device) * 255)
    return ((images.float() - mean) * scale).to(dtype).permute(0, 3, 1, 2)


class Feed(IterableDataset[PackedSequence]):
    """Builds as a stream of packed sequences.

    One iteration goes through all epochs, from the start or from where a loaded state says. It works by itself, in
    torch's DataLoader (`batch_size=None`) and in torchdata's StatefulDataLoader, with any number of workers; threads
    do the work, so that no worker is needed.

    Args:
        builds: directories of finished builds, or their fsspec URLs.
        weights: how often an epoch goes through each build; once by default.
        sequence_length: most tokens of a sequence; that of the longest recipe by default.
        seed: of the order.
        max_images: most images of a sequence, if bounded.
        oversize: whether samples that fit in no sequence are refused, or left out.
        epochs: how many; without end if None.
        rank: of this process, and `world_size`, the number of all.
        last: the stream may end within a round of ranks; then those without a sequence get a filler, or nothing.
        threads: that read and decode.
        prefetch: sequences that are made ahead; each holds up to 338,688 bytes an image.
        on_damage: whether a damaged sample is an error, or is left out and told in `PackedSequence.damaged`.
        tokenizer: folder of the model's tokenizer, to refuse builds that were counted with another.
        cache: folder for copies of remote builds, and `cache_bytes`, the most that their shards may take there.

    Raises:
        UsageError: if the builds cannot be read, or not together; the message says why.
    """

    def __init__(
        self,
        builds: Sequence[str | Path],
        *,
        weights: Sequence[float] | None = None,
        sequence_length: int | None = None,
        seed: int = 0,
        max_images: int | None = None,
        oversize: Literal["refuse", "drop"] = "refuse",
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
        last: Literal["fill", "stop"] = "fill",
        threads: int = 2,
        prefetch: int = 2,
        on_damage: Literal["raise", "skip"] = "raise",
        tokenizer: Path | None = None,
        cache: Path | None = None,
        cache_bytes: int = 64 << 30,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank is {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")
        if threads < 1 or prefetch < 0:
            raise UsageError(f"threads is {threads}, at least 1; prefetch is {prefetch}, at least 0")
        names = [str(build) for build in builds]
        folders, self._shards = _located(names, cache, cache_bytes)
        chosen = blend(folders, weights, sequence_length=sequence_length, seed=seed, max_images=max_images, names=names)
        if oversize == "refuse":
            chosen.refuse_oversize()
        self.blend: Blend = chosen
        self.tokenizer = _tokenizer(chosen, tokenizer)
        self.rank, self.world_size = rank, world_size
        self._fill = last == "fill"
        self._threads, self._prefetch, self._skip = threads, prefetch, on_damage == "skip"
        self._course = Course(chosen, epochs)
        self._start: tuple[Position, int] | None = None
        self._state = self._course.state(Position())

    @property
    def sources(self) -> list[str]:
        """Names of the sources by their ids in `PackedSequence.sources`."""
        return self.blend.sources

    def __len__(self) -> int:
        """How many sequences this rank gets from the start to the end; plans every epoch once.

        Raises:
            TypeError: if there is no end.
        """
        if self._course.epochs is None:
            raise TypeError("a feed without end has no length")
        total = sum(len(self.blend.epoch(epoch)) for epoch in range(self._course.epochs))
        return (total + (self.world_size - 1 if self._fill else self.world_size - 1 - self.rank)) // self.world_size

    def __iter__(self) -> Iterator[PackedSequence]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        (start, shared_by), self._start = self._start or (Position(), 1), None
        if shared_by not in (1, workers):
            raise UsageError(
                f"the state was saved by one of {shared_by} workers and cannot be loaded into {workers}; use as many,"
                f" or resume from the `state` of the last sequence that was read, which fits any number"
            )
        # A worker's own state is where its next round starts; a rank's is where the next round of all workers starts.
        place = worker.id if worker and shared_by == 1 else 0
        reader = Reader(self.rank, self.world_size, place, workers)
        with ThreadPoolExecutor(self._threads, "feed") as pool:
            kitchen = _Kitchen(self, pool)
            try:
                for assigned, sequence in kitchen.served(self._course.assigned(start, reader, fill=self._fill)):
                    self._state = self._course.state(assigned.own_following, workers)
                    yield sequence
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands: plain numbers, the same for each rank once all have read a round."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next iteration go on from a state, of a feed with any `world_size`.

        Raises:
            UsageError: if it is a position in other sequences; the message says what differs.
        """
        self._start = self._course.restored(dict(state))
        self._state = dict(state)


class _Kitchen:
    """Makes sequences in threads, a few ahead of the one that is served."""

    def __init__(self, feed: Feed, pool: ThreadPoolExecutor) -> None:
        self._feed = feed
        self._blend = feed.blend
        self._tokenizer = feed.tokenizer
        self._pool = pool
        self._reader = ShardReader(feed._shards, [part.name for part in feed.blend.parts])
        self._memory, self._read_memory = ImageMemory(), ReadMemory()

    def served(self, assigned: Iterator[Assigned]) -> Iterator[tuple[Assigned, PackedSequence]]:
        begun: deque[_Begun] = deque()
        for item in assigned:
            begun.append(self._begin(item))
            if len(begun) > self._feed._prefetch:
                yield self._finish(begun.popleft())
        while begun:
            yield self._finish(begun.popleft())

    def _begin(self, assigned: Assigned) -> "_Begun":
        entries = [self._blend.entry(int(row)) for row in assigned.rows]
        images = self._memory.images(sum(entry.images for entry in entries))
        ends = np.cumsum([entry.images for entry in entries], dtype=np.int64)
        parts = [images[end - entry.images : end] for end, entry in zip(ends, entries, strict=True)]
        made = [self._pool.submit(self._make_all, task) for task in _tasks(zip(entries, parts, strict=True))]
        return _Begun(assigned, images, parts, made)

    def _make_all(self, task: "_Task") -> list[Encoded | DamageError]:
        return [self._make(entry, images) for entry, images in task]

    def _make(self, entry: Entry, images: np.ndarray) -> Encoded | DamageError:
        """One sample: its tokens and labels; its pictures are put into `images`."""
        try:
            record, files = members(self._reader.read(entry, self._read_memory))
            name = f"{self._blend.parts[entry.build].name}: sample {entry.key} in {entry.shard}"
            if len(files) != len(images):
                raise BuildError(
                    f"{name} has {len(files)} images, but index.parquet says {len(images)}; build it again"
                )
            encoded = self._tokenizer.encode(record["conversations"])
            if len(encoded.ids) != entry.tokens:
                raise BuildError(
                    f"{name} has {len(encoded.ids):,} tokens, but index.parquet says {entry.tokens:,}: it was counted"
                    f" by another version of the tokenizer; build it again"
                )
            for file, image in zip(files, images, strict=True):
                self._decoded(name, file, image)
        except DamageError as error:
            if not self._feed._skip:
                raise
            return error
        return encoded

    def _decoded(self, name: str, file: memoryview, image: np.ndarray) -> None:
        try:
            decode(file, image)
        except (OSError, ValueError) as error:
            raise DamageError(f"{name}: an image cannot be decoded ({error}); `longllava validate --deep`") from error

    def _finish(self, begun: "_Begun") -> tuple[Assigned, PackedSequence]:
        made = [one for future in begun.made for one in future.result()]
        whole = [i for i, one in enumerate(made) if isinstance(one, Encoded)]
        images = begun.images
        if len(whole) < len(made):
            images = np.concatenate([images[:0], *(begun.parts[i] for i in whole)])
        encoded = [one for one in made if isinstance(one, Encoded)] or [self._nothing]
        rows = begun.assigned.rows[whole] if whole else np.array([-1])
        ids = np.concatenate([one.ids for one in encoded], dtype=np.int64)
        labels = np.concatenate([one.labels for one in encoded], dtype=np.int64)
        starts = np.cumsum([0, *(len(one.ids) for one in encoded)])
        at = np.flatnonzero(ids == self._tokenizer.image_token_id)[::TOKENS_PER_IMAGE]
        sequence = PackedSequence(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            images=torch.from_numpy(images),
            image_positions=torch.from_numpy(at),
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
            sources=torch.from_numpy(self._blend.source_ids[rows] if whole else np.zeros(1, np.int64)),
            rows=torch.from_numpy(rows),
            epoch=begun.assigned.position.epoch,
            sequence=begun.assigned.position.sequence,
            filler=not whole,
            damaged=tuple(str(one) for one in made if isinstance(one, DamageError)),
            state=self._feed._course.state(begun.assigned.following),
        )
        return begun.assigned, sequence

    @property
    def _nothing(self) -> Encoded:
        """What a sequence without samples reads."""
        return Encoded(np.array([self._tokenizer.eos_id], np.int32), np.array([IGNORED], np.int32))


@dataclass(frozen=True, slots=True)
class _Begun:
    """A sequence that threads are at work on."""

    assigned: Assigned
    images: np.ndarray
    parts: list[np.ndarray]
    made: "list[Future[list[Encoded | DamageError]]]"


_Task = list[tuple[Entry, np.ndarray]]


def _tasks(samples: Iterable[tuple[Entry, np.ndarray]]) -> Iterator[_Task]:
    """Samples in their order, a few at a time: handing each over by itself would cost a few per cent of its making."""
    task: _Task = []
    images = 0
    for entry, place in samples:
        task.append((entry, place))
        images += entry.images
        if len(task) == _SAMPLES or images >= _IMAGES:
            yield task
            task, images = [], 0
    if task:
        yield task


def _located(names: Sequence[str], cache: Path | None, cache_bytes: int) -> tuple[list[Path], list[ShardSource]]:
    """Where each build's manifest and index lie on this machine, and where its shards come from."""
    if cache is None and any(is_remote(name) for name in names):
        raise UsageError("builds behind a URL need a cache: say with `cache` where copies of their shards may lie")
    shards = ShardCache(cache, cache_bytes) if cache else None
    folders: list[Path] = []
    sources: list[ShardSource] = []
    for name in names:
        if shards and cache and is_remote(name):
            remote = RemoteBuild(name, cache, shards)
            folders.append(remote.fetch())
            sources.append(remote)
        else:
            folders.append(Path(name))
            sources.append(LocalShards(Path(name) / SHARDS))
    return folders, sources


def _tokenizer(blend: Blend, wanted: Path | None) -> ChatTokenizer:
    """The builds' tokenizer, which must be the model's."""
    first = blend.parts[0]
    own = ChatTokenizer(first.folder / TOKENIZER / "tokenizer.json")
    if wanted is not None and (model := ChatTokenizer.load(str(wanted))).fingerprint != own.fingerprint:
        raise UsageError(
            f"{first.name} was counted with another tokenizer ({first.manifest['tokenizer']['name']}, sha256"
            f" {own.fingerprint[:12]}) than the model's ({wanted}, sha256 {model.fingerprint[:12]}); build it again"
            f" with `tokenizer: {wanted}`"
        )
    return own
