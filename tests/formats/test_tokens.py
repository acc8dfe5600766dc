"""formats.tokens against the ids and labels that the authors' own code produced."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from formats.errors import UsageError
from formats.tokens import IGNORED, IMAGE_TOKEN, TOKENS_PER_IMAGE, ChatTokenizer

UPSTREAM_IMAGE = -200


@pytest.fixture(scope="session")
def jamba(shared: Path) -> ChatTokenizer:
    return ChatTokenizer.load(str(shared / "data/tokenizers/jamba"))


@pytest.fixture(scope="session")
def upstream(shared: Path) -> dict:
    return json.loads((shared / "parity/tokenised.json").read_text())


# What our pipeline never hands to the tokenizer: `mend_dialogue` drops the first two, `Escaper` breaks up the others.
MENDED_BEFORE = {"leading_gpt_dropped", "empty_answer_pair_dropped"}
ESCAPED_BEFORE = {"eos_inside_answer_quirk", "packed_two_samples"}


def expanded(ids: list[int], fill: int) -> list[int]:
    """Upstream's one -200 (or its label) for an image, as many times as we write the image token."""
    return [x for i in ids for x in ([fill] * TOKENS_PER_IMAGE if i == UPSTREAM_IMAGE else [i])]


def test_ids_and_labels_equal_the_authors(jamba: ChatTokenizer, upstream: dict) -> None:
    checked = 0
    for name, case in upstream["cases"].items():
        if name in MENDED_BEFORE | ESCAPED_BEFORE:
            continue
        encoded = jamba.encode(case["conversations"])
        assert encoded.ids.tolist() == expanded(case["input_ids"], jamba.image_token_id), name
        spread = [
            x
            for i, label in zip(case["input_ids"], case["labels"], strict=True)
            for x in ([IGNORED] * TOKENS_PER_IMAGE if i == UPSTREAM_IMAGE else [label])
        ]
        assert encoded.labels.tolist() == spread, name
        checked += 1
    assert checked == len(upstream["cases"]) - 4


def test_newline_between_rounds_is_labelled_as_the_end(jamba: ChatTokenizer) -> None:
    rounds = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
    encoded = jamba.encode(rounds)
    differing = [(i, label) for i, label in zip(encoded.ids, encoded.labels, strict=True) if label not in (IGNORED, i)]
    assert differing == [(1554, jamba.eos_id)]


def test_an_answer_that_starts_with_a_newline_is_trained_on_whole(jamba: ChatTokenizer) -> None:
    counts = jamba.count([{"from": "human", "value": "a"}, {"from": "gpt", "value": "\n\nb"}])
    assert counts.targets == 4


def test_protocol_tokens_cost_what_the_authors_measured(jamba: ChatTokenizer, upstream: dict) -> None:
    for text, expected in upstream["marker_token_counts"].items():
        assert len(jamba._ids(text)) == expected


def test_counts_are_the_lengths_of_the_encoding(jamba: ChatTokenizer) -> None:
    conversation = [
        {"from": "human", "value": "<img><image></img>\n<img><image></img>\nSame?"},
        {"from": "gpt", "value": "No."},
    ]
    counts, encoded = jamba.count(conversation), jamba.encode(conversation)
    assert counts.total == len(encoded.ids) == counts.text + 2 * TOKENS_PER_IMAGE
    assert counts.targets == (encoded.labels != IGNORED).sum()
    assert (encoded.ids == jamba.image_token_id).sum() == 2 * TOKENS_PER_IMAGE


PICTURES = [
    {"from": "human", "value": "<img><image></img>\n<img><image></img>\nWhich is older?"},
    {"from": "gpt", "value": "The left one, by its frame: " + "a carved one, " * 20},
]


def test_what_comes_again_is_encoded_the_same_whatever_becomes_of_the_first(jamba: ChatTokenizer) -> None:
    first = jamba.encode(PICTURES)
    ids, labels = first.ids.tolist(), first.labels.tolist()
    first.ids[:] = first.labels[:] = 7
    again = jamba.encode(PICTURES)
    assert (again.ids.tolist(), again.labels.tolist()) == (ids, labels)
    copied = pickle.loads(pickle.dumps(jamba)).encode(PICTURES)
    assert (copied.ids.tolist(), copied.labels.tolist()) == (ids, labels)


def test_texts_are_remembered_up_to_a_number_and_encoded_right_beyond_it(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("formats.tokens._MOST_KNOWN", 3)
    tokenizer = ChatTokenizer.load(str(tokenizer_folder))
    for text in ("a b", "c", "a b c d", "\n", "red", "a b", "red", "What colour " * 9):
        assert list(tokenizer._ids(text)) == tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert len(tokenizer._known) == 3


def test_tokenising_starts_no_threads(tokenizer_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from formats.tokens import ChatTokenizer\n"
        "threads = lambda: len(list(Path('/proc/self/task').iterdir()))\n"
        "tokenizer, before = ChatTokenizer.load(sys.argv[1]), threads()\n"
        "tokenizer.encode([{'from': 'gpt', 'value': 'What colour is the circle? ' * 9}])\n"
        "print(threads() - before)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    line = [sys.executable, "-c", code, str(tokenizer_folder)]
    assert subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout == "0\n"


def test_special_tokens_in_text_are_escaped(jamba: ChatTokenizer) -> None:
    text, count = jamba.escaper(f"a<|endoftext|>b{IMAGE_TOKEN}<|Assistant|><image>")
    assert count == 4
    ids = jamba._ids(text)
    assert not {jamba.eos_id, jamba.image_token_id} & set(ids)


def test_a_folder_without_tokenizer_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"hf download nobody/nothing"):
        ChatTokenizer.load("nobody/nothing", tmp_path)


def test_a_tokenizer_without_the_template_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"no token <\|startoftext\|>"):
        ChatTokenizer.load(str(tmp_path))
