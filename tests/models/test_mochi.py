"""Mochi: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel
from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_mochi import MochiRoPE
from safetensors.torch import save_file

from models.foundation.checkpoints.layouts.mochi import MOCHI_LAYOUT
from models.foundation.checkpoints.recognition import owner_of_names
from models.foundation.layers.mochi import rope_of
from tests import test_models as generic
from tests.models import tiny_mochi as tiny
from tests.models.batches import Batch
from tests.models.tiny_folder import encoded, randomised
from utils.diffusion.seeds import normal
from utils.errors import UserError

LAYERS = (2, 1, 3, 1, 2)
"""Of the blocks of a VAE, from the pixels on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("mochi"))


def test_the_publishers_names_are_those_that_the_stock_converter_reads() -> None:
    """Which knows models of 48 blocks alone."""
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "pooled_projection_dim": 4, "text_embed_dim": 8}
    model = randomised(MochiTransformer3DModel(num_layers=48, in_channels=2, time_embed_dim=4, **sizes), 1)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    original = MOCHI_LAYOUT.to_original(tensors)
    again = convert_mochi_transformer_checkpoint_to_diffusers(dict(original))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    # They are known in files of adapters too, where the last block lacks some.
    for module in ("blocks.47.attn.qkv_y", "blocks.3.mlp_y.w1", "transformer_blocks.4.attn1.add_q_proj"):
        assert owner_of_names([module]) == "Mochi"


def genmo_name(name: str) -> str:
    """What the publisher calls a tensor of the VAE, as far as that is one tensor."""
    side, block, *rest = name.split(".")
    parameter, downs = rest.pop(), len(LAYERS) - 2
    if block in ("block_in", "block_out", "down_blocks", "up_blocks"):
        number = int(rest.pop(0)) if "blocks" in block else 0
        if rest[0] in ("conv_in", "proj"):
            own = "layers.0" if rest[0] == "conv_in" else "proj"
        else:
            kind, layer, *part = rest
            part = {
                "norm1.norm_layer": "stack.0",
                "conv1.conv": "stack.2",
                "norm2.norm_layer": "stack.3",
                "conv2.conv": "stack.5",
                "norm_layer": "attn_block.norm",
                "to_out.0": "attn_block.attn.out",
            }[".".join(part)]
            own = (int(layer), part)
        if side == "encoder":
            first = {"block_in": 1, "down_blocks": 1 + LAYERS[0] + number, "block_out": 1 + LAYERS[0] + downs}[block]
            if isinstance(own, tuple):
                layer, part = own
                own = f"layers.{layer + 1}.{part}" if block == "down_blocks" else part
                first += 0 if block == "down_blocks" else layer
            return f"encoder.layers.{first}.{own}.{parameter}"
        first = {"block_in": 0, "up_blocks": 1 + number, "block_out": 1 + downs}[block]
        if isinstance(own, tuple):
            layer, part = own
            own = f"{'blocks.' if block == 'up_blocks' else ''}{layer + (block == 'block_in')}.{part}"
        return f"decoder.blocks.{first}.{own}.{parameter}"
    if side == "decoder" and block == "conv_in":
        return f"decoder.blocks.0.0.{parameter}"
    outer = {"proj_in": "layers.0", "norm_out": "output_norm", "proj_out": "output_proj"}[block]
    return f"{side}.{outer}.{parameter}"


def test_the_publishers_vae_is_read(folder: Path, tmp_path: Path) -> None:
    """As ComfyUI has it in one file."""
    for part in folder.iterdir():
        if part.name != "vae":
            (tmp_path / part.name).symlink_to(part)
    vae = randomised(AutoencoderKLMochi(**{**tiny.VAE, "layers_per_block": LAYERS}), 3)
    vae.save_pretrained(tmp_path / "vae")
    tensors, theirs = vae.state_dict(), {}
    for name in tensors:
        if name.endswith("to_q.weight"):
            fused = [tensors[name.replace("to_q", f"to_{one}")] for one in "qkv"]
            other = genmo_name(name.replace("to_q", "to_out.0")).replace("attn.out", "attn.qkv")
            theirs[other] = torch.cat(fused) + 1
        elif not name.endswith(("to_k.weight", "to_v.weight")):
            theirs[genmo_name(name)] = tensors[name] + 1
    assert len(theirs) == len(tensors) - 2 * sum(name.endswith("to_q.weight") for name in tensors)
    assert {"encoder.layers.4.layers.3.attn_block.attn.qkv.weight", "decoder.blocks.2.blocks.2.stack.5.bias"} <= {
        *theirs
    }
    save_file(theirs, tmp_path / "mochi_vae.safetensors")
    autoencoder = tiny.pipeline(tmp_path, vae_path=tmp_path / "mochi_vae.safetensors").encoders()[0]
    autoencoder.check()
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name] + 1) for name in read)


