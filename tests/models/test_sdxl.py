"""SDXL and Stable Diffusion 1.5: what of them is their own. What holds for every model is tested in
tests/test_models.py, with text encoders that are trained too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from models.assembly.exports import export_plan
from models.assembly.stage import StagedModel, load_stage
from models.families.stable_diffusion import StableDiffusionPipeline as OurPipeline
from optimizers.parameter_groups import groups_of
from tests import test_models as generic
from tests.models import tiny_sd15, tiny_sdxl, tiny_sdxl_texts
from tests.models.tiny_folder import encoded, settings_of
from tests.runs import launch, metrics, only_run
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

CAPTIONS = ["a hiker on a ridge", "two motorcycles and a dog"]
TINY = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}
STOCK = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PARTS = {"sd15": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: module.write_folder(tmp_path_factory.mktemp(name)) for name, module in TINY.items()}


@pytest.fixture(scope="module")
def checkpoints(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each folder as the publisher's single file."""
    files = {}
    for name, module in TINY.items():
        pipeline = module.pipeline(folders[name])
        files[name] = tmp_path_factory.mktemp("single") / f"{name}.safetensors"
        tensors = pipeline.original_layout.to_original(parameters_of(pipeline))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, files[name])
    return files


@pytest.fixture(scope="module")
def texts_model(folders: dict[str, Path]) -> generic.Model:
    return generic.Model("sdxl_texts", folders["sdxl"], tiny_sdxl_texts)


def loaded(pipeline: OurPipeline, adapter: AdapterSettings | None = None) -> StagedModel:
    return load_stage(pipeline, settings_of(pipeline, adapter), stage=0)


def parameters_of(pipeline: OurPipeline) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in loaded(pipeline).denoiser.named_parameters()}


def lora(**keys: Any) -> AdapterSettings:
    return LoraSettings(**{"type": "lora", "rank": 4, "alpha": 2.0, **keys})


def without_weights(folder: Path, place: Path) -> Path:
    """What remains of a folder beside a single file."""
    shutil.copytree(folder, place, symlinks=False)
    for file in place.rglob("*.safetensors"):
        file.unlink()
    return place


def features_of(pipeline: OurPipeline, captions: list[str], *, weighted_tags: bool = False) -> dict[str, torch.Tensor]:
    made: dict[str, Any] = {}
    for encoder in generic.prompt_encoders(pipeline.encoders()):
        made |= encoded(encoder, captions, weighted_tags=weighted_tags)
    return made


# Trained text encoders


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


def moved(pipeline: OurPipeline, place: Path, adapter: AdapterSettings | None) -> StagedModel:
    settings = settings_of(pipeline, adapter, save_format="both")
    staged = loaded(pipeline, adapter)
    parameters = staged.trained(staged.layers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.1)
    export(place, Ranks(), parameters, export_plan(pipeline, settings, staged), step=7)
    return staged


@torch.no_grad()
@pytest.mark.parametrize("convolutions", [False, True], ids=["linears", "convolutions too"])
@pytest.mark.parametrize("file", [generic.LORA_FILE, generic.LORA_COMFYUI])
def test_an_adapter_of_all_parts_is_loaded_by_the_stock_pipeline(
    texts_model: generic.Model, tmp_path: Path, convolutions: bool, file: str
) -> None:
    pipeline, adapter = texts_model.pipeline(), lora(convolutions=convolutions)
    batch = generic.batch_of(texts_model, pipeline, (64, 64, 1))
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


