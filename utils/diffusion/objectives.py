"""What the denoiser is asked to predict.

Shapes: B batch, then the latent's own dimensions (C H W for pictures, C F H W for clips), written `...`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from utils.diffusion.schedules import NoiseSchedule, over_sample

Kind = Literal["flow", "epsilon", "v", "edm"]


class Objective(Protocol):
    """What training and sampling need to know about a prediction.

    Attributes:
        kind: decides which options are allowed or refused (`utils.diffusion.checks`).
    """

    kind: ClassVar[Kind]

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """x_t as the denoiser takes it, in the shape of `clean` (B, ...), at noise levels t_B in [0, 1]."""

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """What the denoiser should output, in the shape of `clean`."""

    def compared(self, output: torch.Tensor) -> torch.Tensor:
        """The part of the denoiser's output that is compared with the target."""

    def for_scheduler(self, prediction: torch.Tensor) -> torch.Tensor:
        """The denoiser's output as the stock scheduler of diffusers takes it."""

    def model_time(self, t_B: torch.Tensor) -> torch.Tensor:
        """The time (B,) that the denoiser takes at noise levels t_B."""

    def snr(self, t_B: torch.Tensor) -> torch.Tensor:
        """The signal-to-noise ratio (B,): the squared factor of the picture in x_t over that of the noise."""


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: x_t = (1 - t) x_0 + t n, and the velocity n - x_0 (Liu et al. 2022; Lipman et al. 2022).

    Attributes:
        predicts_data_minus_noise: the denoiser's output is x_0 - n (HiDream, Lumina 2, Z-Image), not n - x_0.
        time_is_cleanness: the denoiser takes 1 - t (Lumina 2, Z-Image), not t.
        time_scale: factor on that time; 1000 for many models.
    """

    kind: ClassVar[Kind] = "flow"
    predicts_data_minus_noise: bool = False
    time_is_cleanness: bool = False
    time_scale: float = 1.0

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """x_t, in the shape of `clean` (B, ...)."""
        t = over_sample(t_B, clean)
        return (1.0 - t) * clean + t * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """What the denoiser should output, in the shape of `clean` (B, ...)."""
        velocity = noise - clean
        return -velocity if self.predicts_data_minus_noise else velocity

    def compared(self, output: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return output

    def for_scheduler(self, prediction: torch.Tensor) -> torch.Tensor:
        """The velocity n - x_0 = dx/dt."""
        return -prediction if self.predicts_data_minus_noise else prediction

    def model_time(self, t_B: torch.Tensor) -> torch.Tensor:
        """t or 1 - t, scaled."""
        return (1.0 - t_B if self.time_is_cleanness else t_B) * self.time_scale

    def snr(self, t_B: torch.Tensor) -> torch.Tensor:
        """((1 - t) / t)^2."""
        return ((1.0 - t_B) / t_B).square()


@dataclass(frozen=True)
class Epsilon:
    """DDPM, predicting the noise (Ho et al. 2020): x_t = sqrt(abar) x_0 + sqrt(1 - abar) n at step floor(t N).

    Attributes:
        schedule: which abar the steps have.
        learns_sigma: the output has twice the latent's channels; the second half is about the variance of a step (see
            `utils.diffusion.learned_variance`), and what is said here holds for the first.

    Raises:
        ValueError: the schedule ends in noise alone, from which the noise is no question.
    """

    kind: ClassVar[Kind] = "epsilon"
    schedule: NoiseSchedule = NoiseSchedule()
    learns_sigma: bool = False

    def __post_init__(self) -> None:
        if self.schedule.zero_terminal_snr and self.kind == "epsilon":
            raise ValueError(
                "zero terminal SNR needs a model that predicts v: where x_t is noise alone, a model that predicts the "
                "noise learns nothing of the picture (Lin et al. 2023)"
            )

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """x_t, in the shape of `clean` (B, ...)."""
        picture_share, noise_share = self.schedule.coefficients(t_B, clean)
        return picture_share * clean + noise_share * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """The noise."""
        return noise

    def compared(self, output: torch.Tensor) -> torch.Tensor:
        """The mean part: all of it, or the first half of the channels."""
        return output.chunk(2, dim=1)[0] if self.learns_sigma else output

    def for_scheduler(self, prediction: torch.Tensor) -> torch.Tensor:
        """The mean part."""
        return self.compared(prediction)

    def model_time(self, t_B: torch.Tensor) -> torch.Tensor:
        """The integer step, int64."""
        return self.schedule.step(t_B)

    def snr(self, t_B: torch.Tensor) -> torch.Tensor:
        """abar / (1 - abar) at the step."""
        return self.schedule.snr(t_B)

    def clean_of(self, prediction: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """The x_0 that the mean part of an output implies, in the shape of x_t (B, ...)."""
        picture_share, noise_share = self.schedule.coefficients(t_B, x_t)
        return (x_t - noise_share * prediction) / picture_share


@dataclass(frozen=True)
class VPrediction(Epsilon):
    """DDPM, predicting v = sqrt(abar) n - sqrt(1 - abar) x_0 (Salimans and Ho 2022, section 4)."""

    kind: ClassVar[Kind] = "v"

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """v, in the shape of `clean` (B, ...)."""
        picture_share, noise_share = self.schedule.coefficients(t_B, clean)
        return picture_share * noise - noise_share * clean

    def clean_of(self, prediction: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """sqrt(abar) x_t - sqrt(1 - abar) v, in the shape of x_t (B, ...)."""
        picture_share, noise_share = self.schedule.coefficients(t_B, x_t)
        return picture_share * x_t - noise_share * prediction


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022 ("Elucidating the design space"), section 5 and table 1, as Cosmos 1 uses it.

    x = x_0 + sigma n; the denoiser F takes c_in x and gives D(x) = c_skip x + c_out F. The trainer's noise level is
    t = sigma / (1 + sigma), so that logit(t) = log sigma: the sampling method `logit_normal` is the paper's log-normal
    sigma, and a shift s multiplies sigma by s.

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2), c_out = sigma sigma_data / its root; the target is the F for which
    D(x) = x_0. The paper's weight on |D - x_0|^2, (sigma^2 + sigma_data^2) /
    (sigma sigma_data)^2, is 1 / c_out^2, so it is there already in the plain loss of F.

    Attributes:
        sigma_data: standard deviation of the clean latents.
    """

    kind: ClassVar[Kind] = "edm"
    sigma_data: float = 0.5

    def sigma(self, t_B: torch.Tensor) -> torch.Tensor:
        """sigma (B,) at noise levels t_B in (0, 1)."""
        return t_B / (1.0 - t_B)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """c_in x, in the shape of `clean` (B, ...); c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        sigma = over_sample(self.sigma(t_B), clean)
        return (clean + sigma * noise) / self._norm(sigma)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """(x_0 - c_skip x) / c_out, in the shape of `clean` (B, ...)."""
        sigma = over_sample(self.sigma(t_B), clean)
        # In the paper's form, x_0 - c_skip x is a small difference of large numbers at a small sigma.
        return (sigma * clean - self.sigma_data**2 * noise) / (self.sigma_data * self._norm(sigma))

    def prediction_of(self, clean: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """The F for which D(x) is `clean` (B, ...), where the denoiser takes x_t = c_in x."""
        sigma = over_sample(self.sigma(t_B), clean)
        return (self._norm(sigma) * clean - self.sigma_data**2 * x_t) / (sigma * self.sigma_data)

    def compared(self, output: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return output

    def for_scheduler(self, prediction: torch.Tensor) -> torch.Tensor:
        """F: diffusers' EDM schedulers compute D from it themselves."""
        return prediction

    def model_time(self, t_B: torch.Tensor) -> torch.Tensor:
        """c_noise = log(sigma) / 4."""
        return 0.25 * self.sigma(t_B).log()

    def snr(self, t_B: torch.Tensor) -> torch.Tensor:
        """1 / sigma^2."""
        return self.sigma(t_B).square().reciprocal()

    def _norm(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.square() + self.sigma_data**2).sqrt()
