"""Adapters on denoisers whose blocks keep their Linears in 8 or 4 bits.

The reference is the plain denoiser with the weights that the codes mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.assembly.exports import export_plan
from models.assembly.kept import weight_bytes
from models.assembly.stage import StagedModel, load_stage, partition
from models.base import BasePipeline
from tests.models import tiny_flux, tiny_wan
from tests.models.batches import batch_of, micro_batches, sizes_of
from tests.models.tiny_folder import settings_of, tiny
from tests.processes import run_ranks
from tests.test_models import Model, output
from utils.adapters import attach
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings
from utils.diffusion.auxiliary import Output
from utils.diffusion.seeds import normal
from utils.quantised.linear import QuantisedLinear
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

FORMATS = ("float8", "float8_e5m2", "int8", "nf4", "int4")
LORA, LOKR = LoraSettings(type="lora", rank=4), LokrSettings(type="lokr", factor=4)
TINY = {"flux": tiny_flux, "wan": tiny_wan}
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: module.write_folder(tmp_path_factory.mktemp(name)) for name, module in TINY.items()}


def staged_of(pipeline: BasePipeline, adapter: AdapterSettings | None = LORA, stage: int = 0, **keys: Any) -> Any:
    return load_stage(pipeline, settings_of(pipeline, adapter, **keys), stage)


def moved(staged: StagedModel) -> StagedModel:
    """With an adapter that has an effect."""
    with torch.no_grad():
        for name, parameter in staged.trained(staged.layers).items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.1)
    return staged


def quantised(denoiser: nn.Module) -> dict[str, QuantisedLinear]:
    """By name without what adapters add."""
    found = {f"{name}.": part for name, part in denoiser.named_modules() if isinstance(part, QuantisedLinear)}
    return {attach.base_name(name).rstrip("."): part for name, part in found.items()}


def take_weights(plain: nn.Module, denoiser: nn.Module) -> None:
    """Gives a plain denoiser the weights that the codes of another mean."""
    parameters = {attach.base_name(name): parameter for name, parameter in plain.named_parameters()}
    with torch.no_grad():
        for name, linear in quantised(denoiser).items():
            parameters[f"{name}.weight"].copy_(linear.dequantised(linear.dtype))


def gradients(model: Model, pipeline: BasePipeline, staged: StagedModel) -> tuple[torch.Tensor, dict]:
    batch = batch_of(model, pipeline, sizes_of(model)[0])
    stream = pipeline.prepare_inputs(batch.features, batch.x_t, batch.t_B)
    for layer in staged.layers:
        stream = layer.train()(stream)
    prediction = stream.prediction if isinstance(stream, Output) else stream
    prediction.float().square().mean().backward()
    return prediction.detach(), {name: p.grad for name, p in staged.trained(staged.layers).items()}


@pytest.mark.parametrize("adapter", [LORA, LOKR], ids=["lora", "lokr"])
@pytest.mark.parametrize(("name", "dtype"), [("flux", "float32"), ("flux", "bfloat16"), ("wan", "bfloat16")])
@pytest.mark.parametrize("kept", FORMATS)
def test_an_adapter_trains_as_on_the_weights_that_the_codes_mean(
    folders: dict[str, Path], name: str, kept: str, adapter: AdapterSettings, dtype: str
) -> None:
    model = Model(name, folders[name], TINY[name])
    pipeline = model.pipeline(transformer_dtype=kept, dtype=dtype)
    staged = moved(staged_of(pipeline, adapter))
    plain = moved(staged_of(model.pipeline(dtype=dtype), adapter))
    before, _ = gradients(model, pipeline, plain)
    plain.denoiser.zero_grad()
    take_weights(plain.denoiser, staged.denoiser)
    ours, theirs = gradients(model, pipeline, staged), gradients(model, pipeline, plain)
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[0], before)
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(gradient, theirs[1][key]) for key, gradient in ours[1].items())


def test_only_linears_of_blocks_are_quantised_and_no_others_lose_precision(folders: dict[str, Path]) -> None:
    """Of Wan, time embedding and norms stay float32 in bfloat16."""
    for name, module in TINY.items():
        plain = staged_of(module.pipeline(folders[name], dtype="bfloat16")).denoiser
        pipeline = module.pipeline(folders[name], dtype="bfloat16", transformer_dtype="nf4")
        denoiser = staged_of(pipeline).denoiser
        linears = quantised(denoiser)
        assert all(attach.is_within(name, pipeline.blocks) for name in linears)
        assert len(linears) == sum(
            attach.is_within(path, pipeline.blocks)
            for path, part in module.pipeline(folders[name]).weights.build_empty().named_modules()
            if type(part) is nn.Linear and not pipeline.storage.is_named(f"{path}.weight")
        )
        others = {path: p for path, p in denoiser.named_parameters() if p.dtype != torch.uint8}
        for path, parameter in plain.named_parameters():
            if attach.base_name(path).removesuffix(".weight") not in linears:
                assert torch.equal(others[path], parameter) and others[path].dtype == parameter.dtype, path


@pytest.fixture(scope="module")
def preset(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LoRA with an effect, for Flux."""
    flux, place = tiny_flux.pipeline(folders["flux"]), tmp_path_factory.mktemp("preset") / "out"
    staged = moved(staged_of(flux))
    export(place, Ranks(), staged.trained(staged.layers), export_plan(flux, settings_of(flux, LORA), staged), 1)
    return {"path": place, "weight": 0.7}


