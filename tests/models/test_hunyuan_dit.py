"""HunyuanDiT where it is special: sizes, of which version 1.1 is told, the publisher's names, what is read of whole
checkpoints, and the learned variance.

Shapes: B batch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel, T5EncoderModel

from models.assembly.noising import Noising
from models.assembly.preflight import check_training
from models.assembly.stage import StagedModel, load_stage
from models.hunyuan_dit import ORIGINAL_LAYOUT, STYLE_KEY, rotary_tables
from tests.models import tiny_hunyuan_dit
from tests.models.drawn_samples import draw_samples
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import settings_of
from tests.models.tiny_hunyuan_dit import SAMPLING, STOCK, VERSION_1_1
from tests.processes import run_ranks
from utils.dataset.batches import FeatureBatch
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.settings.run_tables import SamplingSettings

Tensors = dict[str, torch.Tensor]
SHAPE = (4, 8, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan_dit.write_folder(tmp_path_factory.mktemp("1_2"))


@pytest.fixture(scope="module")
def told_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan_dit.write_folder(tmp_path_factory.mktemp("1_1"), **VERSION_1_1)


def loaded(folder: Path, **options: Any) -> StagedModel:
    pipeline = tiny_hunyuan_dit.pipeline(folder, **options)
    return load_stage(pipeline, settings_of(pipeline), stage=0)


def predicted(layers: list[nn.Module], inputs: tuple) -> torch.Tensor:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def test_sizes_are_told_as_in_the_first_training(told_sizes: Path) -> None:
    pipeline = tiny_hunyuan_dit.pipeline(told_sizes)
    pipeline.check()
    assert [encoder.name for encoder in pipeline.encoders()] == ["vae", "bert", "mt5", "sizes"]
    x_t, t_B = normal((2, *SHAPE), 0, "x"), torch.tensor([0.2513, 0.913])
    # Height and width of the file, top and left of the crop, height and width of what is trained.
    place = torch.tensor([[1500.0, 1001.0, 16.0, 8.0, 64.0, 96.0]] * 2)
    features = tiny_hunyuan_dit.features((5, 11))
    ours, reference = loaded(told_sizes), loaded(told_sizes).denoiser
    weights = normal((2, 8, *SHAPE[1:]), 0, "loss")
    for told, expected_sizes in ((features, None), ({**features, "size_ids": place}, (1001, 1500, 96, 64, 8, 16))):
        result = predicted(ours.layers, pipeline.prepare_inputs(told, x_t, t_B))
        expected = tiny_hunyuan_dit.whole(reference, pipeline, features, x_t, t_B, expected_sizes)
        assert torch.equal(result, expected)
        (result * weights).sum().backward()
        (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.denoiser.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_samples_are_drawn_with_the_sizes_of_the_stock_pipeline(told_sizes: Path, tmp_path: Path) -> None:
    sampling = SamplingSettings(prompts=["a hiker"], sample_every_n_steps=1, steps=3, seed=7, **SAMPLING)
    ((painted,),) = run_ranks(draw_samples, 1, tiny_hunyuan_dit.pipeline, told_sizes, tmp_path, 1, sampling)
    stock = STOCK.from_pretrained(told_sizes)
    stock.set_progress_bar_config(disable=True)
    expected = tiny_hunyuan_dit.draw(stock, sampling, normal((1, *SHAPE), 7, "sample", 0))
    torch.testing.assert_close(torch.from_numpy(painted), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cells", "apart"), [((64, 64), 0.0), ((96, 160), 0.125), ((160, 96), 0.125)])
def test_positions_are_the_publishers_and_not_those_of_diffusers(cells: tuple[int, int], apart: float) -> None:
    grid = (cells[0] // 2, cells[1] // 2)
    extent = get_resize_crop_region_for_grid(grid, 32)
    ours, expected = rotary_tables(*cells, 64), tiny_hunyuan_dit.publishers_rotary_tables(64, extent, grid)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    theirs = get_2d_rotary_pos_embed(64, extent, grid, output_type="pt")
    # The first features of rows and of columns turn by one radian a position.
    angles = [torch.atan2(sin[:, [0, 32]], cos[:, [0, 32]]) for cos, sin in (ours, theirs)]
    turned = torch.remainder(angles[0] - angles[1] + torch.pi, 2 * torch.pi) - torch.pi
    assert turned.abs().max().item() == pytest.approx(apart, abs=1e-4)


def converted(original: Tensors) -> Tensors:
    """The publisher's tensors under diffusers' names, as diffusers' scripts/convert_hunyuandit_to_diffusers.py says."""
    renamed = {
        ".q_norm": ".norm_q",
        ".k_norm": ".norm_k",
        ".out_proj": ".to_out.0",
        ".attn2.q_proj": ".attn2.to_q",
        ".norm1": ".norm1.norm",
        ".default_modulation.1": ".norm1.linear",
        ".mlp.fc1": ".ff.net.0.proj",
        ".mlp.fc2": ".ff.net.2",
        "pooler.": "time_extra_emb.pooler.",
        "style_embedder": "time_extra_emb.style_embedder",
        "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
        "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
        "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
        "x_embedder": "pos_embed",
        "mlp_t5.0": "text_embedder.linear_1",
        "mlp_t5.2": "text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    switched = {".norm2": ".norm3", ".norm3": ".norm2"}
    found: Tensors = {}
    for name, tensor in original.items():
        if "final_layer.adaLN_modulation.1" in name:
            shift, scale = tensor.chunk(2)
            found[name.replace("final_layer.adaLN_modulation.1", "norm_out.linear")] = torch.cat([scale, shift])
        elif fused := next((part for part in ("Wqkv", "kv_proj") if part in name), None):
            parts = {"Wqkv": "qkv", "kv_proj": "kv"}[fused]
            pieces = zip(parts, tensor.chunk(len(parts)), strict=True)
            found |= {name.replace(fused, f"to_{part}"): piece for part, piece in pieces}
        else:
            old, new = next(((a, b) for a, b in {**renamed, **switched}.items() if a in name), ("", ""))
            found[name.replace(old, new) if old else name] = tensor
    return found


@pytest.mark.parametrize("version", ["folder", "told_sizes"])
def test_the_publishers_names_are_those_of_the_published_conversion(
    version: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = request.getfixturevalue(version)
    tensors = load_file(place / "transformer" / "diffusion_pytorch_model.safetensors")
    original = ORIGINAL_LAYOUT.to_original(tensors)
    assert original["blocks.5.attn1.Wqkv.weight"].shape == (192, 64)
    again = converted(original)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    # As in checkpoints for ComfyUI.
    save_file({f"model.{name}": tensor for name, tensor in original.items()}, tmp_path / "checkpoint.safetensors")
    read = loaded(place, transformer_path=tmp_path / "checkpoint.safetensors").denoiser
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in read.named_parameters())


def test_text_encoders_are_read_from_checkpoints(folder: Path, tmp_path: Path) -> None:
    bert = BertModel.from_pretrained(folder / "text_encoder", add_pooling_layer=False).state_dict()
    mt5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").state_dict()
    tensors = {
        **{f"text_encoders.hydit_clip.transformer.bert.{name}": tensor.clone() for name, tensor in bert.items()},
        **{f"text_encoders.mt5xl.transformer.{name}": tensor.clone() for name, tensor in mt5.items()},
        "text_encoders.mt5xl.spiece_model": torch.zeros(3, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    files = [{"type": name, "path": tmp_path / "checkpoint.safetensors"} for name in ("bert", "mt5")]
    from_folder = tiny_hunyuan_dit.pipeline(folder).encoders()[1:]
    for encoder, own in zip(
        tiny_hunyuan_dit.pipeline(folder, text_encoders=files).encoders()[1:], from_folder, strict=True
    ):
        encoder.check()
        assert encoder.fingerprint != own.fingerprint
        encoder.load(torch.device("cpu"))
        own.load(torch.device("cpu"))
        for name, tensor in own.encode(caption=["a hiker"]).items():
            assert torch.equal(encoder.encode(caption=["a hiker"])[name][0], tensor[0])


def test_a_folder_may_call_mt5_by_its_name(tmp_path: Path) -> None:
    folder = tiny_hunyuan_dit.write_folder(tmp_path)
    source = (folder / "text_encoder_2").resolve()
    (folder / "text_encoder_2").unlink()
    shutil.copytree(source, folder / "text_encoder_2")
    config = json.loads((source / "config.json").read_text())
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps({**config, "model_type": "mt5"}))
    tiny_hunyuan_dit.pipeline(folder).check()


@pytest.mark.parametrize("weight", [0.0, 0.001])
def test_the_variance_is_learned_if_asked_for(folder: Path, weight: float) -> None:
    pipeline = tiny_hunyuan_dit.pipeline(folder, vlb_weight=weight)
    check_training(pipeline)
    features = {**tiny_hunyuan_dit.features((5, 11)), "latents": normal((2, *SHAPE), 0, "clean")}
    batch = FeatureBatch(features, ["a", "b"], Bucket(96, 64, 1), torch.ones(2, 1, 1, 1))
    noised = Noising(pipeline).training(batch, epoch=0)
    output = predicted(loaded(folder).layers, noised.inputs).detach().requires_grad_()
    losses_B = pipeline.maths.loss(output, noised.labels)
    losses_B.sum().backward()
    v, variance = output.grad.chunk(2, dim=1)
    plain_B = (output[:, :4] - noised.labels.target).square().mean((1, 2, 3))
    assert v.any()
    assert bool(variance.any()) == (weight > 0)
    assert (losses_B == plain_B).all() == (weight == 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"in_channels": 8}, "takes latents of 8 channels and the VAE makes 4; give SDXL's VAE"),
        ({"cross_attention_dim": 24}, "takes text of .24, 64. features, and the encoders make .32, 64."),
        ({"learn_sigma": False}, "predicts no variance"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_hunyuan_dit.pipeline(tiny_hunyuan_dit.write_folder(tmp_path, **changes)).check()


def test_the_file_of_another_version_is_told(folder: Path, told_sizes: Path, tmp_path: Path) -> None:
    tensors = load_file(told_sizes / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(ORIGINAL_LAYOUT.to_original(tensors), tmp_path / "hunyuan_dit_1.1.safetensors")
    assert STYLE_KEY in load_file(tmp_path / "hunyuan_dit_1.1.safetensors")
    with pytest.raises(UserError, match=r"is HunyuanDiT 1\.1 .*configuration is that of 1\.2"):
        tiny_hunyuan_dit.pipeline(folder, transformer_path=tmp_path / "hunyuan_dit_1.1.safetensors").check()
    with pytest.raises(UserError, match=r"is HunyuanDiT 1\.2.*configuration is that of 1\.1"):
        tiny_hunyuan_dit.pipeline(told_sizes, transformer_path=folder / "transformer").check()


def test_the_file_of_another_model_is_told(told_sizes: Path) -> None:
    with pytest.raises(UserError, match="it looks like Flux"):
        tiny_hunyuan_dit.pipeline(told_sizes, transformer_path=MINI_FLUX / "transformer").check()
