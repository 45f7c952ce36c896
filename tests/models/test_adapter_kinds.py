"""Every kind of adapter on Flux, SDXL and Wan: trained by a step, exported, and the same in the stock library and by
the names of ComfyUI's modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.assembly.exports import check_exports, check_outputs, export_plan, formats_of
from models.assembly.stage import StagedModel, load_stage, model_names, partition
from models.base import BasePipeline
from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from tests.models.batches import batch_of, sizes_of
from tests.models.test_adapter_exports import KNOWS_OURS, changed_by, merged, taken_apart
from tests.models.tiny_folder import settings_of, tiny
from tests.test_models import Model
from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.base_weight import weight_of
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI_FILE
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

Tensors = dict[str, torch.Tensor]
FORMS: dict[str, dict[str, Any]] = {
    "dora": {"type": "lora", "rank": 2, "alpha": 3.0, "dora": True},
    "rslora from pissa": {"type": "lora", "rank": 4, "alpha": 3.0, "rslora": True, "init": "pissa"},
    "loha": {"type": "loha", "rank": 2, "alpha": 1.0},
    "lokr": {"type": "lokr", "rank": 2, "alpha": 1.0, "factor": 4},
    "oft": {"type": "oft", "block_size": 4},
    "boft": {"type": "oft", "block_size": 16, "butterfly": True},
    "ia3": {"type": "ia3"},
    "vera": {"type": "vera", "rank": 4},
}
MODELS = ("flux", "sdxl", "wan")


def chosen(keys: dict[str, Any], **further: Any) -> AdapterSettings:
    return adapters.find(keys["type"]).settings(**keys, **further)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def find(name: str) -> Model:
        if name not in made:
            module = tiny(name)
            made[name] = Model(name, module.write_folder(tmp_path_factory.mktemp(name)), module)
        return made[name]

    return find


def trained(model: Model, pipeline: BasePipeline, adapter: AdapterSettings) -> StagedModel:
    """After a step that all factors take part in."""
    staged = load_stage(pipeline, settings_of(pipeline, adapter), stage=0)
    factors = staged.trained(staged.layers)
    with torch.no_grad():
        for name, factor in factors.items():
            factor.add_(normal(tuple(factor.shape), 0, "moved", name), alpha=0.1)
    before = {name: factor.detach().clone() for name, factor in factors.items()}
    optimizer = torch.optim.SGD(factors.values(), lr=1e-3)
    batch = batch_of(model, pipeline, sizes_of(model)[0])
    predicted(pipeline, staged.layers, batch).square().sum().backward()
    optimizer.step()
    assert sum(not torch.equal(factor, before[name]) for name, factor in factors.items()) > 0.9 * len(factors)
    return staged


def predicted(pipeline: BasePipeline, layers: list[nn.Module], batch: Any) -> torch.Tensor:
    stream = pipeline.prepare_inputs(batch.features, batch.x_t, batch.t_B)
    for layer in layers:
        stream = layer(stream)
    return stream


@torch.no_grad()
def effective(staged: StagedModel) -> Tensors:
    """The weights, and biases, that the adapted modules have in effect, by what they make of single numbers."""
    found = {}
    for name, (kind, layer) in attach.adapted(staged.denoiser.eval()).items():
        base = kind.base_of(layer)
        measure = seen_weight if isinstance(base, nn.Conv2d) else seen_matrix
        found[f"{name}.weight"], origin = measure(layer, base)
        if base.bias is not None:
            found[f"{name}.bias"] = origin
    return found


def seen_matrix(layer: nn.Module, base: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    origin = layer(torch.zeros(1, base.in_features))
    return (layer(torch.eye(base.in_features)) - origin).T, origin[0]


def seen_weight(layer: nn.Module, base: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """By the second output, which has seen all of the kernel."""
    inputs, (rows, columns), stride, padding = base.in_channels, base.kernel_size, base.stride[0], base.padding[0]
    weight = torch.empty(base.out_channels, inputs, rows, columns)
    x = torch.zeros(inputs, inputs, 2 * stride + rows, 2 * stride + columns)
    origin = layer(x)[0, :, 1, 1]
    for row in range(rows):
        for column in range(columns):
            one = x.clone()
            one[:, :, stride + row - padding, stride + column - padding] = torch.eye(inputs)
            weight[:, :, row, column] = (layer(one)[:, :, 1, 1] - origin).T
    return weight, origin


@pytest.mark.parametrize("keys", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_trained_adapter_is_the_same_elsewhere(
    known: Callable[[str], Model], name: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    model, adapter = known(name), chosen(keys, convolutions=name == "sdxl" and keys["type"] != "vera")
    pipeline = model.pipeline()
    staged = trained(model, pipeline, adapter)
    settings = settings_of(pipeline, adapter)
    export(tmp_path / "out", Ranks(), staged.trained(staged.layers), export_plan(pipeline, settings, staged), step=1)
    made, kind = effective(staged), adapters.find(adapter.type)
    plain = load_stage(pipeline, settings_of(pipeline), stage=0)
    weights = {n: p.detach().clone() for n, p in plain.denoiser.named_parameters()}
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == {ADAPTER_FILE, *([COMFYUI_FILE] if "comfyui" in kind.formats else [])}
    # Here, as a preset.
    names = model_names(pipeline, plain.denoiser)
    for file in files:
        for parameter, update in read_updates(tmp_path / "out" / file, names).items():
            result = weights[parameter] + update.delta(weights[parameter])
            torch.testing.assert_close(result, made[parameter], rtol=1e-4, atol=1e-4, msg=f"{file} {parameter}")
    # In ComfyUI.
    if COMFYUI_FILE in files:
        in_comfyui(pipeline, name, load_file(tmp_path / "out" / COMFYUI_FILE), weights, made)
    # In the stock library.
    if keys["type"] == "lora":
        stock = model.stock()
        stock.load_lora_weights(tmp_path / "out", weight_name=ADAPTER_FILE)
        batch = batch_of(model, pipeline, sizes_of(model)[0])
        theirs = getattr(stock, pipeline.denoiser_folder).eval()
        with torch.no_grad():
            result = model.tiny.whole(theirs, pipeline, batch.features, batch.x_t, batch.t_B)
            expected = predicted(pipeline, [layer.eval() for layer in staged.layers], batch)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    # Training goes on from each file, of a start with its rank and scale.
    going_on = chosen({"type": "lora", "rank": 8}, convolutions=name == "sdxl") if "init" in keys else adapter
    for file in files - ({COMFYUI_FILE} if keys["type"] == "vera" else set()):
        again = partition(pipeline, settings_of(pipeline, going_on), pipeline.weights.build_empty())
        own = model_names(pipeline, again.denoiser)
        read = read_factors(tmp_path / "out" / file, kind, own, attach.scales(again.denoiser))
        if "init" not in keys:
            for factor_name, factor in staged.trained(staged.layers).items():
                torch.testing.assert_close(read[factor_name], factor.detach(), rtol=1e-4, atol=1e-5, msg=factor_name)
        attach.check_fits({n: tuple(p.shape) for n, p in again.trained(again.layers).items()}, read, file)


def in_comfyui(pipeline: BasePipeline, name: str, tensors: Tensors, weights: Tensors, made: Tensors) -> None:
    """The weights that ComfyUI has after the file."""
    layout = pipeline.original_layout
    if name == "sdxl":
        theirs = taken_apart(tensors)
        for parameter in [parameter for parameter in made if parameter.endswith(".weight")]:
            stem = parameter.removesuffix(".weight").removeprefix("unet.").replace(".", "_")
            own = theirs.pop(f"lora_unet_{stem}", None) or theirs.pop(f"lycoris_{stem}")
            torch.testing.assert_close(changed_by(own, weights[parameter]), made[parameter], rtol=1e-4, atol=1e-4)
        assert not theirs
        return
    changed = merged(tensors, weights, layout, name in KNOWS_OURS)
    expected = layout.to_original({**weights, **{n: t for n, t in made.items() if n.endswith(".weight")}})
    for key, tensor in expected.items():
        torch.testing.assert_close(changed[key], tensor, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("keys", [FORMS["oft"], FORMS["dora"]], ids=["oft", "dora"])
def test_parts_that_comfyui_does_not_know_are_whole_differences(
    known: Callable[[str], Model], keys: dict[str, Any], tmp_path: Path
) -> None:
    """Of rotated weights, which are read from the base's file; of DoRA the lengths of all parts of a module, of which
    one is not adapted."""
    model = known("hunyuan_dit" if keys["type"] == "oft" else "flux")
    pipeline = model.pipeline()
    adapter = chosen(keys, exclude=[] if keys["type"] == "oft" else ["to_k"])
    staged = trained(model, pipeline, adapter)
    plan = export_plan(pipeline, settings_of(pipeline, adapter), staged)
    export(tmp_path / "out", Ranks(), staged.trained(staged.layers), plan, step=1)
    tensors, made = load_file(tmp_path / "out" / COMFYUI_FILE), effective(staged)
    assert any(key.endswith(".diff" if keys["type"] == "oft" else "img_attn_qkv.dora_scale") for key in tensors)
    plain = load_stage(pipeline, settings_of(pipeline), stage=0).denoiser
    in_comfyui(pipeline, model.name, tensors, {n: p.detach().clone() for n, p in plain.named_parameters()}, made)


@pytest.mark.parametrize("name", MODELS[::2])
def test_before_a_run_all_kinds_have_names_without_reading(
    known: Callable[[str], Model], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = known(name).pipeline()
    monkeypatch.setattr("models.foundation.checkpoints.weights.Weights.read", None)
    for keys in FORMS.values():
        settings = settings_of(pipeline, chosen(keys))
        staged = partition(pipeline, settings, pipeline.weights.build_empty())
        check_exports(pipeline, settings, staged)


def test_what_comfyui_does_not_read_is_told_before(known: Callable[[str], Model]) -> None:
    pipeline, adapter = known("wan").pipeline(), chosen(FORMS["ia3"])
    assert formats_of(pipeline, settings_of(pipeline, adapter)) == ("diffusers",)
    check_outputs(pipeline, settings_of(pipeline, adapter))
    for asked in ("both", "comfyui"):
        with pytest.raises(UserError, match='ComfyUI does not read IA3, .* use "diffusers", or another'):
            check_outputs(pipeline, settings_of(pipeline, adapter, save_format=asked))


def test_lengths_are_those_of_the_base_with_fused_presets(known: Callable[[str], Model], tmp_path: Path) -> None:
    """DoRA's file for ComfyUI says what is to be done with the base of the preset."""
    model, lora = known("wan"), chosen({"type": "lora", "rank": 2})
    pipeline = model.pipeline()
    staged = trained(model, pipeline, lora)
    plan = export_plan(pipeline, settings_of(pipeline, lora), staged)
    export(tmp_path / "preset", Ranks(), staged.trained(staged.layers), plan, step=1)
    pipeline = model.pipeline(preset_adapters=[{"path": tmp_path / "preset" / ADAPTER_FILE}])
    adapter = chosen(FORMS["dora"])
    staged = trained(model, pipeline, adapter)
    plan = export_plan(pipeline, settings_of(pipeline, adapter), staged)
    export(tmp_path / "out", Ranks(), staged.trained(staged.layers), plan, step=1)
    begun = load_stage(pipeline, settings_of(pipeline), stage=0).denoiser
    weights = {n: p.detach().clone() for n, p in begun.named_parameters()}
    in_comfyui(pipeline, "wan", load_file(tmp_path / "out" / COMFYUI_FILE), weights, effective(staged))
    assert weight_of(presets.adapters.base_of(staged.denoiser.get_submodule("blocks.0.attn1.to_q"))).equal(
        weights["blocks.0.attn1.to_q.weight"]
    )


