"""Tokenizer, chat template, token counts and label spans.

The template is that of the authors' code (LongLLaVA, llava/train/train.py `preprocess_jamba`):

    <|startoftext|><|User|>\\n{question}\\n<|startoftext|><|Assistant|>\\n{answer}\\n…{answer}<|endoftext|>

Only answers and their ends are trained on. As in the authors' code, the newline after an answer that is not the last
carries the label of `<|endoftext|>`, so that the model learns to stop there too. `<|User|>` and the protocol's
strings are plain text to Jamba's tokenizer and cost several tokens each; nothing here assumes how many.
"""

import hashlib
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from formats.errors import UsageError
from formats.protocol import PLACEHOLDER, Escaper

TOKENS_PER_IMAGE = 144
"""24 x 24 patches of CLIP ViT-L/14-336, pooled 2 x 2 (paper, 3.1)."""

IMAGE_TOKEN = "<|reserved_0|>"
"""The vocabulary entry that stands for image features; one of Jamba's unused ones, so the vocabulary keeps its size."""

IGNORED = -100
"""Label of positions that are not trained on, as PyTorch's cross entropy has it."""

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_NO_LABEL = array("i", [IGNORED])
_SHORT, _MOST_KNOWN = 64, 4096  # characters of a text whose ids are kept, and how many such texts
_PREFIX = {"system": f"{BOS}<|System|>\n", "human": f"{BOS}<|User|>\n", "gpt": f"{BOS}<|Assistant|>\n"}

Conversation = Sequence[Mapping[str, str]]
"""Turns as {"from": "system" | "human" | "gpt", "value": protocol text}."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as the model reads it.

    Attributes:
        ids: int32[tokens]; each image is `image_token_id` repeated 144 times.
        labels: int32[tokens], not shifted; `IGNORED` outside of answers and their ends.
    """

    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, slots=True)
class Counts:
    """How long a conversation is, chat template included: `total` = `text` + 144 for each image."""

    text: int
    total: int
    targets: int


class ChatTokenizer:
    """A Hugging Face tokenizer with LongLLaVA's chat template.

    Args:
        file: a `tokenizer.json`. Read by the `tokenizers` library itself: transformers' `AutoTokenizer` puts a
            "▁" in front of every text of Jamba's tokenizer and so changes nearly all ids.

    Raises:
        UsageError: if it lacks the template's or the image's tokens.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        # Our threads and processes tokenise one text each; a pool of threads in each of them would be in the way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._required_id(BOS)
        self.eos_id = self._required_id(EOS)
        self.image_token_id = self._required_id(IMAGE_TOKEN)
        self._eos = array("i", [self.eos_id])
        self._known: dict[str, array[int]] = {}

    @classmethod
    def load(cls, name: str, relative_to: Path | None = None) -> "ChatTokenizer":
        """Finds a tokenizer by folder (looked up from `relative_to` too) or by Hugging Face hub id.

        Raises:
            UsageError: if it is neither; the message says how to get it.
        """
        for folder in (Path(name), (relative_to or Path()) / name):
            if (folder / "tokenizer.json").is_file():
                return cls(folder / "tokenizer.json")
        return cls(_from_hub(name))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    @cached_property
    def escaper(self) -> Escaper:
        """Makes text harmless that spells the protocol's or this tokenizer's control strings."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return Escaper([IMAGE_TOKEN, *(token.content for token in added if token.special)])

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are, special ones included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def copy_to(self, folder: Path) -> None:
        """Copies the tokenizer's files, so that what was counted with it can be recounted."""
        if folder.resolve() == self.file.parent.resolve():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source := self.file.with_name(name)).is_file():
                shutil.copyfile(source, folder / name)

    def encode(self, conversation: Conversation, tokens_per_image: int = TOKENS_PER_IMAGE) -> Encoded:
        """Turns a conversation into token ids and labels."""
        ids, labels = array("i"), array("i")  # C's int: four bytes
        image = array("i", [self.image_token_id]) * tokens_per_image

        def add(tokens: "array[int]", targets: "array[int] | None" = None) -> None:
            ids.extend(tokens)
            labels.extend(targets or _NO_LABEL * len(tokens))

        for i, turn in enumerate(conversation):
            answer = turn["from"] == "gpt"
            add(self._ids(_PREFIX[turn["from"]]))
            for n, piece in enumerate(turn["value"].split(PLACEHOLDER)):
                if n:
                    add(image)
                tokens = self._ids(piece)
                add(tokens, tokens if answer else None)
            end = self._eos if answer and i == len(conversation) - 1 else self._ids("\n")
            add(end, self._eos + _NO_LABEL * (len(end) - 1) if answer else None)
        return Encoded(np.asarray(ids, np.int32), np.asarray(labels, np.int32))

    def piece(self, token_id: int) -> str:
        """A vocabulary entry as the tokenizer writes it; empty for an id that it has not."""
        return self._tokenizer.id_to_token(token_id) or ""

    def count(self, conversation: Conversation) -> Counts:
        """Counts a conversation's tokens: the lengths of what `encode` gives."""
        encoded = self.encode(conversation)
        images = sum(turn["value"].count(PLACEHOLDER) for turn in conversation)
        total = len(encoded.ids)
        return Counts(total - images * TOKENS_PER_IMAGE, total, int((encoded.labels != IGNORED).sum()))

    def _required_id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UsageError(f"{self.file} has no token {token}; LongLLaVA needs Jamba's tokenizer or one like it")
        return found

    def _ids(self, text: str) -> "array[int]":
        """A text's ids, not to be changed: those of the template and of what is around images come again and again.

        `encode_batch_fast` gives the ids of `encode` without each token's place in the text, and lets go of the GIL.
        """
        if (known := self._known.get(text)) is not None:
            return known
        ids = array("i", self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        if len(text) <= _SHORT and len(self._known) < _MOST_KNOWN:
            self._known[text] = ids
        return ids


def _from_hub(name: str) -> Path:
    """Downloads a tokenizer, or finds it in the Hugging Face cache."""
    from huggingface_hub import hf_hub_download  # comes with `tokenizers`

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # the hub's client raises many kinds, network errors of several libraries among them
        raise UsageError(
            f"tokenizer: {name!r} is no folder with a tokenizer.json, and the hub did not give it"
            f" ({type(error).__name__}). With a network: `hf download {name} tokenizer.json"
            f" tokenizer_config.json --local-dir TOKENIZER`, then set `tokenizer: TOKENIZER`."
        ) from error
