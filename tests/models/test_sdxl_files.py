"""The files of SDXL and Stable Diffusion 1.5: the publisher's single file, other programs' LoRAs, wrong files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.assembly.stage import load_stage, model_names
from models.assembly.tools import __main__ as tools
from models.foundation.checkpoints import published
from models.foundation.checkpoints.adapter_files import read_updates
from tests import test_models as generic
from tests.models import tiny_sd15, tiny_sdxl, tiny_sdxl_texts
from tests.models.batches import batch_of
from tests.models.tiny_folder import settings_of
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
from utils.diffusion.seeds import normal
from utils.errors import UserError

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
    # It is read of a checkpoint too, unless the config says otherwise.
    of_v, of_epsilon = (tmp_path / name / generic.DENOISER_COMFYUI for name in ("v", "epsilon"))
    read = tiny_sdxl.pipeline(folders["sdxl"], transformer_path=of_v)
    assert read.objective.kind == "v" and read.objective.schedule.zero_terminal_snr
    assert ("prediction_type", "taken as v_prediction: the checkpoint has the mark `v_pred`") in list(read.remarks())
    assert tiny_sdxl.pipeline(folders["sdxl"], transformer_path=of_epsilon).objective.kind == "epsilon"
    meant = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    assert tiny_sdxl.pipeline(folders["sdxl"], transformer_path=of_v, **meant).objective.kind == "epsilon"


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_is_enough(
    name: str, folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder, but for the tokenizers."""
    folder, tokenizers = folders[name], tmp_path / "tokenizers"
    for place in folder.glob("tokenizer*"):
        shutil.copytree(place, tokenizers / place.name)
    configs = {
        part: json.loads(next((folder / part).glob("*config.json")).read_text()) for part in (*PARTS[name], "scheduler")
    }
    monkeypatch.setattr(published, "CONFIGS", tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "tiny.json").write_text(json.dumps(configs))
    keys = {"type": name, "dtype": "float32", "transformer_path": checkpoints[name], "tokenizer_path": tokenizers}
    single, own = models.build(models.find(name).Options(**keys)), TINY[name].pipeline(folder)
    single.check()
    ours, theirs = parameters_of(single), parameters_of(own)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = features_of(single, CAPTIONS), features_of(own, CAPTIONS)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# LoRA files of other programs


@torch.no_grad()
def test_the_publishers_names_in_a_lora_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """kohya names SDXL's modules as the publisher does; diffusers' converter is the reference for these names."""
    pipeline = tiny_sdxl.pipeline(folders["sdxl"])
    moved(pipeline, tmp_path, lora(convolutions=True))
    tensors = load_file(tmp_path / generic.LORA_COMFYUI)
    names = [name for name, _ in loaded(pipeline).denoiser.named_parameters()]
    there = {target.modules[0]: name for name, target in pipeline.original_layout.targets(names)}
    renamed = {ours.removeprefix("unet.").replace(".", "_"): theirs.replace(".", "_") for ours, theirs in there.items()}
    publishers = {}
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix("lora_unet_").partition(".")
        publishers[f"lora_unet_{renamed[module]}.{factor}"] = tensor
    assert any("input_blocks" in key for key in publishers) and not any("down_blocks" in key for key in publishers)
    save_file(publishers, tmp_path / "publishers.safetensors")
    stock = STOCK["sdxl"].from_pretrained(folders["sdxl"])
    stock.load_lora_weights(tmp_path, weight_name="publishers.safetensors")
    again = loaded(pipeline, lora(convolutions=True, init_from_existing=tmp_path / "publishers.safetensors"))
    batch = batch_of(generic.Model("sdxl", folders["sdxl"], tiny_sdxl), pipeline, (64, 64, 1))
    expected = tiny_sdxl.whole(stock.unet.eval(), pipeline, batch.features, batch.x_t, batch.t_B)
    torch.testing.assert_close(generic.output(pipeline, again.layers, batch), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("file", [generic.LORA_FILE, generic.LORA_COMFYUI])
def test_an_adapter_is_fused_as_a_preset(folders: dict[str, Path], tmp_path: Path, file: str) -> None:
    """Convolutions too, which are not adapted in the run that fuses them."""
    model = generic.Model("sdxl", folders["sdxl"], tiny_sdxl)
    pipeline = model.pipeline()
    batch = batch_of(model, pipeline, (64, 64, 1))
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
    with pytest.raises(UserError, match="42 of its 130 modules are a text encoder's, .*'text_encoder"):
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


# An adapter from two checkpoints


def test_text_encoders_are_extracted_where_both_have_them(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a single file, and of a folder that has one of the two."""
    caplog.set_level(logging.INFO)
    base, file = folders["sdxl"], tmp_path / "tuned.safetensors"
    pipeline = tiny_sdxl_texts.pipeline(base)
    first = dict(loaded(pipeline).denoiser.named_parameters())
    queries = [name for name in first if name.endswith("to_q.weight") or name.endswith("q_proj.weight")]
    parts = [part for part in PARTS["sdxl"] if part != "vae"]
    ends = {part: next(name for name in queries if name.startswith(f"{part}.")) for part in parts}
    changed = {name: tensor.detach().clone() for name, tensor in first.items()}
    for number, name in enumerate(ends.values()):
        rows, columns = changed[name].shape
        changed[name] += (number + 1.0) * normal((rows, 2), 0, name) @ normal((2, columns), 1, name)
    whole = pipeline.original_layout.to_original(changed)
    save_file({key: tensor.contiguous() for key, tensor in whole.items()} | {"other.weight": torch.ones(1)}, file)
    folder = shutil.copytree(base, tmp_path / "folder")
    shutil.rmtree(folder / "text_encoder_2")
    for part in ("unet", "text_encoder"):
        (weights,) = (folder / part).glob("*.safetensors")
        stored = load_file(weights)
        (key,) = [key for key in stored if ends[part].endswith(key)]
        save_file({**stored, key: changed[ends[part]]}, weights)

    def extracted(tuned: Path) -> set[str]:
        caplog.clear()
        words = ["--rank", "2", "--type", "sdxl", "--base", str(base), "--out", str(tmp_path / f"{tuned.stem}_lora")]
        assert tools.main(["extract", str(tuned), *words]) == 0, caplog.text
        denoiser = pipeline.weights.build_empty()
        updates = read_updates(tmp_path / f"{tuned.stem}_lora", model_names(pipeline, denoiser))
        for name, update in updates.items():
            difference = (changed[name] - first[name]).detach()
            torch.testing.assert_close(update.delta(difference), difference, atol=1e-3, rtol=1e-3)
        return set(updates)

    assert extracted(file) == set(ends.values())
    assert "only unet, text_encoder, text_encoder_2 is compared; not first_stage_model, other" in caplog.text
    assert extracted(folder) == {ends["unet"], ends["text_encoder"]}
    assert "only unet, text_encoder is compared; not scheduler" in caplog.text and "vae" in caplog.text
