"""Exports as other programs meet them: loaded by the stock library, and by a further run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline as StockPipeline
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from models.assembly import sample_checks
from models.assembly.exports import check_outputs, export_plan
from models.assembly.prompts import sample_bucket
from models.assembly.sample_checks import tell_long_prompts
from models.assembly.stage import load_stage
from models.flux import BFL_LAYOUT, FluxPipeline
from tests.models import tiny_chroma, tiny_flux
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from utils.adapters.lora import LoraSettings
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.writing import tensor_to_image
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.run_tables import SamplingSettings
from utils.settings.sample_requests import requests_of
from utils.settings.schema import AdapterSettings

STEP = 7
LORA_FILE, LORA_COMFYUI, DENOISER_COMFYUI = (
    "adapter_model.safetensors",
    "adapter_model_comfyui.safetensors",
    "model_comfyui.safetensors",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def lora(**keys: Any) -> AdapterSettings:
    return LoraSettings(**{"type": "lora", "rank": 4, "alpha": 1.0, **keys})


def export_moved(
    ranks: Ranks, folder: Path, place: Path, adapter: AdapterSettings | None, keys: dict[str, Any], plan: dict[str, Any]
) -> list[nn.Module]:
    """Job of a rank: exports a stage whose weights training has moved; the stage's layers."""
    ranks = ranks.with_stages(keys.get("pipeline_stages", 1))
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, adapter, **keys)
    staged = load_stage(flux, settings, ranks.stage)
    layers = staged.stage_layers(ranks.stage)
    parameters = staged.trained(layers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.2)
    export(place, ranks, parameters, replace(export_plan(flux, settings, staged), **plan), STEP)
    return layers


def exported(
    folder: Path, place: Path, adapter: AdapterSettings | None = None, plan: dict[str, Any] | None = None, **keys: Any
) -> list[nn.Module]:
    return export_moved(Ranks(), folder, place, adapter, keys, plan or {})


@torch.no_grad()
def output(flux: FluxPipeline, layers: list[nn.Module]) -> torch.Tensor:
    features = {"t5": normal((1, 16, 64), 0, "t5"), "clip_pooled": normal((1, 32), 0, "clip")}
    stream = flux.prepare_inputs(features, normal((1, 4, 4, 6), 0, "x"), torch.tensor([0.4]))
    for layer in layers:
        stream = layer(stream)
    return stream


