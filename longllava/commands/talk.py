"""Commands that run a model: generate, chat and convert."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from formats.errors import LongLlavaError, UsageError
from longllava.commands.terminal import print_json, stderr, stdout

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Folder of a saved model, such as OUT/final of a training.", show_default=False)
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer, if it is not with the model.")
]
Int8Option = Annotated[bool, typer.Option("--int8", help="Hold the language model's large matrices in eight bits.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Such as cpu or cuda:1; the first GPU by default, if there is one.")
]
LongestOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer, at most.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0, help="0 takes the likeliest token; above, tokens are drawn.")
]
TopPOption = Annotated[float, typer.Option("--top-p", help="Draw among the likeliest that have this share together.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]
SystemOption = Annotated[str, typer.Option("--system", help="Said before the talk.")]
PatchOption = Annotated[bool, typer.Option("--patch", help="Cut pictures into up to 16 tiles, too, to see details.")]
FpsOption = Annotated[float | None, typer.Option("--fps", help="Frames taken of a second of video; 1 by default.")]
FramesOption = Annotated[
    int | None, typer.Option("--max-frames", min=1, help="Frames of a video, at most; 128 by default.")
]


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option("--prompt", help='What to ask; "-" reads it from stdin.')],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Picture; may be repeated. <image> in the prompt places it.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option("--video", help="Clip; may be repeated. <video> in the prompt places it.")
    ] = None,
    patch: PatchOption = False,
    fps: FpsOption = None,
    max_frames: FramesOption = None,
    system: SystemOption = "",
    max_new_tokens: LongestOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    int8: Int8Option = False,
    device: DeviceOption = None,
    tokenizer: TokenizerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Ask a model about pictures and clips; the answer is printed as it is written.

    Example: longllava generate runs/multi_image/final --image cat.jpg --image dog.jpg --prompt "Which one barks?"
    """
    needs_torch("generate")
    from model.chat import Media, question

    media = Media(image or (), video or (), patch, fps, max_frames)
    message = question(sys.stdin.read() if prompt == "-" else prompt, media)
    started = time.monotonic()
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    chat = _load(checkpoint, tokenizer, device, int8, system, options)
    loaded = time.monotonic()
    answer = _ask(chat, message, None if json_output else _write)
    if json_output:
        seconds = {"load": round(loaded - started, 3), "answer": round(time.monotonic() - loaded, 3)}
        print_json({"checkpoint": str(checkpoint), **asdict(answer), "seconds": seconds})
        return
    _write("\n")
    if not answer.ended:
        stderr().print(f"cut off after {answer.tokens} tokens; --max-new-tokens allows more", style="dim")


def chat(
    checkpoint: CheckpointArgument,
    patch: PatchOption = False,
    fps: FpsOption = None,
    max_frames: FramesOption = None,
    system: SystemOption = "",
    max_new_tokens: LongestOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    int8: Int8Option = False,
    device: DeviceOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Talk with a model. Lines are questions; /image FILE, /video FILE, /reset, /help and /quit are commands.

    Example: longllava chat runs/multi_image/final --patch
    """
    needs_torch("chat")
    from longllava.talk_lines import Talk

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    loaded = _load(checkpoint, tokenizer, device, int8, system, options)

    def ask(message: Any) -> Any:
        answer = _ask(loaded, message, _write)
        _write("\n")
        return answer

    talk = Talk(
        ask=ask,
        reset=loaded.reset,
        say=_say,
        media={"patched": patch, "fps": fps, "max_frames": max_frames},
    )
    interactive = sys.stdin.isatty()
    if interactive:
        _say(talk.help)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if not talk.hear(line):
            return


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder in the authors' layout.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Where to put it; must not be there yet.")],
    vision: Annotated[
        Path | None,
        typer.Option(
            "--vision", help="Folder of the vision tower, if it is not CLIP ViT-L/14-336 or not in CHECKPOINT."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer, if it is not in CHECKPOINT.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the result: bfloat16, float16 or float32.")] = "bfloat16",
    json_output: JsonOption = False,
) -> None:
    """Bring a checkpoint of the authors', or Jamba and a vision tower, into the layout that generate and train read.

    Example: longllava convert LongLLaVA-9B --out longllava-9b

    Example: longllava convert Jamba-v0.1 --vision clip-vit-large-patch14-336 --out jamba
    """
    needs_torch("convert")
    import torch

    from model.convert import convert as run

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in kinds:
        raise UsageError(f"--dtype {dtype}: it can be {', '.join(kinds)}")
    config = run(checkpoint, vision, out, tokenizer=tokenizer, dtype=kinds[dtype])
    has_tokenizer = (out / "tokenizer.json").is_file()
    if json_output:
        fields = {"tokens_per_image": config.image_seq_length, "image_token_id": config.image_token_id}
        print_json({"out": str(out), "dtype": dtype, "tokenizer": has_tokenizer, **fields})
        return
    more = "" if has_tokenizer else " --tokenizer FOLDER (CHECKPOINT holds none)"
    stdout().print(f'next: longllava generate {out} --prompt "…"{more}', markup=False, highlight=False, soft_wrap=True)


def needs_torch(command: str) -> None:
    """Refuses a command that runs a model where the training extra is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise UsageError(f"`longllava {command}` needs {', '.join(missing)}: pip install 'longllava[train]'")


def _load(
    checkpoint: Path, tokenizer: Path | None, device: str | None, int8: bool, system: str, options: dict[str, Any]
) -> Any:
    from model.chat import Chat
    from model.generate import Settings
    from model.processor import Processor
    from model.saved import load_model, load_tokenizer

    try:
        settings = Settings(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model = load_model(checkpoint, device=device, int8=int8)
    processor = Processor.of(model.config, load_tokenizer(checkpoint, tokenizer))
    return Chat(model, processor, settings, system)


def _ask(chat: Any, message: Any, on_text: Callable[[str], None] | None) -> Any:
    import torch

    try:
        return chat.ask(message, on_text)
    except torch.OutOfMemoryError as error:
        raise LongLlavaError(
            f"out of GPU memory: {str(error).splitlines()[0]} Try --int8, fewer pictures, fewer --max-frames;"
            " `longllava plan-memory` says what fits"
        ) from error


def _write(text: str) -> None:
    from longllava.commands.terminal import printable

    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