@pytest.mark.parametrize("kept", ["float8", "nf4"])
@pytest.mark.parametrize("adapter", [LORA, LOKR], ids=["lora", "lokr"])
def test_a_fused_preset_is_in_the_weight_before_it_is_quantised(
    folders: dict[str, Path], preset: dict[str, Any], kept: str, adapter: AdapterSettings
) -> None:
    whole = staged_of(tiny_flux.pipeline(folders["flux"], preset_adapters=[preset]), None).denoiser
    flux = tiny_flux.pipeline(folders["flux"], transformer_dtype=kept, preset_adapters=[preset])
    untouched = quantised(staged_of(tiny_flux.pipeline(folders["flux"], transformer_dtype=kept)).denoiser)
    for name, linear in quantised(staged_of(flux, adapter).denoiser).items():
        expected = QuantisedLinear(whole.get_submodule(name), linear.form)
        expected.fill(whole.get_parameter(f"{name}.weight"))
        assert torch.equal(linear.weight, expected.weight) and torch.equal(linear.scale, expected.scale), name
        assert not torch.equal(linear.weight, untouched[name].weight), name


def test_a_preset_lies_beside_a_quantised_weight(folders: dict[str, Path], preset: dict[str, Any]) -> None:
    model = Model("flux", folders["flux"], tiny_flux)
    keys = {"dtype": "bfloat16", "preset_adapters": [{**preset, "fused": False}]}
    flux = model.pipeline(**keys, transformer_dtype="int8")
    staged, plain = staged_of(flux), staged_of(model.pipeline(**keys))
    take_weights(plain.denoiser, staged.denoiser)
    ours, theirs = gradients(model, flux, staged), gradients(model, flux, plain)
    assert torch.equal(ours[0], theirs[0])
    without = gradients(model, flux, staged_of(model.pipeline(dtype="bfloat16", transformer_dtype="int8")))
    assert not torch.equal(ours[0], without[0])


