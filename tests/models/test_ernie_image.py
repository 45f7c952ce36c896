"""ERNIE-Image: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.ernie_image import ErnieAutoencoder
from models.foundation.encoders.flux2_vae import Flux2Autoencoder
from tests.models import tiny_ernie_image
from utils.errors import UserError


def test_its_latents_are_not_those_of_flux2(tmp_path: Path) -> None:
    """Another number is added to the variances, so that the cache must not take one for the other."""
    folder = tiny_ernie_image.write_folder(tmp_path)
    ours, flux2 = (kind(folder, None, torch.float32) for kind in (ErnieAutoencoder, Flux2Autoencoder))
    assert ours.fingerprint != flux2.fingerprint
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 1, 32, 32)
    for autoencoder in (ours, flux2):
        autoencoder.load(torch.device("cpu"))
        latents = autoencoder.encode(pixels=pixels)["latents"]
        torch.testing.assert_close(autoencoder.decode(latents), flux2_decoded(autoencoder, latents), rtol=0, atol=0)
    both = [autoencoder.encode(pixels=pixels)["latents"] for autoencoder in (ours, flux2)]
    assert not torch.equal(*both)
    torch.testing.assert_close(*both, rtol=0.1, atol=0.1)


def flux2_decoded(autoencoder: Flux2Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """What the VAE makes of latents whose statistics are put back by hand."""
    norm, epsilon = autoencoder.vae.bn, 1e-5 if isinstance(autoencoder, ErnieAutoencoder) else 1e-4
    mean, std = norm.running_mean.view(1, -1, 1, 1), (norm.running_var + epsilon).sqrt().view(1, -1, 1, 1)
    return autoencoder.vae.decode(autoencoder.cells_of(latents * std + mean)).sample.clamp(-1, 1).unsqueeze(2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes latents of 8 channels and the VAE makes 16; give Flux.2's VAE"),
        ({"text_in_dim": 8}, "takes text of 8 features and Mistral makes 16; give Ministral 3 3B"),
        ({"patch_size": 2}, "has patches of side 2; give ERNIE-Image, whose are 1"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    ernie = tiny_ernie_image.pipeline(tiny_ernie_image.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        ernie.check()
