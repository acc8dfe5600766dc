"""What a recipe may say, and loading one: every mistake at once, each with its file, line and remedy."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from formats.errors import RecipeError
from formats.manifest import fingerprint

Modality = Literal["text", "image", "multi_image", "video", "subimage"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_is_no_boolean(cls, value: Any, about: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[about.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"must be a number; found {str(value).lower()}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation} if isinstance(annotation, type) else set()


class ImageOptions(_Strict):
    """How pictures and frames become 336 x 336 JPEG files."""

    mode: Literal["exact", "fast"] = Field("exact", description="fast decodes large JPEGs at a fraction of their size")
    passthrough: bool = Field(False, description="store a bare 336 x 336 JPEG that is good enough as it is")
    quality: int = Field(95, ge=1, le=100)
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:2:0"
    max_pixels: int = Field(64_000_000, ge=336 * 336, description="larger pictures are rejected before decoding")


class VideoOptions(_Strict):
    """Which frames of a clip are taken."""

    fps: float = Field(1.0, gt=0, le=60)
    max_frames: int = Field(128, ge=1, description="longer clips are thinned evenly to this many frames")
    decoder: Literal["pyav", "decord"] = "pyav"


class Limits(_Strict):
    """What one picture or clip may cost before it is rejected."""

    seconds: float = Field(120.0, gt=0, description="of computing; by the clock thrice that")
    memory_mb: int = Field(4096, ge=512)


class SourceLocation(_Strict):
    """Where a set lies, if not below DATA/<source>; folders or fsspec URLs."""

    annotations: str | None = None
    media_root: str | None = None


Flags = tuple[str, ...]


class Steps(_Strict):
    """What is junk, for all components or one: a record that is known to break a condition is dropped, and counted.

    What a score cannot tell (the side of a text, the language of a number) breaks nothing. The scores are those of
    `formats.textscore` and, for pictures, of `pipelines.curate`.
    """

    drop_flags: Flags | None = Field(None, description="flags that upstream's records may not have, such as toxic")
    min_words: int | None = Field(None, ge=0, description="of the whole conversation")
    max_words: int | None = Field(None, ge=1)
    min_answer_words: int | None = Field(None, ge=1, description="of the shortest answer, or of a caption")
    max_turn_words: int | None = Field(None, ge=1, description="of the longest turn")
    max_repetition: float | None = Field(None, ge=0, le=1, description="share of an answer's five-word runs not new")
    max_refusals: int | None = Field(None, ge=0, description="answers that decline, or speak as a language model")
    max_emails: int | None = Field(None, ge=0)
    max_phones: int | None = Field(None, ge=0)
    max_cards: int | None = Field(None, ge=0)
    answer_languages: Flags | None = Field(None, min_length=1, description="ISO 639-1 codes, told from the text")
    same_language: bool | None = Field(None, description="the answer's is the question's, unless it asks for another")
    min_side: int | None = Field(None, ge=1, description="pixels of every picture's and clip's shorter side")
    max_side: int | None = Field(None, ge=1, description="pixels of every picture's and clip's longer side")
    max_aspect: float | None = Field(None, ge=1, description="longer side over shorter")
    min_contrast: int | None = Field(None, ge=0, le=255, description="brightest less darkest place; 0 is one colour")
    min_bytes: int | None = Field(None, ge=1, description="of every picture's file")
    max_bytes: int | None = Field(None, ge=1)


class Filters(Steps):
    """Which records a component may draw; each condition that is given must hold.

    Those of its own select: they say what the component is about. Those of `Steps` take junk out of that.
    """

    modality: tuple[Modality, ...] | None = Field(None, min_length=1)
    files: tuple[str, ...] | None = Field(None, min_length=1, description="patterns of upstream annotation files")
    languages: tuple[str, ...] | None = Field(None, min_length=1, description="as upstream spells them, in any case")
    without: tuple[str, ...] = Field((), description="flags that a record may not have")
    min_turns: int | None = Field(None, ge=1)
    max_turns: int | None = Field(None, ge=1)
    min_chars: int | None = Field(None, ge=0)
    max_chars: int | None = Field(None, ge=1)


class Component(_Strict):
    """One ingredient of the mix: records of a source, or samples of an earlier build.

    Exactly one of `source` (records of an upstream set), `replay` (samples of a finished build, bytes as they are)
    and `subimage` (samples of a finished build, their pictures split into tiles) says where it comes from.
    """

    source: str | None = None
    replay: Name | None = None
    subimage: Name | None = None
    count: Annotated[int, Field(ge=1)] | Literal["all"]
    filters: Filters = Filters()
    max_drop: float | None = Field(None, ge=0, le=1, description="the recipe's, if not given")
    backfill: bool = Field(True, description="replace a record whose media fails by the next one")
    on_short: Literal["error", "accept", "repeat"] = "error"
    max_tiles: int = Field(16, ge=1, le=400, description="of a sub-image grid")

    @property
    def origin(self) -> str:
        """The source or earlier build that it draws from."""
        return self.source or self.replay or self.subimage or ""

    @model_validator(mode="after")
    def _one_origin(self) -> "Component":
        given = [key for key in ("source", "replay", "subimage") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of source, replay and subimage; found {', '.join(given) or 'none'}")
        return self


class Training(_Strict):
    """The stage's settings for the trainer (paper, 3.3 and 4.1)."""

    trainable: tuple[Literal["vision", "projector", "llm"], ...] = ("projector", "llm")
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    epochs: int = Field(1, ge=1)
    global_batch: int = Field(24, ge=1, description="sequences a step over all GPUs")
    isolate: bool = Field(False, description="reset attention and Mamba state between the samples of a sequence")