@pytest.mark.parametrize("adapter", [LORA, LOKR], ids=["lora", "lokr"])
@torch.no_grad()
def test_switched_off_exported_and_gone_on_from(
    folders: dict[str, Path], tmp_path: Path, adapter: AdapterSettings
) -> None:
    model = Model("flux", folders["flux"], tiny_flux)
    flux = model.pipeline(transformer_dtype="float8")
    batch = batch_of(model, flux, sizes_of(model)[0])
    staged = moved(staged_of(flux, adapter))
    with_adapter = output(flux, staged.layers, batch)
    with attach.switched_off(staged.denoiser):
        without = output(flux, staged.layers, batch)
    assert torch.equal(without, output(flux, staged_of(flux, adapter).layers, batch))
    assert (with_adapter - without).abs().mean() > 1e-3

    settings = settings_of(flux, adapter, save_format="both")
    export(tmp_path / "out", Ranks(), staged.trained(staged.layers), export_plan(flux, settings, staged), 1)
    again = staged_of(flux, adapter.model_copy(update={"init_from_existing": tmp_path / "out"}))
    assert torch.equal(output(flux, again.layers, batch), with_adapter)
    if adapter is LORA:
        stock = model.stock()
        stock.load_lora_weights(tmp_path / "out", weight_name="adapter_model.safetensors")
        base = {name.replace(".base_layer.", "."): p for name, p in stock.transformer.named_parameters()}
        for name, linear in quantised(staged.denoiser).items():
            base[f"{name}.weight"].copy_(linear.dequantised(torch.float32))
        theirs = tiny_flux.whole(stock.transformer, flux, batch.features, batch.x_t, batch.t_B)
        torch.testing.assert_close(theirs, with_adapter, rtol=1e-4, atol=1e-5)


def train(ranks: Ranks, name: str, folder: Path, kept: str) -> list[float]:
    """Job of a rank: losses and gradient norms; each rank is a stage, in which blocks are recomputed."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    ranks, model = ranks.with_stages(ranks.world_size), Model(name, folder, tiny(name))
    pipeline = model.pipeline(transformer_dtype=kept)
    staged = staged_of(pipeline, LORA, ranks.stage, pipeline_stages=ranks.stages)
    held = {id(part) for layer in staged.stage_layers(ranks.stage) for part in layer.modules()}
    for linear in quantised(staged.denoiser).values():
        assert linear.weight.is_meta == linear.scale.is_meta == (id(linear) not in held)
    module = DenoiserPipeline(staged.layers, staged.bounds, pipeline.stream_type, pipeline.maths.loss, recompute=True)
    trained = list(staged.trained(staged.stage_layers(ranks.stage)).values())
    engine = Engine(module, torch.optim.AdamW(trained, lr=1e-2), accumulation=2, clip_norm=1.0)
    results = [engine.train_step(micro_batches(model, pipeline, step), step) for step in range(STEPS)]
    return [number for result in results for number in (result.loss, result.grad_norm)]


@pytest.mark.parametrize("kept", ["float8", "nf4"])
@pytest.mark.parametrize("name", TINY)
def test_two_stages_equal_one(folders: dict[str, Path], name: str, kept: str) -> None:
    (reference,) = run_ranks(train, 1, name, folders[name], kept)
    assert len({round(number, 5) for number in reference}) == 2 * STEPS
    for numbers in run_ranks(train, 2, name, folders[name], kept):
        assert numbers == pytest.approx(reference, rel=2e-5)


@pytest.mark.parametrize("kept", FORMATS)
def test_the_plan_counts_what_is_held(folders: dict[str, Path], kept: str) -> None:
    flux = tiny_flux.pipeline(folders["flux"], transformer_dtype=kept)
    settings = settings_of(flux, LORA)
    planned, staged = partition(flux, settings, flux.weights.build_empty()), load_stage(flux, settings, stage=0)
    held = weight_bytes(planned.layers)
    assert held == sum(t.nbytes for t in (*staged.denoiser.parameters(), *staged.denoiser.buffers()))
    whole = weight_bytes(staged_of(tiny_flux.pipeline(folders["flux"])).layers)
    assert held < 0.6 * whole
    assert planned.bounds == partition(flux, settings, tiny_flux.pipeline(folders["flux"]).weights.build_empty()).bounds


def test_random_weights_are_quantised_too(folders: dict[str, Path]) -> None:
    whole = tiny_flux.pipeline(folders["flux"], from_scratch=True).weights.build()
    made = staged_of(tiny_flux.pipeline(folders["flux"], from_scratch=True, transformer_dtype="int8")).denoiser
    for name, linear in quantised(made).items():
        expected = whole.get_parameter(f"{name}.weight")
        assert (linear.dequantised(torch.float32) - expected).abs().max() <= linear.scale.max()
    assert not any(parameter.is_meta for parameter in made.parameters())
