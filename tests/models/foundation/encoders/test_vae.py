"""The image VAE against diffusers, from a diffusers folder and from single files.

Shapes: B batch, C channels, H W pixels, h w latent cells; F = 1 frame.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file, save_file

from models.foundation.encoders.vae import AUTOENCODER_KL, ImageAutoencoder, in_the_room_there_is
from tests.models.tiny_flux import write_folder
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import generator
from utils.errors import UserError

Tensors = dict[str, torch.Tensor]
LEVELS = 2
CONFIG = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
    "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
CPU = torch.device("cpu")
# What diffusers calls it -> what the autoencoder of latent diffusion (and Flux's ae.safetensors) calls it.
ORIGINAL_NAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{LEVELS - 1 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{LEVELS - 1 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 1, 32, 48, generator=generator(0, "pixels")) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of Flux's kind with random weights: unlike a trained one's, its distribution is wide."""
    place = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    AutoencoderKL(**CONFIG).save_pretrained(place / "vae")
    return place


def loaded(folder: Path, **keys: object) -> ImageAutoencoder:
    autoencoder = ImageAutoencoder(folder, **{"file": None, "dtype": torch.float32, **keys})
    autoencoder.load(CPU)
    return autoencoder


def weights_file(folder: Path) -> Path:
    return folder / "vae" / "diffusion_pytorch_model.safetensors"


