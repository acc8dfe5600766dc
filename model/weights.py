"""Weights between files in Hugging Face layout and a sharded model, a tensor at a time.

Each process reads only the rows that it holds; the first writes what all together have. No process ever holds a whole
model: the 53B model's file is 103 GB.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from formats.errors import UsageError
from model.longllava import LongLlavaForConditionalGeneration

INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_FILE_BYTES = 5 << 30


def file_names(name: str, experts: int) -> list[str]:
    """The tensors of a file that make up a parameter, one below the other.

    Args:
        name: of the parameter; those of experts are many in files and one in memory.
        experts: of a layer that has some.
    """
    name = name.replace("vision_tower.vision_model.", "vision_tower.")  # older transformers wrap the tower once more
    if name.endswith(".experts.gate_up_proj"):
        layer = name.removesuffix("gate_up_proj")
        return [f"{layer}{i}.{part}_proj.weight" for i in range(experts) for part in ("gate", "up")]
    if name.endswith(".experts.down_proj"):
        layer = name.removesuffix("down_proj")
        return [f"{layer}{i}.down_proj.weight" for i in range(experts)]
    return [name]


class Folder:
    """The safetensors files of a folder, opened once.

    Raises:
        UsageError: if there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._places: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UsageError(
                f"{folder}: no *.safetensors to start from; see `longllava convert` for others' checkpoints"
            )
        for file in files:
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            except Exception as error:  # the library's own errors have no common type
                raise UsageError(f"{file}: cannot be read ({error})") from error
            self._places |= dict.fromkeys(opened.keys(), opened)
            self._files |= dict.fromkeys(opened.keys(), file)

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self, model: nn.Module, experts: int) -> None:
        """Compares names and shapes with those of a model whose experts are flat.

        Raises:
            UsageError: that lists what does not fit.
        """
        problems, seen = [], set()
        for name, parameter in model.named_parameters():
            parts = file_names(name, experts)
            shape = [parameter.shape[0] // len(parts), *parameter.shape[1:]]
            seen.update(parts)
            for part in parts:
                if part not in self._places:
                    problems.append(f"missing: {part}")
                elif (found := self._places[part].get_slice(part).get_shape()) != shape:
                    problems.append(f"shape: {part} is {found}, the model has {shape}")
        problems += [f"unknown: {name}" for name in sorted(self._places.keys() - seen)]
        if problems:
            shown = "\n  ".join(problems[:20])
            raise UsageError(f"{self.folder} does not fit the model ({len(problems)} tensors):\n  {shown}")

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored.

        Raises:
            UsageError: if that is nothing to start from.
        """
        stored = self._places[name].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UsageError(
                f"{self._files[name]}: {name} is stored as {stored}, which training cannot start from; undo the"
                f" quantisation and save the model as one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[stored]

    def rows(self, parts: list[str], start: int, stop: int) -> Iterator[Tensor]:
        """Some rows of tensors that stand one below the other."""
        at = 0
        for part in parts:
            whole = self._places[part].get_slice(part)
            length = whole.get_shape()[0]
            low, high = max(start - at, 0), min(stop - at, length)
            if low < high:
                yield whole[low:high]
            at += length


def load(model: LongLlavaForConditionalGeneration, folder: Folder) -> None:
    """Fills a sharded model's parameters, each process its own rows of them."""
    experts = model.config.text_config.num_experts
    for name, parameter in model.named_parameters():
        local, start = _own_rows(parameter)
        at = 0
        for rows in folder.rows(file_names(name, experts), start, start + len(local)):
            local[at : at + len(rows)].copy_(rows)
            at += len(rows)


@torch.no_grad()
def _own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a parameter, and where that starts in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    local = parameter.to_local().detach()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return local, offset[0]


def fill_buffers(model: LongLlavaForConditionalGeneration) -> None:
    """Gives a model that was made without memory its only buffer: the numbers of the image patches' positions."""
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise AssertionError(f"{name}: a buffer that this does not know")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


@dataclass(slots=True)
class _Writer:
    """Writes tensors into files of bounded size, and the index that says where each is."""

    folder: Path
    held: dict[str, Tensor]
    bytes: int = 0
    total: int = 0
    files: int = 0
    places: dict[str, str] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.bytes + size > _FILE_BYTES:
            self.flush()
        self.held[name] = tensor.contiguous()
        self.bytes += size
        self.total += size

    def flush(self) -> None:
        file = f"part-{self.files:05d}.safetensors"
        save_file(self.held, self.folder / file, metadata={"format": "pt"})
        self.places = (self.places or {}) | dict.fromkeys(self.held, file)
        self.held, self.bytes, self.files = {}, 0, self.files + 1

    def finish(self) -> None:
        self.flush()
        assert self.places is not None
        if self.files == 1:
            (self.folder / "part-00000.safetensors").rename(self.folder / "model.safetensors")
            return
        final = {f"part-{i:05d}": f"model-{i + 1:05d}-of-{self.files:05d}" for i in range(self.files)}
        for before, after in final.items():
            (self.folder / f"{before}.safetensors").rename(self.folder / f"{after}.safetensors")
        weights = {
            name: f"{final[file.removesuffix('.safetensors')]}.safetensors" for name, file in self.places.items()
        }
        index = {"metadata": {"total_size": self.total}, "weight_map": weights}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def export(
    model: LongLlavaForConditionalGeneration, out: Path, dtypes: Mapping[str, torch.dtype], *, write: bool
) -> None:
    """Writes a sharded model in Hugging Face layout; every process takes part, one writes.

    Args:
        model: experts flat.
        out: folder that is there.
        dtypes: what each parameter is written in, by name; as it is held if not said.
        write: whether this process writes.
    """
    writer = _Writer(out, {})
    experts = model.config.text_config.num_experts
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        if not write:
            continue
        full = full.to("cpu", dtypes.get(name, full.dtype))
        parts = file_names(name, experts)
        for part, rows in zip(parts, full.chunk(len(parts)), strict=True):
            writer.add(part, rows.clone())
    if write:
        writer.finish()
        model.config.architectures = [LongLlavaForConditionalGeneration.__name__]
        model.config.save_pretrained(out)
