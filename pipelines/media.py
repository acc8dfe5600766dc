"""Finding a sample's media, in folders and archives read in place, and turning them into stored images."""

import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import Reject
from formats.faults import blaming_storage
from formats.imaging import EncodedImage, ImageSettings, decode, fit, patched, picture, stored
from formats.sample import Kind, Media
from formats.video import VideoSettings, frames, thin
from pipelines.storage import Root

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".ts")

_LIMITS = {"image": 64 << 20, "video": 4 << 30}
_MEMORY_LIMIT = 1 << 30  # for a video that is no local file and so has to be held, here and in the decoder's process
_OPEN_ARCHIVES = 32  # each keeps its list of members, about half a MB for a thousand

Match = Literal["exact", "tail", "inside"]
_MATCHES: tuple[Match, ...] = ("exact", "tail", "inside")


def render_media(
    media: Media, data: str | bytes, images: ImageSettings, video: VideoSettings, max_tiles: int | None = None
) -> list[EncodedImage]:
    """Turns what `MediaStore.fetch` gave into stored images; what runs behind the guard.

    Args:
        media: what the record says it is.
        data: the file's bytes, or its path (of a folder of frames, too).
        images, video: how to read and store.
        max_tiles: cut a picture into at most so many tiles; not if None. Videos are never cut.

    Returns:
        A picture's one image, or main image and tiles; a video's frames.

    Raises:
        Reject: whatever `picture`, `patched` and `frames` raise.
    """
    if media.kind == "video":
        if isinstance(data, str) and Path(data).is_dir():
            return _frame_folder(media, Path(data), images, video)
        return frames(data, video, images, media.start, media.end)
    content = Path(data).read_bytes() if isinstance(data, str) else data
    return picture(content, images) if max_tiles is None else patched(content, images, max_tiles)


def _frame_folder(media: Media, folder: Path, images: ImageSettings, video: VideoSettings) -> list[EncodedImage]:
    """A video that upstream ships as a folder of pictures (ShareGPTVideo): in order of names, times unknown."""
    if media.start is not None or media.end is not None:
        raise Reject("broken-video", f"{media.path} is a folder of frames, which has no clock to cut a clip by")
    with _readable(media.path):
        files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise Reject("broken-video", f"{media.path} is a folder without pictures")
    shown = []
    for file in thin(sorted(files, key=_by_number), video.max_frames):
        with _readable(f"{media.path}/{file.name}"):
            data = file.read_bytes()
        image = decode(data, images)
        shown.append(stored(fit(image), "frame", image.size, images))
    return shown


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Sorts "9.jpg" before "10.jpg"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


