"""Small videos whose frames can be told apart after lossy coding: each shows its own number as black and white fields.

Shapes: H height, W width, C channels.
"""

from fractions import Fraction

import av
import numpy as np

WIDTH, HEIGHT = 64, 48
COLUMNS, ROWS = 4, 2


def numbered(number, width=WIDTH, height=HEIGHT):
    """A picture, levels_HWC, of a number below 256."""
    bits = [255 * (number >> bit & 1) for bit in range(COLUMNS * ROWS)]
    fields = np.array(bits, np.uint8).reshape(ROWS, COLUMNS)
    return np.ascontiguousarray(fields.repeat(height // ROWS, 0).repeat(width // COLUMNS, 1)[..., None].repeat(3, 2))


def number_of(levels_HWC):
    """The number in such a picture, of any size."""
    height, width = levels_HWC.shape[:2]
    y = [(2 * row + 1) * height // (2 * ROWS) for row in range(ROWS)]
    x = [(2 * column + 1) * width // (2 * COLUMNS) for column in range(COLUMNS)]
    bits = np.asarray(levels_HWC)[np.ix_(y, x)].mean(-1).ravel() > 127
    return sum(1 << int(bit) for bit in np.flatnonzero(bits))


def numbers_of(pixels_CFHW):
    return [number_of(levels_HWC) for levels_HWC in ((pixels_CFHW + 1) * 127.5).permute(1, 2, 3, 0).numpy()]


def write_video(
    path,
    frames=40,
    codec="libx264",
    fps=24,
    pix_fmt="yuv420p",
    options=None,
    times=None,
    container_options=None,
    setup=lambda stream: None,
    picture=numbered,
):
    """Writes a video of numbered frames.

    Args:
        times: when each frame is shown, in milliseconds; at a constant rate if None.
        setup: called with the stream before anything is encoded.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        height, width = picture(0).shape[:2]
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        unit = Fraction(1, 1000) if times else 1 / Fraction(fps).limit_denominator(1001)
        stream.codec_context.time_base = unit
        setup(stream)
        for index in range(frames):
            levels = picture(index)
            frame = av.VideoFrame.from_ndarray(levels, "rgba" if levels.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = times[index] if times else index, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(path):
    """The reference: when each frame is shown, in seconds after the first, and its number, by decoding all."""
    with av.open(str(path)) as container:
        unit = container.streams.video[0].time_base
        frames = [(frame.pts, number_of(frame.to_ndarray(format="rgb24"))) for frame in container.decode(video=0)]
    return [float((pts - frames[0][0]) * unit) for pts, _ in frames], [number for _, number in frames]
