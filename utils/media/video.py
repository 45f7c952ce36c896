"""Decodes videos with FFmpeg (PyAV) frame by frame, so that memory does not grow with their length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation
from av.video.stream import VideoStream
from PIL import Image

from utils.media.colour_profiles import Colours
from utils.media.images import TimedFrame
from utils.media.source import ROUNDING_SECONDS, MediaError, Probe, check_pixels

# Containers only: FFmpeg also accepts plain text as a video, and playlists, which open other files.
CONTAINERS = "asf,avi,flv,matroska,mov,mpeg,mpegts"
# Containers with correct times after a seek. Others are decoded from the beginning.
SEEKABLE = frozenset({"asf", "avi", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mpegts"})
UNKNOWN_RATE = 25
# How far before the wanted frame to seek, in turn. The first distance fails only if a keyframe is stored before frames
# that are displayed before it, or if the container has no index; the last one is the beginning.
BACK_SECONDS = (0, 2, 16, math.inf)
# Video streams that are no video of their own: the cover picture of a song, the pictures of chapters, tiles and layers.
NOT_SHOWN = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
# The decoders that read transparency beside the colours in Matroska; FFmpeg's own ones leave it out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# FFmpeg's default takes a shortcut from halved chroma to RGB that darkens by more than one level in 255.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# What telephones and televisions tell of high dynamic range and wide gamuts.
WIDE_TRANSFERS = frozenset({ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67})
WIDE_PRIMARIES = frozenset({ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432})
# The signs of a display matrix (a, b, c, d), where (x, y) is shown at (ax + cy, bx + dy), y pointing down.
UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
SIDEWAYS = frozenset(transpose for signs, transpose in UPRIGHT.items() if not signs[0])


def probe_video(stream: BinaryIO) -> Probe:
    """Examines a video. All packets are read, but only one frame is decoded: the number of displayed packets equals the
    number of decoded frames, whereas the number in a header may be missing or ignore an edit list."""
    with _open(stream) as video:
        first, count, begin, end = None, 0, math.inf, -math.inf
        decoder = _decoder(video)
        for packet in video.container.demux(video):
            first = first or next(iter(decoder.decode(packet)), None)
            if _is_shown(packet):
                time = _seconds(packet.dts if packet.pts is None else packet.pts, video)
                count, begin, end = count + 1, min(begin, time), max(end, time + _period(packet, video))
        if first is None or not count:
            raise MediaError("holds no frame that can be decoded; replace or remove it")
        fps = _fps(count, end - begin, video)
        return Probe(*_upright_size(first, video), count, fps, colours=_colours(first))


def shown_frames(stream: BinaryIO, start_seconds: float) -> Iterator[TimedFrame]:
    """The frames in order, from the one at `start_seconds` after the first frame, or from an earlier one."""
    for back in BACK_SECONDS:
        with _open(stream) as video, closing(_decoded(video, start_seconds - back)) as frames:
            time, frame = next(frames, (math.inf, None))
            if time > start_seconds + ROUNDING_SECONDS and start_seconds > back:
                continue
            for following, next_frame in frames:
                yield TimedFrame(following, partial(_picture, frame, video))
                time, frame = following, next_frame
            if frame:
                yield TimedFrame(time + _period(frame, video), partial(_picture, frame, video))
            return


@contextmanager
def _open(stream: BinaryIO) -> Iterator[VideoStream]:
    """The video stream that players show, the first if the file marks none, whose container stays open within this
    context."""
    stream.seek(0)
    try:
        container = av.open(stream, options={"format_whitelist": CONTAINERS})
    except av.FFmpegError as error:
        reason = f"neither a picture nor a video that can be read ({error.strerror}); replace or remove it"
        raise MediaError(reason) from error
    with container:
        videos = [video for video in container.streams.video if not video.disposition & NOT_SHOWN]
        if not videos:
            has = "has sound but no video" if container.streams.audio else "has no video in it"
            raise MediaError(f"{has}; replace or remove it")
        video = next((one for one in videos if one.disposition & Disposition.default), videos[0])
        check_pixels(video.width, video.height)
        # Callers read several files at once in their own threads. Threads within a file would each hold a frame, and
        # decode frames ahead that nobody needs.
        video.codec_context.thread_count = 1
        yield video


def _decoded(video: VideoStream, start_seconds: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """The frames from the keyframe before `start_seconds` on, with their times in seconds after the first frame."""
    if video.container.format.name == "avi" and video.codec_context.has_b_frames:
        # These are storage times in another order: only the number of a frame tells its time.
        yield from ((index / _nominal_rate(video), frame) for index, frame in enumerate(_frames(video)))
        return
    if start_seconds > 0 and video.container.format.name in SEEKABLE:
        offset = (video.start_time or 0) + int(start_seconds / video.time_base)
        video.container.seek(offset, stream=video)
    time = 0.0
    for frame in _frames(video):
        time = time if frame.pts is None else _seconds(frame.pts - (video.start_time or 0), video)
        yield time, frame
        time += _period(frame, video)


def _frames(video: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames from where the container stands."""
    decoder = _decoder(video)
    for packet in video.container.demux(video):
        yield from decoder.decode(packet)


