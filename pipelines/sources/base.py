"""What a source is, and the readers and checks that sources share.

A source is plain data plus two functions: `read` streams an annotation file as raw records, `convert` turns one
record into samples or raises `Reject`. Nothing here opens media.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import Reject, SourceError
from formats.sample import Media, Role, Sample, Turn, image_first, mend_dialogue, place_images, safe_path
from pipelines.storage import Root, refuse_stand_in


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record stands upstream."""

    source: str
    file: str
    ordinal: int

    @property
    def uid(self) -> str:
        """The record's stable name."""
        return f"{self.source}/{self.file}:{self.ordinal}"

    def sample(
        self,
        turns: list[Turn],
        media: Sequence[Media] = (),
        *,
        part: str | None = None,
        upstream_id: str | None = None,
        language: str | None = None,
        flags: Sequence[str] = (),
    ) -> Sample:
        """The record's sample, or one part of it, with its dialogue mended.

        Raises:
            Reject: as `mend_dialogue` does.
        """
        mended, changes = mend_dialogue(turns)
        return Sample(
            uid=self.uid if part is None else f"{self.uid}:{part}",
            source=self.source,
            turns=mended,
            media=tuple(media),
            file=self.file,
            ordinal=self.ordinal,
            upstream_id=upstream_id,
            language=language,
            flags=(*flags, *changes),
        )


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that cannot be used, as a ledger keeps it."""

    uid: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Expected:
    """A file or folder that a complete download has; `pattern` is relative to the set's folder."""

    pattern: str
    what: str
    required: bool = True


Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One upstream set.

    Attributes:
        name: the folder below DATA, and what recipes call it.
        hub_id, licence, non_commercial: as the hub's card states them.
        files: patterns of its annotation files, relative to its folder.
        not_files: patterns among those that are no records (instruction lists and the like).
        repeats: (pattern, replacement) as `re.sub` takes them, for files whose records stand in another file too:
            a file is left out if the file of the replaced name is there.
        expected: what `longllava sources` looks for.
        fetch: upstream commands that download it.
        read: streams the raw records of one annotation file.
        convert: turns one raw record into its samples.
        flags: those that `convert` may set, besides what `mend_dialogue` sets.
        version: raise it when `convert` changes what it yields, so that catalogs are read anew.
    """

    name: str
    hub_id: str
    licence: str
    non_commercial: bool
    files: tuple[str, ...]
    not_files: tuple[str, ...] = ()
    repeats: tuple[tuple[str, str], ...] = ()
    expected: tuple[Expected, ...]
    fetch: tuple[str, ...]
    read: Callable[[Root, str], Iterator[Any]]
    convert: Callable[[Record, Origin], Sequence[Sample]]
    flags: tuple[str, ...] = ()
    version: int = 1

    def annotation_files(self, root: Root) -> list[str]:
        """The annotation files that are there and whose records no other of them holds, sorted."""
        found = {path for pattern in self.files for path in root.glob(pattern)}
        found -= {path for pattern in self.not_files for path in root.glob(pattern)}
        return sorted(path for path in found if not self._is_repeated(path, found))

    def _is_repeated(self, path: str, found: set[str]) -> bool:
        fuller = {re.sub(pattern, replacement, path) for pattern, replacement in self.repeats}
        return bool(fuller & (found - {path}))

    def samples(self, root: Root, file: str) -> Iterator[list[Sample] | Rejected]:
        """Streams one annotation file: for each record either its samples or why it has none."""
        for ordinal, record in enumerate(self.read(root, file)):
            origin = Origin(self.name, file, ordinal)
            try:
                if isinstance(record, Reject):
                    raise record
                if not isinstance(record, Mapping):
                    raise Reject("bad-record", f"expected an object, found {type(record).__name__}")
                yield list(self.convert(record, origin))
            except Reject as reject:
                yield Rejected(origin.uid, reject.reason, reject.detail)


# Readers ------------------------------------------------------------------------------------------------------------


def json_array(root: Root, file: str) -> Iterator[Any]:
    """Streams the elements of a JSON file that is one array; memory does not grow with the file.

    Bytes that are not UTF-8 become halves of surrogate pairs, which cost only the record that they stand in
    (`check_text`). The usual streaming parser, ijson on yajl, is as fast, but gives up the whole file at one such
    byte, and turns half a surrogate pair into "?" in silence.

    Raises:
        SourceError: if it is no such file, or ends early.
    """
    with _open_checked(root, file) as f, _text(f) as text:
        yield from _elements(text, root.full(file))


_CHUNK = 1 << 20
_LONGEST = 64 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)
_DIGITS = 4_000  # Python refuses to read longer numbers


def _whole_number(digits: str) -> int | str:
    return int(digits) if len(digits) <= _DIGITS else digits


_DECODER = json.JSONDecoder(parse_int=_whole_number)


def _elements(text: TextIO, where: str) -> Iterator[Any]:
    buffer = text.read(_CHUNK)
    at = _skip(buffer, 0)
    if buffer[at : at + 1] != "[":
        raise SourceError(f"{where}: starts with {buffer[at : at + 1]!r}, so it is no JSON array; download it again")
    if buffer.startswith("]", _skip(buffer, at + 1)):
        at = _skip(buffer, at + 1)
    count = 0
    while buffer[at] != "]":
        try:
            value, at = _element(buffer, at + 1)
        except (ValueError, IndexError) as error:
            rest = buffer[at:]
            more = text.read(max(_CHUNK, len(rest)))
            if not more or len(rest) > _LONGEST:
                what = f"not a complete JSON array, it breaks off after {count} records ({error})"
                raise SourceError(f"{where}: {what}; download it again") from error
            buffer, at = rest + more, 0
        else:
            count += 1
            yield value
    if (buffer[at + 1 :] + text.read(_CHUNK)).strip():
        raise SourceError(f"{where}: more follows its array of {count} records; download it again")


def _element(buffer: str, at: int) -> tuple[Any, int]:
    """One element of an array, and where the comma or bracket after it stands."""
    start = _skip(buffer, at)
    try:
        value, end = _DECODER.raw_decode(buffer, start)
    except RecursionError:
        value, end = Reject("bad-record", "is nested too deeply to be read"), _end_by_brackets(buffer, start)
    end = _skip(buffer, end)
    if buffer[end] not in ",]":
        raise ValueError(f"a {buffer[end]!r} follows an element")
    return value, end


def _end_by_brackets(buffer: str, at: int) -> int:
    """Where an array or object ends, whatever is in it."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(buffer, at):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if not depth:
            return match.end()
    raise ValueError("an element has no end")


