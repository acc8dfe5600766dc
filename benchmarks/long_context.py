"""How long a prompt fits, how fast is it read, and how fast is written after it? Needs no checkpoint.

    python benchmarks/long_context.py                                     # the paper's model in 80 GB, on a GPU
    python benchmarks/long_context.py --model tiny --images 4 --tokens 0 --write 4 --chunk 512 --device cpu

Weights are random, made on the device and quantised a layer at a time; frames are noise, each with the text that stands
around a frame of a clip. Memory is capped to `--memory`, on a CPU beyond what Python and PyTorch take themselves. Each
prompt goes through `model.generate.generate`: seconds until the first token, images encoded on the way; tokens a second
after it; the most bytes that were allocated, beside what `longllava plan-memory` counts on, its reserve left out.
Running out of memory is a result. One JSON document; each row also on stderr, as soon as it is known. Images are 7
tokens of text and 144, or 36, of their own. A CPU's bytes count what libraries touch as well.
"""

import argparse
import gc
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from transformers import CLIPVisionModel  # noqa: TID253

from model.budget import TEXT_PER_IMAGE, Shape, Weights, parse_size, plan_memory
from model.config import LongLlavaConfig, named_config
from model.generate import Settings, generate
from model.hybrid import HybridLayer, RMSNorm
from model.int8 import quantise
from model.longllava import LongLlavaForConditionalGeneration
from model.projector import Projector

T = TypeVar("T")
_FRAMES = 64
"""Distinct frames; longer clips repeat them."""


def main() -> None:
    """Measures and prints one JSON document."""
    arguments = parsed()
    device, memory = torch.device(arguments.device), parse_size(arguments.memory)
    before = cap(device, memory)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"model": arguments.model, "weights": arguments.weights, "device": name, "torch": torch.__version__}
    about |= {"memory": memory, "chunk": arguments.chunk}
    started = time.perf_counter()
    model, failure = tried(lambda: random_model(named_config(arguments.model), arguments.weights, device))
    if model is None:
        print(json.dumps(about | {"out_of_memory": failure}, indent=2))
        return
    about["made_s"] = round(time.perf_counter() - started, 2)
    held = [t for t in [*model.parameters(), *model.buffers()] if t.dtype != torch.int64]  # CLIP numbers its patches
    about["weight_bytes"] = sum(t.numel() * t.element_size() for t in held)
    tried(lambda: run(model, 8, 0, Settings(max_new_tokens=3, prefill_chunk=512)))  # kernels are loaded and compiled
    prompts = [(each, images, 0) for each in arguments.image_tokens for images in arguments.images]
    prompts += [(arguments.image_tokens[0], 0, tokens) for tokens in arguments.tokens if tokens]
    settings = Settings(max_new_tokens=arguments.write, prefill_chunk=arguments.chunk)
    rows = []
    for each, images, tokens in prompts:
        model.config.image_seq_length = each
        rows.append(measured(model, images, tokens, settings, arguments.weights, memory, before))
        print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps(about | {"prompts": rows}, indent=2))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="53b", help="53b, 9b, tiny, or a folder with a config.json")
    parser.add_argument("--weights", choices=get_args(Weights), default="int8")
    parser.add_argument("--memory", default="80GB", help="all that may be used")
    parser.add_argument("--images", type=int, nargs="*", default=[933, 1000, 2000, 4000])
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[144, 36])
    parser.add_argument("--tokens", type=int, nargs="*", default=[100_000], help="prompts of text alone")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--write", type=int, default=128, help="tokens written after each prompt, at least 2")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.write < 2:
        parser.error("--write: one token comes with the prompt, a second one is needed to tell a speed")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here; --model tiny --device cpu shows that the script works")
    return arguments


