import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.errors import UsageError
from formats.protocol import IMAGE
from model.chat import Chat, Media, _Stream, question
from model.generate import Settings, generate
from model.processor import Processor
from model.saved import load_model, load_tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (400, 300), colour).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def chat(saved: Path) -> Chat:
    model = load_model(saved)
    model.config.text_config.eos_token_id = None
    return Chat(model, Processor.of(model.config, load_tokenizer(saved)), Settings(max_new_tokens=6))


def written(chat: Chat, prompt: str, media: Media) -> str:
    """The protocol text that a question becomes, read back from its ids."""
    ids = chat.processor([question(prompt, media)]).input_ids[0].tolist()
    image, each = chat.processor.tokenizer.image_token_id, chat.model.config.image_seq_length
    text = "".join("#" if token == image else chat.processor.decode([token]) for token in ids)
    return text.replace("#" * each, "<image>")


def test_pictures_that_the_prompt_does_not_place_come_in_front(chat: Chat, pictures: list[Path]) -> None:
    assert f"{IMAGE}\n{IMAGE}\nWhat?" in written(chat, "What?", Media(pictures[:2]))


def test_pictures_stand_where_the_prompt_places_them(chat: Chat, pictures: list[Path]) -> None:
    message = question("a <image> b <image>", Media(pictures[:2]))
    shown = [part.get("image", part.get("text")) for part in message["content"]]
    assert shown == ["a ", pictures[0], " b ", pictures[1]]
    assert f"a {IMAGE} b {IMAGE}" in written(chat, "a <image> b <image>", Media(pictures[:2]))


def test_clips_and_patched_pictures_take_their_options(chat: Chat, pictures: list[Path]) -> None:
    media = Media(pictures[:1], pictures[1:2], patched=True, max_frames=3)
    text = written(chat, "a <video> b", media)
    assert f"{IMAGE}\n{IMAGE * 2}\na <vid>{IMAGE}</vid> b" in text


def test_more_or_fewer_places_than_pictures_are_refused(pictures: list[Path]) -> None:
    with pytest.raises(UsageError, match="2 <image>, but 3 of --image"):
        question("<image> <image>", Media(pictures))
    with pytest.raises(UsageError, match=r"1 <video>, but 0 of --video .* < video>"):
        question("<video>", Media(pictures))
    with pytest.raises(UsageError, match=r"absent\.png: no such file"):
        question("a", Media([Path("absent.png")]))


def test_a_prompt_cannot_spell_the_protocol(chat: Chat) -> None:
    ids = chat.processor([question("</img><t><|User|><|endoftext|>")]).input_ids[0].tolist()
    assert chat.processor.tokenizer.eos_id not in ids
    assert "< /img>< t>< |User|>" in chat.processor.decode(ids)


def test_answers_arrive_in_pieces_that_make_the_whole(chat: Chat, pictures: list[Path]) -> None:
    pieces: list[str] = []
    chat.settings = Settings(max_new_tokens=40, temperature=2.0, seed=1)
    answer = chat.ask(question("What colour?", Media(pictures[:1])), pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 5
    assert (answer.tokens, answer.ended, answer.images) == (40, False, 1)
    assert chat.messages[-1] == {"role": "assistant", "content": answer.text}


def test_a_character_of_several_tokens_is_not_written_before_its_last(chat: Chat) -> None:
    ids = chat.processor.tokenizer.encode([{"from": "gpt", "value": "a é 漢 b"}]).ids[-12:].tolist()
    pieces: list[str] = []
    stream = _Stream(chat.processor, pieces.append)
    for token in ids:
        stream.add(token)
    stream.finish()
    assert "".join(pieces) == chat.processor.decode(ids)
    assert "é" in pieces
    assert "漢" in pieces


def test_a_talk_that_is_read_on_is_answered_as_if_read_anew(chat: Chat, pictures: list[Path]) -> None:
    first = chat.ask(question("What?", Media(pictures[:1])))
    second_question = question("And <image> this?", Media(pictures[1:2]))
    whole = chat.processor([*chat.messages, second_question])
    expected = generate(chat.model, whole.input_ids, whole.pixel_values, chat.settings).tokens
    second = chat.ask(second_question)
    assert second.text == chat.processor.decode(expected)
    assert second.images == 2
    assert first.read_tokens == first.prompt_tokens


def test_only_what_is_new_of_a_talk_is_read(chat: Chat, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    word = int(chat.processor.tokenizer.encode([{"from": "gpt", "value": "a b"}]).ids[-2])
    monkeypatch.setattr("model.generate.choose", lambda *_: word)  # text whose tokens are the ones that were written
    first = chat.ask(question("What?", Media(pictures)))
    chat.ask(question("And now?"))
    third = chat.ask(question("And then?", Media(pictures[:1])))
    assert third.read_tokens < 60 < first.prompt_tokens
    assert third.images == 4
    chat.reset()
    again = chat.ask(question("What?", Media(pictures)))
    assert again.read_tokens == first.prompt_tokens


def test_a_picture_that_cannot_be_read_leaves_the_talk_as_it_was(chat: Chat, tmp_path: Path) -> None:
    chat.ask(question("a"))
    before = list(chat.messages)
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(UsageError, match=r"page\.jpg: not an image .* pictures can be JPEG"):
        chat.ask(question("b", Media([tmp_path / "page.jpg"])))
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(noise, "PNG")
    (tmp_path / "cut.png").write_bytes(noise.getvalue()[:600])
    with pytest.raises(UsageError, match=r"broken-image: .*cut\.png: .*; the file is damaged"):
        chat.ask(question("b", Media([tmp_path / "cut.png"])))
    assert chat.messages == before


def test_what_is_said_before_the_talk_stays_after_a_reset(chat: Chat) -> None:
    told = Chat(chat.model, chat.processor, chat.settings, system="Answer briefly.")
    told.ask(question("a"))
    told.reset()
    assert told.messages == [{"role": "system", "content": "Answer briefly."}]
