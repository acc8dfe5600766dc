"""Reading long prompts and writing after them, in bounded memory.

A prompt is read in chunks; a Mamba layer hands its state from one to the next and an attention layer its keys and
values, so that chunks give what one go gives, while activations, which take far more room than keys and values, exist
for one chunk only. Images are encoded a few at a time, just before the chunk that they stand in. Only the last
position's logits are ever computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from model.cache import HybridCache
from model.longllava import LongLlavaForConditionalGeneration


@dataclass(frozen=True, slots=True)
class Settings:
    """How to read and write.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token; above, tokens are drawn, the more evenly the higher.
        top_k: draw among the k likeliest only; 0 for all.
        top_p: draw among the likeliest that together have this probability.
        seed: of what is drawn; the same seed and prompt give the same text.
        prefill_chunk: tokens read at a time.
        images_at_once: images encoded at a time.
        eos_token_id: tokens that end a text; those of the configuration if None.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    prefill_chunk: int = 8192
    images_at_once: int = 32
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.prefill_chunk < 1 or self.images_at_once < 1:
            raise ValueError("max_new_tokens, prefill_chunk and images_at_once are at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top_k are not below 0, top_p is in (0, 1]")


_HARMLESS = {
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "repetition_penalty": 1.0,
}
"""Options of transformers' `generate` that may be given if they say what happens anyway."""


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Settings from keywords, and from those of transformers that mean the same; None is as if not given.

    Raises:
        ValueError: if there is no such option, or it cannot have that value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    draws = given.pop("do_sample", None)
    known = [field.name for field in fields(Settings)]
    for name in [name for name in given if name not in known]:
        if name not in _HARMLESS:
            raise ValueError(f"generate has no option {name}; it has {', '.join([*known, 'do_sample', *_HARMLESS])}")
        if (value := given.pop(name)) != _HARMLESS[name]:
            raise ValueError(f"generate: {name} is {value!r}; only {_HARMLESS[name]!r} is supported")
    if draws is not None:
        given["temperature"] = given.get("temperature", 1.0) if draws else 0.0
    if isinstance(ends := given.get("eos_token_id"), list):
        given["eos_token_id"] = tuple(ends)
    return Settings(**given)


@dataclass(frozen=True, slots=True)
class Generated:
    """What was written.

    Attributes:
        tokens: [new], the end-of-text token included if it came.
        scores: float32 [new, vocabulary], the logits that each token was chosen from; None unless asked for.
    """

    tokens: Tensor
    scores: Tensor | None


@torch.inference_mode()
def prefill(
    model: LongLlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    cache: HybridCache,
    settings: Settings,
) -> Tensor:
    """Reads a prompt into a cache.

    Args:
        model: it.
        input_ids: [1, length], at least one token.
        pixel_values: [images, 3, 336, 336], on any device.
        cache: with room for them.
        settings: sizes of chunks.

    Returns:
        Logits after the last token, float32 [vocabulary].

    Raises:
        ValueError: if ids and images disagree.
    """
    if input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"prefill reads one row of at least one token, not {tuple(input_ids.shape)}")
    image_id, each = model.config.image_token_id, model.config.image_seq_length
    places, given = int((input_ids == image_id).sum()), 0 if pixel_values is None else len(pixel_values)
    if places != given * each:
        raise ValueError(f"the prompt has {places} image positions, but {given} images of {each} tokens are given")
    features = _Features(model, pixel_values, settings.images_at_once)
    hidden = None
    for chunk in input_ids.split(settings.prefill_chunk, dim=1):
        embeds = model.model.embed(chunk, features.take(int((chunk == image_id).sum())))
        hidden = model.model.language_model(embeds, None, cache)
    assert hidden is not None
    logits: Tensor = model.lm_head(hidden[0, -1]).float()
    return logits


class _Features:
    """Image features in order, encoded when they are needed."""

    def __init__(self, model: LongLlavaForConditionalGeneration, pixels: Tensor | None, at_once: int) -> None:
        self._model, self._pixels, self._at_once = model, pixels, at_once
        self._next = 0
        self._ready: Tensor | None = None

    def take(self, tokens: int) -> Tensor | None:
        """The next so many rows: [tokens, hidden]."""
        if self._pixels is None or not tokens:
            return None
        while self._ready is None or len(self._ready) < tokens:
            batch = self._pixels[self._next : self._next + self._at_once]
            fresh = self._model.model.image_features(batch).flatten(0, 1)
            self._ready = fresh if self._ready is None else torch.cat([self._ready, fresh])
            self._next += len(batch)
        taken, self._ready = self._ready[:tokens], self._ready[tokens:]
        return taken


