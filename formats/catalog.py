"""The catalog: one Parquet row for each upstream record that can be used, with what filters need beside it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from formats.sample import Media, Sample, Turn
from formats.shard import TEXT_SCORES
from formats.textscore import VERSION, text_scores

CATALOG_VERSION = f"2/{VERSION}"
"""Raise the number when columns change; catalogs of other versions are read anew."""

CATALOG_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("source", pa.string()),
        ("modality", pa.string()),
        ("file", pa.string()),
        ("ordinal", pa.int64()),
        ("upstream_id", pa.string()),
        ("language", pa.string()),
        ("flags", pa.list_(pa.string())),
        ("n_turns", pa.int32()),
        ("n_media", pa.int32()),
        ("n_chars", pa.int64()),
        *TEXT_SCORES,
        (
            "turns",
            pa.list_(pa.struct([("role", pa.string()), ("text", pa.string()), ("slots", pa.list_(pa.int32()))])),
        ),
        (
            "media",
            pa.list_(
                pa.struct(
                    [
                        ("kind", pa.string()),
                        ("path", pa.string()),
                        ("roots", pa.list_(pa.string())),
                        ("start", pa.float64()),
                        ("end", pa.float64()),
                    ]
                )
            ),
        ),
    ]
)


def to_row(sample: Sample) -> dict[str, Any]:
    """A sample as a catalog row."""
    return {
        "uid": sample.uid,
        "source": sample.source,
        "modality": sample.modality,
        "file": sample.file,
        "ordinal": sample.ordinal,
        "upstream_id": sample.upstream_id,
        "language": sample.language,
        "flags": list(sample.flags),
        "n_turns": len(sample.turns),
        "n_media": len(sample.media),
        "n_chars": sum(len(turn.text) for turn in sample.turns),
        **asdict(text_scores(sample.turns)),
        "turns": [{"role": t.role, "text": t.text, "slots": list(t.slots)} for t in sample.turns],
        "media": [
            {"kind": m.kind, "path": m.path, "roots": list(m.roots), "start": m.start, "end": m.end}
            for m in sample.media
        ],
    }


def from_row(row: Mapping[str, Any]) -> Sample:
    """The sample of a catalog row."""
    return Sample(
        uid=row["uid"],
        source=row["source"],
        turns=tuple(Turn(t["role"], t["text"], tuple(t["slots"])) for t in row["turns"]),
        media=tuple(
            Media(kind=m["kind"], path=m["path"], roots=tuple(m["roots"]), start=m["start"], end=m["end"])
            for m in row["media"]
        ),
        file=row["file"],
        ordinal=row["ordinal"],
        upstream_id=row["upstream_id"],
        language=row["language"],
        flags=tuple(row["flags"]),
    )
