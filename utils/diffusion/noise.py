"""The noise of a sample, and the ways to make it other than plain.

Every function takes and gives one sample, without the batch: a sample's noise depends on its name alone, not on what it
is batched with. Shapes: latents (C H W) of pictures or (C F H W) of clips, written `C...`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange

from utils.diffusion import seeds

DEFAULT_DISCOUNT = 0.3
# A level of the pyramid is between 2 and 4 times smaller than the one before.
SMALLEST_RATIO, LARGEST_RATIO = 2.0, 4.0


@dataclass(frozen=True)
class NoiseOptions:
    """How noise is made.

    Attributes:
        noise_offset: standard deviation of a number that is added to a whole channel.
        adaptive_noise_scale: this times the absolute mean of the sample's channel is added to the offset.
        multires_noise_iterations: levels of the pyramid; 0 for plain noise.
        multires_noise_discount: by what a level counts less than the one before.
        ip_noise_gamma: strength of the noise that the denoiser sees beside the noise that it is asked for.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """

    noise_offset: float = 0.0
    adaptive_noise_scale: float = 0.0
    multires_noise_iterations: int = 0
    multires_noise_discount: float = DEFAULT_DISCOUNT
    ip_noise_gamma: float = 0.0

    def __post_init__(self) -> None:
        check_noise(self)


def check_noise(options: NoiseOptions) -> None:
    """Whether the options are in their ranges and go together.

    Raises:
        ValueError: they do not; names which.
    """
    for name in ("noise_offset", "multires_noise_iterations", "ip_noise_gamma"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} must not be below 0, and is {getattr(options, name)}")
    if not 0.0 < options.multires_noise_discount <= 1.0:
        raise ValueError(
            f"multires_noise_discount must be above 0 and at most 1, and is {options.multires_noise_discount}"
        )
    if options.noise_offset and options.multires_noise_iterations:
        raise ValueError(
            "noise_offset and multires_noise_iterations both add coarse noise, and the pyramid's lowest level is an "
            "offset already; leave one out"
        )
    if options.adaptive_noise_scale and not options.noise_offset:
        raise ValueError("adaptive_noise_scale changes noise_offset, which is 0; set noise_offset, or leave it out")


def sample_noise(clean: torch.Tensor, options: NoiseOptions, seed: int, *name: object) -> torch.Tensor:
    """The noise (C...) of a sample, float32 on the CPU; without options plain normal numbers.

    Args:
        clean: its latents (C...).
        name: the draw, see `utils.diffusion.seeds`.
    """
    noise = seeds.normal(tuple(clean.shape), seed, *name)
    if options.multires_noise_iterations:
        return _pyramid(noise, options.multires_noise_iterations, options.multires_noise_discount, seed, *name)
    return noise + _offset(clean, options, seed, *name) if options.noise_offset else noise


def perturbed(noise: torch.Tensor, options: NoiseOptions, seed: int, *name: object) -> torch.Tensor:
    """The noise (C...) with which x_t is made; the target keeps `noise`: noise + gamma * another noise.
    Ning et al. 2023 ("Input perturbation reduces exposure bias in diffusion models")."""
    if not options.ip_noise_gamma:
        return noise
    return noise + options.ip_noise_gamma * seeds.normal(tuple(noise.shape), seed, *name, "perturbation")


def _offset(clean: torch.Tensor, options: NoiseOptions, seed: int, *name: object) -> torch.Tensor:
    """(C, 1, ...): noise_offset times a normal number per channel (Guttenberg 2023, "Diffusion with offset noise").

    With `adaptive_noise_scale` the offset follows the channel's mean, and is not below 0 (kohya).
    """
    ones = [1] * (clean.ndim - 1)
    strength = torch.full((clean.shape[0], *ones), options.noise_offset)
    if options.adaptive_noise_scale:
        means = clean.float().flatten(1).mean(1).abs().view(-1, *ones)
        strength = (strength + options.adaptive_noise_scale * means).clamp(min=0.0)
    return strength * seeds.normal((clean.shape[0], *ones), seed, *name, "offset")


def _pyramid(noise: torch.Tensor, iterations: int, discount: float, seed: int, *name: object) -> torch.Tensor:
    """Noise plus coarser and coarser noise, enlarged, level i times discount^i, scaled to variance 1. Whitaker 2023
    ("Multi-resolution noise for diffusion model training").

    The frames of a clip have pyramids of their own. The variance is measured within the sample, not, as elsewhere, in
    the batch.
    """
    is_clip = noise.ndim == 4
    layers_1LHW = rearrange(noise, "c f h w -> 1 (c f) h w" if is_clip else "c h w -> 1 c h w")
    _, layers, height, width = layers_1LHW.shape
    for level in range(iterations):
        share = seeds.uniform(seed, *name, "pyramid ratio", level)
        ratio = (SMALLEST_RATIO + (LARGEST_RATIO - SMALLEST_RATIO) * share) ** level
        size = (max(1, int(height / ratio)), max(1, int(width / ratio)))
        coarse_1LHW = seeds.normal((1, layers, *size), seed, *name, "pyramid", level)
        enlarged_1LHW = torch.nn.functional.interpolate(coarse_1LHW, (height, width), mode="bilinear")
        layers_1LHW = layers_1LHW + discount**level * enlarged_1LHW
        if 1 in size:
            break
    scaled_1LHW = layers_1LHW / layers_1LHW.std()
    if is_clip:
        return rearrange(scaled_1LHW, "1 (c f) h w -> c f h w", c=noise.shape[0])
    return rearrange(scaled_1LHW, "1 c h w -> c h w")
