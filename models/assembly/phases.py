"""The memory of what a run does beside training: caching, by each encoder on its own, and decoding samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.assembly.encoder_needs import GIB, Need, counted, reading_needs
from models.assembly.kept import weight_bytes
from models.assembly.live_bytes import ForwardRun
from models.foundation.checkpoints.weights import meta_tensors
from models.foundation.encoders.vae import ImageAutoencoder, distribution_of
from utils.dataset.encoders import Encoder
from utils.dataset.samples import Bucket
from utils.parallel.partition import Range

if TYPE_CHECKING:
    from models.assembly.memory import StagePlan

CHANNELS = ("in_channels", "input_channels")
"""Keys of a VAE's configuration, of which one says how many channels a picture has."""
SHORT_LATENTS = (3, 4)
"""Numbers of a latent's frames from which longer clips follow."""
RGB, RGBA = 3, 4
LARGE = 2**20
LITTLE = 2**28
"""Bytes that every card has room for."""


@dataclass(frozen=True)
class Decoding:
    """The bytes that it takes to decode a sample, with the VAE's weights.

    Attributes:
        whole: at once.
        tiled: in tiles, as happens where there is no room for that.
    """

    whole: int
    tiled: int


@dataclass(frozen=True)
class Phases:
    """What a run does beside training.

    Attributes:
        vae: which decodes samples.
        cached: the encoders whose features are cached.
        caching: the largest size, and how many samples are encoded together.
        live: the text encoders that encode captions when they are needed, and for how many samples at once.
        evaluated, sampled: a forward pass of all layers, of the largest size that is evaluated and of a sample; None if
            the run does not do so.
        latent_shape: of a sample.
    """

    vae: Encoder
    cached: Sequence[Encoder]
    caching: tuple[Bucket, int]
    live: tuple[Sequence[Encoder], int] = ((), 1)
    evaluated: ForwardRun | None = None
    sampled: ForwardRun | None = None
    latent_shape: Sequence[int] | None = None

    @cached_property
    def decoding(self) -> Decoding | None:
        """Of a sample."""
        return decoding_need(self.vae, self.latent_shape) if self.latent_shape else None

    @cached_property
    def caching_needs(self) -> list[Need]:
        """What each encoder takes while the cache is filled."""
        return list(caching_needs(self.cached, *self.caching))

    @cached_property
    def live_needs(self) -> list[Need]:
        """What each text encoder takes that stays on the device of the first stage."""
        encoders, batch = self.live
        return list(caching_needs(encoders, self.caching[0], batch))

    @property
    def staying(self) -> tuple[int, int]:
        """The bytes of their weights, and of what they take more when captions are encoded, by one after the other."""
        needs = self.live_needs
        return sum(need.weights for need in needs), max((need.activations or 0 for need in needs), default=0)

    def forward(self, pieces: Sequence[Range], held: int, live: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """The bytes at the peaks of evaluation and of sampling, of a stage that holds so many between two steps. The
        first stage decodes, in tiles where it must.

        Args:
            live: of text encoders that stay on its device: their weights, and what they take at once, which for
                samples they do not.
        """
        evaluation = held + sum(live) + self.evaluated.peak(pieces) if self.evaluated else 0
        if not self.sampled:
            return evaluation, 0
        decoded = self.decoding.tiled if self.decoding and pieces[0][0] == 0 else 0
        return evaluation, held + live[0] + max(self.sampled.peak(pieces), decoded)

    def peaks(self, plans: Sequence[StagePlan]) -> dict[str, int]:
        """The bytes at the peak of each phase, on the rank that takes most."""
        return {
            "caching": max((need.least for need in self.caching_needs), default=0),
            "training": max(plan.training for plan in plans),
            "evaluation": max(plan.evaluation for plan in plans),
            "sampling": max(plan.sampling for plan in plans),
        }

    def lines(self, plans: Sequence[StagePlan]) -> Iterator[str]:
        """Every phase with its peak on the rank that takes most, and which phase decides."""
        peaks = self.peaks(plans)
        remarks = {"caching": "; ".join(map(str, self.caching_needs)), "sampling": self._of_sampling(plans)}
        for phase, bytes_ in peaks.items():
            if bytes_:
                remark = remarks.get(phase)
                yield f"  {phase}: {bytes_ / GIB:.2f} GiB{f' ({remark})' if remark else ''}"
        yield f"  {max(peaks, key=peaks.__getitem__)} takes most"

    def _of_sampling(self, plans: Sequence[StagePlan]) -> str:
        if self.sampled is None or self.decoding is None:
            return "without the VAE, which cannot be counted" if self.sampled else ""
        first = plans[0]
        beside = first.weights + first.between + first.live[0]
        told = f"{(beside + self.decoding.whole) / GIB:.2f} where the VAE decodes at once"
        if self.decoding.tiled == self.decoding.whole:
            return told
        return f"{told}, {(beside + self.decoding.tiled) / GIB:.2f} in tiles, if there is no room for that"


def caching_needs(encoders: Iterable[Encoder], bucket: Bucket, batch: int) -> Iterator[Need]:
    """What each encoder takes for this many samples of the largest size; they come one after the other."""
    for encoder in encoders:
        if isinstance(encoder, ImageAutoencoder):
            vae = empty_vae(encoder)
            yield Need(encoder.name, weight_bytes([vae]), *encoding_bytes(encoder, vae, bucket, batch))
        else:
            yield from reading_needs([encoder], bucket, batch)


def encoding_bytes(
    encoder: ImageAutoencoder, vae: nn.Module, bucket: Bucket, batch: int
) -> tuple[int | None, int | None]:
    """What a VAE on the meta device takes beside its weights to encode so many samples of a size: at once, and in
    tiles. None for what cannot be counted, or not be done."""
    channels = _channels(vae)
    (latent_shape, _) = next(iter(encoder.feature_shapes(bucket).values()))
    if len(latent_shape) == 3:

        def encoded(frames: int, height: int, width: int) -> Any:
            return _encoded(vae, _empty(encoder, batch, channels, height, width))

        group = 1
    else:

        def encoded(frames: int, height: int, width: int) -> Any:
            return _encoded(vae, _empty(encoder, batch, channels, frames, height, width))

        group = (bucket.frames - 1) // max(latent_shape[1] - encoder.leading - 1, 1)
    few, some = (1 + group * (count - 1) for count in SHORT_LATENTS)
    size = bucket.height, bucket.width
    whole = _of_clip(vae, lambda frames: encoded(frames, *size), bucket.frames, (few, some))
    if not hasattr(vae, "enable_tiling") or _is_little(whole):
        return whole, None
    vae.enable_tiling()
    # Tiles are made one after the other: four of them, and two parts of a clip, take as much as all. What grows is
    # the input.
    canvas = [min(side, 2 * _tile_of(vae, name)) for side, name in zip(size, ("height", "width"), strict=True)]
    in_pieces = getattr(vae, "use_framewise_encoding", False)
    frames = min(bucket.frames, 2 * _tile_of(vae, "num_frames") + 1 if in_pieces else LARGE)
    tiled = _of_clip(vae, lambda count: encoded(count, *canvas), frames, (few, some))
    left_out = batch * channels * (bucket.pixels - frames * canvas[0] * canvas[1]) * encoder.dtype.itemsize
    return whole, None if tiled is None else tiled + left_out


def _channels(vae: nn.Module) -> int:
    """The number of channels of a picture. The configuration of Wan 2.2's VAE counts them after it has been cut into
    patches, that of Mochi's with sines and cosines of the colours."""
    told = next((vae.config[key] for key in CHANNELS if vae.config.get(key)), RGB)
    if told <= RGBA:
        return told
    return told // vae.config["patch_size"] ** 2 if "patch_size" in vae.config else vae.config["out_channels"]


def _is_little(activations: int | None) -> bool:
    """Whether every card has room for them, so that tiles are never made."""
    return activations is not None and activations < LITTLE


def _tile_of(vae: nn.Module, side: str) -> int:
    """The size of a tile, in pixels or in frames."""
    return getattr(vae, f"tile_sample_min_{side}", getattr(vae, "tile_sample_min_size", LARGE))


def decoding_need(autoencoder: Encoder, latent_shape: Sequence[int]) -> Decoding | None:
    """What the VAE takes for one sample; None if it cannot be counted."""
    if not isinstance(autoencoder, ImageAutoencoder):
        return None
    vae = empty_vae(autoencoder)
    weights, whole = weight_bytes([vae]), _of_decoding(autoencoder, vae, latent_shape)
    if whole is None:
        return None
    if not hasattr(vae, "enable_tiling") or _is_little(whole):
        return Decoding(weights + whole, weights + whole)
    vae.enable_tiling()
    tiled = _of_decoding(autoencoder, vae, latent_shape)
    return Decoding(weights + whole, weights + min(whole, whole if tiled is None else tiled))


def empty_vae(encoder: ImageAutoencoder) -> nn.Module:
    """The VAE of an encoder, on the meta device."""
    return encoder.family.load(encoder.folder, encoder.file, encoder.dtype, meta_tensors).to("meta").eval()


def _of_decoding(encoder: ImageAutoencoder, vae: nn.Module, latent_shape: Sequence[int]) -> int | None:
    def decoded(*shape: int) -> Any:
        latents = encoder.cells_of(_empty(encoder, 1, *shape))
        return vae.decode(latents, *encoder.told(vae, latents))

    if len(latent_shape) == 3:
        return counted(partial(decoded, *latent_shape))
    channels, frames, *size = latent_shape
    return _of_clip(vae, lambda count: decoded(channels, count, *size), frames, SHORT_LATENTS)


def _of_clip(vae: nn.Module, compute: Callable[[int], Any], frames: int, short: tuple[int, int]) -> int | None:
    """What a clip of so many frames takes. VAEs with a memory of frames, as Wan's, go through clips part by part, so
    that each further part adds as much as the one before: long clips follow from two short ones."""
    few, some = short
    if frames <= some or not hasattr(vae, "clear_cache"):
        return counted(partial(compute, frames))
    taken = [counted(partial(compute, count)) for count in short]
    if None in taken:
        return None
    return taken[1] + (taken[1] - taken[0]) * (frames - some) // (some - few)


def _encoded(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return distribution_of(vae.encode(pixels)).mode()


def _empty(encoder: ImageAutoencoder, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=encoder.dtype, device="meta")