def test_ranks_are_those_of_a_file(known: Callable[[str], Model], tmp_path: Path) -> None:
    """Of each module its own, and modules that are not there are not adapted; of another alpha."""
    pipeline = known("flux").pipeline()
    tensors: Tensors = {}
    for module, rank in (("img_attn_qkv", 3), ("img_mlp_0", 2)):
        own = f"lora_unet_double_blocks_0_{module}"
        there = {"img_attn_qkv": ("attn.to_q", 3), "img_mlp_0": ("ff.net.0.proj", 1)}[module]
        rows, columns = pipeline.weights.build_empty().get_submodule(f"transformer_blocks.0.{there[0]}").weight.shape
        tensors |= {
            f"{own}.lora_down.weight": normal((rank, columns), 0, module, "down"),
            f"{own}.lora_up.weight": normal((rows * there[1], rank), 0, module, "up"),
            f"{own}.alpha": torch.tensor(1.5),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    keys = {"type": "lora", "dim_from_weights": True, "alpha": 5.0}
    adapter = chosen(keys, init_from_existing=tmp_path / "a.safetensors")
    staged = load_stage(pipeline, settings_of(pipeline, adapter), stage=0)
    ranks = {name: layer.r["default"] for name, (_, layer) in attach.adapted(staged.denoiser).items()}
    parts = {f"transformer_blocks.0.attn.to_{part}": 3 for part in "qkv"}
    assert ranks == parts | {"transformer_blocks.0.ff.net.0.proj": 2}
    made = effective(staged)
    plain = load_stage(pipeline, settings_of(pipeline), stage=0).denoiser
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    for name, update in read_updates(tmp_path / "a.safetensors", model_names(pipeline, plain)).items():
        expected = weights[name] + update.delta(weights[name])
        torch.testing.assert_close(made[name], expected, rtol=1e-4, atol=1e-4)
    for further, told in (({"rank": 4}, "rank"), ({"init_from_existing": None}, "dim_from_weights")):
        wrong = adapter.model_copy(update=further)
        assert [key for key, _ in wrong.problems(pipeline.options)] == [told]
    assert [key for key, _ in chosen({"type": "lora"}).problems(pipeline.options)] == ["rank"]
