"""Flux.2: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline as StockDev
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Mistral3Model, Qwen3Config, Qwen3ForCausalLM

from models.assembly.stage import load_stage
from models.flux2 import FLUX2_LAYOUT, Flux2Pipeline
from models.foundation.encoders.flux2_vae import Flux2Autoencoder
from tests.models import tiny_flux2, tiny_flux2_dev
from tests.models.tiny_folder import encoded, settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError

CAPTIONS = ["a hiker on a ridge", "[IMG] two motorcycles"]
DEV_TOKENS = 640
"""The system message alone has more than a hundred letters, each of them a token here."""


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux2.write_folder(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux2_dev.write_folder(tmp_path_factory.mktemp("dev"))


@pytest.mark.parametrize("variant", ["klein", "dev"])
def test_the_publishers_names_are_those_that_the_stock_converter_reads(
    variant: str, request: pytest.FixtureRequest
) -> None:
    flux2 = tiny_flux2.pipeline(request.getfixturevalue(variant))
    denoiser = load_stage(flux2, settings_of(flux2), stage=0).denoiser
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    again = convert_flux2_transformer_checkpoint_to_diffusers(FLUX2_LAYOUT.to_original(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_devs_text_is_that_of_the_stock_pipeline(dev: Path) -> None:
    """Mistral's, with the system message."""
    flux2 = tiny_flux2.pipeline(dev, max_sequence_length=DEV_TOKENS)
    (features,) = encoded(flux2.encoders()[1], CAPTIONS).values()
    model = Mistral3Model.from_pretrained(dev / "text_encoder").eval()
    words = AutoTokenizer.from_pretrained(dev / "tokenizer")
    with torch.no_grad():
        expected = StockDev._get_mistral_3_small_prompt_embeds(model, words, CAPTIONS, max_sequence_length=DEV_TOKENS)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert features.shape == (2, DEV_TOKENS, 3 * tiny_flux2.TEXT_WIDTH)


def test_devs_text_model_may_come_without_vision_and_without_the_layers_behind(dev: Path, tmp_path: Path) -> None:
    """As ComfyUI has it: Mistral's names, no vision, and perhaps cut to the layers whose states are read."""
    tensors = load_file(dev / "text_encoder" / "model.safetensors")
    text = {
        name.replace("language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("language_model.") and ".layers.30." not in name
    }
    save_file({**text, "tekken_model": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "mistral.safetensors")
    assert len(text) < len(tensors)
    given = [{"type": "mistral3", "path": tmp_path / "mistral.safetensors"}]
    made = []
    for options in ({}, {"text_encoders": given}):
        pipeline = tiny_flux2.pipeline(dev, max_sequence_length=DEV_TOKENS, **options)
        pipeline.check()
        made.append(encoded(pipeline.encoders()[1], CAPTIONS)["mistral3"])
    assert torch.equal(*made)
    lacks = {name: tensor for name, tensor in text.items() if ".layers.7." not in name}
    save_file(lacks, tmp_path / "mistral.safetensors")
    with pytest.raises(UserError, match="layers.7.* is not in the file"):
        pipeline.check()


def test_layers_that_nothing_is_read_of_are_not_loaded(tmp_path: Path) -> None:
    """The text is that of the stock pipeline all the same, as tests/test_models.py shows."""
    folder = tiny_flux2.write_folder(tmp_path)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    deeper = Qwen3ForCausalLM(Qwen3Config(**{**config, "num_hidden_layers": 30, "layer_types": None}))
    deeper.save_pretrained(folder / "text_encoder")
    _, text = tiny_flux2.pipeline(folder).encoders()
    text.load(torch.device("cpu"))
    assert len(text.model.layers) == 28 and text.needed().num_hidden_layers == 28
    (tmp_path / "dev").mkdir()
    _, text = tiny_flux2.pipeline(tiny_flux2_dev.write_folder(tmp_path / "dev")).encoders()
    text.load(torch.device("cpu"))
    assert len(text.model.language_model.layers) == 31 and not text.model.vision_tower.transformer.layers


@pytest.mark.parametrize("tokens", [64, 4096, 4300, 4301, 9000])
def test_the_shift_is_that_of_the_stock_pipeline(tokens: int) -> None:
    for steps in (4, 28, 50):
        assert Flux2Pipeline.resolution_shift.mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


def test_klein_is_guided_by_a_second_prediction_and_dev_by_an_input(klein: Path, dev: Path) -> None:
    assert tiny_flux2.pipeline(klein).guided_by_second_prediction
    flux2 = tiny_flux2.pipeline(dev, guidance=2.5)
    assert not flux2.guided_by_second_prediction
    x_t = normal((2, *flux2.latent_shape(64, 64)), 0, "x")
    features, t_B = tiny_flux2_dev.features((3, 4)), torch.tensor([0.2, 0.7])
    for given, expected in ((None, 2.5), (4.0, 4.0)):
        assert flux2.prepare_inputs(features, x_t, t_B, given).guidance_B.tolist() == [expected] * 2


def test_the_publishers_vae_is_read(klein: Path, tmp_path: Path) -> None:
    """Stability's names, with the convolutions beside the latent inside of encoder and decoder, and the statistics."""
    ours = Flux2Autoencoder(klein, None, torch.float32, draw="mode")
    tensors = load_file(klein / "vae" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "ae.safetensors"
    save_file({_ldm_name(name): _ldm_form(name, tensor) for name, tensor in tensors.items()}, file)
    theirs = Flux2Autoencoder(klein, file, torch.float32, draw="mode")
    pixels = normal((1, 3, 1, 64, 32), 0, "pixels").clamp(-1, 1)
    for autoencoder in (ours, theirs):
        autoencoder.load(torch.device("cpu"))
    assert torch.equal(ours.encode(pixels=pixels)["latents"], theirs.encode(pixels=pixels)["latents"])


BLOCKS = 4
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _ldm_name(name: str) -> str:
    """What the publisher calls a tensor of diffusers' VAE."""
    if name.startswith("quant_conv."):
        return f"encoder.{name}"
    if name.startswith("post_quant_conv."):
        return f"decoder.{name}"
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    for here, there in ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{here}.", f"mid.attn_1.{there}.")
    for number in range(BLOCKS):
        name = name.replace(f"down_blocks.{number}.resnets.", f"down.{number}.block.")
        name = name.replace(f"down_blocks.{number}.downsamplers.0.", f"down.{number}.downsample.")
        name = name.replace(f"up_blocks.{number}.resnets.", f"up.{BLOCKS - 1 - number}.block.")
        name = name.replace(f"up_blocks.{number}.upsamplers.0.", f"up.{BLOCKS - 1 - number}.upsample.")
    return name


def _ldm_form(name: str, tensor: torch.Tensor) -> torch.Tensor:
    is_matrix = "attentions.0.to_" in name and name.endswith(".weight")
    return tensor[:, :, None, None].contiguous() if is_matrix else tensor


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes latents of 8 channels and the VAE makes 16; give Flux.2's own VAE"),
        ({"joint_attention_dim": 8}, "takes text of 8 features and the text encoder makes 48; give its own"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    flux2 = tiny_flux2.pipeline(tiny_flux2.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        flux2.check()