def same_weights(one: list[nn.Module], other: list[nn.Module]) -> bool:
    pairs = zip(nn.ModuleList(one).parameters(), nn.ModuleList(other).parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def loaded(flux: FluxPipeline, adapter: AdapterSettings | None = None) -> list[nn.Module]:
    """The layers of a run that starts from these files."""
    return load_stage(flux, settings_of(flux, adapter), stage=0).layers


@pytest.mark.parametrize(
    "keys", [{}, {"alpha": 10.0}, {"alpha": None}, {"include": ["to_q", "proj_mlp"], "exclude": ["blocks.1."]}]
)
def test_adapter_loads_in_the_stock_pipeline(folder: Path, tmp_path: Path, keys: dict) -> None:
    layers = exported(folder, tmp_path / "epoch1", lora(**keys))
    stock = StockPipeline.from_pretrained(folder, vae=None, text_encoder=None, text_encoder_2=None)
    flux = tiny_flux.pipeline(folder)
    plain = output(flux, flux.to_layers(stock.transformer))
    stock.load_lora_weights(tmp_path / "epoch1", weight_name=LORA_FILE)
    theirs = output(flux, flux.to_layers(stock.transformer))

    assert (theirs - plain).abs().mean() > 0.01
    torch.testing.assert_close(theirs, output(flux, layers), rtol=1e-4, atol=1e-5)


def test_a_named_adapter_loads_in_the_stock_pipeline_and_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    layers = exported(folder, tmp_path / "epoch1", lora(), run_name="fox")
    stock = StockPipeline.from_pretrained(folder, vae=None, text_encoder=None, text_encoder_2=None)
    flux = tiny_flux.pipeline(folder)
    stock.load_lora_weights(tmp_path / "epoch1", weight_name="fox-epoch000001.safetensors")
    expected = output(flux, layers)
    torch.testing.assert_close(output(flux, flux.to_layers(stock.transformer)), expected, rtol=1e-4, atol=1e-5)
    # Of both files in the folder, the one for diffusers.
    again = loaded(flux, lora(init_from_existing=tmp_path / "epoch1"))
    torch.testing.assert_close(output(flux, again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", [LORA_FILE, LORA_COMFYUI])
@pytest.mark.parametrize("keys", [{}, {"alpha": 10.0, "include": ["to_q", "proj_mlp", "mlp.0"]}])
def test_adapter_is_gone_on_from(folder: Path, tmp_path: Path, file: str, keys: dict) -> None:
    layers = exported(folder, tmp_path / "epoch1", lora(**keys), save_format="both")
    flux = tiny_flux.pipeline(folder)
    again = loaded(flux, lora(**{**keys, "alpha": 3.0}, init_from_existing=tmp_path / "epoch1" / file))
    torch.testing.assert_close(output(flux, again), output(flux, layers), rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    """The first export may come before a step has moved lora_B from zero."""
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, lora())
    staged = load_stage(flux, settings, stage=0)
    parameters = staged.trained(staged.layers)
    export(tmp_path / "step0", Ranks(), parameters, export_plan(flux, settings, staged), step=0)
    again = loaded(flux, lora(init_from_existing=tmp_path / "step0"))
    assert torch.equal(output(flux, again), output(flux, staged.layers))


def test_full_export_loads_in_diffusers(folder: Path, tmp_path: Path) -> None:
    layers = exported(folder, tmp_path / "epoch1")
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "epoch1", subfolder="transformer")
    flux = tiny_flux.pipeline(folder)
    assert dict(theirs.config)["guidance_embeds"] is True
    assert same_weights(flux.to_layers(theirs), layers)
    assert not same_weights(loaded(flux), layers)


def test_full_export_in_shards(folder: Path, tmp_path: Path) -> None:
    layers = exported(folder, tmp_path / "epoch1", plan={"shard_bytes": 100_000})
    files = list((tmp_path / "epoch1" / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 110_000 for file in files)
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "epoch1" / "transformer")
    flux = tiny_flux.pipeline(folder, transformer_path=tmp_path / "epoch1" / "transformer")
    assert same_weights(flux.to_layers(theirs), layers)
    assert same_weights(loaded(flux), layers)


def test_full_export_as_a_single_file(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = exported(folder, tmp_path / "epoch1")
    file = tmp_path / "epoch1" / DENOISER_COMFYUI
    assert BFL_LAYOUT.recognises(load_file(file))
    flux = tiny_flux.pipeline(folder, transformer_path=file)
    with caplog.at_level(logging.WARNING, "models"):
        assert same_weights(loaded(flux), layers)
    assert not caplog.records


@pytest.mark.parametrize(
    ("adapter", "save_format", "files"),
    [
        (lora(), None, {LORA_FILE, "adapter_config.json", LORA_COMFYUI}),
        (lora(), "diffusers", {LORA_FILE, "adapter_config.json"}),
        (lora(), "comfyui", {LORA_COMFYUI}),
        (lora(), "both", {LORA_FILE, "adapter_config.json", LORA_COMFYUI}),
        (None, None, {"transformer", DENOISER_COMFYUI}),
        (None, "diffusers", {"transformer"}),
        (None, "comfyui", {DENOISER_COMFYUI}),
    ],
)
def test_formats(
    folder: Path, tmp_path: Path, adapter: AdapterSettings | None, save_format: str | None, files: set[str]
) -> None:
    exported(folder, tmp_path / "epoch1", adapter, save_format=save_format, save_dtype="bfloat16")
    assert {path.name for path in (tmp_path / "epoch1").iterdir()} == files
    assert {path.name for path in tmp_path.iterdir()} == {"epoch1"}
    for file in (tmp_path / "epoch1").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        assert (metadata["step"], metadata["format"], metadata["model_type"]) == (str(STEP), "pt", "flux")
        assert metadata["base_model"] == folder.name
        assert {t.dtype for name, t in load_file(file).items() if not name.endswith(".alpha")} == {torch.bfloat16}


def test_who_loads_an_export_drops_no_inputs(folder: Path, tmp_path: Path) -> None:
    """PEFT's layers are in training mode when stock pipelines have loaded them."""
    exported(folder, tmp_path, lora().model_copy(update={"dropout": 0.5}))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    stock = tiny_flux.STOCK.from_pretrained(folder)
    stock.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    dropouts = [module.p for module in stock.transformer.modules() if isinstance(module, nn.Dropout)]
    assert not any(dropouts)


def test_an_export_replaces_the_one_of_its_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "epoch1").mkdir()
    (tmp_path / "epoch1" / "leftover").touch()
    exported(folder, tmp_path / "epoch1", lora())
    assert not (tmp_path / "epoch1" / "leftover").exists()


def in_ranks(ranks: Ranks, *arguments: Any) -> None:
    """Job of a rank that brings nothing back: modules do not travel between processes."""
    export_moved(ranks, *arguments)


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
def test_two_stages_export_what_one_does(folder: Path, tmp_path: Path, adapter: AdapterSettings | None) -> None:
    exported(folder, tmp_path / "one", adapter, save_format="both")
    keys = {"save_format": "both", "pipeline_stages": 2}
    run_ranks(in_ranks, 2, folder, tmp_path / "two", adapter, keys, {})
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        one, two = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_samples_have_a_size_that_the_model_makes(folder: Path) -> None:
    flux = tiny_flux.pipeline(folder)
    assert sample_bucket(flux, SamplingSettings(width=96, height=64)) == Bucket(96, 64, 1)
    with pytest.raises(UserError, match="multiples of 16; set 992 x 16 instead of 1000 x 4"):
        sample_bucket(flux, SamplingSettings(width=1000, height=4))


def test_what_is_wrong_with_samples_is_told_of_all_where_each_is_written(folder: Path, tmp_path: Path) -> None:
    flux, file = tiny_flux.pipeline(folder), tmp_path / "prompts.txt"
    file.write_text("a --w 64\nb --n dark --w 65\nc --am 0.5\n")
    own = [{"prompt": "d"}, {"prompt": "e", "height": 40}]
    asked = {"prompts": ["f"], "samples": own, "prompt_file": file, "width": 64, "height": 64}
    with pytest.raises(UserError) as raised:
        check_outputs(flux, settings_of(flux, sampling=asked))
    told = {(one.file, one.where): one.message for one in raised.value.problems}
    assert told.keys() == {
        ("", "[[sampling.samples]] 2 width, height"),
        (str(file), "line 2 negative_prompt"),
        (str(file), "line 3 adapter_scale"),
    }
    assert "set 64 x 32 instead of 64 x 40" in told["", "[[sampling.samples]] 2 width, height"]
    assert "there is no [adapter]" in told[str(file), "line 3 adapter_scale"]
    lora = LoraSettings(type="lora", rank=4)
    file.write_text("a --w 64 --am 0.5")
    check_outputs(flux, settings_of(flux, lora, sampling={**asked, "samples": own[:1]}))


def test_a_prompt_that_is_too_long_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    flux = tiny_flux.pipeline(folder)
    sampling = SamplingSettings(prompts=["a"], samples=[{"prompt": "a star " * 200}], width=64, height=64)
    tell_long_prompts(flux.encoders(), requests_of(sampling, False), flux)
    told = [record.getMessage() for record in caplog.records if record.name == sample_checks.__name__]
    assert told and all(one.startswith("[[sampling.samples]] 1: the prompt is too long: ") for one in told)


def test_a_negative_prompt_that_leads_nowhere_is_refused(folder: Path, tmp_path: Path) -> None:
    flux, chroma = tiny_flux.pipeline(folder), tiny_chroma.pipeline(tiny_chroma.write_folder(tmp_path))
    guided = {"prompts": ["a star"], "negative_prompt": "blurred"}
    check_outputs(chroma, settings_of(chroma, save_format="diffusers", sampling=guided))
    with pytest.raises(UserError, match="negative_prompt: is not used: guidance is an input"):
        check_outputs(flux, settings_of(flux, sampling=guided))
    with pytest.raises(UserError, match="negative_prompt: is not used: with `guidance = 1`"):
        check_outputs(chroma, settings_of(chroma, sampling={**guided, "guidance": 1.0}))


def test_a_picture_that_breaks_off_is_told_before_it_is_drawn_from(folder: Path, tmp_path: Path) -> None:
    """Its header is whole."""
    whole = tmp_path / "whole.png"
    tensor_to_image(normal((3, 1, 64, 64), 0, "picture").clamp(-1, 1)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    flux, asked = tiny_flux.pipeline(folder), {"prompts": ["a star"], "width": 64, "height": 64}
    check_outputs(flux, settings_of(flux, sampling={**asked, "control_images": [whole]}))
    with pytest.raises(UserError, match=r"control_images: .*half\.png.*truncated"):
        check_outputs(flux, settings_of(flux, sampling={**asked, "control_images": [tmp_path / "half.png"]}))


@pytest.mark.parametrize(
    ("prompts", "images", "told"),
    [
        (0, [1], "there are none"),
        (3, [1, 1], "has 2 entries for 3 prompts"),
        (2, [2, 2], "at most 1 with a prompt"),
    ],
)
def test_pictures_that_do_not_fit_the_prompts_are_refused(
    folder: Path, prompts: int, images: list[int], told: str
) -> None:
    flux = tiny_flux.pipeline(folder)
    given = {"prompts": ["a star"] * prompts, "control_images": [[folder] * count for count in images]}
    with pytest.raises(UserError, match=f"control_images: .*{told}"):
        check_outputs(flux, settings_of(flux, sampling=given))


def test_pictures_for_a_model_that_is_shown_none_are_refused(tmp_path: Path) -> None:
    chroma = tiny_chroma.pipeline(tiny_chroma.write_folder(tmp_path))
    given = {"prompts": ["a star"], "control_images": [tmp_path]}
    with pytest.raises(UserError, match="control_images: this model is shown no pictures"):
        check_outputs(chroma, settings_of(chroma, save_format="diffusers", sampling=given))


def test_masks_for_a_model_that_keeps_nothing_are_refused(folder: Path) -> None:
    flux, refused = tiny_flux.pipeline(folder), "mask_images: no masks are given to this model"
    with pytest.raises(UserError, match=refused):
        check_outputs(flux, settings_of(flux, sampling={"prompts": ["a star"], "mask_images": [folder]}))
    samples = [{"prompt": "a star", "mask_image": folder}]
    with pytest.raises(UserError, match=r"\[\[sampling.samples\]\] 1 " + refused):
        check_outputs(flux, settings_of(flux, sampling={"samples": samples}))


class WithoutOriginal(FluxPipeline):
    """A model whose publisher's names are not known."""

    original_layout = None


@pytest.mark.parametrize("save_format", ["comfyui", "both"])
def test_a_layout_that_the_model_has_not_is_refused(folder: Path, save_format: str) -> None:
    flux = tiny_flux.pipeline(folder)
    other = WithoutOriginal(flux.options)
    check_outputs(flux, settings_of(flux, save_format=save_format))
    check_outputs(other, settings_of(other))
    with pytest.raises(UserError, match=f'save_format`: "{save_format}" needs .* use "diffusers"'):
        check_outputs(other, settings_of(other, save_format=save_format))


def test_exports_are_readable_by_whom_the_umask_says(folder: Path, tmp_path: Path) -> None:
    exported(folder, tmp_path / "epoch1", lora(), save_format="both")
    (tmp_path / "other").write_text("")
    expected = (tmp_path / "other").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "epoch1").iterdir()} == {expected}
