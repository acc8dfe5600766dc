"""Are the token counts right? Counts them again, with the tokenizer that lies in the build.

The template is upstream's (LongLLaVA, `preprocess_jamba`): every turn is "<|startoftext|><|Role|>\\n{text}\\n", and
the last answer ends in "<|endoftext|>" instead of the newline. What is between two "<image>" is tokenised as one
string, so that text merges across turns exactly as it does in training.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from validators.findings import Check, error
from validators.folder import Folder
from validators.index import Row
from validators.manifest import Manifest
from validators.samples import Record

FILE = "tokenizer/tokenizer.json"
_NAMES = {"human": "User", "gpt": "Assistant", "system": "System"}
_PLACEHOLDER = "<image>"
_MEMORY = 4096
_SPACE = "\u2581"  # how SentencePiece writes a space; text that has it itself comes back with a space

Dialogue = Sequence[tuple[str, str]]
"""(role, text) of every turn; roles are human, gpt and system."""

Span = tuple[int, int]
"""Where an answer starts and ends, in characters of the whole text."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of one sample.

    Attributes:
        text: all tokens but the images'.
        target: what is trained on: the answers' tokens, and one more for the end of each.
        has_image_token: whether the text itself gave the image token's id.
        misspelt: what the tokens of an answer decode to, if that is not the answer and one asked; else None.
    """

    text: int
    target: int
    has_image_token: bool
    misspelt: str | None = None


class Recount:
    """Counts tokens.

    Args:
        tokenizer_json: content of a tokenizer.json.
        image_token: the vocabulary entry that stands for an image.
    """

    def __init__(self, tokenizer_json: bytes, image_token: str) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._image_id = self._tokenizer.token_to_id(image_token)
        self._known: dict[str, tuple[int, bool]] = {}

    @property
    def special_tokens(self) -> list[str]:
        """The strings that the tokenizer turns into special tokens wherever they stand."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    @property
    def has_image_token(self) -> bool:
        """Whether the image token is in the vocabulary."""
        return self._image_id is not None

    def count(self, dialogues: Sequence[Dialogue], *, decode: bool = False) -> list[Counts]:
        """Counts several samples at once, which lets the tokenizer use all cores.

        Args:
            dialogues: the samples' turns.
            decode: turn the answers' tokens back to text, too.
        """
        layouts = [_lay_out(dialogue) for dialogue in dialogues]
        chunks = [_cut(text, spans) for text, spans in layouts]
        self._learn({chunk for cut in chunks for chunk, inside in cut if not inside})
        answers = iter(self._encode([chunk for cut in chunks for chunk, inside in cut if inside]))
        counts = []
        for (_, spans), cut in zip(layouts, chunks, strict=True):
            text, target, found = 0, len(spans), False
            misspelt: str | None = None
            for chunk, inside in cut:
                if inside:
                    starts, ids = next(answers)
                    size, has_image_token = len(ids), self._image_id in ids
                    for start, end in inside:
                        mine = ids[bisect_left(starts, start) : bisect_left(starts, end)]
                        target += len(mine)
                        misspelt = misspelt or (self._misspelt(mine, chunk[start:end]) if decode else None)
                else:
                    size, has_image_token = self._known[chunk]
                text, found = text + size, found or has_image_token
            counts.append(Counts(text, target, found, misspelt))
        return counts

    def _encode(self, chunks: list[str]) -> Iterator[tuple[list[int], list[int]]]:
        """For each chunk the characters at which its tokens start, and their ids."""
        for encoding in self._tokenizer.encode_batch(chunks, add_special_tokens=False):
            yield [start for start, _ in encoding.offsets], encoding.ids

    def _misspelt(self, ids: list[int], text: str) -> str | None:
        """What tokens decode to, if that is not the text; space around it may have merged with what is beside it."""
        decoded: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        same = decoded.replace(_SPACE, " ").strip() == text.replace(_SPACE, " ").strip()
        return None if same else decoded

    def _learn(self, chunks: set[str]) -> None:
        """Counts chunks that hold no answer and remembers them: what joins two frames is the same everywhere."""
        if len(self._known) > _MEMORY:
            self._known.clear()
        ordered = sorted(chunks - self._known.keys())
        for chunk, (_, ids) in zip(ordered, self._encode(ordered), strict=True):
            self._known[chunk] = len(ids), self._image_id in ids