@torch.no_grad()
def test_texts_without_padding_are_seen_as_in_the_stock_module(folder: Path) -> None:
    pipeline, features = tiny.pipeline(folder), tiny.features((7, 7))
    batch = Batch(features, normal((2, *pipeline.latent_shape(32, 48, 7)), 0, "x"), torch.tensor([0.2, 0.9]))
    assert pipeline.prepare_inputs(*batch).text_lengths is None
    made = generic.output(pipeline, generic.loaded(pipeline).layers, batch)
    stock = MochiTransformer3DModel.from_pretrained(folder / "transformer")
    expected = tiny.whole(stock, pipeline, *batch)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_of_an_empty_caption_nothing_is_seen_where_the_folder_says_so(folder: Path, tmp_path: Path) -> None:
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": True}))
    pipeline, plain = tiny.pipeline(tmp_path), tiny.pipeline(folder)
    encoder, captions = pipeline.encoders()[1], ["", "a hiker"]
    assert encoder.fingerprint != plain.encoders()[1].fingerprint
    made = encoded(encoder, captions)
    assert [mask.tolist() for mask in made["t5_mask"]] == [[False], [True] * len(made["t5_mask"][1])]
    assert encoded(plain.encoders()[1], captions)["t5_mask"][0].tolist() == [True]

    stock = generic.Model("mochi", tmp_path, tiny).stock()
    x_t, t_B = normal((1, *pipeline.latent_shape(32, 48, 7)), 0, "x"), torch.tensor([0.3])
    for caption, text_LD, mask_L in zip(captions, made["t5"], made["t5_mask"], strict=True):
        batch = Batch({"t5": text_LD[None], "t5_mask": mask_L[None]}, x_t, t_B)
        text_BLD, mask_BL, *_ = stock.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=tiny.TEXT_TOKENS, device="cpu"
        )
        features = {"t5": text_BLD, "t5_mask": mask_BL}
        result = generic.output(pipeline, generic.loaded(pipeline).layers, batch)
        expected = tiny.whole(stock.transformer, pipeline, features, x_t, t_B)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_places_are_those_of_the_stock_module() -> None:
    frequencies_3HE = normal((3, 2, 8), 0, "frequencies")
    for grid in ((1, 2, 3), (4, 30, 53), (3, 7, 5)):
        expected = MochiRoPE()(frequencies_3HE, *grid, dtype=torch.float32)
        for made, stock in zip(rope_of(frequencies_3HE, *grid), expected, strict=True):
            assert torch.equal(made, stock)


def test_steps_are_those_of_the_stock_scheduler(folder: Path) -> None:
    """Noise levels of its inverted sigmas, shifted as the folder says; also of a single step, which the stock pipeline
    does not make."""
    pipeline = tiny.pipeline(folder)
    for steps in (1, 4, 7):
        levels, scheduler = pipeline.sampling_levels(steps), pipeline.scheduler()
        assert len(levels) == steps and levels[0] == 1 and levels == sorted(levels, reverse=True)
        scheduler.set_timesteps(sigmas=levels)
        shifted = torch.tensor([1.5 * level / (1 + 0.5 * level) for level in levels])
        torch.testing.assert_close(scheduler.timesteps, shifted * 1000)
        told = pipeline.objective.model_time(scheduler.timesteps / 1000)
        torch.testing.assert_close(told, scheduler.stock.timesteps, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes latents of 8 channels, gives 8, and the VAE makes 4; give Mochi 1"),
        ({"out_channels": 8}, "takes latents of 4 channels, gives 8, and the VAE makes 4"),
        ({"text_embed_dim": 8}, "takes text of 8 features and T5 makes 64; give T5-XXL"),
        ({"patch_size": 4}, "takes patches of 4 cells; give Mochi 1, whose are of 2"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()


def test_a_scheduler_that_counts_noise_is_refused(tmp_path: Path) -> None:
    place = tiny.write_folder(tmp_path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(place / "scheduler")
    with pytest.raises(UserError, match="lacks `invert_sigmas`, as Mochi is told how clean a clip is"):
        tiny.pipeline(place).check()
