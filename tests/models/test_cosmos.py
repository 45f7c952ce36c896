"""Cosmos 1.0: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from models.foundation.checkpoints.layouts.cosmos import COSMOS_LAYOUT
from models.foundation.checkpoints.recognition import owner_of_names, recognised
from tests import test_models as generic
from tests.models import tiny_cosmos, tiny_cosmos_v2w
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import normal
from utils.errors import UserError


class Remembering(dict):
    """The stock converter empties a checkpoint before it looks which of the Cosmos models it is of: then this still
    says that it is of 1.0."""

    def __contains__(self, key: object) -> bool:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cosmos.write_folder(tmp_path_factory.mktemp("cosmos"))


@pytest.fixture(scope="module")
def v2w_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cosmos_v2w.write_folder(tmp_path_factory.mktemp("cosmos_v2w"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = generic.loaded(tiny_cosmos.pipeline(folder, **options)).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_names_are_those_that_the_stock_converter_knows(folder: Path) -> None:
    tensors = tensors_of(folder)
    original = {f"net.{name}": tensor for name, tensor in COSMOS_LAYOUT.to_original(tensors).items()}
    assert recognised({name: tensor.shape for name, tensor in original.items()}).what == "Cosmos 1.0"
    again = convert_cosmos_transformer_checkpoint_to_diffusers(Remembering(original))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_publishers_file_is_read(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(folder)
    original = COSMOS_LAYOUT.to_original({name: tensor + 1 for name, tensor in tensors.items()})
    theirs = {f"net.{name}": tensor.contiguous() for name, tensor in original.items()}
    save_file({**theirs, "net.logvar.0.freqs": torch.ones(8)}, tmp_path / "cosmos.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "cosmos.safetensors")
    assert all(torch.equal(read[name], tensors[name] + 1) for name in tensors)


def test_an_adapter_is_known_by_its_names() -> None:
    theirs = ["blocks.block0.blocks.0.block.attn.to_q.0", "blocks.block11.blocks.2.block.layer1"]
    assert owner_of_names(theirs) == "Cosmos 1.0"


def test_the_table_of_positions_stays_precise(folder: Path) -> None:
    denoiser = generic.loaded(tiny_cosmos.pipeline(folder, dtype="bfloat16")).denoiser
    kept = {name for name, parameter in denoiser.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {f"learnable_pos_embed.pos_emb_{axis}" for axis in "thw"}


@torch.no_grad()
@pytest.mark.parametrize("counts", [(1, 2), (0, 1)])
def test_given_frames_are_seen_without_noise_and_have_a_mask(v2w_folder: Path, counts: tuple[int, int]) -> None:
    """In training, where one or two are given; all frames are told the time of the others."""
    cosmos, given_B = tiny_cosmos.pipeline(v2w_folder), torch.tensor(counts)
    clean, x_t = (normal((2, 4, 3, 4, 6), 0, name) for name in ("clean", "x"))
    t_B = torch.tensor([0.2513, 0.913])
    features = {**tiny_cosmos.features((5, 11)), "latents": clean, "given_frames": given_B}
    stream, staged = cosmos.prepare_inputs(features, x_t, t_B), generic.loaded(cosmos)
    for layer in staged.layers:
        stream = layer(stream)
    seen, mask = x_t.clone(), torch.zeros(2, 1, 3, 4, 6)
    for sample, count in enumerate(counts):
        seen[sample, :, :count], mask[sample, :, :count] = clean[sample, :, :count] / 0.5, 1
    expected = tiny_cosmos.whole(staged.denoiser, cosmos, features, seen, t_B, condition_mask=mask)
    torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_frame_by_itself_is_that_of_a_clip(v2w_folder: Path) -> None:
    pixels = normal((1, 3, 9, 32, 48), 0, "clip").clamp(-1, 1)
    autoencoder, _, alone = tiny_cosmos.pipeline(v2w_folder, latents="mode").encoders()
    for encoder in (autoencoder, alone):
        encoder.load(torch.device("cpu"))
    first = alone.encode(pixels=pixels)["first_frame_latents"]
    torch.testing.assert_close(first, autoencoder.encode(pixels=pixels)["latents"][:, :, :1], rtol=1e-4, atol=1e-5)
    assert alone.feature_shapes(Bucket(48, 32, 9))["first_frame_latents"][0] == first.shape[1:]


@torch.no_grad()
@pytest.mark.parametrize("draw", ["sample", "mode", "distribution"])
def test_latents_have_no_spread(folder: Path, draw: str) -> None:
    autoencoder = tiny_cosmos.pipeline(folder, latents=draw).encoders()[0]
    autoencoder.load(torch.device("cpu"))
    made = autoencoder.encode(pixels=normal((1, 3, 1, 32, 48), 0, "picture").clamp(-1, 1))
    plain = tiny_cosmos.pipeline(folder, latents="mode").encoders()[0]
    plain.load(torch.device("cpu"))
    expected = plain.encode(pixels=normal((1, 3, 1, 32, 48), 0, "picture").clamp(-1, 1))["latents"]
    if draw == "distribution":
        assert torch.equal(made["latents_mean"], expected) and not made["latents_std"].any()
    else:
        assert torch.equal(made["latents"], expected)


def test_how_many_frames_are_given(folder: Path, v2w_folder: Path) -> None:
    cosmos = tiny_cosmos.pipeline(v2w_folder, second_frame_share=0.25, frame_rate=24.0)
    assert [cosmos.given_frames((4, 3, 4, 6), quantile) for quantile in (0.0, 0.24, 0.25, 0.9)] == [2, 2, 1, 1]
    assert [cosmos.given_frames((4, frames, 4, 6), 0.0) for frames in (1, 2)] == [0, 1]
    assert tiny_cosmos.pipeline(folder).given_frames((4, 3, 4, 6), 0.0) == 0
    assert generic.loaded(cosmos).layers[0].fps == cosmos.media.fps == 24.0


def test_clips_are_no_longer_than_the_tokenizer_has_numbers_for(folder: Path) -> None:
    """Those of three latent frames."""
    assert tiny_cosmos.pipeline(folder).media.max_frames == 17


def test_sizes_beyond_the_positions_are_refused(folder: Path) -> None:
    """The table has 16 rows and 24 columns of latent cells."""
    cosmos = tiny_cosmos.pipeline(folder)
    assert cosmos.too_large(192, 128) is None and "ends at 192 x 128" in cosmos.too_large(192, 144)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        (
            {"in_channels": 16},
            {},
            "takes 16 channels, and the VAE makes 4; text to world takes 4, video to world takes 5",
        ),
        ({"text_embed_dim": 8}, {}, "takes text of 8 features and T5 makes 64; give T5-11B"),
        ({"extra_pos_embed_type": None}, {}, 'is of Cosmos-Predict2: set .model. type = "cosmos_predict2"'),
        ({"use_crossattn_projection": True}, {}, 'is of Cosmos-Predict2.5: set .model. type = "cosmos_predict25"'),
        ({"img_context_dim_in": 8}, {}, "is of Cosmos-Transfer2.5: it is not trained here; give Cosmos 1.0"),
        ({}, {"second_frame_share": 0.1}, "second_frame_share: is for video to world alone"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict, options: dict, said: str) -> None:
    cosmos = tiny_cosmos.pipeline(tiny_cosmos.write_folder(tmp_path, **changes), **options)
    with pytest.raises(UserError, match=said):
        cosmos.check()


def test_the_scheduler_of_another_model_is_told(tmp_path: Path) -> None:
    place = tiny_cosmos.write_folder(tmp_path)
    tiny_cosmos.EDMEulerScheduler(sigma_data=1.0).save_pretrained(place / "scheduler")
    with pytest.raises(UserError, match="sigma_data: is 1.0, and Cosmos 1.0 has 0.5"):
        tiny_cosmos.pipeline(place).check()


def as_nvidia_names_it(name: str) -> str:
    """A tensor of diffusers' tokenizer in the publisher's file; it has three blocks up."""
    name = re.sub(r"up_blocks\.(\d)", lambda number: f"up.{2 - int(number[1])}", name)
    for here, there in (
        (r"down_blocks\.", "down."),
        (r"mid_block\.resnets\.(\d)", lambda number: f"mid.block_{int(number[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1.0"),
        (r"mid_block\.temp_attentions\.0", "mid.attn_1.1"),
        (r"\.resnets\.", ".block."),
        (r"(down|up)samplers\.0\.(conv\d)", r"\1sample.\2.conv3d"),
        (r"to_([qkv])", r"\1.conv3d"),
        (r"to_out\.0", "proj_out.conv3d"),
        (r"conv_s\b", "0.conv3d"),
        (r"conv_t\b", "1.conv3d"),
        (r"conv_shortcut", "nin_shortcut.conv3d"),
        (r"quant_conv", "quant_conv.conv3d"),
    ):
        name = re.sub(here, there, name)
    return name


def test_the_publishers_tokenizer_is_read(folder: Path, tmp_path: Path) -> None:
    tensors = {name: one + 1 for name, one in load_file(next((folder / "vae").glob("*.safetensors"))).items()}
    theirs = {as_nvidia_names_it(name): tensor for name, tensor in tensors.items()}
    known = ("encoder.conv_in.0.conv3d.weight", "decoder.mid.attn_1.1.q.conv3d.bias", "post_quant_conv.conv3d.bias")
    assert {*known, "encoder.down.0.block.0.conv1.1.conv3d.weight"} <= theirs.keys()
    save_file({**theirs, "encoder.patcher3d.wavelets": torch.ones(2)}, tmp_path / "vae.safetensors")
    autoencoder = tiny_cosmos.pipeline(folder, vae_path=tmp_path / "vae.safetensors").encoders()[0]
    autoencoder.check()
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
