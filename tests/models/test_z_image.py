"""Z-Image against diffusers where it is special: rows filled up to 32 tokens, ComfyUI's files, guidance from 0, chats.

Shapes: B batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM, Qwen3Model

from models.assembly.exports import export_plan
from models.assembly.stage import StagedModel, load_stage
from models.z_image import COMFYUI_LAYOUT
from tests.models import tiny_z_image
from tests.models.drawn_samples import draw_samples
from tests.models.tiny_folder import settings_of
from tests.models.tiny_z_image import STOCK, TEXT_TOKENS
from tests.processes import run_ranks
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.run_tables import SamplingSettings
from utils.settings.schema import AdapterSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_z_image.write_folder(tmp_path_factory.mktemp("z_image"))


def loaded(folder: Path, adapter: AdapterSettings | None = None, **options: Any) -> StagedModel:
    pipeline = tiny_z_image.pipeline(folder, **options)
    return load_stage(pipeline, settings_of(pipeline, adapter), stage=0)


def predicted(layers: list, inputs: tuple) -> torch.Tensor:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


@pytest.mark.parametrize("lengths", [(5, 40), (33, 64), (32, 32)])
@pytest.mark.parametrize("size", [(32, 48), (128, 64)], ids=["picture filled up", "picture of 32 tokens"])
def test_rows_are_filled_up_and_masked_like_stock(folder: Path, lengths: tuple[int, int], size: tuple) -> None:
    """Gradients of what embeds the text are sums over its rows, which are more here where the batch pads it."""
    pipeline = tiny_z_image.pipeline(folder)
    x_t, t_B = normal((2, *pipeline.latent_shape(*size)), 0, "x"), torch.tensor([0.2513, 0.913])
    features, weights = tiny_z_image.features(lengths), normal(tuple(x_t.shape), 0, "loss")
    ours, reference = loaded(folder), loaded(folder).denoiser
    result = predicted(ours.layers, pipeline.prepare_inputs(features, x_t, t_B))
    (result * weights).sum().backward()
    expected = tiny_z_image.whole(reference, pipeline, features, x_t, t_B)
    (expected * weights).sum().backward()
    assert torch.equal(result, expected)
    gradients = {name: parameter.grad for name, parameter in ours.denoiser.named_parameters()}
    for name, parameter in reference.named_parameters():
        tolerance = 1e-5 if name.startswith("cap_") and lengths == (5, 40) else 0.0
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=tolerance, atol=tolerance)


def test_rotary_tables_outlast_a_run_on_another_device(folder: Path) -> None:
    """Stock's embedder keeps its tables where it was called; `--check` calls the layers on the meta device."""
    pipeline, planned = tiny_z_image.pipeline(folder), loaded(folder)
    inputs = pipeline.prepare_inputs(tiny_z_image.features((5, 40)), normal((2, 4, 4, 4), 0), torch.tensor([0.5, 0.6]))
    empty = type(inputs)(*(tensor.to("meta") for tensor in inputs))
    assert predicted([layer.to("meta") for layer in planned.layers], empty).shape == (2, 4, 4, 4)
    entry, stock = pipeline.to_layers(planned.denoiser)[0], loaded(folder).denoiser.rope_embedder
    for tables, positions in zip(entry.rope(inputs.positions_BT3), inputs.positions_BT3, strict=True):
        assert torch.equal(tables, stock(positions))


def test_a_single_file_is_read_and_written(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ComfyUI's has a norm that nothing applies."""
    tensors = {name: parameter.detach() for name, parameter in loaded(folder).denoiser.named_parameters()}
    original = COMFYUI_LAYOUT.to_original(tensors)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    again = convert_z_image_transformer_checkpoint_to_diffusers(prefixed)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    save_file({**original, "norm_final.weight": torch.ones(96)}, tmp_path / "z_image.safetensors")
    single = loaded(folder, transformer_path=tmp_path / "z_image.safetensors").denoiser
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in single.named_parameters())
    assert not caplog.messages


