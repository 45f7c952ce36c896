"""Trains the autoencoder of the miniature Flux on drawn pictures: about 8 minutes on two CPU cores.

    python examples/mini_flux/train_autoencoder.py

writes examples/mini_flux/vae. It is shown every shape, the star too: an autoencoder has to draw whatever
the transformer may learn later.

Shapes: B batch, C channels, H height, W width.
"""

import logging
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from draw import SHAPES, captioned_pictures
from einops import rearrange
from torch import Tensor
from tqdm import trange

log = logging.getLogger(__name__)

PICTURES, HELD_OUT = 6000, 256
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 2e-3
# Squared error beside the absolute one punishes a wrong colour more than a soft edge. The pull towards a
# normal distribution is strong for an autoencoder: flow matching learns smooth latents much faster.
SQUARED_ERROR_WEIGHT, KL_WEIGHT = 0.5, 2e-5
# Of the finished encoder: a deviation of 0.00005.
LOG_VARIANCE = -20.0


def pictures_as_tensor(count: int, seed: int) -> Tensor:
    """Drawn pictures of every shape, `(B, 3, 64, 64)` in [-1, 1]."""
    pictures = [np.asarray(picture) for picture, _ in captioned_pictures(count, seed, list(SHAPES))]
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w").float() / 127.5 - 1


def new_autoencoder() -> AutoencoderKL:
    """AutoencoderKL of 0.72M parameters: 64x64 pixels become 4 channels of 8x8."""
    channels = [16, 32, 32, 64]
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def train(autoencoder: AutoencoderKL, pictures_BCHW: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    progress = trange(steps, desc="autoencoder", mininterval=10)
    for _ in progress:
        batch_BCHW = pictures_BCHW[torch.randint(len(pictures_BCHW), (BATCH_SIZE,))]
        distribution = autoencoder.encode(batch_BCHW).latent_dist
        error_BCHW = autoencoder.decode(distribution.sample()).sample - batch_BCHW
        absolute, squared = error_BCHW.abs().mean(), error_BCHW.square().mean()
        (absolute + SQUARED_ERROR_WEIGHT * squared + KL_WEIGHT * distribution.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(L1=f"{absolute.item():.4f}", refresh=False)


@torch.no_grad()
def narrow_posterior(autoencoder: AutoencoderKL) -> None:
    """Makes a sampled latent equal to its mean.

    The noise of training smooths the space of latents, and unused dimensions are noise alone. A transformer
    that learns from samples would have to predict it.
    """
    last = autoencoder.encoder.conv_out
    _, log_variance_rows = last.weight.chunk(2)
    log_variance_rows.zero_()
    last.bias.chunk(2)[1].fill_(LOG_VARIANCE)


@torch.no_grad()
def latents_of(autoencoder: AutoencoderKL, pictures_BCHW: Tensor) -> Tensor:
    """The means of the latent distributions, unscaled, `(B, 4, 8, 8)`."""
    return torch.cat([autoencoder.encode(x_BCHW).latent_dist.mode() for x_BCHW in pictures_BCHW.split(100)])


@torch.no_grad()
def held_out_error(autoencoder: AutoencoderKL, pictures_BCHW: Tensor) -> float:
    """Mean absolute difference between pictures and their reconstructions, on the scale [-1, 1]."""
    latents_BCHW = latents_of(autoencoder, pictures_BCHW)
    return (autoencoder.decode(latents_BCHW).sample - pictures_BCHW).abs().mean().item()


def main() -> None:
    parser = ArgumentParser(description="Trains the autoencoder of the miniature Flux.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vae", help="folder to write to")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(0)
    pictures_BCHW = pictures_as_tensor(PICTURES, seed=0)
    autoencoder = new_autoencoder()
    log.info("%.2fM parameters", sum(parameter.numel() for parameter in autoencoder.parameters()) / 1e6)
    train(autoencoder, pictures_BCHW, options.steps)
    narrow_posterior(autoencoder)
    error = held_out_error(autoencoder, pictures_as_tensor(HELD_OUT, seed=1))
    log.info("L1 on held-out pictures: %.4f", error)

    # Flow matching expects latents of mean 0 and deviation 1: latent = (z - shift_factor) * scaling_factor.
    latents_BCHW = latents_of(autoencoder, pictures_BCHW)
    autoencoder.register_to_config(
        shift_factor=latents_BCHW.mean().item(), scaling_factor=1 / latents_BCHW.std().item()
    )
    autoencoder.save_pretrained(options.out)
    log.info("wrote %s", options.out)


if __name__ == "__main__":
    main()
