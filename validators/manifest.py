"""Does the manifest have the fields that a build's manifest has, and is its recipe the one that it states?"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from validators.findings import Check, error
from validators.folder import Folder

FILE = "manifest.json"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Block(BaseModel):
    """Types are taken literally ("3" is no number); fields that are not known here are let be."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class TokenizerBlock(Block):
    """What the tokens were counted with."""

    name: str
    sha256: Sha256
    image_token: Annotated[str, Field(min_length=1)]
    tokens_per_image: Annotated[int, Field(ge=1)]


class Tally(Block):
    """Records read of a source or of one of its files."""

    records: Count
    usable: Count
    rejected: Count


class SourceFile(Tally):
    """One upstream annotation file."""

    file: str
    bytes: Count


class Source(Tally):
    """One upstream set."""

    files: list[SourceFile]


class Component(Block):
    """What became of one ingredient of the mix."""

    asked: Count
    pool: Count
    filtered: dict[str, Count]
    dropped: dict[str, Count] = {}
    drawn: Count
    kept: Count
    rejected: Count
    short: Count
    rejects: dict[str, Count]
    images: Count
    tokens: Count
    target_tokens: Count


class Totals(Block):
    """Sums over the build."""

    samples: Count
    images: Count
    tokens: Count
    target_tokens: Count
    bytes: Count
    rejected: Count


class Shard(Block):
    """One tar."""

    file: str
    sha256: Sha256
    bytes: Count
    samples: Count


class Table(Block):
    """The index or the reject ledger."""

    file: str
    sha256: Sha256
    rows: Count


class EarlierBuild(Block):
    """A build that this one draws from, and the sha256 of every annotation file that it goes back to, by source."""

    index_sha256: Sha256
    sources: dict[str, dict[str, str]]


class RecipeComponent(Block):
    """Of a component's recipe, what its samples can be held against."""

    count: int | str | None = None
    source: str | None = None
    replay: str | None = None
    subimage: str | None = None
    on_short: str | None = None
    max_tiles: int | None = None
    filters: dict[str, Any] = {}
    max_drop: float | None = None


class Recipe(Block):
    """Of the resolved recipe, what the build can be held against."""

    seed: int
    sequence_length: Annotated[int, Field(ge=1)]
    duplicates: str = "off"
    decontaminate: str | None = None
    filters: dict[str, Any] = {}
    max_drop: float | None = None
    components: dict[str, RecipeComponent]

    @property
    def passes_over(self) -> bool:
        """Whether it leaves out copies, or what stands in benchmarks."""
        return self.duplicates != "off" or self.decontaminate is not None


class Manifest(Block):
    """manifest.json."""

    format: Literal["longllava.build/1"]
    protocol: Literal["longllava.protocol/1"]
    recipe: Recipe
    recipe_sha256: Sha256
    tokenizer: TokenizerBlock
    sources: dict[str, Source]
    builds: dict[str, EarlierBuild] = {}
    components: dict[str, Component]
    totals: Totals
    shards: list[Shard]
    index: Table
    rejects: Table
    overlaps: Table | None = None
    environment: dict[str, Any]


def read(folder: Folder) -> Check[Manifest | None]:
    """Reads the manifest; None if it cannot be understood."""
    if folder.size(FILE) is None:
        yield error("manifest-missing", "there is no manifest.json; finish the build first", file=FILE)
        return None
    content = folder.read(FILE)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as problems:
        for problem in problems.errors(include_url=False):
            where = ".".join(map(str, problem["loc"])) or "the file"
            yield error("manifest-field", f"{where}: {problem['msg']}", file=FILE)
        return None
    recipe = json.loads(content)["recipe"]
    if manifest.recipe_sha256 not in _fingerprints(recipe):
        yield error("recipe-hash", f"recipe_sha256 {manifest.recipe_sha256} is of another recipe", file=FILE)
    return manifest


def _fingerprints(recipe: dict[str, Any]) -> set[str]:
    """The recipe's hash, also with `on_short: accept` read as `error`: the answer to a shortfall changes no sample."""
    found = {_fingerprint(recipe)}
    for component in recipe["components"].values():
        if component.get("on_short") == "accept":
            component["on_short"] = "error"
    return found | {_fingerprint(recipe)}


def _fingerprint(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