@torch.no_grad()
def test_stock_loads_the_adapter_in_comfyuis_names(folder: Path, tmp_path: Path) -> None:
    pipeline, adapter = tiny_z_image.pipeline(folder), LoraSettings(type="lora", rank=4, alpha=2.0)
    staged = loaded(folder, adapter)
    factors = staged.trained(staged.layers)
    for name, factor in factors.items():
        factor.add_(normal(tuple(factor.shape), 0, "moved", name), alpha=0.1)
    plan = export_plan(pipeline, settings_of(pipeline, adapter, save_format="both"), staged)
    export(tmp_path, Ranks(), factors, plan, step=1)
    file = "adapter_model_comfyui.safetensors"
    assert "lora_unet_layers_0_attention_qkv.lora_down.weight" in load_file(tmp_path / file)

    x_t, t_B, features = normal((2, 4, 4, 6), 0, "x"), torch.tensor([0.2, 0.9]), tiny_z_image.features((5, 40))
    stock = STOCK.from_pretrained(folder)
    plain = tiny_z_image.whole(stock.transformer, pipeline, features, x_t, t_B)
    stock.load_lora_weights(tmp_path, weight_name=file)
    result = tiny_z_image.whole(stock.transformer, pipeline, features, x_t, t_B)
    expected = predicted(staged.layers, pipeline.prepare_inputs(features, x_t, t_B))
    assert (expected - plain).abs().mean() > 1e-3
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_counts_from_0_as_in_the_stock_pipeline(folder: Path, tmp_path: Path, guidance: float) -> None:
    sampling = SamplingSettings(
        prompts=["a red star"], sample_every_n_steps=1, steps=2, width=32, height=48, seed=7, guidance=guidance
    )
    ((latents,),) = run_ranks(draw_samples, 1, tiny_z_image.pipeline, folder, tmp_path / "cache", 1, sampling)
    stock = STOCK.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    expected = tiny_z_image.draw(stock, sampling, normal((1, 4, 6, 4), 7, "sample", 0))
    torch.testing.assert_close(torch.from_numpy(latents), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_text_encoder_file_is_read_and_its_chat_is_counted(folder: Path, tmp_path: Path) -> None:
    """With the names of the whole language model, as ComfyUI's files have them."""
    model = Qwen3ForCausalLM(Qwen3Model.from_pretrained(folder / "text_encoder").config)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "qwen.safetensors")
    file = {"type": "qwen3", "path": tmp_path / "qwen.safetensors"}
    encoder = tiny_z_image.pipeline(folder, text_encoders=[file]).encoders()[1]
    encoder.check()
    encoder.load(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(encoder.model.parameters(), model.model.parameters(), strict=True))
    # Each byte is a token; with the chat around it half of the limit is too much.
    encoder.encode(caption=["a" * (TEXT_TOKENS // 4), "a" * (TEXT_TOKENS - 5)])
    assert encoder.truncated == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"siglip_feat_dim": 16}, "Z-Image Omni"),
        ({"axes_lens": [65, 32, 32]}, "64 tokens are more than this model has positions for; set at most 32"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_z_image.pipeline(tiny_z_image.write_folder(tmp_path, **changes)).check()


def test_the_longest_caption_has_a_position(tmp_path: Path) -> None:
    """64 tokens of text are the places 1 to 64, and the picture's is 65."""
    folder = tiny_z_image.write_folder(tmp_path, axes_lens=[66, 32, 32])
    pipeline = tiny_z_image.pipeline(folder)
    pipeline.check()
    inputs = pipeline.prepare_inputs(tiny_z_image.features((64,)), normal((1, 4, 4, 4), 0), torch.tensor([0.5]))
    assert predicted(loaded(folder).layers, inputs).isfinite().all()


def test_a_tokenizer_without_a_chat_template_is_told(tmp_path: Path) -> None:
    folder = tiny_z_image.write_folder(tmp_path)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        tiny_z_image.pipeline(folder).check()
