"""Fingerprints of catalog records, kept beside the catalog: of texts by annotation file, of media by file.

    CATALOG/<source>/part-….texts-1.parquet   uid, exact, minhash; as old as the part, and removed with it
    CATALOG/<source>/media-1/00003-of-00008.parquet   a share of the media: what each file's bytes, pixels and looks are

Media are decoded behind the guard, by tasks that keep what is still true of what they find: a run that was killed, or
a catalog that has grown, costs only what is new.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from formats.errors import Reject
from formats.imaging import EncodedImage, ImageSettings, decode
from formats.likeness import LOOK, VERSION, look, minhash, text_key, words
from formats.manifest import temporary
from formats.sample import Media
from formats.video import VideoSettings
from pipelines.executor import Executor
from pipelines.guard import Guard
from pipelines.ingest import Catalog, Location
from pipelines.media import MediaStore, render_media
from pipelines.progress import Progress
from pipelines.sql import parquet, text
from pipelines.storage import Root

TEXTS = pa.schema([("uid", pa.string()), ("exact", pa.binary()), ("minhash", pa.binary()), ("n_media", pa.int32())])

MEDIA = pa.schema(
    [
        ("ref", pa.string()),
        ("state", pa.string()),
        ("exact", pa.binary()),
        ("looks", pa.binary()),
        ("reason", pa.string()),
    ]
)
"""`exact` stands for the pixels of a picture, or for the bytes and the part of a clip; `looks` has one hash for a
picture and one a frame for a clip. Both are null, and `reason` says why, for what cannot be read."""

FRAMES = VideoSettings(fps=1.0, max_frames=5)
"""Frames that stand for a clip: the first, the last and three between."""

_BUCKET = 512  # media of a task, about
_SECONDS, _MEMORY = 120.0, 4 << 30


# Texts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextTask:
    """One part of a catalog."""

    part: str
    out: str


def text_prints(catalogs: Sequence[Catalog], executor: Executor, progress: Progress) -> list[str]:
    """Parquet files of `TEXTS` for all records of some catalogs."""
    parts = [file for catalog in catalogs for file in catalog.files]
    tasks = [TextTask(file, file.removesuffix(".parquet") + f".texts-{VERSION}.parquet") for file in parts]
    missing = [task for task in tasks if not Path(task.out).exists()]
    progress.stage("fingerprint texts", len(tasks), "files")
    progress.advance(len(tasks) - len(missing), new=False)
    for _ in executor.map(print_texts, missing):
        progress.advance(1)
    return [task.out for task in tasks]


def print_texts(task: TextTask) -> str:
    """Writes the fingerprints of one part's texts."""
    out = Path(task.out)
    with temporary(out) as name, pq.ParquetWriter(name, TEXTS, compression="zstd") as writer:
        for batch in pq.ParquetFile(task.part).iter_batches(batch_size=1_000, columns=["uid", "turns", "n_media"]):
            rows = [text_print(row) for row in batch.to_pylist()]
            writer.write_table(pa.Table.from_pylist(rows, schema=TEXTS))
    return task.out


