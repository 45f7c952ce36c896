"""Tensors to media files.

Shapes: C channels (RGB), F frames, H height, W width. Pixels are in [-1, 1]; values outside are clipped.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from PIL import Image

if TYPE_CHECKING:
    import av

# Visually almost lossless, since samples are looked at closely.
QUALITY = {"crf": "17"}


def tensor_to_image(pixels_CFHW: torch.Tensor) -> Image.Image:
    """The first frame as an RGB picture."""
    return Image.fromarray(_levels_FHWC(pixels_CFHW[:, :1])[0].numpy())


def write_clip(pixels_CFHW: torch.Tensor, fps: float, path: Path, comment: str = "") -> None:
    """Writes a clip of `fps` frames per second as H.264 in MP4, which plays nearly everywhere.

    H.264 halves the resolution of colours, so sizes must be even: the last row or column of an odd size is repeated.

    Args:
        comment: a text in the file's metadata.

    Raises:
        ImportError: PyAV is not installed.
    """
    # Imported here, since runs of pictures can do without it.
    import av
    from av.video.reformatter import Colorspace, Interpolation

    # FFmpeg's default takes shortcuts that shift colours.
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
    height, width = pixels_CFHW.shape[2:]
    pad = (0, width % 2, 0, height % 2)
    levels_FHWC = _levels_FHWC(torch.nn.functional.pad(pixels_CFHW.float(), pad, mode="replicate"))
    # The format is given, since the file may first have another name.
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        exact_fps = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=exact_fps, options=QUALITY)
        stream.width, stream.height, stream.pix_fmt = width + pad[1], height + pad[3], "yuv420p"
        _tag(stream.codec_context)
        for index, levels_HWC in enumerate(levels_FHWC.numpy()):
            frame = av.VideoFrame.from_ndarray(levels_HWC, "rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=exact, threads=1
            )
            frame.pts, frame.time_base = index, 1 / exact_fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _tag(context: av.VideoCodecContext) -> None:
    """Declares the standard of the colour coding, which players would otherwise guess from the size."""
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def _levels_FHWC(pixels_CFHW: torch.Tensor) -> torch.Tensor:
    levels_CFHW = pixels_CFHW.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return rearrange(levels_CFHW, "c f h w -> f h w c").contiguous().cpu()
