"""A whole tiny HunyuanVideo of picture to video, with the first frame as further channels and without guidance."""

from __future__ import annotations

from pathlib import Path

from tests.models import tiny_hunyuan_video, tiny_hunyuan_video_i2v
from tests.models.tiny_hunyuan_video_i2v import (  # noqa: F401
    SAMPLING,
    SIZES,
    STOCK,
    TEMPLATE,
    draw,
    features,
    features_of_pictures,
    pipeline,
    stock_latents,
    whole,
)


def write_folder(folder: Path) -> Path:
    channels = 2 * tiny_hunyuan_video.CHANNELS + 1
    return tiny_hunyuan_video_i2v.write_folder(folder, "latent_concat", in_channels=channels, guidance_embeds=False)