def with_original_names(tensors: Tensors) -> Tensors:
    """Original checkpoints keep the attention's projections as convolutions."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in ORIGINAL_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor[:, :, None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
    return renamed


@pytest.fixture(scope="module")
def stock(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae").eval()


@torch.no_grad()
def test_control_latents_are_the_scaled_mode(folder: Path, stock: AutoencoderKL) -> None:
    latents = loaded(folder, reads="control", draw="mode").encode(control_BCFHW=pixels())["control_latents"]
    mode = stock.encode(rearrange(pixels(), "b c 1 h w -> b c h w")).latent_dist.mode()
    assert torch.equal(latents, (mode - stock.config.shift_factor) * stock.config.scaling_factor)


@torch.no_grad()
def test_latents_are_a_draw_from_the_stock_distribution(folder: Path, stock: AutoencoderKL) -> None:
    latents = loaded(folder).encode(pixels_BCFHW=pixels())["latents"]
    distribution = stock.encode(rearrange(pixels(), "b c 1 h w -> b c h w")).latent_dist
    drawn = latents / stock.config.scaling_factor + stock.config.shift_factor
    noise = ((drawn - distribution.mode()) / distribution.std).flatten().double()
    # Within 4 standard errors of the mean 0 and the variance 1 of normal numbers.
    count = noise.numel()
    assert count > 1000
    assert abs(noise.mean().item()) < 4 / count**0.5
    assert abs(noise.var().item() - 1) < 4 * (2 / (count - 1)) ** 0.5


def test_a_picture_has_one_draw(folder: Path) -> None:
    together = loaded(folder).encode(pixels_BCFHW=pixels())["latents"]
    alone = loaded(folder).encode(pixels_BCFHW=pixels()[1:])["latents"]
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().mean() > 0.1


@torch.no_grad()
def test_mean_and_deviation_give_the_latents_of_any_noise(folder: Path, stock: AutoencoderKL) -> None:
    features = loaded(folder, draw="distribution").encode(pixels_BCFHW=pixels())
    distribution = stock.encode(rearrange(pixels(), "b c 1 h w -> b c h w")).latent_dist
    drawn = distribution.sample(generator=generator(0, "noise"))
    noise = torch.randn(drawn.shape, generator=generator(0, "noise"))
    expected = (drawn - stock.config.shift_factor) * stock.config.scaling_factor
    torch.testing.assert_close(features["latents_mean"] + features["latents_std"] * noise, expected)


@torch.no_grad()
def test_decoding_undoes_the_scaling(folder: Path, stock: AutoencoderKL) -> None:
    autoencoder = loaded(folder, reads="control", draw="mode")
    latents = autoencoder.encode(control_BCFHW=pixels())["control_latents"]
    mode = stock.encode(rearrange(pixels(), "b c 1 h w -> b c h w")).latent_dist.mode()
    expected = rearrange(stock.decode(mode).sample.clamp(-1, 1), "b c h w -> b c 1 h w")
    torch.testing.assert_close(autoencoder.decode(latents), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reads", ["pixels", "control"])
@pytest.mark.parametrize("draw", ["sample", "mode", "distribution"])
def test_promised_shapes_are_those_that_come(folder: Path, reads: str, draw: str) -> None:
    autoencoder = loaded(folder, reads=reads, draw=draw, dtype=torch.bfloat16)
    features = autoencoder.encode(**{f"{reads}_BCFHW": pixels()})
    came = {name: (feature.shape[1:], feature.dtype) for name, feature in features.items()}
    assert came == autoencoder.feature_shapes(Bucket(48, 32, 1))


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_file_in_original_names(folder: Path, tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    expected = load_file(weights_file(folder))
    tensors = {f"{prefix}{name}": tensor for name, tensor in with_original_names(expected).items()}
    save_file(tensors, tmp_path / "ae.safetensors")
    weights = AUTOENCODER_KL.load(folder, tmp_path / "ae.safetensors", dtype).state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor.to(dtype)), name


def test_single_file_in_the_names_of_diffusers(folder: Path) -> None:
    from_folder, from_file = loaded(folder), loaded(folder, file=weights_file(folder))
    one, other = (autoencoder.encode(pixels_BCFHW=pixels())["latents"] for autoencoder in (from_folder, from_file))
    assert torch.equal(one, other)


MISTAKES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a transformer": (lambda tensors: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, "is not in the file"),
    "a missing tensor": (
        lambda tensors: {name: t for name, t in tensors.items() if name != "decoder.up.1.block.0.conv1.weight"},
        "'decoder.up_blocks.0.resnets.0.conv1.weight' of the model is not in the file",
    ),
    "16 latent channels": (
        lambda tensors: {**tensors, "decoder.conv_in.weight": torch.zeros(16, 16, 3, 3)},
        "'decoder.conv_in.weight' is [16, 16, 3, 3], but the model's configuration asks for [16, 4, 3, 3]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    file = tmp_path / "ae.safetensors"
    save_file(change(with_original_names(load_file(weights_file(folder)))), file)
    with pytest.raises(UserError) as raised:
        loaded(folder, file=file)
    assert message in str(raised.value) and str(file) in str(raised.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_check_tells_the_same_from_headers_alone(folder: Path, tmp_path: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    save_file(change(with_original_names(load_file(weights_file(folder)))), tmp_path / "ae.safetensors")
    ImageAutoencoder(folder, None, torch.float32).check()
    with pytest.raises(UserError) as raised:
        ImageAutoencoder(folder, tmp_path / "ae.safetensors", torch.float32).check()
    assert message in str(raised.value)


def test_a_folder_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    """diffusers would fill it with random numbers."""
    shutil.copytree(folder / "vae", tmp_path / "vae")
    tensors = load_file(weights_file(folder))
    lost = "encoder.conv_out.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights_file(tmp_path))
    for keys in ({"folder": tmp_path}, {"folder": folder, "file": tmp_path / "vae"}):
        with pytest.raises(UserError, match=lost):
            loaded(**keys)


def test_a_folder_of_weights_has_its_own_scaling(folder: Path, tmp_path: Path) -> None:
    config = AutoencoderKL.load_config(folder / "vae")
    AutoencoderKL.from_config({**config, "scaling_factor": 2.0}).save_config(tmp_path / "vae")
    shutil.copy(weights_file(folder), tmp_path / "vae")
    own, plain = (loaded(folder, file=file, draw="mode") for file in (tmp_path / "vae", None))
    one, other = (vae.encode(pixels_BCFHW=pixels())["latents"] for vae in (own, plain))
    torch.testing.assert_close(one / 2.0, other / config["scaling_factor"])


def test_another_models_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(UserError, match="a configuration of FluxTransformer2DModel; one of AutoencoderKL"):
        loaded(folder, file=tmp_path / "transformer")


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = weights_file(folder).read_bytes()
    (tmp_path / "ae.safetensors").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="download it again"):
        loaded(folder, file=tmp_path / "ae.safetensors")


def test_fingerprint_tells_what_changes_the_latents(folder: Path, tmp_path: Path) -> None:
    def made(place: Path, **keys: object) -> str:
        return ImageAutoencoder(place, **{"file": None, "dtype": torch.float32, **keys}).fingerprint

    config = AutoencoderKL.load_config(folder / "vae")
    AutoencoderKL.from_config({**config, "scaling_factor": 1.0}).save_config(tmp_path / "vae")
    file = weights_file(folder)
    different = [
        made(folder),
        made(folder, dtype=torch.bfloat16),
        made(folder, draw="mode"),
        made(folder, draw="distribution"),
        made(folder, file=file),
        made(tmp_path, file=file),
    ]
    assert len(set(different)) == len(different)
    assert made(folder) == made(folder)


class NeedsTiles(AutoencoderKL):
    """A VAE for which the memory is too small as a whole."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        if not self.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().encode(x, return_dict)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        if not self.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().decode(z, return_dict, generator)


def test_where_memory_is_too_small_tiles_are_made_and_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    vae = NeedsTiles(**CONFIG, sample_size=32).eval()
    pictures = pixels()[:, :, 0]
    with torch.no_grad():
        latents = in_the_room_there_is(vae, "encode", pictures).latent_dist.mode()
        decoded = in_the_room_there_is(vae, "decode", latents).sample
        assert "encode 32 x 48 at once" in caplog.text and len(caplog.records) == 1, "once: tiles are made from then on"
        assert torch.equal(latents, vae.encode(pictures).latent_dist.mode())
        vae.disable_tiling()
        whole = AutoencoderKL.decode(vae, latents).sample
    assert decoded.shape == whole.shape and not torch.equal(decoded, whole)


def test_where_it_is_too_small_for_tiles_too_it_is_an_error() -> None:
    vae = NeedsTiles(**CONFIG)
    vae.enable_tiling = lambda: None
    with pytest.raises(torch.OutOfMemoryError):
        in_the_room_there_is(vae, "encode", pixels()[:, :, 0])
