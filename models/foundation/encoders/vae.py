"""VAEs as encoders for the cache, and as decoders for samples.

Shapes: B batch, C channels, F frames, H W pixels, h w latent cells.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import nn

from models.foundation.checkpoints.configs import made_of
from models.foundation.checkpoints.folders import read_config
from models.foundation.checkpoints.headers import fingerprint
from models.foundation.checkpoints.weights import assign, build_empty, load_tensors, meta_tensors
from utils.dataset.samples import Bucket
from utils.device_memory import lacks_memory
from utils.diffusion import seeds

logger = logging.getLogger(__name__)

Draw = Literal["sample", "mode", "distribution"]
Tensors = dict[str, torch.Tensor]
NOISE_SEED = 0
"""The seed of the draw from a picture's distribution. It does not depend on the run, so that all runs can share a
cache."""


@dataclass(frozen=True)
class Family:
    """A kind of VAE on disk: a diffusers folder, possibly with weights from another file, with diffusers' or original
    names.

    Attributes:
        model_class: name of the class of diffusers.
        keys: keys that its configuration must have.
        own_name: part of a tensor's name that only occurs in files of diffusers.
        convert: (tensors of another program, configuration) -> tensors under diffusers' names.
        prefix: of its tensors in checkpoints with other parts.
        older: (part of a name in files of older diffusers, the current name).
        one_by_one: whether its class can only make one picture or clip at a time.
    """

    model_class: str
    keys: tuple[str, ...]
    own_name: str
    convert: Callable[[Tensors, dict[str, Any]], Tensors]
    prefix: str = ""
    older: tuple[tuple[str, str], ...] = ()
    one_by_one: bool = False

    def config(self, folder: Path, file: Path | None) -> dict[str, Any]:
        """The configuration: that of a diffusers folder, unless `file` is a folder with its own.

        Raises:
            UserError: it is missing, damaged, or belongs to another model.
        """
        return read_config(self._config_folder(folder, file), model=self.model_class, keys=self.keys)

    @staticmethod
    def _config_folder(folder: Path, file: Path | None) -> Path:
        return file if file is not None and (file / "config.json").is_file() else folder / "vae"

    def load(
        self,
        folder: Path,
        file: Path | None,
        dtype: torch.dtype,
        read: Callable[[Path, torch.dtype, str], Tensors] = load_tensors,
    ) -> nn.Module:
        """The VAE.

        Args:
            folder: the diffusers folder with `vae/config.json`.
            file: file or folder of weights that replace the folder's.
            read: gives the tensors of a file or folder; with `meta_tensors` the VAE is on the meta device.

        Raises:
            UserError: the file contains no VAE that fits the configuration.
        """
        config = self.config(folder, file)
        vae = build_empty(lambda: made_of(self.model_class, config, self._config_folder(folder, file) / "config.json"))
        source = file or folder / "vae"
        tensors = read(source, dtype, self.prefix)
        if not any(self.own_name in name for name in tensors):
            tensors = self.convert(tensors, config)
        for old, new in self.older:
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        assign(vae, tensors, source)
        if self.one_by_one:
            vae.enable_slicing()
        return vae


def _from_ldm(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors with the names of the publisher's checkpoints, under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return convert_ldm_vae_checkpoint(tensors, config)


AUTOENCODER_KL = Family(
    "AutoencoderKL",
    ("block_out_channels", "latent_channels", "scaling_factor"),
    "down_blocks.",
    _from_ldm,
    prefix="first_stage_model.",
    older=((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")),
)
vae_config = AUTOENCODER_KL.config


class ImageAutoencoder:
    """An image VAE as an `Encoder`: pixels -> latents (z - shift) * scale.

    Args:
        folder: the diffusers folder with `vae/config.json`.
        file: file or folder of weights that replace the folder's.
        dtype: the type in which it encodes.
        reads: its input, "pixels" or "control" ("control_2" ...), which also names its store and features.
        draw: what it yields from the distribution of a picture's latents: one sample, which is always the same for a
            picture; the mode; or mean and standard deviation, so that mean + std * noise is a latent.
    """

    family: ClassVar[Family] = AUTOENCODER_KL
    leading: int = 0
    """How many latent frames, each of a picture by itself, come before those of the clip."""

    def __init__(
        self, folder: Path, file: Path | None, dtype: torch.dtype, *, reads: str = "pixels", draw: Draw = "sample"
    ):
        self.folder, self.file, self.dtype, self.draw = folder, file, dtype, draw
        self.name = "vae" if reads == "pixels" else f"vae_{reads}"
        self.reads = (reads,)
        latents = "latents" if reads == "pixels" else f"{reads}_latents"
        self.outputs = [f"{latents}_mean", f"{latents}_std"] if draw == "distribution" else [latents]
        self.vae: nn.Module | None = None
        self.device = torch.device("cpu")

    @cached_property
    def fingerprint(self) -> str:
        config = self.folder / "vae" / "config.json"
        weights = [self.file, config] if self.file else [self.folder / "vae"]
        return fingerprint("vae", self.draw, str(self.dtype), *weights)

    def check(self) -> None:
        """Whether the weights fit the configuration, from their headers alone.

        Raises:
            UserError: they do not.
        """
        self.family.load(self.folder, self.file, self.dtype, meta_tensors)

    def load(self, device: torch.device) -> None:
        self.device = device
        self.vae = self.family.load(self.folder, self.file, self.dtype).to(device).eval().requires_grad_(False)

    def unload(self) -> None:
        self.vae = None

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, h, w) of `pixels_BCFHW` or `control_BCFHW` in [-1, 1], F = 1, as `draw` says."""
        (pixels_BCFHW,) = inputs.values()
        pixels_BCHW = rearrange(pixels_BCFHW, "b c 1 h w -> b c h w").to(self.device, self.dtype)
        posterior = distribution_of(in_the_room_there_is(self.vae, "encode", pixels_BCHW))
        shift, scale = self.shift, self.vae.config.scaling_factor
        latents = posterior.mode()
        if self.draw == "sample":
            latents = latents + posterior.std * picture_noise(pixels_BCFHW, latents)
        yielded = [(latents - shift) * scale, posterior.std * scale]
        return dict(zip(self.outputs, yielded, strict=False))

    @property
    def shift(self) -> float:
        """What is taken from latents before they are scaled."""
        return self.vae.config.get("shift_factor") or 0.0

    @staticmethod
    def cells_of(latents: torch.Tensor) -> torch.Tensor:
        """Latents in the form that the VAE itself has them."""
        return latents

    @torch.no_grad()
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, 1, H, W) in [-1, 1]."""
        latents = latents_BChw.to(self.device, self.dtype) / self.vae.config.scaling_factor + self.shift
        return rearrange(
            in_the_room_there_is(self.vae, "decode", latents).sample.float(), "b c h w -> b c 1 h w"
        ).clamp(-1, 1)

    def told(self, vae: nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the VAE is told beside the latents that it decodes."""
        return ()

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        config = self.family.config(self.folder, self.file)
        cell = 2 ** (len(config["block_out_channels"]) - 1)
        shape = (config["latent_channels"], bucket.height // cell, bucket.width // cell)
        return dict.fromkeys(self.outputs, (shape, self.dtype))


class UnshiftedAutoencoder(ImageAutoencoder):
    """An image VAE as an `Encoder`: pixels -> latents z * scale, also where its configuration has a shift."""

    shift = 0.0

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint("unshifted", super().fingerprint)


@dataclass(frozen=True)
class Certain:
    """Latents as a distribution of no width, as `DiagonalGaussianDistribution` of diffusers is of some."""

    latents: torch.Tensor

    def mode(self) -> torch.Tensor:
        return self.latents

    @property
    def std(self) -> torch.Tensor:
        return torch.zeros_like(self.latents)


def distribution_of(encoded: Any) -> Any:
    """The distribution of the latents that the class of a VAE has encoded."""
    return encoded.latent_dist if hasattr(encoded, "latent_dist") else Certain(encoded.latent)


def in_the_room_there_is(vae: nn.Module, method: str, values: torch.Tensor, *further: Any) -> Any:
    """What a VAE makes of pictures or latents. Where the GPU has no memory for that, it is made in overlapping tiles,
    from then on.

    Raises:
        RuntimeError: there is none for tiles either, or the VAE makes none.
    """
    try:
        return getattr(vae, method)(values, *further)
    except RuntimeError as error:
        tiles = hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
        if not (tiles and lacks_memory(error)):
            raise
    # Behind the `except`, which holds what the attempt has made.
    size = " x ".join(str(side) for side in values.shape[2:])
    logger.warning(
        "the GPU's memory is too small for the VAE to %s %s at once: it does so in overlapping tiles, between which "
        "the result differs a little",
        method,
        size,
    )
    torch.cuda.empty_cache()
    vae.enable_tiling()
    return getattr(vae, method)(values, *further)


def picture_noise(pixels_BCFHW: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Normal noise that depends only on each picture, not on the batch in which it is encoded."""
    noise = torch.empty(latents.shape)
    for index, pixels in enumerate(pixels_BCFHW):
        noise[index] = seeds.normal(latents.shape[1:], NOISE_SEED, "latents", content_of(pixels))
    return noise.to(latents)


def content_of(pixels: torch.Tensor) -> str:
    """A name of a picture or clip that follows from all its values."""
    return hashlib.blake2b(pixels.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()