class MediaStore:
    """Finds media below a root, in folders and in archives (.zip, .tar, .parquet) without unpacking them.

    A file is looked for under all roots of the `Media` by its exact name; then in the archives as upstream's unpacking
    would have placed it (below some folder, or with `unzip -j`); then so again with other suffixes, since upstream
    renames ".mp4" to ".mkv" and leaves suffixes out. Archives stay open: make one store for each process and root.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._files: dict[str, list[str]] = {}  # by root, what a pattern stands for
        self._opened: OrderedDict[str, _Archive | str] = OrderedDict()  # by path, or why it cannot be opened

    def fetch(self, media: Media) -> str | bytes:
        """The path of a video in a local folder; in all other cases the file's bytes.

        Raises:
            Reject: "media-missing", "media-unreadable" (damaged archive, no permission, a folder) or "too-large".
            ConnectionError, TimeoutError: the network's or the disk's fault, not the file's.
        """
        place, member = self._found(media)
        return place.read(member, media.kind)

    def state(self, media: Media) -> str:
        """Place, size and time (or entity tag) of the file that `fetch` would read: another string if it has changed.

        Raises:
            Reject: as `fetch` does if there is none.
        """
        place, member = self._found(media)
        file = place.file(member)
        with _readable(media.path):
            info = self._root.info(file)
        changed = info.get("mtime") or info.get("ETag") or info.get("LastModified")
        return f"{self._root.full(file)} {info['size']} {changed}"

    def _found(self, media: Media) -> "tuple[_Place, str]":
        seen: list[_Place | str] = []
        for place, member in self._candidates(media, seen):
            if member is not None:
                return place, member
        damaged = [place for place in seen if isinstance(place, str)]
        if damaged:
            raise Reject("media-unreadable", f"{media.path} may be in a file that cannot be read: {damaged[0]}")
        raise Reject("media-missing", f"{media.path} is not in {self._looked_in(media)}")

    def close(self) -> None:
        """Closes all archives."""
        self._close_idle(0, limit=0)

    def _candidates(self, media: Media, seen: "list[_Place | str]") -> "Iterator[tuple[_Place, str | None]]":
        """Where the file may be, best first; opens an archive only once no place before it has the exact name."""
        for root in media.roots:
            for place in self._places(root):
                seen.append(place)
                self._close_idle(len(seen))
                if not isinstance(place, str):
                    yield place, place.find(media.path, "exact")
        for name in _names(media):
            for match in _MATCHES:
                yield from ((place, place.find(name, match)) for place in seen if not isinstance(place, str))

    def _places(self, root: str) -> "Iterator[_Place | str]":
        if PurePosixPath(root).suffix not in _ARCHIVES:
            yield _Folder(self._root, root)
            return
        if root not in self._files:
            single = [root] if self._root.is_file(root) else []
            self._files[root] = self._root.glob(root) if "*" in root else single
        for path in self._files[root]:
            if path not in self._opened:
                self._opened[path] = self._open(path)
            self._opened.move_to_end(path)
            yield self._opened[path]

    def _open(self, path: str) -> "_Archive | str":
        try:
            with _readable(path), ExitStack() as on_failure:
                file = on_failure.enter_context(self._root.open(path))
                archive = _ARCHIVES[PurePosixPath(path).suffix](file, path)
                on_failure.pop_all()
                return archive
        except Reject as reject:
            return reject.detail  # kept, so that a damaged archive is tried once and not for each of its files

    def _close_idle(self, in_use: int, limit: int = _OPEN_ARCHIVES) -> None:
        while len(self._opened) > max(limit, in_use):
            _, oldest = self._opened.popitem(last=False)
            if not isinstance(oldest, str):
                oldest.close()

    def _looked_in(self, media: Media) -> str:
        absent = [root for root, files in self._files.items() if not files]
        return ", ".join((root or "the media root") + " (no such file)" * (root in absent) for root in media.roots)


def _names(media: Media) -> Iterator[str]:
    """The name itself, then with each other suffix it may have."""
    yield media.path
    known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    suffix = PurePosixPath(media.path).suffix
    stem = media.path.removesuffix(suffix) if suffix.lower() in known else media.path
    for other in IMAGE_SUFFIXES if media.kind == "image" else VIDEO_SUFFIXES:
        if other != suffix:
            yield stem + other


# Places -------------------------------------------------------------------------------------------------------------


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turns the errors of unreadable files into `Reject`, those of their storage into `ConnectionError`."""
    try:
        with blaming_storage(where):
            yield
    except (ConnectionError, TimeoutError):
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,  # an encrypted member, or a compression that is not known here
        struct.error,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        tarfile.TarError,
        pa.ArrowException,
    ) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Reject("media-unreadable", f"{where}: {type(error).__name__}: {what}") from error