class Recipe(_Strict):
    """One build."""

    name: Name
    description: str = ""
    seed: int = 0
    tokenizer: str = Field(description="folder (from the recipe's own, too) or Hugging Face hub id")
    sequence_length: int = Field(40_960, ge=256)
    overlong: Literal["cut", "reject"] = Field("cut", description="text that does not fit: cut at a turn, or reject")
    samples_per_shard: int = Field(1000, ge=1, le=1_000_000)
    image: ImageOptions = ImageOptions()
    video: VideoOptions = VideoOptions()
    limits: Limits = Limits()
    sources: dict[str, SourceLocation] = {}
    builds: dict[Name, str] = Field({}, description="where earlier builds lie, if not beside the output")
    duplicates: Literal["off", "exact", "near"] = Field("off", description="which records are passed over as copies")
    apart_from: tuple[Name, ...] = Field((), description="earlier builds whose records count as drawn before")
    decontaminate: str | None = Field(None, description="fingerprints of benchmarks whose items are passed over")
    filters: Steps = Field(Steps(), description="of all components; a component's own value goes before")
    max_drop: float = Field(0.2, ge=0, le=1, description="share of a component that these may drop")
    components: dict[Name, Component] = Field(min_length=1)
    training: Training = Training()

    @field_validator("duplicates", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of the bare word

    @model_validator(mode="after")
    def _apart_needs_duplicates(self) -> "Recipe":
        if self.apart_from and self.duplicates == "off":
            raise ValueError("apart_from has no effect while duplicates is off; set that to exact or near")
        return self

    def steps(self, component: str) -> Steps:
        """What is junk in a component: what it says itself, else what the recipe says for all."""
        own = self.components[component].filters
        given = {name: value for name in Steps.model_fields if (value := getattr(own, name)) is not None}
        return self.filters.model_copy(update=given)

    def budget(self, component: str) -> float:
        """The share of a component that its steps may drop."""
        own = self.components[component].max_drop
        return self.max_drop if own is None else own

    @property
    def sha256(self) -> str:
        """Fingerprint of the whole recipe."""
        return fingerprint(self.model_dump(mode="json"))

    @property
    def content_sha256(self) -> str:
        """Fingerprint of everything that decides the shards' bytes.

        Whether a shortfall is an error or accepted, and how much may be dropped, changes no byte, so that an
        unfinished build can be finished with the other answer.
        """
        content = self.model_dump(mode="json", exclude={"max_drop": True})
        for component in content["components"].values():
            del component["max_drop"]
            component["on_short"] = "repeat" if component["on_short"] == "repeat" else "error"
        return fingerprint(content)

    def scaled(self, factor: float) -> "Recipe":
        """The same mix with every count multiplied; the total is rounded once and shared out by largest remainder.

        Raises:
            RecipeError: if the factor is no positive number, or a count is "all", which has no size yet.
        """
        if factor == 1:
            return self
        if not 0 < factor < math.inf:
            raise RecipeError(f"--scale {factor:g}: give a number above 0, such as 0.001")
        counts: dict[str, int] = {}
        for name, component in self.components.items():
            if component.count == "all":
                raise RecipeError(f"components.{name}.count is 'all', which --scale cannot multiply; give a number")
            counts[name] = component.count
        shares = largest_remainder(counts, factor)
        components = {name: c.model_copy(update={"count": shares[name]}) for name, c in self.components.items()}
        return self.model_copy(update={"components": components})


def largest_remainder(counts: Mapping[str, int], factor: float) -> dict[str, int]:
    """Scales counts so that their sum is the rounded scaled sum; ties go to the first.

    Each stays at least 1, even where that makes the sum larger: a trial should try every component.
    """
    exact = {name: count * factor for name, count in counts.items()}
    shares = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    missing = round(sum(counts.values()) * factor) - sum(shares.values())
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: max(missing, 0)]:
        shares[name] += 1
    return {name: max(share, 1) for name, share in shares.items()}


