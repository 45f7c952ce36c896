"""Exports of adapters of every model: in a program that reads no header, as ComfyUI, each has the strength that it has
here; and factors that are still zero come back.

`merged` does what ComfyUI does with a file: it looks for each name that it knows, and adds what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import models
from models.assembly.exports import check_exports, export_plan
from models.assembly.preflight import check_layers
from models.assembly.stage import StagedModel, model_names, partition
from models.base import BasePipeline
from models.flux import FluxPipeline
from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from models.foundation.checkpoints.key_layouts import KeyLayout
from tests.models import tiny_flux, tiny_sd15
from tests.models.tiny_folder import UNKNOWN_TO_COMFYUI, settings_of, tiny
from tests.utils.adapters.test_rotations import turned
from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI_FILE
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

Tensors = dict[str, torch.Tensor]
LORA = LoraSettings(type="lora", rank=4, alpha=1.5)
LOKR = LokrSettings(type="lokr", factor=4, rank=2, alpha=1.0)
KNOWS_OURS = ("chroma", "flux", "flux2", "hidream", "qwen_image", "qwen_image_layered", "sd3", "z_image")
"""Types of which ComfyUI knows `lycoris_` with diffusers' names, and slices of fused weights by them."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BasePipeline]:
    made: dict[str, BasePipeline] = {}

    def find(name: str) -> BasePipeline:
        if name not in made:
            module = tiny(name)
            made[name] = module.pipeline(module.write_folder(tmp_path_factory.mktemp(name)))
        return made[name]

    return find


def exported(
    pipeline: BasePipeline,
    place: Path,
    adapter: AdapterSettings,
    *,
    zeros: bool = False,
    small: float = 1.0,
    **keys: Any,
) -> tuple[StagedModel, Tensors]:
    """An export of random factors, and the factors. Zeros are those that start from zero, of every second module."""
    settings = settings_of(pipeline, adapter, **keys)
    staged = partition(pipeline, settings, pipeline.weights.build_empty())
    factors = {name: normal(tuple(p.shape), 0, name) * small for name, p in staged.trained(staged.layers).items()}
    if zeros:
        started = [name for name in factors if ".lora_B." in name or name.endswith(("lokr_w2", "lokr_w2_b"))]
        factors |= {name: torch.zeros_like(factors[name]) for name in started[::2]}
    export(place, Ranks(), factors, export_plan(pipeline, settings, staged), step=1)
    return staged, factors