def _skip(buffer: str, at: int) -> int:
    space = _SPACE.match(buffer, at)
    return space.end() if space else at


def json_lines(root: Root, file: str) -> Iterator[Any]:
    """Streams a file with one JSON value a line; a line that is not costs only itself."""
    with _open_checked(root, file) as f, _text(f) as text:
        for line in text:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Reject("bad-record", f"line is not JSON: {error}")


@contextmanager
def parquet(root: Root, file: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file for `parquet_rows`.

    Raises:
        SourceError: if it is no such file, or what is read from it is damaged.
    """
    with _open_checked(root, file) as f:
        try:
            yield pq.ParquetFile(f, buffer_size=_CHUNK)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{root.full(file)}: not a readable Parquet file ({error}); download it again") from error


def parquet_rows(
    table: pq.ParquetFile, columns: Sequence[str], row_groups: Sequence[int] | None = None
) -> Iterator[Any]:
    """Streams rows as dictionaries, a few at a time, reading nothing but the given columns that are there.

    Args:
        table: from `parquet`.
        columns: names, or "name.field" for one field of a list of structs.
        row_groups: which to read, if not all.
    """
    paths = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
    # The name of a list's items, between the two, depends on what wrote the file.
    leaves = [path for path in paths if re.sub(r"\..*\.", ".", path) in columns]
    for batch in table.iter_batches(batch_size=64, columns=leaves, row_groups=row_groups):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            yield from (_row(batch.slice(i, 1)) for i in range(batch.num_rows))


def _row(batch: pa.RecordBatch) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Reject("bad-record", f"a string is not UTF-8: {error}")


def _open_checked(root: Root, file: str) -> BinaryIO:
    refuse_stand_in(root.read(file, limit=64), root.full(file))
    return root.open(file)


def _text(f: BinaryIO) -> TextIO:
    return io.TextIOWrapper(f, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


# Checks on records --------------------------------------------------------------------------------------------------

_KINDS: Mapping[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a whole number"}


T = TypeVar("T")


def field(record: Record, key: str, kind: type[T]) -> T:
    """A field of a record that must be there and be of one type.

    Raises:
        Reject: "bad-record" otherwise, or if a string cannot be written as UTF-8.
    """
    value = record.get(key)
    if not isinstance(value, kind):
        found = "absent" if key not in record else type(value).__name__
        raise Reject("bad-record", f"{key}: expected {_KINDS.get(kind, kind.__name__)}, found {found}")
    if isinstance(value, str):
        check_text(value, key)
    return value


def text_field(record: Record, key: str) -> str:
    """A field that must be there and be a string; null counts as "".

    Raises:
        Reject: as `field` does.
    """
    return "" if key in record and record[key] is None else field(record, key, str)


def check_text(text: str, key: str) -> None:
    """Raises `Reject` if a string cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Reject("bad-record", f"{key}: not valid Unicode at character {error.start}") from error


def label(record: Record, *keys: str) -> str | None:
    """What a record is called: the first of these fields that is there, a string or a whole number, as text.

    Raises:
        Reject: "bad-record" if it is anything else.
    """
    for key in keys:
        value = record.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise Reject("bad-record", f"{key}: expected a string or a number, found {type(value).__name__}")
            check_text(str(value), key)
            return str(value)
    return None


LLAVA_ROLES: Mapping[str, Role] = {"human": "human", "gpt": "gpt", "system": "system"}
CHAT_ROLES: Mapping[str, Role] = {"user": "human", "assistant": "gpt", "system": "system"}


def messages(
    record: Record, key: str, *, role_key: str, text_key: str, roles: Mapping[str, Role]
) -> list[tuple[Role, str]]:
    """The turns of a record as (role, text), with upstream's role names mapped to ours and null text as "".

    Raises:
        Reject: "bad-record" if a message has no such fields, "bad-roles" if a role is unknown.
    """
    turns = []
    for i, message in enumerate(field(record, key, list)):
        if not isinstance(message, Mapping):
            raise Reject("bad-record", f"{key}[{i}]: expected an object, found {type(message).__name__}")
        role = field(message, role_key, str)
        if role not in roles:
            raise Reject("bad-roles", f"{key}[{i}].{role_key} is {role!r}; known are {', '.join(roles)}")
        turns.append((roles[role], text_field(message, text_key)))
    return turns


def llava_sample(record: Record, origin: Origin, roots: tuple[str, ...] = ("",)) -> Sample:
    """The sample of a record in LLaVA's format: `conversations` of from/value, and `image`, one path, if it has one.

    Raises:
        Reject: if the record is not of that format, or cannot be used.
    """
    if record.get("video") is not None:
        raise Reject("bad-record", "video: this set holds pictures only")
    texts = messages(record, "conversations", role_key="from", text_key="value", roles=LLAVA_ROLES)
    upstream_id = label(record, "id")
    if record.get("image") is None:
        return origin.sample(place_images(texts, 0), upstream_id=upstream_id)
    image = Media(kind="image", path=safe_path(record["image"]), roots=roots)
    return origin.sample(image_first(texts), (image,), upstream_id=upstream_id)