# The publisher's files


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_is_read_by_the_stock_pipeline(
    name: str, folders: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    own = STOCK[name].from_pretrained(folders[name])
    single = STOCK[name].from_single_file(checkpoints[name], config=str(folders[name]), local_files_only=True)
    for part in PARTS[name]:
        expected = getattr(own, part).state_dict()
        read = getattr(single, part).state_dict()
        assert expected.keys() == read.keys()
        assert all(torch.equal(expected[key], read[key]) for key in expected), part


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_holds_all_that_a_folder_does(
    name: str, folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    empty = without_weights(folders[name], tmp_path / "empty")
    single = TINY[name].pipeline(empty, transformer_path=checkpoints[name], latents="mode")
    single.check()
    own = TINY[name].pipeline(folders[name], latents="mode")
    ours, theirs = parameters_of(single), parameters_of(own)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = features_of(single, CAPTIONS), features_of(own, CAPTIONS)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    pixels = normal((1, 3, 1, 64, 64), 0, "pixels").clamp(-1, 1)
    latents = []
    for pipeline in (single, own):
        autoencoder = pipeline.encoders()[0]
        autoencoder.load(torch.device("cpu"))
        latents.append(autoencoder.encode(pixels=pixels)["latents"])
    assert torch.equal(*latents)


def test_a_vae_beside_a_checkpoint_counts(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    empty = without_weights(folders["sdxl"], tmp_path / "empty")
    vae = folders["sdxl"] / "vae" / "diffusion_pytorch_model.safetensors"
    both = tiny_sdxl.pipeline(empty, transformer_path=checkpoints["sdxl"], vae_path=vae)
    both.check()
    assert both.encoders()[0].file == vae


def test_a_vae_with_the_names_of_older_diffusers_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(folders["sd15"] / "vae" / "diffusion_pytorch_model.safetensors")
    for new, old in older.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "older.safetensors")
    tiny_sd15.pipeline(folders["sd15"], vae_path=tmp_path / "older.safetensors").check()


def test_what_the_model_predicts_is_told_in_its_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipeline = tiny_sdxl.pipeline(folders["sdxl"], **v)
    assert pipeline.objective.kind == "v" and pipeline.objective.schedule.zero_terminal_snr
    assert pipeline.scheduler().config.prediction_type == "v_prediction"
    moved(pipeline, tmp_path / "v", None)
    moved(tiny_sdxl.pipeline(folders["sdxl"]), tmp_path / "epsilon", None)
    written = [load_file(tmp_path / name / generic.DENOISER_COMFYUI).keys() for name in ("v", "epsilon")]
    assert [{"v_pred", "ztsnr"} & keys for keys in written] == [{"v_pred", "ztsnr"}, set()]


# LoRA files of other programs


@torch.no_grad()
def test_the_publishers_names_in_a_lora_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """kohya names SDXL's modules as the publisher does; diffusers' converter is the reference for these names."""
    pipeline = tiny_sdxl.pipeline(folders["sdxl"])
    moved(pipeline, tmp_path, lora(convolutions=True))
    tensors = load_file(tmp_path / generic.LORA_COMFYUI)
    there = pipeline.original_layout.names_there(dict(loaded(pipeline).denoiser.unet.named_modules()))
    renamed = {ours.replace(".", "_"): theirs.replace(".", "_") for ours, theirs in there.items()}
    publishers = {}
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix("lora_unet_").partition(".")
        publishers[f"lora_unet_{renamed[module]}.{factor}"] = tensor
    assert any("input_blocks" in key for key in publishers) and not any("down_blocks" in key for key in publishers)
    save_file(publishers, tmp_path / "publishers.safetensors")
    stock = STOCK["sdxl"].from_pretrained(folders["sdxl"])
    stock.load_lora_weights(tmp_path, weight_name="publishers.safetensors")
    again = loaded(pipeline, lora(convolutions=True, init_from_existing=tmp_path / "publishers.safetensors"))
    batch = generic.batch_of(generic.Model("sdxl", folders["sdxl"], tiny_sdxl), pipeline, (64, 64, 1))
    expected = tiny_sdxl.whole(stock.unet.eval(), pipeline, batch.features, batch.x_t, batch.t_B)
    torch.testing.assert_close(generic.output(pipeline, again.layers, batch), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("file", [generic.LORA_FILE, generic.LORA_COMFYUI])
def test_an_adapter_is_fused_as_a_preset(folders: dict[str, Path], tmp_path: Path, file: str) -> None:
    """Convolutions too, which are not adapted in the run that fuses them."""
    model = generic.Model("sdxl", folders["sdxl"], tiny_sdxl)
    pipeline = model.pipeline()
    batch = generic.batch_of(model, pipeline, (64, 64, 1))
    staged = moved(pipeline, tmp_path, lora(convolutions=True))
    expected = generic.output(pipeline, staged.layers, batch)
    fused = loaded(model.pipeline(preset_adapters=[{"path": tmp_path / file, "fused": True}]))
    torch.testing.assert_close(generic.output(pipeline, fused.layers, batch), expected, rtol=1e-4, atol=1e-5)


def test_factors_of_a_text_encoder_that_is_frozen_are_not_lost_in_silence(
    texts_model: generic.Model, tmp_path: Path
) -> None:
    moved(texts_model.pipeline(), tmp_path, lora())
    frozen = tiny_sdxl.pipeline(texts_model.folder)
    with pytest.raises(UserError, match="lora_te1_text_model.*text_encoder_1_lr"):
        loaded(frozen, lora(init_from_existing=tmp_path / generic.LORA_COMFYUI))
    with pytest.raises(UserError, match="text_encoder.*has no counterpart"):
        loaded(frozen, lora(init_from_existing=tmp_path / generic.LORA_FILE))


def test_convolutions_are_refused_where_there_are_none(tmp_path: Path) -> None:
    from tests.models import tiny_flux

    flux = tiny_flux.pipeline(tiny_flux.write_folder(tmp_path))
    with pytest.raises(UserError, match="convolutions: this model's blocks have no convolutions"):
        load_stage(flux, settings_of(flux, lora(convolutions=True)), stage=0)


# Wrong files

REAL = {"sd15": (768, 4), "sdxl": (2048, 4), "refiner": (1280, 4), "inpainting": (768, 9)}
"""Features of the text, and channels that the first convolution takes."""


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("sdxl", "sd15", 'looks like Stable Diffusion 1.5: set .model. type = "sd15"'),
        ("sd15", "sdxl", 'looks like Stable Diffusion XL: set .model. type = "sdxl"'),
        ("sdxl", "refiner", "refiner of Stable Diffusion XL: it is not trained here"),
        ("sd15", "inpainting", "inpainting model of Stable Diffusion 1.5: give the plain one"),
    ],
)
def test_a_checkpoint_of_another_model_is_told(
    name: str, other: str, told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of the checkpoint there is only what tells models apart."""
    width, channels = REAL[other]
    tensors = {
        "input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width),
        "output_blocks.0.0.in_layers.0.weight": torch.zeros(8),
    }
    save_file(
        {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "other.safetensors"
    )
    with pytest.raises(UserError, match=told):
        TINY[name].pipeline(folders[name], transformer_path=tmp_path / "other.safetensors").check()


@pytest.mark.parametrize(("name", "other"), [("sdxl", "sd15"), ("sd15", "sdxl")])
def test_the_folder_of_the_other_is_told(name: str, other: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """With what it lacks, so that all else fits."""
    shutil.copytree(folders[other], tmp_path, symlinks=False, dirs_exist_ok=True)
    for part in ("text_encoder_2", "tokenizer_2"):
        shutil.copytree(folders["sdxl"] / part, tmp_path / part, dirs_exist_ok=True)
    with pytest.raises(UserError, match=f'type = "{other}"'):
        TINY[name].pipeline(tmp_path).check()


def test_a_lora_is_no_base(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = tiny_sdxl.pipeline(folders["sdxl"])
    moved(pipeline, tmp_path, lora())
    for file in (generic.LORA_FILE, generic.LORA_COMFYUI):
        with pytest.raises(UserError, match="looks like an adapter: give it as .adapter. init_from_existing"):
            tiny_sdxl.pipeline(folders["sdxl"], transformer_path=tmp_path / file).check()


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("unet", {"in_channels": 9}, "takes 9 channels and the VAE makes 4"),
        ("unet", {"cross_attention_dim": 48}, "takes text of 48 features and the text encoders make 40"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is UNetMidBlock2D"),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types has AttnDownBlock2D"),
        ("unet", {"_class_name": "Transformer2DModel"}, "one of UNet2DConditionModel belongs here"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("text_encoder", {"hidden_act": "gelu"}, "as Stable Diffusion 2 has it"),
        ("scheduler", {"_class_name": "EulerScheduler"}, "is no scheduler of diffusers"),
    ],
)
def test_a_folder_of_another_model_is_told(
    folders: dict[str, Path], tmp_path: Path, part: str, changes: dict[str, Any], told: str
) -> None:
    shutil.copytree(folders["sdxl"], tmp_path, symlinks=False, dirs_exist_ok=True)
    (file,) = (tmp_path / part).glob("*config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=told):
        tiny_sdxl.pipeline(tmp_path).check()


def test_a_checkpoint_without_text_encoders_needs_them_elsewhere(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {key: t for key, t in load_file(checkpoints["sdxl"]).items() if not key.startswith("conditioner")}
    save_file(tensors, tmp_path / "bare.safetensors")
    empty = without_weights(folders["sdxl"], tmp_path / "empty")
    with pytest.raises(UserError, match="name a file with .model. text_encoders") as error:
        tiny_sdxl.pipeline(empty, transformer_path=tmp_path / "bare.safetensors").check()
    assert len(error.value.problems) == 2
    tiny_sdxl.pipeline(folders["sdxl"], transformer_path=tmp_path / "bare.safetensors").check()


def test_a_text_encoder_is_not_trained_beside_random_numbers(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="text_encoder_2_lr"):
        tiny_sdxl.pipeline(folders["sdxl"], from_scratch=True, text_encoder_2_lr=1e-4).check()


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
