"""SDXL and Stable Diffusion 1.5: what of them is their own. What holds for every model is tested in
tests/test_models.py, with text encoders that are trained too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from optimizers.parameter_groups import groups_of
from tests import test_models as generic
from tests.models import tiny_sd15, tiny_sdxl, tiny_sdxl_texts
from tests.models.batches import batch_of
from tests.models.unet_models import (
    CAPTIONS,
    STOCK,
    TINY,
    features_of,
    loaded,
    lora,
    moved,
    parameters_of,
    without_weights,
)
from tests.runs import launch, metrics, only_run
from utils.diffusion.seeds import normal


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: module.write_folder(tmp_path_factory.mktemp(name)) for name, module in TINY.items()}


@pytest.fixture(scope="module")
def texts_model(folders: dict[str, Path]) -> generic.Model:
    return generic.Model("sdxl_texts", folders["sdxl"], tiny_sdxl_texts)


# Trained text encoders


@pytest.mark.parametrize(
    ("module", "rates", "told"),
    [
        (tiny_sdxl, {}, "text_encoder_1_lr and text_encoder_2_lr"),
        (tiny_sdxl, {"text_encoder_1_lr": 1e-5}, "text_encoder_2_lr"),
        (tiny_sdxl, {"text_encoder_1_lr": 0.0, "text_encoder_2_lr": 1e-5}, None),
        (tiny_sd15, {}, "text_encoder_1_lr"),
        (tiny_sd15, {"text_encoder_1_lr": 0.0}, None),
    ],
)
def test_text_encoders_that_are_not_trained_without_a_word_of_it_are_told(
    module: object, rates: dict[str, float], told: str | None
) -> None:
    said = dict(module.pipeline(Path("nowhere"), **rates).remarks())
    assert list(said) == ([told] if told else [])
    assert told is None or "these text encoders are not trained" in said[told]


def test_trained_text_encoders_are_parts_of_the_denoiser(texts_model: generic.Model) -> None:
    names = [name for name, _ in texts_model.pipeline().weights.build().named_parameters()]
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder", "text_encoder_2"}


@torch.no_grad()
@pytest.mark.parametrize("weighted_tags", [False, True])
def test_tokens_lead_to_the_features_that_are_cached_otherwise(folders: dict[str, Path], weighted_tags: bool) -> None:
    trained, frozen = tiny_sdxl_texts.pipeline(folders["sdxl"]), tiny_sdxl.pipeline(folders["sdxl"])
    x_t, t_B = normal((2, 4, 8, 8), 0, "x"), torch.tensor([0.25, 0.9])
    results = []
    for pipeline in (trained, frozen):
        features = features_of(pipeline, ["a hiker", "two (motorcycles:1.4)"], weighted_tags=weighted_tags)
        stream = pipeline.prepare_inputs(features, x_t, t_B)
        for layer in loaded(pipeline).layers:
            stream = layer.eval()(stream)
        results.append(stream)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_each_part_has_its_own_lr(folders: dict[str, Path]) -> None:
    pipeline = tiny_sdxl_texts.pipeline(folders["sdxl"])
    names = {f"{part}.x": nn.Parameter(torch.zeros(2, 2)) for part in ("unet", "text_encoder", "text_encoder_2")}
    groups = groups_of(names.items(), lr=1.0, weight_decay=0.0, own_lr=pipeline.learning_rate)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert list(rates.values()) == list(tiny_sdxl_texts.RATES.values())
    plain = tiny_sdxl.pipeline(folders["sdxl"])
    assert plain.learning_rate("unet.x") is None


@torch.no_grad()
@pytest.mark.parametrize("convolutions", [False, True], ids=["linears", "convolutions too"])
@pytest.mark.parametrize("file", [generic.LORA_FILE, generic.LORA_COMFYUI])
def test_an_adapter_of_all_parts_is_loaded_by_the_stock_pipeline(
    texts_model: generic.Model, tmp_path: Path, convolutions: bool, file: str
) -> None:
    pipeline, adapter = texts_model.pipeline(), lora(convolutions=convolutions)
    batch = batch_of(texts_model, pipeline, (64, 64, 1))
    staged = moved(pipeline, tmp_path, adapter)
    expected = generic.output(pipeline, staged.layers, batch)
    stock = texts_model.stock()
    stock.load_lora_weights(tmp_path, weight_name=file)
    result = tiny_sdxl_texts.whole(stock, pipeline, batch.features, batch.x_t, batch.t_B)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    again = loaded(pipeline, adapter.model_copy(update={"init_from_existing": tmp_path / file}))
    torch.testing.assert_close(generic.output(pipeline, again.layers, batch), expected, rtol=1e-4, atol=1e-5)
    adapted = {name.partition(".lora_")[0] for name in staged.trained(staged.layers)}
    assert ("unet.down_blocks.0.resnets.0.conv1" in adapted) == convolutions
    assert {"text_encoder.text_model.encoder.layers.0.mlp.fc1", "unet.mid_block.attentions.0.proj_in"} <= adapted


@torch.no_grad()
def test_all_parts_are_exported_in_full(texts_model: generic.Model, tmp_path: Path) -> None:
    """As folders, which stand in for those of the model, and as a checkpoint."""
    written = dict(moved(texts_model.pipeline(), tmp_path / "out", None).denoiser.named_parameters())
    place = tmp_path / "model"
    shutil.copytree(texts_model.folder, place, symlinks=False)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        shutil.rmtree(place / part)
        (tmp_path / "out" / part).rename(place / part)
    stock = StableDiffusionXLPipeline.from_pretrained(place)
    of_stock = dict(stock.unet.named_parameters(prefix="unet"))
    of_stock |= dict(stock.text_encoder.named_parameters(prefix="text_encoder.text_model"))
    of_stock |= dict(stock.text_encoder_2.named_parameters(prefix="text_encoder_2"))
    single = parameters_of(
        tiny_sdxl_texts.pipeline(
            without_weights(texts_model.folder, tmp_path / "empty"),
            transformer_path=tmp_path / "out" / generic.DENOISER_COMFYUI,
        )
    )
    for others in (of_stock, single):
        assert others.keys() == written.keys()
        assert all(torch.equal(others[name], written[name]) for name in written)


def test_a_model_with_trained_text_encoders_trains(
    write_config: Callable[..., Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    options = tiny_sdxl_texts.pipeline(folders["sdxl"]).options.model_dump(mode="json", exclude_unset=True)
    sampling = {"prompts": CAPTIONS[:1], "steps": 2, "sample_every_n_steps": 10, **tiny_sdxl.SAMPLING}
    config = write_config(
        model=options, sampling=sampling, pipeline_stages=2, max_steps=10, cache_text_embeddings=False,
        adapter={"type": "lora", "rank": 4}, lr_scheduler="constant",
    )  # fmt: skip
    codes, log = launch(config, processes=2)
    assert codes == [0, 0], log
    losses = list(metrics(only_run(config), "train/loss").values())
    assert sum(losses[-3:]) < sum(losses[:3])


# What else is their own


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_takes_an_earlier_layer(folders: dict[str, Path], skip: int) -> None:
    """Counted as the stock pipeline's, which calls the last layer 0. It cannot do it itself with this transformers."""
    stock = STOCK["sd15"].from_pretrained(folders["sd15"])
    tokens = stock.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = stock.text_encoder(tokens, output_hidden_states=True).hidden_states[-1 - (skip - 1)]
    expected = stock.text_encoder.final_layer_norm(hidden)
    made = features_of(tiny_sd15.pipeline(folders["sd15"], clip_skip=skip), CAPTIONS)["clip_l"]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_sizes_are_embedded_in_float32_under_bfloat16(folders: dict[str, Path]) -> None:
    """Two sizes that bfloat16 cannot tell apart."""
    pipeline = tiny_sdxl.pipeline(folders["sdxl"], dtype="bfloat16")
    entry, features = loaded(pipeline).layers[0], tiny_sdxl.features((5, 5))
    same = {name: feature[:1].expand_as(feature) for name, feature in features.items()}
    same["size_ids"] = torch.tensor([[1000.0, 1000, 0, 0, 64, 64], [1001.0, 1000, 0, 0, 64, 64]])
    low, high = entry(pipeline.prepare_inputs(same, normal((2, 4, 8, 8), 0, "x"), torch.tensor([0.5, 0.5]))).time_BD
    assert low.dtype == torch.bfloat16 and not torch.equal(low, high)


def test_samples_are_drawn_as_of_whole_pictures(folders: dict[str, Path]) -> None:
    pipeline = tiny_sdxl.pipeline(folders["sdxl"])
    features = {name: feature for name, feature in tiny_sdxl.features((5, 5)).items() if name != "size_ids"}
    inputs = pipeline.prepare_inputs(features, torch.zeros(2, 4, 8, 16), torch.tensor([0.5, 0.5]))
    assert inputs.sizes_B6.tolist() == [[64, 128, 0, 0, 64, 128]] * 2