def random_model(config: LongLlavaConfig, weights: Weights, device: torch.device) -> LongLlavaForConditionalGeneration:
    """A model in bfloat16 whose large matrices are as `weights` says; no more than one layer is ever wide."""
    text, vision = config.text_config, config.vision_config
    text.eos_token_id = None  # it is to write as long as it is told
    with torch.device("meta"):
        model = LongLlavaForConditionalGeneration(config)
    language = model.model.language_model
    with bfloat16(), device:
        model.model.vision_tower = CLIPVisionModel(vision)
        model.model.multi_modal_projector = Projector(vision.hidden_size, text.hidden_size)
        language.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        language.final_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        model.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        for i in range(text.num_hidden_layers):
            layer = HybridLayer(text, i)
            if hasattr(layer, "mamba"):
                layer.mamba.A_log.data, layer.mamba.D.data = layer.mamba.A_log.data.float(), layer.mamba.D.data.float()
            for module in layer.modules():
                model._init_weights(module)
            if weights != "bf16":
                quantise(layer, linears=weights == "int8")
            language.layers[i] = layer
    model.train(False)
    return model


@contextmanager
def bfloat16() -> Iterator[None]:
    """New tensors are in bfloat16."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def prompt(model: LongLlavaForConditionalGeneration, images: int, tokens: int) -> tuple[Tensor, Tensor | None]:
    """Ids of so many frames, or of so much text, and the frames' pixels."""
    config = model.config
    if not images:
        return torch.randint(600, config.text_config.vocab_size, (1, tokens)), None
    words = torch.randint(600, config.text_config.vocab_size, (images, TEXT_PER_IMAGE))
    places = torch.full((images, config.image_seq_length), config.image_token_id)
    side = config.vision_config.image_size
    assert isinstance(side, int)
    frames = torch.randint(0, 256, (min(images, _FRAMES), 3, side, side), dtype=torch.uint8)
    ids = torch.cat([words, places], 1).flatten()[None]
    return ids, frames[torch.arange(images) % len(frames)]


def run(model: LongLlavaForConditionalGeneration, images: int, tokens: int, settings: Settings) -> dict[str, Any]:
    """Reads a prompt and writes after it."""
    ids, pixels = prompt(model, images, tokens)
    written: list[float] = []
    started = time.perf_counter()
    generate(model, ids, pixels, settings, on_token=lambda _: written.append(time.perf_counter()))
    reading, writing = written[0] - started, written[-1] - written[0]
    return {
        "prefill_s": round(reading, 3),
        "prefill_tokens_per_s": round(ids.shape[1] / reading, 1),
        "tokens_per_s": round((len(written) - 1) / writing, 2),
    }


def measured(
    model: LongLlavaForConditionalGeneration,
    images: int,
    tokens: int,
    settings: Settings,
    weights: Weights,
    memory: int,
    before: int,
) -> dict[str, Any]:
    """One prompt: what it took, or that it did not fit."""
    device = model.lm_head.weight.device
    shape = Shape.of(json.loads(model.config.to_json_string(use_diff=False)))
    length = images * (shape.image_tokens + TEXT_PER_IMAGE) or tokens
    chunk, at_once = min(settings.prefill_chunk, length), min(settings.images_at_once, images)
    plan = plan_memory(shape, memory, weights, chunk=chunk, images_at_once=at_once)
    row: dict[str, Any] = {"images": images, "image_tokens": shape.image_tokens if images else 0, "tokens": length}
    row["planned_bytes"] = plan.fixed - plan.reserve + plan.kv_per_token * (length + settings.max_new_tokens)
    reset_peak(device)
    found, failure = tried(lambda: run(model, images, tokens, settings))
    row |= {"out_of_memory": failure} if found is None else found
    row["peak_bytes"] = peak(device) - before
    if device.type == "cuda":
        row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)  # which the cap is for
    return row


def tried(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """What comes of it, or how it ran out of memory; what was held is freed."""
    result, failure = None, None
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the first; on a CPU it is a plain one
        if isinstance(error, RuntimeError) and not _is_of_memory(error):
            raise
        failure = (str(error) or "MemoryError").splitlines()[0]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result, failure


def _is_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def cap(device: torch.device, memory: int) -> int:
    """Allows so many bytes from now on, and tells how many are taken already that do not count."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
        return 0
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + memory, hard))
    return _status("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Forgets the most bytes that were held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most bytes that were held since."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a line of this process's status; Linux only."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
