"""Videos of several codecs and containers against a full decode by PyAV; what is refused; what it costs."""

import io
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.media.clips import HEIGHT, WIDTH, decoded, numbered, numbers_of, write_video
from utils.media.decode import load_alpha, load_clip, load_image, load_mask, probe
from utils.media.geometry import View
from utils.media.source import Blob, MediaError, Probe
from utils.media.timing import frames_at

SMALL = View(WIDTH, HEIGHT)
B_FRAMES = {"bf": "3", "g": "12"}
OPEN_GOP = {"bf": "3", "g": "12", "x264-params": "open-gop=1:scenecut=0"}
VPX = {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12", "deadline": "realtime", "cpu-used": "8"}

KINDS = {
    "h264.mp4": {"options": B_FRAMES},
    "h264.mkv": {"options": B_FRAMES},
    "h264.mov": {"options": B_FRAMES},
    "h264.avi": {"options": B_FRAMES},
    "h264.ts": {"options": B_FRAMES},
    "h264.flv": {"options": B_FRAMES},
    "open_gop.mp4": {"options": OPEN_GOP},
    "open_gop.mkv": {"options": OPEN_GOP},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=none:bframes=4:keyint=12"}},
    "without_edits.mp4": {"options": B_FRAMES, "container_options": {"use_editlist": "0"}},
    "fragments.mp4": {"options": B_FRAMES, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "simple.avi": {"codec": "mpeg4", "options": {"bf": "0", "g": "12"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": VPX},
    "vp8.webm": {"codec": "libvpx", "options": VPX},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}},
    "wmv2.wmv": {"codec": "wmv2"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_counted_timed_and_found(tmp_path, name):
    """Probed by packets: as many frames as decoding gives. Found by seeking: the ones that decoding all gives."""
    path = write_video(tmp_path / name, 40, **KINDS[name])
    _, numbers = decoded(path)
    assert numbers == list(range(40))
    assert probe(path) == Probe(WIDTH, HEIGHT, 40, 24)
    for start in [0, 1, 11, 12, 13, 23, 36, 39]:
        count = min(3, 40 - start)
        assert numbers_of(load_clip(path, SMALL, start / 24, count, 24)) == list(range(start, start + count)), start
    assert numbers_of(load_clip(path, SMALL, 0, 40, 24)) == numbers


@pytest.mark.parametrize("name", ["mpeg2.mpg", "h264.flv", "h264.ts", "open_gop.mp4"])
def test_frames_far_from_the_beginning_are_found(tmp_path, name):
    """Also where times are wrong after a seek, and where it ends behind what was sought."""
    path = write_video(tmp_path / name, 200, **KINDS[name])
    for start in range(3, 198, 7):
        assert numbers_of(load_clip(path, SMALL, start / 24, 2, 24)) == [start, start + 1]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rates_are_sampled_by_time(tmp_path, suffix):
    draw = random.Random(0)
    times = [0]
    for _ in range(59):
        times.append(times[-1] + draw.choice([10, 33, 50, 200]))
    path = write_video(tmp_path / f"a.{suffix}", 60, options=B_FRAMES, times=times)
    assert decoded(path)[0] == pytest.approx([time / 1000 for time in times], abs=0.001)
    found = probe(path)
    assert found.frames == 60 and times[-1] < 1000 * found.seconds <= times[-1] + 200
    for fps, start in [(16, 0), (25, 1.01), (3, 0.5)]:
        count = int((times[-1] / 1000 - start) * fps)
        expected = [_shown_at(times, start + index / fps) for index in range(count)]
        assert numbers_of(load_clip(path, SMALL, start, count, fps)) == expected


def _shown_at(times, seconds):
    """The last frame that has begun; from a millisecond before its time, which is how exact Matroska is."""
    return max(index for index, time in enumerate(times) if time <= 1000 * seconds + 1)


@pytest.mark.parametrize(("fps", "target", "frames"), [(24, 16, 26), (8, 16, 80), (30, 24, 32), (23.976, 24, 40)])
def test_other_rates(tmp_path, fps, target, frames):
    path = write_video(tmp_path / "a.mp4", 40, fps=fps)
    found = probe(path)
    assert found.fps == pytest.approx(fps, rel=1e-4) and frames_at(found, target) == frames
    expected = [int((index / target + 0.001) * found.fps) for index in range(frames)]
    assert numbers_of(load_clip(path, SMALL, 0, frames, target)) == expected


def test_what_an_edit_list_cuts_off_is_neither_counted_nor_shown(tmp_path):
    """Times before zero are cut off by an edit list, and stay in the file for others to be decoded from."""
    times = [1000 * (index - 10) // 25 for index in range(40)]
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    path = write_video(tmp_path / "a.mp4", 40, fps=25, options=B_FRAMES, times=times, container_options=options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    assert decoded(path)[1] == list(range(10, 40))
    assert probe(path) == Probe(WIDTH, HEIGHT, 30, 25)
    assert numbers_of(load_clip(path, SMALL, 0, 30, 25)) == list(range(10, 40))
    assert numbers_of(load_clip(path, SMALL, 1, 5, 25)) == list(range(35, 40))


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    """A frame is hidden by clearing a bit of its header, as encoders do with frames for reference alone."""
    source = write_video(tmp_path / "a.webm", 40, codec="libvpx", options=VPX)
    path = tmp_path / "hidden.webm"
    with av.open(str(source)) as reading, av.open(str(path), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for index, packet in enumerate(packet for packet in reading.demux(video=0) if packet.size):
            content = bytearray(bytes(packet))
            content[0] &= 0xEF if index % 10 == 5 else 0xFF
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
            copy.is_keyframe = packet.is_keyframe
            writing.mux(copy)
    assert len(decoded(path)[0]) == probe(path).frames == 36


MATRICES = {
    "as it is": ((1, 0, 0, 1), lambda a: a),
    "left to right": ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda a: a[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
    "clockwise": ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
    "counterclockwise": ((0, -1, 1, 0), np.rot90),
    "transposed": ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
    "transposed on the other diagonal": ((0, -1, -1, 0), lambda a: np.rot90(a, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_display_matrix_is_honoured(tmp_path, name):
    (a, b, c, d), turned = MATRICES[name]
    one, unit = 1 << 16, 1 << 30
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, unit]
    path = write_video(tmp_path / "a.mp4", 2, options={"crf": "10"}, setup=lambda s: s.set_display_matrix(matrix))
    expected = turned(numbered(1))
    found = probe(path)
    assert (found.height, found.width) == expected.shape[:2]
    pixels = load_clip(path, View(found.width, found.height), 1 / 24, 1, 24)
    levels = ((pixels[:, 0] + 1) * 127.5).permute(1, 2, 0).numpy()
    assert abs(levels - expected).mean() < 8


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = write_video(tmp_path / "a.mp4", 5, setup=wide)
    assert probe(path) == Probe(2 * WIDTH, HEIGHT, 5, 24)
    assert numbers_of(load_clip(path, View(2 * WIDTH, HEIGHT), 0, 5, 24)) == list(range(5))


@pytest.mark.parametrize(("tag", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (2, 0.299, 0.114)])
def test_colours_are_exact(tmp_path, tag, red, blue):
    """Against the formulas of Rec. 709 and 601, which is also meant where nothing is said, in fields of 8 x 8. By
    default, FFmpeg is 1.3 levels too dark on the average."""
    draw = np.random.default_rng(0)
    y, cb, cr = (draw.integers(*limits, (6, 8)).astype(np.uint8) for limits in [(90, 160), (110, 146), (110, 146)])
    planes = [y.repeat(8, 0).repeat(8, 1), cb.repeat(4, 0).repeat(4, 1), cr.repeat(4, 0).repeat(4, 1)]
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.colorspace = tag
        flat = np.concatenate([plane.ravel() for plane in planes]).reshape(HEIGHT * 3 // 2, WIDTH)
        frame = av.VideoFrame.from_ndarray(flat, "yuv420p")
        frame.colorspace = tag
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    light, v, u = (y - 16.0) / 219, 2 * (1 - red) * (cr - 128.0) / 224, 2 * (1 - blue) * (cb - 128.0) / 224
    green = (light - red * (light + v) - blue * (light + u)) / (1 - red - blue)
    expected = 255 * np.stack([light + v, green, light + u], -1)
    levels = ((load_image(path, SMALL)[:, 0] + 1) * 127.5).permute(1, 2, 0).numpy()
    found = levels[4::8, 4::8]
    assert abs(found - expected).max() <= 2 and abs((found - expected).mean()) < 0.2


TRANSPARENT = [
    ("ffv1", "bgra", "mkv", {}),
    ("ffv1", "yuva444p", "mkv", {}),
    ("png", "rgba", "mov", {}),
    ("png", "rgba", "avi", {}),
    ("qtrle", "argb", "mov", {}),
    ("prores_ks", "yuva444p10le", "mov", {"profile": "4444"}),
    ("cfhd", "gbrap12le", "mov", {}),
    ("utvideo", "gbrap", "avi", {}),
    ("magicyuv", "gbrap", "avi", {}),
    ("huffyuv", "bgra", "avi", {}),
    ("ffvhuff", "yuva444p", "avi", {}),
    ("rawvideo", "bgra", "avi", {}),
    ("jpeg2000", "rgba", "mov", {}),
    ("exr", "gbrapf32le", "mov", {}),
    ("libvpx", "yuva420p", "webm", {"auto-alt-ref": "0"}),
    ("libvpx-vp9", "yuva420p", "webm", {}),
    ("libvpx-vp9", "yuva420p", "mkv", {}),
]


@pytest.mark.parametrize(("codec", "pix_fmt", "suffix", "options"), TRANSPARENT)
def test_transparent_video_is_on_white_and_has_an_alpha(tmp_path, codec, pix_fmt, suffix, options):
    """The right half is transparent, and what the codec keeps there is red."""
    levels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    levels[:, WIDTH // 2 :, 0] = 255
    levels[:, : WIDTH // 2, 3] = 255

    def rgba(index):
        return av.VideoFrame.from_ndarray(levels, "rgba").reformat(format=pix_fmt)

    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"strict": "-2", **options})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for index in range(30):
            frame = rgba(index)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(path).frames == 30
    for start in (0, 1.0):
        pixels, alpha = load_clip(path, SMALL, start, 3, 24), load_alpha(path, SMALL, start, 3, 24)
        left, right = slice(0, WIDTH // 2 - 4), slice(WIDTH // 2 + 4, None)
        assert pixels[..., left].max() < -0.9 and pixels[..., right].min() > 0.9
        assert alpha[..., left].min() > 0.95 and alpha[..., right].max() < 0.05


def test_transparency_that_nothing_decodes_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mkv", 3, setup=lambda stream: stream.metadata.update(alpha_mode="1"))
    for read in (probe, lambda path: load_image(path, SMALL)):
        with pytest.raises(MediaError, match="a.mkv: has transparency that cannot be decoded .h264.; save it as"):
            read(path)


def test_clips_as_masks(tmp_path):
    path = write_video(tmp_path / "a.mkv", 10, codec="ffv1", pix_fmt="bgr0")
    mask = load_mask(path, SMALL, 5 / 24, 2, 24)
    expected = np.stack([numbered(number)[..., 0] for number in (5, 6)]) / 255
    torch.testing.assert_close(mask, torch.from_numpy(expected).float()[None])


def _sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _no_frame(path):
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def _nothing(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def _cut(path):
    write_video(path, 40)
    path.write_bytes(path.read_bytes()[:-200])


def _playlist(path):
    write_video(path.parent / "b.ts", 5)
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nb.ts\n#EXT-X-ENDLIST\n")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_sound, "sound but no video"),
        (_nothing, "no video in it"),
        (_no_frame, "no frame"),
        (_cut, "neither a picture nor a video"),
        (_playlist, "neither a picture nor a video"),
        (lambda path: path.write_text("a caption\n" * 50), "neither a picture nor a video"),
        (lambda path: path.write_bytes(b""), "is empty"),
    ],
)
def test_what_cannot_be_shown_is_told(tmp_path, write, reason):
    path = tmp_path / "a.mp4"
    write(path)
    with pytest.raises(MediaError, match=f"{re.escape(str(path))}: .*{reason}.*remove it"):
        probe(path)
    with pytest.raises(MediaError, match=re.escape(str(path))):
        load_clip(path, SMALL, 0, 1, 24)


@pytest.mark.parametrize("start", [35, 60])
def test_a_file_that_ends_too_early_is_told(tmp_path, start):
    path = write_video(tmp_path / "a.mp4", 40)
    with pytest.raises(MediaError, match=r"a.mp4: ends after 1.667 s, but wanted are 10 frames, 24 per second"):
        load_clip(path, SMALL, start / 24, 10, 24)


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mjpeg.avi"])
def test_any_broken_file_is_read_or_refused(tmp_path, name):
    draw = random.Random(0)
    path = write_video(tmp_path / name, 10, **KINDS[name])
    whole = path.read_bytes()
    for _ in range(30):
        broken = bytearray(whole)
        for _ in range(8):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        path.write_bytes(broken[: draw.choice([len(broken), draw.randrange(len(broken))])])
        for read in (probe, lambda path: load_clip(path, SMALL, 0.2, 4, 24)):
            try:
                read(path)
            except MediaError as error:
                assert str(error).startswith(str(path))


def test_threads_read_one_blob_at_once(tmp_path):
    content = write_video(tmp_path / "a.mp4", 40, options=B_FRAMES).read_bytes()
    blob = Blob("a.mp4 in a.tar", lambda: io.BytesIO(content))
    assert probe(blob) == Probe(WIDTH, HEIGHT, 40, 24)
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(lambda start: load_clip(blob, SMALL, start / 24, 4, 24), range(36)))
    assert [numbers_of(clip) for clip in clips] == [list(range(start, start + 4)) for start in range(36)]
    with pytest.raises(MediaError, match="^b in a.tar: "):
        probe(Blob("b in a.tar", lambda: io.BytesIO(b"text")))


def test_memory_does_not_grow_with_the_length_of_the_file(tmp_path):
    """1000 frames of 512 x 384 are 590 MB decoded; a keyframe at the beginning alone makes all of them be decoded."""
    picture = numbered(170, 512, 384)
    options = {"g": "2000"}
    path = write_video(tmp_path / "a.mp4", 1000, codec="mpeg4", options=options, picture=lambda index: picture)
    load_clip(path, SMALL, 0, 2, 24)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mb()
    assert probe(path).frames == 1000
    load_clip(path, SMALL, 990 / 24, 10, 24)
    load_clip(path, SMALL, 0, 100, 2.4)
    assert _peak_mb() - before < 100


def _peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def test_of_a_long_file_only_what_is_near_the_clip_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    codec = {"codec": "mpeg4", "options": {"g": "10", "qmax": "2"}}
    content = write_video(tmp_path / "a.mp4", 600, picture=lambda index: np.roll(noise, index * 7, 1), **codec)
    content = content.read_bytes()
    read = []

    class Counting(io.BytesIO):
        def read(self, size=-1):
            found = super().read(size)
            read.append(len(found))
            return found

    load_clip(Blob("a", lambda: Counting(content)), SMALL, 580 / 24, 5, 24)
    assert sum(read) < len(content) / 4


def test_without_pyav_pictures_are_read_and_clips_are_refused_by_its_name(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "utils.media.video")
    monkeypatch.delattr("utils.media.video")
    assert probe(tmp_path / "a.png").width == 8
    with pytest.raises(MediaError, match="pip install av"):
        probe(tmp_path / "a.mp4")