def _lay_out(dialogue: Dialogue) -> tuple[str, list[Span]]:
    """The whole text that the model reads, and where in it the answers are."""
    pieces: list[str] = []
    spans: list[Span] = []
    at = 0
    for number, (role, text) in enumerate(dialogue):
        head = f"<|startoftext|><|{_NAMES[role]}|>\n"
        is_end = role == "gpt" and number == len(dialogue) - 1
        piece = head + text + ("<|endoftext|>" if is_end else "\n")
        if role == "gpt":
            spans.append((at + len(head), at + len(head) + len(text)))
        pieces.append(piece)
        at += len(piece)
    return "".join(pieces), spans


def _cut(text: str, spans: list[Span]) -> list[tuple[str, list[Span]]]:
    """Splits the text at its images; with each chunk the parts of answers in it, in characters of the chunk."""
    cut: list[tuple[str, list[Span]]] = []
    at = 0
    for chunk in text.split(_PLACEHOLDER):
        end = at + len(chunk)
        inside = [(max(a, at) - at, min(b, end) - at) for a, b in spans if a < end and b > at]
        cut.append((chunk, inside))
        at = end + len(_PLACEHOLDER)
    return cut


def open_recount(folder: Folder, manifest: Manifest) -> Check[Recount]:
    """Loads the build's tokenizer.

    Raises:
        Exception: whatever reading a file that is absent or no tokenizer raises.
    """
    if folder.size(FILE) is not None and (digest := folder.sha256(FILE)) != manifest.tokenizer.sha256:
        yield error("tokenizer-hash", f"sha256 is {digest}; the manifest says {manifest.tokenizer.sha256}", file=FILE)
    recount = Recount(folder.read(FILE), manifest.tokenizer.image_token)
    if not recount.has_image_token:
        yield error("tokenizer-image-token", f"{manifest.tokenizer.image_token!r} is no token of it", file=FILE)
    return recount


@dataclass(frozen=True, slots=True)
class Counted:
    """A sample that waits for its tokens to be counted; `row` is None if the index could not be read."""

    key: str
    file: str
    record: Record
    row: Row | None


def check(recount: Recount, samples: Sequence[Counted], manifest: Manifest, *, deep: bool = False) -> Check[None]:
    """Counts some samples again and holds the counts against their rows and the sequence length.

    Args:
        recount: what counts.
        samples: some of a build.
        manifest: the build's.
        deep: decode the answers' tokens and hold them against the answers, too.
    """
    dialogues = [[(turn.role, turn.value) for turn in sample.record.conversations] for sample in samples]
    for sample, counts in zip(samples, recount.count(dialogues, decode=deep), strict=True):
        for code, detail in _check_one(sample, counts, manifest):
            yield error(code, detail, file=sample.file, key=sample.key)


def _check_one(sample: Counted, counts: Counts, manifest: Manifest) -> Iterator[tuple[str, str]]:
    images = len(sample.record.images) * manifest.tokenizer.tokens_per_image
    total, limit = counts.text + images, manifest.recipe.sequence_length
    if counts.has_image_token:
        yield "control-string", f"the text itself spells the image token {manifest.tokenizer.image_token!r}"
    if counts.misspelt is not None:
        yield "target-text", f"the tokens to be learned are those of {counts.misspelt[:80]!r}"
    if total > limit:
        yield "over-long", f"{total} tokens; the recipe allows {limit}"
    if sample.row is None:
        return
    stated = sample.row["n_text_tokens"], sample.row["n_tokens"]
    if stated != (counts.text, total):
        yield "token-count", f"(text, all) is {stated}; counted {(counts.text, total)}"
    if sample.row["n_target_tokens"] != counts.target:
        yield "target-count", f"{sample.row['n_target_tokens']}; counted {counts.target}"
