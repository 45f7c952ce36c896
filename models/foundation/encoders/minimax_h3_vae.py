"""The VAE of MiniMax-H3 as an encoder for the cache, and as a decoder for samples.

It goes through clips in pieces, of which the last latent frames of each one but the first overlap with the next piece:
17 n + 5 frames are 5 n + 2 latent frames, and a picture is one.

Shapes: B batch, C channels, F frames, K key frames, H W pixels, f h w latent cells.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from models.foundation.encoders.vae import Family, Tensors, in_the_room_there_is, picture_noise
from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.inputs import ENDS, as_clip
from utils.dataset.samples import Bucket

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1], as in ImageNet: the VAE takes and gives pixels in these units."""
GIVEN_SEED, GIVEN_NOISE = 42, 0.001
"""The seed by which the stock pipeline draws all key frames and references, and their part of noise."""


RENAMED = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^decoder\.x_embedder\.", "decoder.proj_in."),
    (r"\.attn\.to_out\.(?=weight|bias)", ".attn.to_out.0."),
    (r"\.ff\.w1\.", ".ff.net.0.proj."),
    (r"\.ff\.w2\.", ".ff.net.2."),
)
"""The publisher's names, which are ComfyUI's too, and diffusers'."""
OF_ITS_TRAINING = ("decoder.mask_token", "latents_mean", "latents_std")
"""What is in the publisher's file and not in diffusers' class, whose configuration has the latter two."""