def _decoder(video: VideoStream) -> av.VideoCodecContext:
    """What decodes the video with its transparency.

    Raises:
        MediaError: it has transparency that nothing here decodes; what lies under it was not meant to be seen.
    """
    has_alpha = any(key.lower() == "alpha_mode" and value == "1" for key, value in video.metadata.items())
    if not has_alpha:
        return video.codec_context
    name = ALPHA_DECODERS.get(video.codec_context.name)
    if name is None or name not in av.codecs_available:
        reason = f"has transparency that cannot be decoded ({video.codec_context.name}); save it as ProRes 4444 or VP9"
        raise MediaError(reason)
    decoder = av.CodecContext.create(name, "r")
    decoder.extradata, decoder.thread_count = video.codec_context.extradata, 1
    return decoder


def _is_shown(packet: av.Packet) -> bool:
    # VP8 has frames that only serve as references; the fifth bit marks them. Other codecs store such frames together
    # with a displayed one.
    hidden = packet.size and packet.stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
    return bool(packet.size and not packet.is_discard and not hidden)


def _seconds(ticks: int | None, video: VideoStream) -> float:
    return float((ticks or 0) * video.time_base)


def _nominal_rate(video: VideoStream) -> float:
    return float(video.average_rate or video.guessed_rate or UNKNOWN_RATE)


def _period(timed: av.Packet | av.VideoFrame, video: VideoStream) -> float:
    return _seconds(timed.duration, video) or 1 / _nominal_rate(video)


def _fps(frames: int, seconds: float, video: VideoStream) -> float:
    """Frames per second as the container says, unless it differs from the counted value by more than rounding."""
    nominal = _nominal_rate(video)
    return nominal if abs(frames / nominal - seconds) <= 2 * ROUNDING_SECONDS else frames / seconds


def _picture(frame: av.VideoFrame, video: VideoStream) -> Image.Image:
    """The frame, upright and with square pixels."""
    transparent = any(component.is_alpha for component in frame.format.components)
    width, height = _square_size(frame, video)
    levels_HWC = frame.to_ndarray(
        format="rgba" if transparent else "rgb24", width=width, height=height, interpolation=EXACT, threads=1
    )
    transpose = _transpose(frame)
    image = Image.fromarray(levels_HWC)
    return image if transpose is None else image.transpose(transpose)


def _square_size(frame: av.VideoFrame, video: VideoStream) -> tuple[int, int]:
    """Width and height in square pixels, before the frame is turned upright."""
    width = max(1, round(frame.width * (video.sample_aspect_ratio or 1)))
    check_pixels(width, frame.height)
    return width, frame.height


def _upright_size(frame: av.VideoFrame, video: VideoStream) -> tuple[int, int]:
    width, height = _square_size(frame, video)
    return (height, width) if _transpose(frame) in SIDEWAYS else (width, height)


def _colours(frame: av.VideoFrame) -> Colours:
    return "wide" if frame.color_trc in WIDE_TRANSFERS or frame.color_primaries in WIDE_PRIMARIES else ""


def _transpose(frame: av.VideoFrame) -> Image.Transpose | None:
    """The operation that turns the frame upright; None for matrices with other than right angles."""
    if "DISPLAYMATRIX" not in frame.side_data:
        return None
    matrix = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)
    return UPRIGHT.get(tuple(int(sign) for sign in np.sign(matrix[[0, 1, 3, 4]])))