Problem = tuple[tuple[str, ...], str]
"""A key of a recipe, and what is wrong with it."""


def load_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    check: Callable[[Recipe], Iterable[Problem]] = lambda _: (),
) -> Recipe:
    """Reads a recipe and applies `--set` overrides such as "image.quality=90".

    Args:
        path: a YAML file.
        overrides: "KEY=VALUE" each, the value in YAML.
        check: finds what only others can know, such as names of sources that do not exist.

    Raises:
        RecipeError: with every problem, one a line, as "file:line:column: key: what is wrong".
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error})") from error
    try:
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
        content = yaml.load(text, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, an alias of itself
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}:1:1: a recipe is a mapping with name, tokenizer and components")
    marks, problems = _positions(root, str(path)) if root else ({}, [])
    content = _unshared(content)
    for override in overrides:
        _apply(content, override, marks)
    try:
        recipe = Recipe.model_validate(content)
        problems += [f"{_nearest(key, marks, str(path))}: {'.'.join(key)}: {what}" for key, what in check(recipe)]
    except ValidationError as error:
        problems += [_describe(e, marks, str(path)) for e in error.errors()]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


_Marks = dict[tuple[str, ...], str]
_DEEPEST = 20  # an alias that contains itself has no end


def _positions(root: yaml.Node, file: str) -> tuple[_Marks, list[str]]:
    """Where each key stands, and the keys that stand twice (which YAML libraries accept in silence)."""
    marks: _Marks = {}
    problems: list[str] = []

    def walk(node: yaml.Node, path: tuple[str, ...]) -> None:
        if len(path) > _DEEPEST:
            raise RecipeError(f"{_place(file, node.start_mark)}: {'.'.join(path[:3])}: nested too deep")
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                marks[(*path, str(i))] = _place(file, item.start_mark)
                walk(item, (*path, str(i)))
        if isinstance(node, yaml.ScalarNode) and (odd := _odd_number(node)):
            problems.append(f"{_place(file, node.start_mark)}: {'.'.join(path)}: {odd}")
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in marks:
                problems.append(f"{_place(file, key.start_mark)}: {'.'.join(here)}: stands twice; remove one")
            marks[here] = _place(file, key.start_mark)
            walk(value, here)

    walk(root, ())
    return marks, problems


def _odd_number(node: yaml.Node) -> str:
    """What is odd about a number that YAML takes for another than people do: 010 for 8, 1:30 for 90."""
    if node.tag != "tag:yaml.org,2002:int" or not re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9]+)+)", node.value):
        return ""
    taken = yaml.safe_load(node.value)
    return f"YAML takes {node.value} for {taken}; write {taken} if that is meant, and {node.value!r} if it is text"


def _unshared(node: Any) -> Any:
    """A copy in which what an alias names twice is there twice, so that an override changes only what it names."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _place(file: str, mark: yaml.Mark) -> str:
    return f"{file}:{mark.line + 1}:{mark.column + 1}"


def _apply(content: dict[str, Any], override: str, marks: _Marks) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as --set image.quality=90")
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {parent} is not a mapping")
    try:
        node[last] = yaml.safe_load(value)
        odd = _odd_number(yaml.compose(value, Loader=yaml.SafeLoader) or yaml.ScalarNode("", ""))
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: {value!r} is not a YAML value ({error})") from error
    if odd:
        raise RecipeError(f"--set {override}: {odd}")
    marks[tuple(key.split("."))] = f"--set {override}"


def _nearest(key: tuple[str, ...], marks: _Marks, file: str) -> str:
    while key and key not in marks:
        key = key[:-1]
    return marks.get(key, f"{file}:1:1")


def _describe(error: ErrorDetails, marks: _Marks, file: str) -> str:
    """One validation error as "place: key: message"."""
    location = tuple(str(part) for part in error["loc"])
    known = location
    while known and known not in marks:  # a missing key, or one of pydantic's own path parts: take the parent's place
        known = known[:-1]
    shown = ".".join(location if error["type"] == "missing" else known)
    return f"{marks.get(known, file + ':1:1')}: {shown}: {_message(error, location)}"


def _message(error: ErrorDetails, location: tuple[str, ...]) -> str:
    if error["type"] == "extra_forbidden":
        near = get_close_matches(location[-1], _keys_of(location[:-1]), n=2)
        return "unknown key" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if error["type"] == "missing":
        return "is required"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{message}; found {error['input']!r}"


def _keys_of(location: tuple[str, ...]) -> list[str]:
    """The keys that a recipe may have at some place."""
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        if annotation is None:
            continue  # the name of a component or a source: the model of the mapping's values is set already
        inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        model = next((a for a in inner if issubclass(a, BaseModel)), model)
    return list(model.model_fields)