def _check_size(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise Reject("too-large", f"{where} has {size:,} bytes; the limit is {limit:,}")


def _read_up_to(file: IO[bytes], limit: int, where: str) -> bytes:
    data = file.read(limit + 1)
    _check_size(len(data), limit, where)
    return data


class _Place(Protocol):
    """Somewhere media may lie."""

    def find(self, name: str, match: Match) -> str | None: ...

    def file(self, member: str) -> str:
        """The file below the root that holds a member."""

    def read(self, member: str, kind: Kind) -> str | bytes: ...


class _Folder:
    """A folder below the root."""

    def __init__(self, root: Root, folder: str) -> None:
        self._root = root
        self._folder = folder

    def find(self, name: str, match: Match) -> str | None:
        path = f"{self._folder}/{name}" if self._folder else name
        return path if match == "exact" and self._root.exists(path) else None

    def file(self, member: str) -> str:
        return member

    def read(self, member: str, kind: Kind) -> str | bytes:
        with _readable(member):
            info = self._root.info(member)
            local_video = kind == "video" and self._root.is_local
            if info["type"] == "directory" and not local_video:
                raise Reject("media-unreadable", f"{member} is a folder")
            if info["type"] == "other":  # a pipe or device, which may have no end
                raise Reject("media-unreadable", f"{member} is no file")
            limit = _LIMITS[kind] if local_video else _memory_limit(kind)
            if info["size"] is not None:  # which some HTTP servers do not tell
                _check_size(info["size"], limit, member)
            if local_video:
                return self._root.full(member)
            with self._root.open(member) as file:
                return _read_up_to(file, limit, member)


class _Archive(Protocol):
    """An opened file that holds media."""

    def find(self, name: str, match: Match) -> str | None: ...

    def file(self, member: str) -> str: ...

    def read(self, member: str, kind: Kind) -> bytes: ...

    def close(self) -> None: ...


class _Names:
    """The members of an archive by name, and how a name finds its member."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def find(self, name: str, match: Match) -> str | None:
        if match == "exact":
            return name if name in self._names else None
        if match == "tail":  # unpacked below a folder that the name begins with, at the least its own
            parts = name.split("/")
            tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
            return next((tail for tail in tails if tail in self._names), None)
        return self._inside(name)

    def _inside(self, name: str) -> str | None:
        """The one member below further folders; if the archive is but one folder, its file of that base name."""
        same_base = self._by_base.get(name.rsplit("/", 1)[-1], [])
        deeper = same_base if self._one_folder else [member for member in same_base if member.endswith("/" + name)]
        return deeper[0] if len(deeper) == 1 else None

    @cached_property
    def _by_base(self) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {}
        for member in sorted(self._names):
            members.setdefault(member.rsplit("/", 1)[-1], []).append(member)
        return members

    @cached_property
    def _one_folder(self) -> bool:
        return len({member.rpartition("/")[0] for member in self._names}) == 1


class _Zip:
    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self._zip = zipfile.ZipFile(file)
        names = _Names(info.filename for info in self._zip.infolist() if not info.is_dir())
        self.find = names.find

    def file(self, member: str) -> str:
        return self._path

    def read(self, member: str, kind: Kind) -> bytes:
        where, limit = f"{self._path}/{member}", _memory_limit(kind)
        with _readable(where):
            _check_size(self._zip.getinfo(member).file_size, limit, where)
            with self._zip.open(member) as file:
                return _read_up_to(file, limit, where)

    def close(self) -> None:
        self._zip.close()
        self._file.close()


class _Tar:
    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self._tar = tarfile.TarFile(fileobj=file)
        self._members = {member.name.removeprefix("./"): member for member in self._tar if member.isfile()}
        self.find = _Names(self._members).find

    def file(self, member: str) -> str:
        return self._path

    def read(self, member: str, kind: Kind) -> bytes:
        where, limit = f"{self._path}/{member}", _memory_limit(kind)
        with _readable(where):
            _check_size(self._members[member].size, limit, where)
            file = self._tar.extractfile(self._members[member])
            data = file.read() if file else b""
            if len(data) < self._members[member].size:
                raise EOFError("the archive ends within this file")
            return data

    def close(self) -> None:
        self._tar.close()
        self._file.close()


class _Parquet:
    """Pictures inside a table, as the hub stores them: "<row>/<index>" is column `images`[index].bytes of that row."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self._table = pq.ParquetFile(file)
        groups = self._table.metadata
        self._starts = [0, *accumulate(groups.row_group(i).num_rows for i in range(groups.num_row_groups))]

    def find(self, name: str, match: Match) -> str | None:
        row = re.fullmatch(r"(\d+)/\d+", name) if match == "exact" else None
        return name if row and int(row[1]) < self._starts[-1] else None

    def file(self, member: str) -> str:
        return self._path

    def read(self, member: str, kind: Kind) -> bytes:
        where = f"{self._path}/{member}"
        row, index = (int(number) for number in member.split("/"))
        with _readable(where):
            group = bisect_right(self._starts, row) - 1
            images = _pictures(self._table, group)[row - self._starts[group]].as_py() or []
        data = images[index].get("bytes") if index < len(images) else None
        if data is None:
            raise Reject("media-missing", f"{where}: row {row} of the table has no bytes of a picture {index}")
        _check_size(len(data), _memory_limit(kind), where)
        return bytes(data)

    def close(self) -> None:
        self._table.close()
        self._file.close()


@lru_cache(maxsize=1)  # neighbours are read one after the other; groups may be large, so of all tables one is kept
def _pictures(table: pq.ParquetFile, group: int) -> pa.ChunkedArray:
    return table.read_row_group(group, columns=["images"]).column("images")


def _memory_limit(kind: Kind) -> int:
    return min(_LIMITS[kind], _MEMORY_LIMIT)


_ARCHIVES: Mapping[str, Callable[[BinaryIO, str], _Archive]] = {".zip": _Zip, ".tar": _Tar, ".parquet": _Parquet}
