import io
import resource
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from formats.errors import Reject
from formats.imaging import ImageSettings, encode
from formats.sample import Media
from formats.video import VideoSettings
from pipelines import media as media_module
from pipelines.media import MediaStore, render_media
from pipelines.storage import Root

IMAGES, VIDEO = ImageSettings(), VideoSettings()


def put(root: Path, path: str, data: bytes = b"data") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(data)


def zipped(path: Path, members: dict[str, bytes], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def tarred(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def image(path: str, *roots: str) -> Media:
    return Media(kind="image", path=path, roots=roots or ("",))


def video(path: str, *roots: str) -> Media:
    return Media(kind="video", path=path, roots=roots or ("",))


@pytest.fixture
def store(tmp_path):
    store = MediaStore(Root(str(tmp_path)))
    yield store
    store.close()


def png(colour: str = "red", size: tuple[int, int] = (20, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


# Where things are found


def test_the_first_root_that_has_the_exact_name_wins(tmp_path, store):
    put(tmp_path, "b/x/1.jpg", b"second")
    put(tmp_path, "c/x/1.jpg", b"third")
    assert store.fetch(image("x/1.jpg", "a", "b", "c")) == b"second"


def test_an_exact_name_in_a_later_root_beats_a_likeness_in_an_earlier_one(tmp_path, store):
    zipped(tmp_path / "a.zip", {"1.jpg": b"likeness"})
    put(tmp_path, "b/x/1.png", b"other suffix")
    put(tmp_path, "c/x/1.jpg", b"exact")
    assert store.fetch(image("x/1.jpg", "a.zip", "b", "c")) == b"exact"
    assert store.fetch(image("x/1.jpg", "b", "a.zip")) == b"likeness"


@pytest.mark.parametrize("write", [zipped, tarred])
def test_archives_are_read_in_place(tmp_path, store, write):
    suffix = "zip" if write is zipped else "tar"
    write(tmp_path / f"pictures_1.{suffix}", {"x/1.jpg": b"one", "x/2.jpg": b"two"})
    write(tmp_path / f"pictures_2.{suffix}", {"x/3.jpg": b"three"})
    found = [store.fetch(image(f"x/{n}.jpg", f"pictures_*.{suffix}")) for n in (3, 1, 2)]
    assert found == [b"three", b"one", b"two"]


def test_remote_archives_and_folders_are_read_too():
    memory = fsspec.filesystem("memory")
    with memory.open("/set/a.zip", "wb") as f, zipfile.ZipFile(f, "w") as archive:
        archive.writestr("1.jpg", b"one")
    memory.pipe("/set/plain/2.mp4", b"two")
    store = MediaStore(Root("memory://set"))
    assert store.fetch(image("1.jpg", "a.zip")) == b"one"
    assert store.fetch(video("2.mp4", "plain")) == b"two"
    store.close()


@pytest.mark.parametrize(
    ("member", "wanted"),
    [
        ("images/1.jpg", "set/images/1.jpg"),  # unpacked in set/
        ("1.jpg", "set/images/1.jpg"),  # unpacked in set/images/
        ("train_images/x/1.jpg", "x/1.jpg"),  # unpacked beside its own folder
        ("somewhere/else/1.jpg", "set/images/1.jpg"),  # `unzip -j` of one folder
    ],
)
def test_archives_are_understood_as_upstream_unpacks_them(tmp_path, store, member, wanted):
    zipped(tmp_path / "a.zip", {member: b"one"})
    assert store.fetch(image(wanted, "a.zip")) == b"one"


def test_a_like_name_in_another_of_several_folders_is_not_taken(tmp_path, store):
    zipped(tmp_path / "a.zip", {"x/1.jpg": b"x", "y/2.jpg": b"y"})
    with pytest.raises(Reject, match="media-missing"):
        store.fetch(image("z/1.jpg", "a.zip"))


def test_a_name_that_could_be_two_members_is_not_guessed(tmp_path, store):
    zipped(tmp_path / "a.zip", {"x/1.jpg": b"x", "y/1.jpg": b"y"})
    with pytest.raises(Reject, match="media-missing"):
        store.fetch(image("1.jpg", "a.zip"))


@pytest.mark.parametrize("there", ["v/abc.mkv", "v/abc.mp4", "v/abc.webm"])
@pytest.mark.parametrize("wanted", ["v/abc.mp4", "v/abc", "v/abc.MP4"])
def test_a_video_is_found_under_another_suffix(tmp_path, store, there, wanted):
    put(tmp_path, there)
    assert Path(store.fetch(video(wanted))).samefile(tmp_path / there)


def test_a_dot_in_a_name_is_not_taken_for_a_suffix(tmp_path, store):
    put(tmp_path, "v_a.b1.mp4")
    assert Path(store.fetch(video("v_a.b1"))).name == "v_a.b1.mp4"


def test_pictures_come_as_bytes_and_local_videos_as_paths(tmp_path, store):
    put(tmp_path, "1.gif", b"gif")
    zipped(tmp_path / "a.zip", {"2.mp4": b"zipped"})
    assert store.fetch(image("1.gif")) == b"gif"
    assert Path(store.fetch(video("1.gif"))) == tmp_path / "1.gif"
    assert store.fetch(video("2.mp4", "a.zip")) == b"zipped"


def test_links_are_followed(tmp_path, store):
    put(tmp_path, "real/1.jpg", b"one")
    (tmp_path / "set").symlink_to(tmp_path / "real")
    assert store.fetch(image("set/1.jpg")) == b"one"


def test_what_is_missing_is_said_with_where_it_was_looked_for(store):
    with pytest.raises(Reject, match=r"media-missing: x/1.jpg is not in the media root, b, c_\*.zip \(no such file\)"):
        store.fetch(image("x/1.jpg", "", "b", "c_*.zip"))


# Pictures in tables


@pytest.fixture
def table(tmp_path):
    rows = [[{"bytes": b"%d-%d" % (r, i), "path": None} for i in range(r % 3)] for r in range(20)]
    rows[5] = None
    rows[8][0]["bytes"] = None
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"id": list(range(20)), "images": pa.array(rows, kind)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)


def test_pictures_inside_a_table_are_found_by_row_and_place(table, store):
    found = [store.fetch(image(path, "t.parquet")) for path in ("1/0", "2/1", "19/0", "7/0", "2/0")]
    assert found == [b"1-0", b"2-1", b"19-0", b"7-0", b"2-0"]


@pytest.mark.parametrize("path", ["20/0", "0/0", "1/1", "5/0", "8/0", "x/y"])
def test_a_row_or_place_that_a_table_does_not_have_is_missing(table, store, path):
    with pytest.raises(Reject, match="media-missing"):
        store.fetch(image(path, "t.parquet"))


# What cannot be read


def test_pictures_of_many_tables_do_not_pile_up_in_memory(tmp_path, store):
    picture = pa.list_(pa.struct([("bytes", pa.binary())]))
    table = pa.table({"images": pa.array([[{"bytes": bytes(1 << 20)}]] * 8, picture)})
    before = pa.total_allocated_bytes()
    for name in ("a.parquet", "b.parquet", "c.parquet", "d.parquet"):
        pq.write_table(table, tmp_path / name, compression="none", use_dictionary=False)
        assert store.fetch(image("1/0", name)) == bytes(1 << 20)
    del table
    assert pa.total_allocated_bytes() - before < 20 << 20


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.parquet"])
def test_a_damaged_archive_costs_its_own_files_only(tmp_path, store, name):
    put(tmp_path, name, b"this is none of them" * 100)
    put(tmp_path, "b/2.jpg", b"two")
    assert store.fetch(image("2.jpg", name, "b")) == b"two"
    for _ in range(2):
        with pytest.raises(Reject, match=f"media-unreadable: 1/0 may be in a file that cannot be read: {name}"):
            store.fetch(image("1/0", name, "b"))


@pytest.mark.parametrize("write", [zipped, tarred])
def test_an_archive_that_was_cut_short_is_unreadable(tmp_path, store, write):
    name = "a.zip" if write is zipped else "a.tar"
    write(tmp_path / name, {"1.jpg": bytes(3000), "2.jpg": bytes(3000)})
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    with pytest.raises(Reject, match="media-unreadable"):
        store.fetch(image("2.jpg", name))


def test_a_damaged_member_costs_only_itself(tmp_path, store):
    zipped(tmp_path / "a.zip", {"1.jpg": b"one" * 50, "2.jpg": b"two" * 50})
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b"oneone", b"onnone", 1))
    with pytest.raises(Reject, match=r"media-unreadable: a.zip/1.jpg: BadZipFile: Bad CRC-32"):
        store.fetch(image("1.jpg", "a.zip"))
    assert store.fetch(image("2.jpg", "a.zip")) == b"two" * 50


def test_an_encrypted_member_is_unreadable(tmp_path, store):
    zipped(tmp_path / "a.zip", {"1.jpg": b"one"})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(Reject, match=r"media-unreadable: .* encrypted"):
        store.fetch(image("1.jpg", "a.zip"))


def test_a_machine_out_of_file_handles_costs_no_record(tmp_path, store):
    put(tmp_path, "a.jpg", b"one")
    zipped(tmp_path / "b.zip", {"x.jpg": b"two"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for media in (image("a.jpg"), image("x.jpg", "b.zip")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            with pytest.raises(ConnectionError, match="Too many open files"):
                store.fetch(media)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.fetch(image("x.jpg", "b.zip")) == b"two"


def test_a_folder_is_no_picture(tmp_path, store):
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(Reject, match=r"media-unreadable: x.jpg is a folder"):
        store.fetch(image("x.jpg"))


def test_a_picture_of_more_than_64_mib_is_too_large_wherever_it_lies(tmp_path, store):
    with (tmp_path / "1.jpg").open("wb") as f:
        f.truncate((64 << 20) + 1)
    zipped(tmp_path / "a.zip", {"2.jpg": bytes((64 << 20) + 1)}, compression=zipfile.ZIP_DEFLATED)
    for media in (image("1.jpg"), image("2.jpg", "a.zip")):
        with pytest.raises(Reject, match=r"too-large: .* has 67,108,865 bytes; the limit is 67,108,864"):
            store.fetch(media)


def test_a_video_may_be_larger_as_long_as_it_is_a_local_file(tmp_path, store):
    for size, name in ((2 << 30, "1.mp4"), ((4 << 30) + 1, "2.mp4")):
        with (tmp_path / name).open("wb") as f:
            f.truncate(size)
    assert store.fetch(video("1.mp4")) == str(tmp_path / "1.mp4")
    with pytest.raises(Reject, match=r"too-large: 2.mp4 has 4,294,967,297 bytes"):
        store.fetch(video("2.mp4"))


def open_zips() -> int:
    return sum(fd.exists() and fd.readlink().suffix == ".zip" for fd in Path("/proc/self/fd").iterdir())


def test_no_more_than_a_few_archives_stay_open_but_all_that_one_picture_needs(tmp_path, store):
    for n in range(40):
        zipped(tmp_path / f"{n}.zip", {f"{n}.jpg": b"%d" % n})
        assert store.fetch(image(f"{n}.jpg", f"{n}.zip")) == b"%d" % n
    assert open_zips() == 32
    assert [store.fetch(image(f"{n}.jpg", "*.zip")) for n in (0, 39, 5)] == [b"0", b"39", b"5"]
    with pytest.raises(Reject, match="media-missing"):
        store.fetch(image("none.jpg", "*.zip"))
    assert open_zips() == 40
    assert store.fetch(image("7.jpg", "7.zip")) == b"7"
    assert open_zips() == 32
    store.close()
    assert open_zips() == 0


def test_archives_behind_a_folder_that_has_the_file_stay_shut(tmp_path, store):
    put(tmp_path, "x/1.jpg", b"unpacked")
    zipped(tmp_path / "a.zip", {"x/1.jpg": b"packed"})
    assert store.fetch(image("x/1.jpg", "", "a.zip")) == b"unpacked"
    assert open_zips() == 0


# Rendering


def test_a_picture_becomes_one_image_or_a_whole_with_tiles():
    assert [i.role for i in render_media(image("1.png"), png(), IMAGES, VIDEO)] == ["image"]
    rendered = render_media(image("1.png"), png(size=(400, 100)), IMAGES, VIDEO, max_tiles=4)
    assert [i.tile for i in rendered] == [None, (0, 0), (0, 1)]


def test_a_video_becomes_frames_of_the_part_that_is_meant(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 64
        for i in range(60):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (4 * i, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    media = Media(kind="video", path="v.mp4", start=2, end=4.5)
    rendered = render_media(media, str(tmp_path / "v.mp4"), IMAGES, VIDEO, max_tiles=4)
    assert [(i.role, i.time) for i in rendered] == [("frame", 2.0), ("frame", 3.0), ("frame", 4.0)]
    with pytest.raises(Reject, match="unknown-format: not an image that is read here: mp4"):
        render_media(image("v.jpg"), (tmp_path / "v.mp4").read_bytes(), IMAGES, VIDEO)


def test_a_still_that_is_called_a_video_is_one_frame():
    assert [(i.role, i.time) for i in render_media(video("1.mp4"), png(), IMAGES, VIDEO)] == [("frame", 0.0)]


def test_a_video_that_is_a_folder_of_frames_is_read_in_the_order_of_their_numbers(tmp_path, store):
    for n, colour in ((1, "red"), (2, "green"), (10, "blue"), (11, "white")):
        put(tmp_path, f"clip/f{n}.png", png(colour, (336, 336)))
    put(tmp_path, "clip/notes.txt")
    folder = store.fetch(video("clip"))
    rendered = render_media(video("clip"), folder, IMAGES, VideoSettings(max_frames=3))
    expected = [encode(Image.new("RGB", (336, 336), colour), IMAGES) for colour in ("red", "blue", "white")]
    assert [i.jpeg for i in rendered] == expected
    assert {(i.role, i.time) for i in rendered} == {("frame", None)}


def test_a_folder_without_pictures_or_with_a_clip_to_cut_is_rejected(tmp_path):
    with pytest.raises(Reject, match="broken-video: clip is a folder without pictures"):
        render_media(video("clip"), str(tmp_path), IMAGES, VIDEO)
    with pytest.raises(Reject, match="broken-video: clip is a folder of frames, which has no clock"):
        render_media(Media(kind="video", path="clip", start=1), str(tmp_path), IMAGES, VIDEO)


# HTTP


class Server(BaseHTTPRequestHandler):
    """Serves one folder's files; `status` is what it answers instead, `sized` whether it tells how long they are."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    status = 0
    sized = True

    def answer(self) -> None:
        file = self.folder / self.path.lstrip("/")
        status = self.status or (200 if file.is_file() else 404)
        content = file.read_bytes() if status == 200 else b""
        self.send_response(status)
        if self.sized or status != 200:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
            content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The URL of a server of `tmp_path`."""
    monkeypatch.setattr(Server, "folder", tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_does_not_answer_is_not_taken_for_an_absent_file(tmp_path, served, monkeypatch, status):
    put(tmp_path, "a.jpg")
    store = MediaStore(Root(served))
    assert store.fetch(image("a.jpg")) == b"data"
    with pytest.raises(Reject, match="media-missing"):
        store.fetch(image("b.jpg"))
    monkeypatch.setattr(Server, "status", status)
    with pytest.raises(ConnectionError, match=f"{status}"):
        store.fetch(image("a.jpg"))
    monkeypatch.setattr(Server, "status", 410)
    with pytest.raises(Reject, match="media-missing"):
        store.fetch(image("a.jpg"))


def test_a_server_that_is_down_is_not_taken_for_an_absent_file():
    with pytest.raises(ConnectionError, match="ClientConnectorError"):
        MediaStore(Root("http://127.0.0.1:9")).fetch(image("a.jpg"))


def test_a_file_of_unknown_length_is_read_up_to_the_limit(tmp_path, served, monkeypatch):
    put(tmp_path, "a.jpg", b"x" * 3_000_000)
    monkeypatch.setattr(Server, "sized", False)
    assert MediaStore(Root(served)).fetch(image("a.jpg")) == b"x" * 3_000_000
    monkeypatch.setitem(media_module._LIMITS, "image", 2_999_999)
    with pytest.raises(Reject, match=r"too-large: a\.jpg has 3,000,000 bytes; the limit is 2,999,999"):
        MediaStore(Root(served)).fetch(image("a.jpg"))
