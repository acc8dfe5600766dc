"""generate, chat and convert, run as users run them: in one process, because loading torch takes seconds."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from formats.errors import UsageError
from longllava.cli import app
from longllava.commands.talk import needs_torch
from longllava.talk_lines import Talk


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny model with random weights, and its tokenizer."""
    import torch

    from formats.tokens import ChatTokenizer
    from model.config import LongLlavaConfig, named_config
    from model.longllava import LongLlavaForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = ChatTokenizer.load(str(tokenizer_folder))
    fields = named_config("tiny").to_dict() | {"image_token_id": tokenizer.image_token_id}
    fields["text_config"] |= {"vocab_size": tokenizer.vocabulary_size, "num_hidden_layers": 2, "attn_layer_offset": 1}
    fields["text_config"] |= {"attn_layer_period": 2}
    folder = tmp_path_factory.mktemp("checkpoint")
    LongLlavaForConditionalGeneration(LongLlavaConfig(**fields)).save_pretrained(folder)
    tokenizer.copy_to(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "a red one.png"
    Image.new("RGB", (500, 300), "red").save(file)
    return file


@pytest.fixture
def run() -> Callable[..., Result]:
    def run(*arguments: object, said: str = "") -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=said)

    return run


def test_an_answer_about_pictures_and_clips_is_one_json_document(
    run: Callable[..., Result], checkpoint: Path, picture: Path
) -> None:
    shown = ("--image", picture, "--image", picture, "--video", picture)
    result = run("generate", checkpoint, "--prompt", "Are <image> and <image> alike?", *shown, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["images"] == 3
    assert 3 * 144 < answer["prompt_tokens"] < 3 * 144 + 120
    assert answer["tokens"] <= 256


def test_an_answer_is_what_json_says_it_is(run: Callable[..., Result], checkpoint: Path, picture: Path) -> None:
    line = ("generate", checkpoint, "--image", picture, "--patch", "--max-new-tokens", 9, "--int8")
    told = json.loads(run(*line, "--prompt", "What?", "--json").stdout)
    result = run(*line, "--prompt", "-", said="What?")
    assert told["images"] == 1 + 2
    assert result.stdout.rstrip("\n") == "".join(
        c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in told["text"]
    )
    assert ("cut off after 9 tokens" in result.stderr) == (not told["ended"])


def test_a_mistake_ends_with_code_2_and_words(checkpoint: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "longllava", "generate", str(tmp_path / "absent"), "--prompt", "a"]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "absent: no such folder; give a folder that" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--image", "absent.png"], "absent.png: no such file"),
        (["--image", __file__], "test_talk.py: not an image"),
        (["--video", __file__], "test_talk.py: not a video"),
        (["--prompt", "<image>"], "1 <image>, but 0 of --image"),
        (["--top-p", "3"], "top_p is in"),
        (["--device", "toaster"], "--device toaster"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    run: Callable[..., Result], checkpoint: Path, arguments: list[str], complaint: str
) -> None:
    result = run("generate", checkpoint, "--prompt", "a", *arguments)
    assert isinstance(result.exception, UsageError)
    assert complaint in str(result.exception)


def test_a_talk_reads_lines_until_it_is_told_to_stop(
    run: Callable[..., Result], checkpoint: Path, picture: Path
) -> None:
    lines = [f"/image '{picture}'", "What is <image>?", "And now?", "/reset", "Hello <image>", "/quit", "never read"]
    result = run("chat", checkpoint, "--max-new-tokens", 3, said="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert f"{picture}: shown with your next question" in result.stderr
    assert "forgotten" in result.stderr
    assert "error: the prompt has 1 <image>" in result.stderr
    assert result.stdout.count("\n") >= 2


class Heard:
    """A talk whose questions and words are kept."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.said: list[str] = []
        self.resets = 0
        self.talk = Talk(self._ask, self._reset, self.said.append, {"patched": False})

    def _ask(self, message: Any) -> Any:
        self.asked.append(message)
        return SimpleNamespace(ended=True)

    def _reset(self) -> None:
        self.resets += 1


def test_pictures_are_shown_with_the_next_question_only(picture: Path) -> None:
    heard = Heard()
    for line in (f"/image '{picture}' '{picture}'", "first", "second", "   "):
        assert heard.talk.hear(line)
    kinds = [[part["type"] for part in message["content"]] for message in heard.asked]
    assert kinds == [["image", "text", "image", "text", "text"], ["text"]]


def test_a_reset_forgets_pictures_that_were_not_asked_about(picture: Path) -> None:
    heard = Heard()
    for line in (f"/video '{picture}'", "/reset", "first"):
        heard.talk.hear(line)
    assert heard.resets == 1
    assert [part["type"] for part in heard.asked[0]["content"]] == ["text"]


@pytest.mark.parametrize("line", ["/image", "/foo", "/image 'open", "/image absent.png", "a <video>"])
def test_a_line_that_cannot_be_done_is_said_and_the_talk_goes_on(line: str) -> None:
    heard = Heard()
    assert heard.talk.hear(line)
    assert heard.asked == []
    assert len(heard.said) == 1
    assert not heard.talk.hear("/quit")


def test_without_torch_a_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(UsageError, match=r"`longllava chat` needs torch: pip install 'longllava\[train\]'"):
        needs_torch("chat")


def test_a_converted_checkpoint_answers(
    run: Callable[..., Result], shared: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    shutil.copy(shared / "parity/config_upstream.json", source / "config.json")
    shutil.copy(shared / "parity/weights_upstream_names.safetensors", source / "model.safetensors")
    options = ("--vision", shared / "parity/clip_tiny", "--tokenizer", tokenizer_folder, "--dtype", "float32")
    result = run("convert", source, *options, "--out", tmp_path / "ours", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["tokens_per_image"] == 144
    asked = run("generate", tmp_path / "ours", "--prompt", "a", "--max-new-tokens", 2, "--json")
    assert json.loads(asked.stdout)["tokens"] in (1, 2)
    again = run("convert", source, *options, "--out", tmp_path / "ours")
    assert "is there already" in str(again.exception)
    assert "--dtype int4: it can be bfloat16" in str(run("convert", source, "--out", "x", "--dtype", "int4").exception)
