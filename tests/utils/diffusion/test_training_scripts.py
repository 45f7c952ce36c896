"""Our loss against that of diffusers' training scripts, on the same latents, noise and timesteps.

The references are written from what the scripts compute (`train_dreambooth_lora_flux.py`,
`train_dreambooth_lora_sd3.py` and `train_text_to_image_lora_sdxl.py`), with diffusers' own schedulers; the denoiser is
one convolution.
Shapes: B batch; pictures (B C h w).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn.functional import conv2d, mse_loss

from utils.diffusion.losses import Labels, Loss
from utils.diffusion.objectives import Epsilon, FlowMatching, Objective, VPrediction
from utils.diffusion.seeds import normal
from utils.diffusion.weights import LossWeighting

SHAPE = (3, 4, 6, 8)
CLEAN, NOISE = normal(SHAPE, 0, "clean"), normal(SHAPE, 0, "noise")
KERNEL = normal((4, 4, 3, 3), 0, "kernel") / 6
INDICES = torch.tensor([10, 480, 970])

Denoiser = Callable[[torch.Tensor], torch.Tensor]


def ours(objective: Objective, weighting: LossWeighting, denoiser: Denoiser, t_B: torch.Tensor) -> torch.Tensor:
    output = denoiser(objective.noised(CLEAN, NOISE, t_B))
    weight = weighting.weight(objective, t_B).view(-1, 1, 1, 1)
    return Loss("mse")(output, Labels(objective.target(CLEAN, NOISE, t_B), weight)).mean()


def flow(denoiser: Denoiser, shift: float, weighting: str, preconditioned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The scripts of Flux and SD3: (loss, sigmas). With `preconditioned` (SD3's option) x_0 is compared."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = scheduler.sigmas[INDICES].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * CLEAN + sigmas * NOISE
    prediction, target = denoiser(noisy), NOISE - CLEAN
    if preconditioned:
        prediction, target = prediction * (-sigmas) + noisy, CLEAN
    weight = {
        "none": torch.ones_like(sigmas),
        "sigma_sqrt": sigmas**-2.0,
        "cosmap": 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
    }[weighting]
    error = weight.float() * (prediction.float() - target.float()) ** 2
    return error.reshape(target.shape[0], -1).mean(1).mean(), sigmas.flatten()


def ddpm(denoiser: Denoiser, prediction_type: str, snr_gamma: float | None) -> torch.Tensor:
    """The script of SDXL."""
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=prediction_type)
    prediction = denoiser(scheduler.add_noise(CLEAN, NOISE, INDICES))
    is_v = prediction_type == "v_prediction"
    target = scheduler.get_velocity(CLEAN, NOISE, INDICES) if is_v else NOISE
    if snr_gamma is None:
        return mse_loss(prediction.float(), target.float(), reduction="mean")
    abar = scheduler.alphas_cumprod[INDICES]
    snr = abar / (1 - abar)
    weight = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (snr + 1 if is_v else snr)
    loss = mse_loss(prediction.float(), target.float(), reduction="none")
    return (loss.mean(dim=[1, 2, 3]) * weight).mean()


def assert_same(our_loss: Callable[[Denoiser], torch.Tensor], theirs: Callable[[Denoiser], torch.Tensor], rtol: float):
    """Loss and gradient at the kernel."""
    values, gradients = [], []
    for loss in (our_loss, theirs):
        kernel = KERNEL.clone().requires_grad_()
        value = loss(lambda x, kernel=kernel: conv2d(x, kernel, padding=1))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, kernel)[0])
    torch.testing.assert_close(*values, rtol=rtol, atol=0)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol * gradients[0].abs().max().item())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_flux_and_sd3(shift: float, weighting: str) -> None:
    sigmas = flow(lambda x: x, shift, weighting, False)[1]
    assert_same(
        lambda denoiser: ours(FlowMatching(), LossWeighting(weighting), denoiser, sigmas),
        lambda denoiser: flow(denoiser, shift, weighting, False)[0],
        rtol=1e-6,
    )


def test_sd3_preconditioned_is_the_plain_loss_times_sigma_squared() -> None:
    """So that its default, x_0 with the weight sigma_sqrt, is our plain loss."""
    sigmas = flow(lambda x: x, 3.0, "none", False)[1]
    assert_same(
        lambda denoiser: ours(FlowMatching(), LossWeighting(), denoiser, sigmas),
        lambda denoiser: flow(denoiser, 3.0, "sigma_sqrt", True)[0],
        rtol=1e-4,
    )


@pytest.mark.parametrize("snr_gamma", [None, 5.0, 1.0])
@pytest.mark.parametrize(("objective", "name"), [(Epsilon(), "epsilon"), (VPrediction(), "v_prediction")])
def test_sdxl(objective: Epsilon, name: str, snr_gamma: float | None) -> None:
    """Their schedule is a product of a thousand numbers in float32, ours in float64: so far they differ."""
    assert_same(
        lambda denoiser: ours(objective, LossWeighting(min_snr_gamma=snr_gamma), denoiser, INDICES / 1000),
        lambda denoiser: ddpm(denoiser, name, snr_gamma),
        rtol=3e-5,
    )
