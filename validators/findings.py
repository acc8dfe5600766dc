"""What a check reports, and the list of everything that can be reported."""

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

Severity = Literal["error", "warning"]
T = TypeVar("T")

CODES: dict[str, str] = {
    # The folder
    "manifest-missing": "manifest.json is absent: no build, or an unfinished one",
    "manifest-field": "manifest.json is not JSON, or a field is absent or has the wrong type",
    "recipe-hash": "the manifest's recipe is not the one whose sha256 it states",
    "file-stray": "a file that belongs to no build",
    "not-run": "a check could not run; what it would have found is unknown",
    # Shards as tar files
    "shard-missing": "a shard of the manifest is absent",
    "shard-stray": "a tar that the manifest does not list",
    "shard-gap": "shard names do not count up from train-000000.tar",
    "shard-size": "a shard's length is not the manifest's",
    "shard-hash": "a shard's sha256 is not the manifest's",
    "shard-samples": "a shard holds more or fewer samples than the manifest says",
    "tar-header": "a block that should be a tar header is none, or its checksum is wrong",
    "tar-format": "a member that is not a plain USTAR file (PAX, GNU, directory, link)",
    "tar-metadata": "a member with a time, an owner, a mode other than 0644 or padding that is not zero",
    "tar-truncated": "a tar ends inside a member",
    "tar-end": "a tar does not end in two zero blocks, or goes on after them",
    "member-name": "a member is not named <key>.json or <key>.NNNN.jpg",
    "member-order": "a sample's members are not its json and then its images in order",
    "key-duplicate": "two samples have the same key",
    "key-order": "keys do not ascend",
    "energon-index": "a .tar.idx or .nv-meta/.info.json disagrees with the shards",
    # Index
    "index-missing": "index.parquet is absent",
    "index-hash": "index.parquet's sha256 is not the manifest's",
    "index-unreadable": "index.parquet cannot be read",
    "index-schema": "index.parquet's columns have other names, another order, other types, or nulls",
    "index-rows": "a sample without a row, a row without a sample, or another number of rows than stated",
    "index-order": "rows do not stand in the order of the samples in the shards",
    "index-offset": "a row's offset or size is not the sample's",
    "index-sample-hash": "a row's sha256 is not that of the sample's bytes",
    "index-column": "another value in a row is not the sample's",
    "index-score": "a score that nothing can have, such as a share above 1",
    # Samples
    "sample-json": "a sample's JSON is absent, cannot be read, or a field is absent or has the wrong type",
    "sample-roles": "turns are not an optional system turn, then human and gpt in turn, ending with gpt",
    "sample-provenance": "a sample says it is from a file that the manifest does not know, or beyond its records",
    "sample-empty-answer": "an answer without text",
    "sample-modality": "the modality does not fit the roles and the number of the images",
    "image-file": "an image's file name is not its number",
    "image-size": "an image is not 336 x 336 RGB, in its JPEG header or in the JSON",
    "image-undecodable": "an image is no complete JPEG, or the decoder refuses it",
    "image-count": "more or fewer image members than the JSON lists",
    # Protocol
    "placeholder-count": "more or fewer <image> placeholders than images",
    "protocol-syntax": "a control string of the protocol stands where the grammar has none",
    "control-string": "text spells a special token, a role marker or the image token",
    "image-role": "an image's role, time or tile does not fit its place in the text",
    "frame-order": "times of a video's frames do not increase, or only some are known",
    "tile-geometry": "tiles are not a complete row-major grid, or not the grid of the text or of the source size",
    "escape-count": "`escaped` is larger than the number of escaped strings in the text",
    # Tokens
    "tokenizer-hash": "tokenizer.json is not the one that the manifest states",
    "tokenizer-image-token": "the image token is not in the tokenizer's vocabulary",
    "token-count": "a row's token counts are not what the tokenizer counts",
    "target-count": "a row's n_target_tokens is not what the tokenizer counts",
    "target-text": "the tokens to be learned do not spell the answers (--deep)",
    "over-long": "a sample is longer than the recipe's sequence_length",
    # Mixture
    "mixture-components": "recipe, manifest and index do not have the same components",
    "mixture-conservation": "counts of a source or component do not add up",
    "mixture-totals": "the manifest's totals are not the sums of its parts",
    "mixture-count": "a component's count in the manifest is not what the index holds",
    "mixture-source": "a component holds a sample of another source than its recipe names",
    "mixture-duplicate": "a component holds the same record twice",
    "mixture-overlap": "replay and sub-image draws share a record",
    "mixture-draw": "what took the place of rejected records is not what the seed puts next",
    "mixture-order": "a sample does not stand where the seed puts it",
    # Against the upstream files
    "upstream-missing": "what a sample goes back to is absent or cannot be read: an upstream file, a record, a build",
    "upstream-changed": "an upstream annotation file, or an earlier build, is not the one that the manifest states",
    "tools-changed": "what decides a build's bytes has other versions here; samples may differ for that alone",
    "rebuilt-rejected": "rebuilt from the upstream files, a sample is rejected",
    "rebuilt-json": "a sample's JSON is not what its upstream record gives",
    "rebuilt-image": "a sample's images are not what its upstream media give",
    "replay-origin": "a replayed sample is not, byte by byte, that of the build it was drawn from",
    # Filters
    "curation-step": "a record was dropped by a filter that the recipe does not have",
    "curation-budget": "filters dropped more of a component than the recipe allows",
    "curation-kept": "a sample breaks a filter of its component",
    # Records that were passed over
    "overlaps-missing": "overlaps.jsonl is absent, though the recipe passes over copies or benchmarks",
    "overlaps-hash": "overlaps.jsonl's sha256 is not the manifest's",
    "overlaps-row": "a line of overlaps.jsonl does not name a record, a known component and what it collides with",
    "overlaps-count": "there are more or fewer lines than the manifest says, in all or of a component and reason",
    "overlaps-kept": "a record that was passed over is in the build, or is what another gave way to",
    # Reject ledger
    "ledger-missing": "rejects.jsonl is absent",
    "ledger-hash": "rejects.jsonl's sha256 is not the manifest's",
    "ledger-row": "a line of rejects.jsonl is no reject with a known reason and component",
    "reject-ledger": "the ledger's counts are not the manifest's",
    "reject-kept": "a record is both in the ledger and in the build",
    "reject-replacement": "a replacement is neither in the build nor in the ledger",
}
"""Every code with the fault it names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    Attributes:
        code: one of `CODES`.
        severity: an "error" makes the build wrong; a "warning" makes it untidy.
        key: the sample's key, if it is about one.
        file: the file, relative to the build.
        detail: what was found and what was expected.
    """

    code: str
    severity: Severity
    key: str | None
    file: str | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Check = Generator[Finding, None, T]
"""A check that yields what it finds, and returns what it has read for the checks that follow."""


def error(code: str, detail: str, *, file: str | None = None, key: str | None = None) -> Finding:
    """A fault that makes the build wrong."""
    return Finding(code, "error", key, file, detail)


def warning(code: str, detail: str, *, file: str | None = None, key: str | None = None) -> Finding:
    """A fault that does no harm to what reads the build."""
    return Finding(code, "warning", key, file, detail)


def guarded(name: str, check: Check[T], *, file: str | None = None, key: str | None = None) -> Check[T | None]:
    """Runs a check; if it cannot go on, that is one more finding instead of a crash."""
    try:
        return (yield from check)
    except Exception as problem:  # whatever a damaged file can provoke, in any library
        yield error("not-run", f"{name}: {type(problem).__name__}: {problem}", file=file, key=key)
        return None