def _from_publisher(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The publisher's tensors under diffusers' names. Its queries, keys and values are one matrix, in turn for each
    head, and the gate of a feed-forward network comes before what it multiplies."""
    made = {}
    for name, tensor in tensors.items():
        own = name
        for theirs, ours in RENAMED:
            own = re.sub(theirs, ours, own)
        if ".attn.to_qkv." in own:
            heads = rearrange(tensor, "(h k d) ... -> k (h d) ...", k=3, h=config["decoder_num_attention_heads"])
            made |= {
                own.replace("to_qkv", part): one for part, one in zip(("to_q", "to_k", "to_v"), heads, strict=True)
            }
        elif ".ff.net.0.proj." in own:
            made[own] = torch.cat(tensor.chunk(2)[::-1])
        elif own not in OF_ITS_TRAINING:
            made[own] = tensor
    return made


MINIMAX_H3 = Family(
    "AutoencoderKLMiniMaxH3",
    (
        "clip_length",
        "decoder_num_attention_heads",
        "latent_channels",
        "latents_mean",
        "latents_std",
        "spatial_downsample_factors",
        "temporal_downsample_factors",
        "token_drop",
    ),
    "down_blocks.",
    _from_publisher,
)


def cell_of(config: dict[str, Any]) -> int:
    """How many pixels of a side a latent cell covers."""
    return math.prod(config["spatial_downsample_factors"])


def pieces_of(config: dict[str, Any]) -> tuple[int, int]:
    """The frames of a piece, and how many more a clip of pieces has."""
    group, frames = math.prod(config["temporal_downsample_factors"]), config["clip_length"]
    missing = -frames % group
    kept = -config["token_drop"] % ((frames + missing) // group)
    return frames, max(kept * group - missing, 0)


def frame_groups(config: dict[str, Any], frames: int) -> list[int]:
    """How many frames each latent frame covers: the first one of a piece covers what its groups leave of the piece."""
    piece, group = config["clip_length"], math.prod(config["temporal_downsample_factors"])
    groups = [piece - piece // group * group or group, *[group] * ((piece - 1) // group)]
    covered = list(islice(cycle(groups), minimax_h3_latent_size(config, 0, 0, frames)[1]))
    return covered if frames > 1 else [1]


def minimax_h3_latent_size(config: dict[str, Any], width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """The shape (C, f, h, w) of a latent."""
    cell, group, piece = cell_of(config), math.prod(config["temporal_downsample_factors"]), config["clip_length"]
    latent_frames = 1
    if frames > 1:
        latent_frames = math.ceil(frames / piece) * math.ceil(piece / group) - config["token_drop"]
    return config["latent_channels"], latent_frames, height // cell, width // cell


class MiniMaxH3Autoencoder(WanAutoencoder):
    """The VAE of MiniMax-H3 as an `Encoder`: pixels of pictures and clips -> latents (z - mean) / std, per channel. It
    computes in float32 whatever `dtype` is, as in the stock pipeline, and in tiles of 256 x 256 pixels, in which it was
    published: what it would make of larger ones differs."""

    family, latent_size = MINIMAX_H3, staticmethod(minimax_h3_latent_size)

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, **how: Any):
        super().__init__(folder, file, torch.float32, **how)

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, f, h, w) of `pixels_BCFHW` in [-1, 1], as `draw` says."""
        return super().encode(**{name: self._units(pixels_BCFHW) for name, pixels_BCFHW in inputs.items()})

    @torch.no_grad()
    def decode(self, latents_BCfhw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, F, H, W) in [-1, 1]."""
        mean, std = self._statistics(latents_BCfhw.shape[2])
        pixels = in_the_room_there_is(self.vae, "decode", latents_BCfhw.to(self.device, self.dtype) * std + mean).sample
        mean, std = self._of_pixels(self.device)
        return ((pixels * std + mean) * 2 - 1).clamp(-1, 1)

    def _units(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] as the VAE takes them."""
        mean, std = self._of_pixels(pixels_BCFHW.device)
        return ((pixels_BCFHW + 1) / 2 - mean) / std

    def _of_pixels(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(values, device=device).view(-1, 1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))


class MiniMaxH3Given(MiniMaxH3Autoencoder):
    """The same of what the model is given beside the noisy clip. It is drawn from its distribution and rounded to
    float16 as in the stock pipeline, by the same numbers for all, and has as little noise as the model has learned to
    see in it, which is always the same for a picture or clip."""

    def _given(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, f, h, w) of pixels in [-1, 1]."""
        return torch.cat([self._of_one(pixels_1CFHW) for pixels_1CFHW in pixels_BCFHW.split(1)])

    def _of_one(self, pixels_1CFHW: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(self._units(pixels_1CFHW).to(self.device, self.dtype)).latent_dist
        drawn = posterior.sample(torch.Generator().manual_seed(GIVEN_SEED)).to(torch.float16).to(self.dtype)
        mean, std = self._statistics(drawn.shape[2])
        latents = (drawn - mean) / std
        return torch.lerp(latents, picture_noise(pixels_1CFHW, latents), GIVEN_NOISE)


class MiniMaxH3KeyFrames(MiniMaxH3Given):
    """Of a clip's first frame, and of its last, each as a picture by itself: `key_frame_latents` (B, C, K, h, w).

    Args:
        to_last: the last frame too, which in samples is a second picture.
    """

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, *, to_last: bool):
        super().__init__(folder, file, dtype)
        self.kept = (0, -1) if to_last else (0,)
        self.reads = (ENDS,) if to_last else ("pixels",)
        self.name = "vae_first_and_last_frame" if to_last else "vae_first_frame"
        self.outputs = ["key_frame_latents"]

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents of the frames of `pixels_BCFHW` in [-1, 1]."""
        (pixels_BCFHW,) = inputs.values()
        frames = [self._given(pixels_BCFHW[:, :, [frame]]) for frame in self.kept]
        return {"key_frame_latents": torch.cat(frames, dim=2)}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        ((channels, _, *cells), dtype) = super().feature_shapes(bucket)["key_frame_latents"]
        return {"key_frame_latents": ((channels, len(self.kept), *cells), dtype)}


class MiniMaxH3Reference(MiniMaxH3Given):
    """Of a control image or clip, which is a reference: `control_latents` (B, C, f, h, w), or `control_2_latents` and
    so on."""

    def __init__(self, *others: Any, reads: str):
        super().__init__(*others, reads=reads)
        self.reads = (as_clip(reads),)

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        (pixels_BCFHW,) = inputs.values()
        return dict.fromkeys(self.outputs, self._given(pixels_BCFHW))

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape for a picture."""
        return super().feature_shapes(replace(bucket, frames=1))