@torch.inference_mode()
def generate(
    model: LongLlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    settings: Settings | None = None,
    *,
    keep_scores: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Reads a prompt and writes until the end-of-text token or `max_new_tokens`.

    Args:
        model: it.
        input_ids: [1, length].
        pixel_values: [images, 3, 336, 336]; absent for text alone.
        settings: how.
        keep_scores: whether to return the logits.
        on_token: called with each token as it is chosen.
    """
    settings = settings or Settings()
    cache = model.new_cache(input_ids.shape[1] + settings.max_new_tokens)
    return _go_on(model, cache, input_ids, pixel_values, settings, keep_scores=keep_scores, on_token=on_token)


def _go_on(
    model: LongLlavaForConditionalGeneration,
    cache: HybridCache,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    settings: Settings,
    *,
    keep_scores: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Reads what comes next, and writes; the last token that is written is not read."""
    device = next(model.parameters()).device
    drawn = torch.Generator(device).manual_seed(settings.seed)
    logits = prefill(model, input_ids.to(device), pixel_values, cache, settings)
    tokens: list[int] = []
    scores: list[Tensor] = []
    while True:
        token = choose(logits, settings, drawn)
        tokens.append(token)
        if keep_scores:
            scores.append(logits)
        if on_token:
            on_token(token)
        if token in ends(model, settings) or len(tokens) == settings.max_new_tokens:
            return Generated(torch.tensor(tokens), torch.stack(scores) if keep_scores else None)
        step = torch.tensor([[token]], device=device)
        output = model(step, cache=cache, logits_to_keep=1)
        logits = output.logits[0, -1].float()


class Memory:
    """What a model remembers of a talk, so that the next prompt is read from where it says something new."""

    def __init__(self, model: LongLlavaForConditionalGeneration) -> None:
        self._model = model
        self._cache: HybridCache | None = None
        self._read: Tensor = torch.empty(0, dtype=torch.long)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        settings: Settings,
        *,
        on_token: Callable[[int], None] | None = None,
    ) -> tuple[Generated, int]:
        """As `generate`, for the whole talk so far; it is read from the start again if it began in another way.

        Returns:
            What was written, and how many tokens of the prompt had to be read.
        """
        ids = input_ids[0].cpu()
        read, cache = self._read, self._cache
        self._cache = None  # nothing is known if this call is broken off
        known, needed = len(read), len(ids) + settings.max_new_tokens
        if cache is None or known >= len(ids) or not torch.equal(ids[:known], read):
            cache, known = self._model.new_cache(needed), 0
        cache.grow(needed)
        pixels = pixel_values
        if pixels is not None:
            seen = int((ids[:known] == self._model.config.image_token_id).sum())
            pixels = pixels[seen // self._model.config.image_seq_length :]
        written = _go_on(self._model, cache, ids[None, known:], pixels, settings, on_token=on_token)
        self._cache, self._read = cache, torch.cat([ids, written.tokens[:-1]])
        return written, len(ids) - known


def generate_rows(
    model: LongLlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Prompts and what follows, row after row: [batch, longest], padded at the end."""
    counts = ((input_ids == model.config.image_token_id).sum(1) // model.config.image_seq_length).tolist()
    given = 0 if pixel_values is None else len(pixel_values)
    if sum(counts) != given:
        raise ValueError(f"the prompts have {counts} images, but {given} are given")
    images = [None] * len(counts) if pixel_values is None else pixel_values.split(counts)
    rows = []
    for i, row in enumerate(input_ids):
        kept = row if attention_mask is None else row[attention_mask[i] != 0]
        new = generate(model, kept[None], images[i] if counts[i] else None, settings).tokens
        rows.append(torch.cat([row, new.to(row)]))
    pad = model.config.text_config.pad_token_id or 0
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def choose(logits: Tensor, settings: Settings, drawn: torch.Generator) -> int:
    """The next token, by temperature, then the k likeliest, then the likeliest up to p.

    Args:
        logits: float32 [vocabulary].
        settings: how.
        drawn: where chance comes from.
    """
    if settings.temperature == 0:
        return int(logits.argmax())
    ordered, tokens = (logits / settings.temperature).sort(descending=True, stable=True)
    if settings.top_k:
        ordered, tokens = ordered[: settings.top_k], tokens[: settings.top_k]
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < settings.top_p, probabilities, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=drawn)])


def ends(model: LongLlavaForConditionalGeneration, settings: Settings) -> list[int]:
    """The tokens that end a text."""
    end = model.config.text_config.eos_token_id if settings.eos_token_id is None else settings.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)
