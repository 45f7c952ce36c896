"""Qwen-Image 2.1: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_qwen_image21_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import save_file

from models.assembly.stage import load_stage
from models.qwen_image_21 import QWEN_21_LAYOUT
from tests import test_models as generic
from tests.models import tiny_qwen_image_21 as tiny
from tests.models import tiny_qwen_image_21_edit as edit
from tests.models.batches import Batch, batch_of
from tests.models.tiny_folder import settings_of
from tests.runs import metrics, only_run
from tests.utils.run.test_goes_on import run_here
from utils.dataset.encoders import inputs_of, item_key
from utils.dataset.manifest import media_file
from utils.dataset.samples import Bucket, Control, version_of_prompt
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.settings.run_tables import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("qwen_image_21"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    pipeline = tiny.pipeline(folder, **options)
    denoiser = load_stage(pipeline, settings_of(pipeline), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_comfyuis_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    tensors = tensors_of(folder)
    original = QWEN_21_LAYOUT.to_original(tensors)
    assert "transformer_blocks.0.img_mlp.gate_up.weight" in original
    again = convert_qwen_image21_transformer_checkpoint_to_diffusers(original)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_comfyuis_file_is_read(folder: Path, tmp_path: Path, prefix: str) -> None:
    moved = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    original = {prefix + name: tensor for name, tensor in QWEN_21_LAYOUT.to_original(moved).items()}
    save_file(original, tmp_path / "qwen.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "qwen.safetensors")
    assert all(torch.equal(read[name], moved[name]) for name in moved)


@torch.no_grad()
@pytest.mark.parametrize("variant", [tiny, edit])
def test_a_model_that_tells_the_text_the_pictures_time(tmp_path: Path, variant: ModuleType) -> None:
    """And control images too (`causal_condition = false`); with it, as the generic tests have it, these are told that
    they have no noise."""
    folder = tiny.write_folder(tmp_path, causal_condition=False)
    pipeline, model = tiny.pipeline(folder), generic.Model("", folder, variant)
    batch, staged = batch_of(model, pipeline, tiny.SIZES[0]), generic.loaded(pipeline)
    result = generic.output(pipeline, staged.layers, batch)
    expected = variant.whole(staged.denoiser, pipeline, batch.features, batch.x_t, batch.t_B)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_control_images_are_seen_in_their_order(folder: Path) -> None:
    pipeline, model = tiny.pipeline(folder), generic.Model("", folder, edit)
    batch = batch_of(model, pipeline, tiny.SIZES[0])
    layers, same = generic.loaded(pipeline).layers, dict.fromkeys(["control_latents", "control_2_latents"])
    features = {**batch.features, **{name: batch.features["control_latents"] + n for n, name in enumerate(same)}}
    turned = {**features, **{name: features[other] for name, other in zip(same, reversed(same), strict=True)}}
    made = [generic.output(pipeline, layers, Batch(one, batch.x_t, batch.t_B)) for one in (features, turned)]
    assert (made[0] - made[1]).abs().mean() > 1e-3


@torch.no_grad()
def test_captions_with_pictures_are_those_of_the_stock_pipeline(folder: Path) -> None:
    """But for the tokens of pictures, whose places are kept. Of captions that are too long the end is left out."""
    pipeline, stock = tiny.pipeline(folder), generic.Model("", folder, tiny).stock()
    encoder = pipeline.encoders(2)[1]
    encoder.check()
    encoder.load(torch.device("cpu"))
    levels = {
        name: normal((3, 3, 1, 32, 64), 0, name).mul(60).add(128).clamp(0, 255).round() for name in encoder.controls
    }
    captions = ["make it night", "", "swap the dogs of <image1> and <image2> " * 20]
    made = encoder.encode(caption=captions, **{name: one / 127.5 - 1 for name, one in levels.items()})
    assert encoder.truncated == 1
    kept = tiny.TEXT_TOKENS - len(stock.processor(text=[stock.prompt_template_t2i.format("")]).input_ids[0])
    for number, caption in enumerate(captions):
        pictures = [Image.fromarray(one[number, :, 0].permute(1, 2, 0).byte().numpy()) for one in levels.values()]
        (text_LD,), mask, (slot_L,) = stock.encode_prompt([caption[:kept]], pictures, "cpu")
        assert mask is None and slot_L.sum() == 2 * 2
        torch.testing.assert_close(made["qwen3_vl"][number], text_LD[~slot_L], rtol=1e-4, atol=1e-5)
        first, _, second, _ = slot_L.nonzero().flatten().tolist()
        assert made["qwen3_vl_places"][number].tolist() == [first, second - 2]
        assert len(made["qwen3_vl_mask"][number]) == len(text_LD) - 4
    shapes = {name: shape for name, (shape, _) in encoder.feature_shapes(Bucket(64, 32, 1)).items()}
    assert shapes["qwen3_vl"] >= tuple(made["qwen3_vl"][2].shape) and shapes["qwen3_vl_places"] == (2,)


@torch.no_grad()
def test_the_vae_reads_the_opacity_of_control_images(folder: Path, tmp_path: Path) -> None:
    """And the text encoder sees the same before a white ground."""
    levels_HW4 = normal((64, 32, 4), 0, "colours and opacity") * 60 + 128
    picture = Image.fromarray(levels_HW4.clamp(1, 255).byte().numpy())
    picture.save(tmp_path / "a.png")
    pipeline, stock = tiny.pipeline(folder), generic.Model("", folder, tiny).stock()
    _, text, vae = pipeline.encoders(1)
    version = version_of_prompt("a", Bucket(32, 64, 1), pictures=[media_file(tmp_path / "a.png")])
    (read,), seen = inputs_of(vae, version).values(), inputs_of(text, version)["control"]
    assert item_key(vae, version) != item_key(text, version)
    pixels_14HW = stock.image_processor.preprocess(picture, width=32, height=64)
    torch.testing.assert_close(read[:, 0], pixels_14HW[0], rtol=0, atol=1e-6)
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.getchannel("A"))
    assert (seen[:, 0] - stock.image_processor.preprocess(white)[0]).abs().max() <= 1.01 / 127.5
    vae.load(torch.device("cpu"))
    made = vae.encode(control=read[None])["control_latents"]
    torch.testing.assert_close(made, tiny.stock_latents(stock, read[None]), rtol=1e-4, atol=1e-5)


def test_control_images_that_qwen_sees_at_another_size_are_told(folder: Path, tmp_path: Path) -> None:
    """The stock pipeline fails for them in its first step."""
    pipeline, asked = tiny.pipeline(folder), {"prompts": ["a"], "control_images": [["a.png"]]}
    sizes = {(32, 32): None, (1024, 1024): None, (2048, 512): None, (2048, 1024): "would see it at 1440 x 704"}
    for (width, height), told in sizes.items():
        control = Control(None, Bucket(width, height, 1))
        sample = SimpleNamespace(controls=(control,), media=SimpleNamespace(locator="b.png"))
        found = [*pipeline.problems_of_data([sample])]
        found += pipeline.problems_of_samples(SamplingSettings(**asked, width=width, height=height))
        assert len(found) == (2 if told else 0), (width, height)
        assert all(told in one.message for one in found)
    assert not [*pipeline.problems_of_samples(SamplingSettings(prompts=["a"], width=2048, height=1024))]


def test_what_sees_control_images_is_asked_for_where_there_are_some(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    (folder / "processor" / "preprocessor_config.json").unlink()
    pipeline = tiny.pipeline(folder)
    pipeline.check()
    assert len(pipeline.encoders_for(0)) == 2
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        pipeline.encoders_for(1)
    with pytest.raises(UserError, match="takes 10 control images, and there are 11"):
        pipeline.encoders_for(11)


def test_it_trains_on_pairs(folder: Path, write_config: Callable[..., Path], pictures: Path) -> None:
    """With evaluation, and samples that are shown their pictures."""
    options = tiny.pipeline(folder).options.model_dump(mode="json", exclude_unset=True)
    pairs = {"directory": [{"path": str(pictures), "control_path": [str(pictures)] * 2, "control_resolution": 64}]}
    shown = {**edit.SAMPLING, "control_images": [[str(pictures / "0.png"), str(pictures / "1.png")]], "steps": 2}
    asked = {"prompts": ["a red picture"], "sample_every_n_steps": 4, **shown}
    keys = {"data": pairs, "model": options, "max_steps": 4, "lr_scheduler": "constant"}
    with pytest.raises(UserError, match="gives 1 per prompt, and the data has 2 per sample"):
        run_here(write_config(**keys, sampling={**asked, "control_images": [[str(pictures / "0.png")]]}))
    data = write_config(**keys).with_name("data.toml")
    seen = data.rename(data.with_name("seen.toml"))
    evaluation = {"eval_every_n_steps": 4, "eval_datasets": [{"name": "seen", "config": str(seen)}]}
    config = write_config(**keys, **evaluation, sampling=asked)
    assert run_here(config)
    losses = metrics(only_run(config), "seen/loss")
    assert losses[4] < losses[0]
    assert (only_run(config) / "samples" / "step000004" / "00_a_red_picture.png").exists()


@torch.no_grad()
def test_opacity_is_a_channel_of_the_pixels(folder: Path) -> None:
    autoencoder = tiny.pipeline(folder, latents="mode").encoders()[0]
    assert autoencoder.reads == ("rgba",)
    autoencoder.load(torch.device("cpu"))
    latents = normal((1, tiny.CHANNELS, 1, 2, 4), 0, "latents")
    shown = autoencoder.decode(latents)
    mean, std = (torch.tensor(tiny.VAE[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    stock_B41HW = autoencoder.vae.decode(latents * std + mean).sample
    assert stock_B41HW[:, 3].std() > 1e-3
    opacity = (stock_B41HW[:, 3:] + 1) / 2
    torch.testing.assert_close(shown, stock_B41HW[:, :3] * opacity)


def test_levels_that_the_folder_names(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": [1.0, 0.7, 0.2]}))
    pipeline = tiny.pipeline(folder)
    assert pipeline.sampling_levels(3) == [1.0, 0.7, 0.2]
    assert pipeline.sampling_levels(4) == [1.0, 0.75, 0.5, 0.25]


def test_the_shift_is_that_of_the_folders_scheduler(folder: Path) -> None:
    shift = tiny.pipeline(folder).resolution_shift
    assert (shift.base_tokens, shift.max_tokens, shift.base_shift, shift.max_shift) == (256, 8192, 0.6, 0.9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 16}, "takes latents of 16 channels and the VAE makes 4; give the VAE of Qwen-Image 2.1"),
        ({"context_in_dim": 8}, "takes text of 8 features and Qwen3-VL makes 16; give Qwen3-VL 8B"),
        ({"patch_size": 2}, "has patches of side 2"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()


def test_a_processor_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    (folder / "processor" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"processor/tokenizer_config\.json"):
        tiny.pipeline(folder).check()