def text_print(row: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of a catalog row's whole conversation: who says what, in order."""
    exact = text_key(part for turn in row["turns"] for part in (turn["role"], turn["text"]))
    found = words("\n".join(turn["text"] for turn in row["turns"]))
    return {"uid": row["uid"], "exact": exact, "minhash": minhash(found, exact), "n_media": row["n_media"]}


# Media --------------------------------------------------------------------------------------------------------------

_REF = """md5(concat_ws('|', m.kind, array_to_string(m.roots, ':'), m.path, coalesce(m.start::VARCHAR, ''),
                      coalesce(m."end"::VARCHAR, '')))"""


@dataclass(frozen=True, slots=True)
class MediaTask:
    """A share of a source's media: the rows of `wanted` whose `bucket` it is."""

    location: Location
    wanted: str
    folder: str
    bucket: int
    buckets: int

    @property
    def file(self) -> Path:
        """Where it keeps what it has found."""
        return _bucket_file(Path(self.folder), self.bucket, self.buckets)


def media_prints(
    db: duckdb.DuckDBPyConnection,
    catalogs: Sequence[Catalog],
    among: str,
    folder: Path,
    executor: Executor,
    progress: Progress,
) -> list[str]:
    """Fingerprints the media of some records.

    Makes the table `refs` (uid, place, ref, path): which media, by name, a record has, in order.

    Args:
        db: where `refs` is made.
        catalogs: where the records are.
        among: SQL of a table with a column `uid`, known to `db`.
        folder: for what the tasks are to read.
        executor, progress: who does it, and who hears of it.

    Returns:
        Parquet files of `MEDIA`; they may hold more than these.
    """
    db.execute("CREATE OR REPLACE TEMP TABLE refs (uid VARCHAR, place BIGINT, ref VARCHAR, path VARCHAR)")
    tasks: list[MediaTask] = []
    total = 0
    for catalog in catalogs:
        source = catalog.location.source
        db.execute(
            f"""CREATE OR REPLACE TEMP TABLE wanted AS SELECT uid, place, {_REF} AS ref, m FROM (
                SELECT uid, unnest(media) AS m, generate_subscripts(media, 1) AS place FROM {parquet(catalog.files)}
                WHERE n_media > 0 AND uid IN (SELECT uid FROM {among}))"""
        )
        db.execute("INSERT INTO refs SELECT uid, place, ref, m.path FROM wanted")
        (count,) = db.execute("SELECT count(DISTINCT ref) FROM wanted").fetchone() or (0,)
        buckets = 1 << (max(0, count - 1) // _BUCKET).bit_length()
        file = folder / f"media-{source}.parquet"
        db.execute(
            f"""COPY (SELECT ref, ('0x' || ref[:8])::BIGINT % {buckets} AS bucket, any_value(m.kind) AS kind,
                      any_value(m.path) AS path, any_value(m.roots) AS roots, any_value(m.start) AS start,
                      any_value(m."end") AS "end" FROM wanted GROUP BY ref ORDER BY bucket, ref)
                TO {text(str(file))} (FORMAT parquet, ROW_GROUP_SIZE 2048)"""
        )
        kept = str(catalog.folder / f"media-{VERSION}")
        tasks += [
            MediaTask(catalog.location, str(file), kept, bucket, buckets) for bucket in range(buckets if count else 0)
        ]
        total += count
    db.execute("DROP TABLE IF EXISTS wanted")
    progress.stage("fingerprint media", total, "files")
    for found, rejected in executor.map(print_media, tasks):
        progress.advance(found, rejected=rejected)
    return [str(task.file) for task in tasks]


def print_media(task: MediaTask) -> tuple[int, dict[str, int]]:
    """Fingerprints one share of media, as far as that has not been done.

    Returns:
        How many there are, and how many cannot be read, by reason.
    """
    known = _known(task)
    wanted = pq.read_table(task.wanted, filters=[("bucket", "==", task.bucket)]).to_pylist()
    done = {row["ref"]: _current(row, task.location, known.get(row["ref"])) for row in wanted}
    rejected: dict[str, int] = {}
    for row in done.values():
        if row["reason"]:
            rejected[row["reason"]] = rejected.get(row["reason"], 0) + 1
    kept = {**known, **done}
    if kept != known or not task.file.exists():
        table = pa.Table.from_pylist([kept[ref] for ref in sorted(kept)], schema=MEDIA)
        task.file.parent.mkdir(parents=True, exist_ok=True)
        with temporary(task.file) as name:
            pq.write_table(table, name, compression="zstd")
    return len(wanted), rejected


def _known(task: MediaTask) -> dict[str, dict[str, Any]]:
    """What was found before, also when the source had fewer media and so fewer, larger shares."""
    buckets = task.buckets
    while buckets:
        file = _bucket_file(Path(task.folder), task.bucket % buckets, buckets)
        with suppress(OSError, pa.ArrowInvalid):
            rows = pq.read_table(file).to_pylist()
            return {row["ref"]: row for row in rows if int(row["ref"][:8], 16) % task.buckets == task.bucket}
        buckets //= 2
    return {}


def _bucket_file(folder: Path, bucket: int, buckets: int) -> Path:
    return folder / f"{bucket:05d}-of-{buckets:05d}.parquet"


def _current(row: dict[str, Any], location: Location, known: dict[str, Any] | None) -> dict[str, Any]:
    """A medium's fingerprint: the known one if its file is still the same."""
    media = Media(kind=row["kind"], path=row["path"], roots=tuple(row["roots"]), start=row["start"], end=row["end"])
    root = location.annotations if media.roots[0].endswith(".parquet") else location.media
    found: dict[str, Any] = {"ref": row["ref"], "state": None, "exact": None, "looks": None, "reason": None}
    try:
        found["state"] = _store(root).state(media)
        if known and known["state"] == found["state"]:
            return known
        exact, looks = medium_print(media, root)
        found |= {"exact": exact, "looks": looks}
    except Reject as reject:
        found["reason"] = reject.reason
    return found


def medium_print(media: Media, root: str, content: bytes | None = None) -> tuple[bytes, bytes]:
    """As `print_medium`, behind the guard, of a file below a root or of its bytes if they are there already."""
    data = _store(root).fetch(media) if content is None else content
    return _guard().call(print_medium, media, data)


def print_medium(media: Media, data: str | bytes) -> tuple[bytes, bytes]:
    """What a picture or clip is, exactly and by its looks; what runs behind the guard.

    Returns:
        16 bytes, and `LOOK` bytes for a picture or for each frame; a picture that shows nothing is like itself only.

    Raises:
        Reject: if it cannot be read.
    """
    if media.kind == "video":
        shown = render_media(media, data, ImageSettings(), FRAMES)
        pictures = [uncovered(image) for image in shown]
        content = _bytes_of(data, shown)
        part = f"{media.start} {media.end}".encode()
        return _digest([content, part]), b"".join(map(look_or_pixels, pictures))
    image = decode(Path(data).read_bytes() if isinstance(data, str) else data, ImageSettings())
    return _pixels(image), look_or_pixels(image)


def _bytes_of(data: str | bytes, shown: Iterable[EncodedImage]) -> bytes:
    """sha256 of a clip's file; of what is shown, if the clip is a folder of pictures."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    if Path(data).is_dir():
        return _digest(image.jpeg for image in shown)
    with Path(data).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def uncovered(image: EncodedImage) -> Image.Image:
    """A stored image without what it was padded with to become a square."""
    width, height = image.source_size
    picture = Image.open(io.BytesIO(image.jpeg)).convert("RGB")
    return uncover(picture, width, height)


def uncover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The part of a padded square that shows a picture of some width and height."""
    side = max(width, height)
    x, y = ((side - length) // 2 * picture.width / side for length in (width, height))
    right, below = x + width * picture.width / side, y + height * picture.height / side
    box = (round(x), round(y), max(round(right), round(x) + 1), max(round(below), round(y) + 1))
    return picture.crop(box)


def look_or_pixels(image: Image.Image) -> bytes:
    """`LOOK` bytes: a picture's hash or, if it shows nothing, what only the same pixels give."""
    return look(image) or hashlib.blake2b(_pixels(image), digest_size=LOOK).digest()


def _pixels(image: Image.Image) -> bytes:
    return _digest([f"{image.mode} {image.width} {image.height}".encode(), image.tobytes()])


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


@cache
def _store(url: str) -> MediaStore:
    return MediaStore(Root(url))


@cache
def _guard() -> Guard:
    return Guard(_SECONDS, _MEMORY)