def changed_by(own: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """A weight after what a file has for its module, as ComfyUI applies it: lengths of rows are those without the
    update, and a constraint is in alpha."""
    if "oft_blocks" in own:
        return turned(own["oft_blocks"], weight)
    changed = weight + delta_of(own).view(weight.shape)
    if "dora_scale" not in own:
        return changed
    assert own["dora_scale"].shape == (len(weight), *[1] * (weight.ndim - 1))
    lengths = weight.flatten(1).norm(dim=1).view(own["dora_scale"].shape)
    return changed * own["dora_scale"] / lengths


def delta_of(own: Tensors) -> torch.Tensor:
    """The update by what a file has for one module."""
    if "diff" in own:
        return own["diff"].float()
    if "hada_w1_a" in own:
        sides = [own[f"hada_w{n}_a"].float() @ own[f"hada_w{n}_b"].float() for n in (1, 2)]
        return sides[0] * sides[1] * own["alpha"].item() / len(own["hada_w1_b"])
    names = ("lora_up.weight", "lora_down.weight") if "lora_up.weight" in own else ("lora_B.weight", "lora_A.weight")
    if names[0] in own:
        up, down = (own[name].float().flatten(1) for name in names)
        return up @ down * (own["alpha"].item() / len(down) if "alpha" in own else 1.0)
    w1, w2 = (own[w] if w in own else own[f"{w}_a"] @ own[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
    rank = next((len(own[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in own), None)
    return torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2) * (own["alpha"].item() / rank if rank else 1.0)


def taken_apart(tensors: Tensors) -> dict[str, Tensors]:
    """What a file has for each module."""
    by_name: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        name = next(key[: -len(end) - 1] for end in ENDS if key.endswith(f".{end}"))
        by_name.setdefault(name, {})[key.removeprefix(f"{name}.")] = tensor
    return by_name


def merged(tensors: Tensors, weights: Tensors, layout: KeyLayout, knows_ours: bool) -> Tensors:
    """The publisher's weights after a file is added to them; what is not found is an error."""
    by_name = taken_apart(tensors)
    # Where several modules are trained as one, the first word is the denoiser's.
    plain = {name: name.removeprefix("transformer.").removesuffix(".weight") for name in weights}
    ours = {f"lycoris_{own.replace('.', '_')}": name for name, own in plain.items()} if knows_ours else {}
    changed = dict(weights)
    for name in [name for name in by_name if name in ours]:
        changed[ours[name]] = changed_by(by_name.pop(name), changed[ours[name]])
    original = getattr(layout, "own", layout).to_original(changed)
    stems = {key.removesuffix(".weight") for key in original}
    theirs = {f"lora_unet_{stem.replace('.', '_')}": stem for stem in stems} | {
        f"diffusion_model.{s}": s for s in stems
    }
    # With dots ComfyUI knows the publisher's names too, where it renames them as it loads a file.
    pairs = zip(layout.to_original(changed), original, strict=True)
    theirs |= {f"diffusion_model.{a.removesuffix('.weight')}": b.removesuffix(".weight") for a, b in pairs}
    for name, own in by_name.items():
        key = f"{theirs[name]}.weight"
        original[key] = changed_by(own, original[key])
    return original


ENDS = (
    *("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha", "diff", "dora_scale"),
    *(f"hada_w{n}_{part}" for n in (1, 2) for part in "ab"),
    "oft_blocks",
    *(f"lokr_{w}{part}" for w in ("w1", "w2") for part in ("", "_a", "_b")),
)


def deltas_of(staged: StagedModel, factors: Tensors) -> Tensors:
    """What the adapter adds to the weight of each module here."""
    deltas = {}
    for module, (kind, layer) in attach.adapted(staged.denoiser).items():
        own = {name.removeprefix(f"{module}."): t for name, t in factors.items() if name.startswith(f"{module}.")}
        if kind.name == "LoRA":
            delta = own["lora_B.weight"] @ own["lora_A.weight"]
        else:
            delta = torch.kron(*(own[w] if w in own else own[f"{w}_a"] @ own[f"{w}_b"] for w in ("lokr_w1", "lokr_w2")))
        deltas[module] = kind.scale_of(layer) * delta
    return deltas


def expected(staged: StagedModel, factors: Tensors, weights: Tensors, layout: KeyLayout) -> Tensors:
    """The publisher's weights with the adapter as it is here."""
    added = {f"{module}.weight": delta for module, delta in deltas_of(staged, factors).items()}
    return layout.to_original({name: weight + added.get(name, 0.0) for name, weight in weights.items()})


def weights_of(staged: StagedModel) -> Tensors:
    shapes = presets.base_shapes(staged.denoiser)
    return {name: normal(shape, 0, "weight", name) for name, shape in shapes.items()}


DENOISERS = [name for name in models.available() if name not in (*UNKNOWN_TO_COMFYUI, "sd15", "sdxl")]
each_denoiser = pytest.mark.parametrize("model", DENOISERS)
WHOLE = (
    *("hunyuan_dit", "hunyuan_image", "hunyuan_video", "hunyuan_video_15", "ideogram4", "lumina2", "minimax_h3"),
    *("mochi", "pixart", "qwen_image_21", "sana"),
)
"""Types of which ComfyUI has several modules as one, so that its file of a LoKr has whole differences."""
IN_TURN = [(model, LOKR if model in WHOLE or number % 2 else LORA) for number, model in enumerate(models.available())]
each_kind = pytest.mark.parametrize("adapter", [LORA, LOKR], ids=["lora", "lokr"])


@each_kind
@each_denoiser
def test_an_export_has_its_strength_in_comfyui(
    pipelines: Callable[[str], BasePipeline], model: str, adapter: AdapterSettings, tmp_path: Path
) -> None:
    pipeline = pipelines(model)
    staged, factors = exported(pipeline, tmp_path / "out", adapter)
    # Of layouts with several spellings that of ComfyUI's modules.
    weights, layout = weights_of(staged), getattr(pipeline.original_layout, "own", pipeline.original_layout)
    made = merged(load_file(tmp_path / "out" / COMFYUI_FILE), weights, pipeline.original_layout, model in KNOWS_OURS)
    for name, tensor in expected(staged, factors, weights, layout).items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-4)
    # The other file too, where it is read: its names are ours, and no header says what alpha is.
    tensors = load_file(tmp_path / "out" / ADAPTER_FILE)
    renamed = {
        f"lycoris_{key.removeprefix('transformer.').rpartition('.lora_')[0].replace('.', '_')}.lora_{end}": tensor
        for key, tensor in tensors.items()
        for end in [key.rpartition(".lora_")[2]]
    }
    made = merged(renamed if adapter is LORA else tensors, weights, layout, True)
    for name, tensor in expected(staged, factors, weights, layout).items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("model", ["sd15", "sdxl_texts"])
def test_an_export_of_stable_diffusion_has_its_strength_in_comfyui(
    pipelines: Callable[[str], BasePipeline], model: str, adapter: AdapterSettings, tmp_path: Path
) -> None:
    """Which knows the UNet by diffusers' names, and text encoders by kohya's prefixes."""
    staged, factors = exported(pipelines(model), tmp_path / "out", adapter)
    read = taken_apart(load_file(tmp_path / "out" / COMFYUI_FILE))
    of_unet = "lora_unet_" if adapter is LORA else "lycoris_"
    prefixes = {"unet": of_unet, "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    deltas = deltas_of(staged, factors)
    assert len(read) == len(deltas) > 10
    for module, delta in deltas.items():
        part, _, rest = module.partition(".")
        made = delta_of(read[prefixes[part] + rest.replace(".", "_")])
        torch.testing.assert_close(made, delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "adapter"), IN_TURN, ids=lambda value: getattr(value, "type", value))
def test_zeros_are_gone_on_from(
    pipelines: Callable[[str], BasePipeline], model: str, adapter: AdapterSettings, tmp_path: Path
) -> None:
    """As of SD3's last block, whose context query gets no gradient. A whole difference cannot be gone on from."""
    pipeline = pipelines(model)
    staged, factors = exported(pipeline, tmp_path / "out", adapter, zeros=True)
    names, kind = model_names(pipeline, staged.denoiser), adapters.find(adapter.type)
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == ({ADAPTER_FILE} if model in UNKNOWN_TO_COMFYUI else {ADAPTER_FILE, COMFYUI_FILE})
    for file in files:
        path = tmp_path / "out" / file
        if file == COMFYUI_FILE and any(key.endswith(".diff") for key in load_file(path)):
            assert adapter is LOKR and model in WHOLE
            with pytest.raises(UserError, match="have something else than LoKr factors"):
                read_factors(path, kind, names, attach.scales(staged.denoiser))
            assert read_updates(path, names).keys() >= {
                f"{module}.weight" for module in attach.adapted(staged.denoiser)
            }
            continue
        read = read_factors(path, kind, names, attach.scales(staged.denoiser))
        assert read.keys() == factors.keys(), file
        for name, tensor in factors.items():
            torch.testing.assert_close(read[name], tensor, rtol=1e-6, atol=0)


def test_names_of_lokr_in_comfyui(
    pipelines: Callable[[str], BasePipeline], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys, told = {}, {}
    caplog.set_level("INFO")
    for model in ("wan", "flux", "hunyuan_dit", "sdxl_texts"):
        caplog.clear()
        exported(pipelines(model), tmp_path / model, LOKR)
        told[model] = "whole differences of weights" in caplog.text
        keys[model] = load_file(tmp_path / model / COMFYUI_FILE).keys()
        ours = load_file(tmp_path / model / ADAPTER_FILE).keys()
        assert all(key.startswith("lycoris_") for key in ours)
    assert {"lora_unet_blocks_0_self_attn_q.lokr_w1", "lora_unet_blocks_1_ffn_2.alpha"} <= keys["wan"]
    assert {"lora_unet_double_blocks_0_img_mlp_0.lokr_w1", "lycoris_transformer_blocks_0_attn_to_q.lokr_w1"} <= keys[
        "flux"
    ]
    assert "diffusion_model.blocks.0.attn1.Wqkv.diff" in keys["hunyuan_dit"]
    assert [model for model in told if told[model]] == ["hunyuan_dit"]
    prefixes = {key.partition("_text_model")[0] for key in keys["sdxl_texts"] if "text_model" in key}
    assert prefixes == {"lora_te1", "lora_te2"}
    assert any(key.startswith("lycoris_down_blocks_1_attentions_0") for key in keys["sdxl_texts"])
    exported(pipelines("wan"), tmp_path / "alone", LOKR, save_format="comfyui")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == [COMFYUI_FILE]


@pytest.mark.parametrize("small", [1.0, 1e-4, 1e-7])
def test_small_values_survive_float16(pipelines: Callable[[str], BasePipeline], small: float, tmp_path: Path) -> None:
    """At rank 128 and alpha 1, in both files."""
    pipeline, adapter = pipelines("wan"), LoraSettings(type="lora", rank=128, alpha=1.0)
    staged, factors = exported(pipeline, tmp_path / "out", adapter, small=small, save_dtype="float16")
    names, expected_types = model_names(pipeline, staged.denoiser), {torch.float16} if small > 1e-3 else {torch.float32}
    for file in (ADAPTER_FILE, COMFYUI_FILE):
        tensors = load_file(tmp_path / "out" / file)
        if small == 1.0 or small == 1e-7:
            assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == expected_types
        for name, update in read_updates(tmp_path / "out" / file, names).items():
            module = name.removesuffix(".weight")
            exact = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"] / 128
            delta = update.delta(torch.zeros(update.shape))
            assert (delta - exact).norm() < 0.005 * exact.norm(), (file, name)


# What is checked before a run


class WithoutNorms(FluxPipeline):
    """A model of which ComfyUI's names are not all known."""

    original_layout = KeyLayout([rule for rule in FluxPipeline.original_layout.rules if "mlp" not in rule.there])


@pytest.mark.parametrize("adapter", [None, LORA, LOKR], ids=["full", "lora", "lokr"])
def test_a_gap_of_a_layout_is_found_before_the_run(adapter: AdapterSettings | None) -> None:
    complete = tiny_flux.pipeline(tiny_flux.MINI_FLUX)
    gappy = WithoutNorms(complete.options)

    def check(pipeline: BasePipeline, **keys: Any) -> None:
        settings = settings_of(pipeline, adapter, **keys)
        check_exports(pipeline, settings, partition(pipeline, settings, pipeline.weights.build_empty()))

    check(complete)
    check(gappy, save_format="diffusers")
    with pytest.raises(UserError, match=r'save_format`: no place in the original layout .*ff.*; set "diffusers"'):
        check(gappy)


@pytest.mark.parametrize("model", [*models.available(), "sdxl_texts"])
def test_every_model_has_names_for_all_that_is_trained(
    pipelines: Callable[[str], BasePipeline], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From headers alone: nothing is read."""
    pipeline = pipelines(model)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    for adapter in (None, LORA, LOKR):
        settings = settings_of(pipeline, adapter)
        staged = partition(pipeline, settings, pipeline.weights.build_empty())
        check_layers(pipeline, staged)
        check_exports(pipeline, settings, staged)


def test_what_no_layer_holds_is_told(pipelines: Callable[[str], BasePipeline]) -> None:
    pipeline = pipelines("flux")
    staged = partition(pipeline, settings_of(pipeline), pipeline.weights.build_empty())
    without = replace(staged, layers=staged.layers[1:])
    with pytest.raises(UserError, match="asks for '.*' and .* more tensors that this model's type does not use"):
        check_layers(pipeline, without)


def test_what_comfyui_takes_an_sd15_for_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_sd15.write_folder(tmp_path)
    for prediction, zero, told in (("epsilon", False, None), ("v_prediction", True, "zsnr = true")):
        pipeline = tiny_sd15.pipeline(folder, prediction_type=prediction, rescale_betas_zero_snr=zero)
        for save_format in ("both", "diffusers"):
            caplog.clear()
            with caplog.at_level("INFO"):
                exported(pipeline, tmp_path / f"{prediction}_{save_format}", LORA, save_format=save_format)
            assert ("ModelSamplingDiscrete" in caplog.text) == bool(told and save_format == "both")
            assert told is None or save_format == "diffusers" or told in caplog.text
