"""`[model] train`: parameters that are trained in full, alone or beside an adapter; their exports, and what goes on
from them.

`in_comfyui` does what ComfyUI does with a file of differences: it looks for each name that it knows, and adds what it
finds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline as StockPipeline
from safetensors.torch import load_file, save_file

from models.assembly import stage
from models.assembly.exports import check_exports, check_outputs, export_plan
from models.assembly.rates import Rates
from models.assembly.stage import StagedModel, load_stage, model_names, partition
from models.assembly.tools.__main__ import main
from models.base import BasePipeline
from models.flux import BFL_LAYOUT
from models.foundation.checkpoints.adapter_files import read_updates
from tests.models import tiny_anima, tiny_flux, tiny_sdxl
from tests.models.test_adapter_exports import pipelines  # noqa: F401
from tests.models.tiny_folder import settings_of, tiny
from utils.adapters import attach, presets
from utils.adapters.differences import differences
from utils.adapters.file_names import contents
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI_FILE, AdapterFile
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.checkpoint import identity_of
from utils.run.export import export
from utils.settings.rules import check_rules
from utils.settings.schema import AdapterSettings

Tensors = dict[str, torch.Tensor]
TRAIN = ["x_embedder", "norm_q", "transformer_blocks.0.ff.net.2", "norm_out.linear"]
TRAINED_FILE = "trained_transformer.safetensors"
MODULE = "transformer_blocks.0.ff.net.2"
LAYOUTS = ("anima", "flux", "hunyuan_dit", "hunyuan_video", "krea2", "lumina2", "qwen_image", "sd3", "wan")
"""Types whose layouts differ: with parts, fused, turned and flat tensors, norms with a scale, two spellings."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def lora(**keys: Any) -> LoraSettings:
    return LoraSettings(**{"type": "lora", "rank": 2, "alpha": 3.0, **keys})


def cut(pipeline: BasePipeline, adapter: AdapterSettings | None = None) -> StagedModel:
    return partition(pipeline, settings_of(pipeline, adapter), pipeline.weights.build_empty())


def moved(folder: Path, train: list[str] = TRAIN, adapter: AdapterSettings | None = None, **options: Any) -> Any:
    """The miniature, its settings, and a stage whose trained weights have moved."""
    flux = tiny_flux.pipeline(folder, train=train, **options)
    settings = settings_of(flux, adapter or lora())
    staged = load_stage(flux, settings, 0)
    with torch.no_grad():
        for name, parameter in staged.trained(staged.layers).items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.2)
    return flux, settings, staged


def exported(folder: Path, place: Path, **keys: Any) -> StagedModel:
    flux, settings, staged = moved(folder, **keys)
    check_exports(flux, settings, staged)
    export(place, Ranks(), staged.trained(staged.layers), export_plan(flux, settings, staged), 1)
    return staged


@torch.no_grad()
def output(layers: Any, flux: BasePipeline) -> torch.Tensor:
    features = {"t5": normal((1, 16, 64), 0, "t5"), "clip_pooled": normal((1, 32), 0, "clip")}
    stream = flux.prepare_inputs(features, normal((1, 4, 4, 6), 0, "x"), torch.tensor([0.4]))
    for layer in layers:
        stream = layer(stream)
    return stream


def base_of(folder: Path) -> Tensors:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def whole_of(staged: StagedModel, base: Tensors) -> Tensors:
    """The weights of a model with its adapter in them."""
    here = {attach.base_name(name): p.detach() for name, p in staged.denoiser.named_parameters()}
    whole = {name: here[name].float().clone() for name in base}
    for name, (kind, module) in attach.adapted(staged.denoiser).items():
        update = module.lora_B["default"].weight @ module.lora_A["default"].weight
        whole[f"{name}.weight"] += kind.scale_of(module) * update.detach()
    return whole


def in_comfyui(tensors: Tensors, original: Tensors) -> Tensors:
    """The publisher's weights after a file is added to them; what is not found is an error."""
    left, changed = dict(tensors), dict(original)
    for key, weight in original.items():
        stem = key.removesuffix(".weight")
        own = [f"diffusion_model.{stem}.diff"]
        if key.endswith(".bias") and key.removesuffix("bias") + "weight" in original:
            own.append(f"diffusion_model.{key.removesuffix('.bias')}.diff_b")
        for name in own:
            if name in left:
                assert left[name].shape == weight.shape, name
                changed[key] = changed[key] + left.pop(name)
        name = f"lora_unet_{stem.replace('.', '_')}"
        if f"{name}.lora_up.weight" in left:
            up, down = (left.pop(f"{name}.lora_{part}.weight") for part in ("up", "down"))
            changed[key] = changed[key] + up @ down * (left.pop(f"{name}.alpha") / len(down))
    assert not left, f"ComfyUI would not find {next(iter(left))}"
    return changed


def assert_close(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


# What is trained


def test_what_is_named_is_trained_and_nothing_else(folder: Path) -> None:
    flux = tiny_flux.pipeline(folder, train=TRAIN)
    alone, beside = cut(flux), cut(flux, lora(include=["transformer_blocks.0.ff"]))
    named = {name for name, _ in alone.denoiser.named_parameters() if any(part in name for part in TRAIN)}
    assert alone.trained(alone.layers).keys() == named and len(named) > 8
    trained = beside.trained(beside.layers)
    assert {name for name in trained if not attach.is_factor(name)} == named
    modules = {name.partition(".lora_")[0] for name in trained if attach.is_factor(name)}
    assert modules and MODULE not in modules and "transformer_blocks.0.ff.net.0.proj" in modules


def test_names_of_parts(tmp_path: Path) -> None:
    anima = tiny_anima.pipeline(tiny_anima.write_folder(tmp_path), train=["text_conditioner"])
    staged = cut(anima, lora())
    trained = {name for name in staged.trained(staged.layers) if not attach.is_factor(name)}
    assert trained == {name for name in presets.base_shapes(staged.denoiser) if name.startswith("text_conditioner.")}
    assert any(attach.is_factor(name) for name in staged.trained(staged.layers))
    whole = cut(tiny_anima.pipeline(tmp_path, train=["denoiser"]))
    assert {name.partition(".")[0] for name in whole.trained(whole.layers)} == {"transformer"}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (["no_such"], '"no_such" matches nothing that can be trained; the parameters are called like .*embed'),
        (["vae"], '"vae" is no part of the denoiser, .* is cached before training begins; leave it out'),
        (["t5"], '"t5" is no part of the denoiser'),
        (["text_encoder_2", "norm_k"], '"text_encoder_2" is no part of the denoiser'),
        (["denoiser"], "train: has the weights of all .* modules that are to be adapted"),
    ],
)
def test_what_cannot_be_trained_is_refused(folder: Path, train: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cut(tiny_flux.pipeline(folder, train=train), lora())


def test_text_encoders_with_a_rate_are_parts(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path)
    with pytest.raises(UserError, match='"text_encoder" is no part .*; set `text_encoder_1_lr` to train it too'):
        cut(tiny_sdxl.pipeline(folder, train=["text_encoder"]))
    staged = cut(tiny_sdxl.pipeline(folder, train=["text_encoder"], text_encoder_1_lr=1e-5))
    assert {name.partition(".")[0] for name in staged.trained(staged.layers)} == {"text_encoder"}


def test_a_quantised_weight_is_not_trained_and_its_bias_is(folder: Path) -> None:
    with pytest.raises(UserError, match=f"names '{MODULE}.weight', which transformer_dtype keeps in codes"):
        cut(tiny_flux.pipeline(folder, train=["ff.net.2"], transformer_dtype="int8"), lora())
    # Of a quantised Linear, with an adapter and without.
    for include in ([], ["attn"]):
        flux, _, staged = moved(
            folder, ["ff.net.2.bias", "x_embedder"], lora(include=include), transformer_dtype="int8"
        )
        bias = staged.trained(staged.layers)[f"{MODULE}.bias"]
        losses = []
        for step in (0.0, 1e-2, -1e-2):
            with torch.no_grad():
                bias += step
                losses.append(output(staged.layers, flux).double().square().sum().item())
                bias -= step
        with torch.enable_grad():
            inputs = flux.prepare_inputs(
                {"t5": normal((1, 16, 64), 0, "t5"), "clip_pooled": normal((1, 32), 0, "clip")},
                normal((1, 4, 4, 6), 0, "x"),
                torch.tensor([0.4]),
            )
            for layer in staged.layers:
                inputs = layer(inputs)
            inputs.square().sum().backward()
        assert bias.grad.sum().item() == pytest.approx((losses[1] - losses[2]) / 2e-2, rel=1e-2)


def test_rates_of_an_adapter_are_no_rates_of_what_is_beside_it(folder: Path) -> None:
    flux = tiny_flux.pipeline(folder, train=["attn.to_q.bias"])
    settings = settings_of(flux, lora(rules=[{"pattern": "attn.to_q", "lr": 0.5}]))
    rates = Rates(settings, flux, partition(flux, settings, flux.weights.build_empty()).denoiser)
    name = "transformer_blocks.0.attn.to_q"
    assert rates.lr(f"{name}.lora_A.weight") == 0.5 and rates.lr(f"{name}.bias") == settings.optimizer.lr


def test_what_is_said_in_vain_beside_it_is_refused(folder: Path) -> None:
    flux = tiny_flux.pipeline(folder, train=TRAIN)
    settings = settings_of(flux, lora(), regularisation_target="parent")
    (told,) = [one.message for one in check_rules(settings, 1) if "parent" in one.message]
    assert "[model] train changes that one too" in told
    asked = {"prompts": ["a"], "width": 64, "height": 64, "adapter_scale": 0.5}
    with pytest.raises(UserError, match="adapter_scale: changes the adapter alone, and not what .model. train"):
        check_outputs(flux, settings_of(flux, lora(), sampling=asked))


def test_a_checkpoint_is_of_what_was_named(folder: Path) -> None:
    named, plain = (identity_of(settings_of(tiny_flux.pipeline(folder, **keys))) for keys in ({"train": TRAIN}, {}))
    assert named["[model] train"] == TRAIN and not plain["[model] train"]


# Exports


@pytest.mark.parametrize("model", [*LAYOUTS, "sdxl_texts"])
def test_comfyui_finds_the_difference_of_every_parameter(
    pipelines: Callable[[str], BasePipeline],  # noqa: F811
    model: str,
) -> None:
    """And they come back from it."""
    pipeline = pipelines(model)
    names = model_names(pipeline, pipeline.weights.build_empty())
    values = {name: normal(shape, 0, "changed", name) for name, shape in names.shapes.items()}
    file = names.layout.differences(values, names.shapes)
    layout = getattr(names.layout, "own", names.layout)
    if model != "sdxl_texts":
        zeros = layout.to_original({name: torch.zeros_like(value) for name, value in values.items()})
        assert_close(in_comfyui(file, zeros), layout.to_original(values))
    back: Tensors = {}
    found = contents(AdapterFile(file), names)
    assert not (found.strangers or found.unread)
    for kind, entry in found.entries:
        assert kind is None
        back |= {name: update.delta(values[name]) for name, update in differences(entry, names).items()}
    assert_close(back, values)


def test_an_export_is_the_same_model_elsewhere(folder: Path, tmp_path: Path) -> None:
    staged = exported(folder, tmp_path)
    base, flux = base_of(folder), tiny_flux.pipeline(folder)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {ADAPTER_FILE, COMFYUI_FILE, TRAINED_FILE}
    expected = whole_of(staged, base)
    theirs = in_comfyui(load_file(tmp_path / COMFYUI_FILE), BFL_LAYOUT.to_original(base))
    assert_close(theirs, BFL_LAYOUT.to_original(expected))
    stock = StockPipeline.from_pretrained(folder, vae=None, text_encoder=None, text_encoder_2=None)
    own = load_file(tmp_path / TRAINED_FILE)
    assert not stock.transformer.load_state_dict(own, strict=False).unexpected_keys
    stock.load_lora_weights(tmp_path, weight_name=ADAPTER_FILE)
    torch.testing.assert_close(
        output(flux.to_layers(stock.transformer), flux), output(staged.layers, flux), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("file", ["", ADAPTER_FILE, COMFYUI_FILE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_an_export(folder: Path, tmp_path: Path, file: str, dtype: str) -> None:
    before = exported(folder, tmp_path, dtype=dtype)
    flux = tiny_flux.pipeline(folder, train=TRAIN, dtype=dtype)
    after = load_stage(flux, settings_of(flux, lora(init_from_existing=tmp_path / file)), 0)
    ours, theirs = (one.trained(one.layers) for one in (after, before))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        exact = dtype == "bfloat16" or file != COMFYUI_FILE
        if exact and not attach.is_factor(name):
            assert torch.equal(parameter, theirs[name]), name
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-6)


def test_files_that_are_called_as_the_run_are_found(folder: Path, tmp_path: Path) -> None:
    flux, settings, staged = moved(folder)
    settings = settings.model_copy(update={"run_name": "fox"})
    trained = staged.trained(staged.layers)
    export(tmp_path / "step1", Ranks(), trained, export_plan(flux, settings, staged), 1)
    assert (tmp_path / "step1" / f"fox-step000001_{TRAINED_FILE}").is_file()
    for path in (tmp_path / "step1", tmp_path / "step1" / "fox-step000001.safetensors"):
        again = load_stage(flux, settings_of(flux, lora(init_from_existing=path)), 0)
        assert torch.equal(again.trained(again.layers)["x_embedder.weight"], trained["x_embedder.weight"])


def test_what_a_file_has_and_a_run_does_not_train_is_refused(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported(folder, tmp_path)
    less = tiny_flux.pipeline(folder, train=[name for name in TRAIN if name != "norm_q"])
    for file in (ADAPTER_FILE, COMFYUI_FILE):
        with pytest.raises(UserError, match="have something else than LoRA factors, .*norm"):
            load_stage(less, settings_of(less, lora(init_from_existing=tmp_path / file)), 0)
    # A file that has less is gone on from, and told.
    caplog.set_level("INFO")
    more = tiny_flux.pipeline(folder, train=[*TRAIN, "norm_k"])
    settings = settings_of(more, lora(init_from_existing=tmp_path))
    stage.load_existing_adapter(more, settings, cut(more, settings.adapter), layers=[])
    assert "has no values for 4 parameters that [model] train names" in caplog.text
    (tmp_path / TRAINED_FILE).unlink()
    with pytest.raises(UserError, match=f"trained together with weights in '{TRAINED_FILE}', which is not there"):
        load_stage(less, settings_of(less, lora(init_from_existing=tmp_path)), 0)


@pytest.mark.parametrize("file", [ADAPTER_FILE, COMFYUI_FILE])
def test_an_export_is_a_preset_and_a_part_of_the_base(folder: Path, tmp_path: Path, file: str) -> None:
    staged = exported(folder, tmp_path / "out")
    expected = whole_of(staged, base_of(folder))
    flux = tiny_flux.pipeline(folder, preset_adapters=[{"path": tmp_path / "out" / file}])
    given = load_stage(flux, settings_of(flux), 0)
    assert_close({name: p.detach() for name, p in given.denoiser.named_parameters()}, expected)
    words = ["merge", tmp_path / "out" / file, "--into_base", "--base", folder, "--out", tmp_path / "m"]
    assert main(list(map(str, words))) == 0
    assert_close(load_file(tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors"), expected)


def test_tools_do_not_lose_what_was_trained_in_full(folder: Path, tmp_path: Path, capsys: Any) -> None:
    exported(folder, tmp_path / "out")
    words = ["convert", tmp_path / "out", "--layout", "comfyui", "--base", folder, "--out", tmp_path / "c.safetensors"]
    assert main(list(map(str, words))) == 1
    assert f"trained in full, in '{TRAINED_FILE}', which a converted adapter would lack" in capsys.readouterr().err


def test_presets_are_no_part_of_differences(folder: Path, tmp_path: Path) -> None:
    exported(folder, tmp_path / "first")
    preset = [{"path": tmp_path / "first" / COMFYUI_FILE}]
    staged = exported(folder, tmp_path / "second", train=["x_embedder"], preset_adapters=preset)
    made = load_file(tmp_path / "second" / COMFYUI_FILE)["diffusion_model.img_in.diff"]
    moved_by = 0.2 * normal(tuple(made.shape), 0, "moved", "x_embedder.weight")
    torch.testing.assert_close(made, moved_by, rtol=1e-3, atol=1e-5)
    assert "x_embedder.weight" in staged.trained(staged.layers)


def test_two_in_one_module_of_comfyui_are_refused(folder: Path) -> None:
    flux = tiny_flux.pipeline(folder, train=["transformer_blocks.0.attn.to_q"])

    def check(adapter: AdapterSettings, **keys: Any) -> None:
        settings = settings_of(flux, adapter, **keys)
        check_exports(flux, settings, partition(flux, settings, flux.weights.build_empty()))

    with pytest.raises(UserError, match=r"names '.*to_q.weight', and '.*attn.to_k' has an adapter; .*img_attn.qkv"):
        check(lora())
    check(lora(exclude=["attn.to_k", "attn.to_v", "proj_mlp"]))
    check(lora(), save_format="diffusers")


def test_damage_of_a_header_is_told(folder: Path, tmp_path: Path) -> None:
    exported(folder, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    for text in ("3", "[", '["../x.safetensors"]'):
        save_file(tensors, tmp_path / ADAPTER_FILE, {"trained_beside": text})
        with pytest.raises(UserError, match="`trained_beside` in its header is damaged"):
            read_updates(tmp_path, model_names(flux := tiny_flux.pipeline(folder), flux.weights.build_empty()))


def test_text_encoders_beside_an_adapter_of_the_unet(tmp_path: Path) -> None:
    """In ComfyUI's names of them, and in a file for each part."""
    module = tiny("sdxl_texts")
    pipeline = module.pipeline(module.write_folder(tmp_path), train=["text_encoder_2", "unet.conv_in"])
    settings = settings_of(pipeline, lora(include=["attn2.to_k"]))
    staged = load_stage(pipeline, settings, 0)
    trained = staged.trained(staged.layers)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.2)
    export(tmp_path / "out", Ranks(), trained, export_plan(pipeline, settings, staged), 1)
    keys = load_file(tmp_path / "out" / COMFYUI_FILE).keys()
    assert "diffusion_model.input_blocks.0.0.diff_b" in keys
    assert "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj.diff" in keys
    assert "text_encoders.clip_g.transformer.text_projection.diff" in keys
    assert load_file(tmp_path / "out" / "trained_unet.safetensors").keys() == {"conv_in.weight", "conv_in.bias"}
    for file in (ADAPTER_FILE, COMFYUI_FILE):
        adapter = settings.adapter.model_copy(update={"init_from_existing": tmp_path / "out" / file})
        again = load_stage(pipeline, settings_of(pipeline, adapter), 0)
        for name, parameter in again.trained(again.layers).items():
            torch.testing.assert_close(parameter, trained[name], rtol=1e-4, atol=1e-6)


def test_a_bias_of_an_adapted_layer_is_found_elsewhere(folder: Path, tmp_path: Path) -> None:
    staged = exported(folder, tmp_path, train=["attn.to_q.bias", "ff.net.0.proj.bias"])
    base, flux = base_of(folder), tiny_flux.pipeline(folder)
    expected = whole_of(staged, base)
    theirs = in_comfyui(load_file(tmp_path / COMFYUI_FILE), BFL_LAYOUT.to_original(base))
    assert_close(theirs, BFL_LAYOUT.to_original(expected))
    stock = StockPipeline.from_pretrained(folder, vae=None, text_encoder=None, text_encoder_2=None)
    stock.transformer.load_state_dict(load_file(tmp_path / TRAINED_FILE), strict=False)
    stock.load_lora_weights(tmp_path, weight_name=ADAPTER_FILE)
    theirs = output(flux.to_layers(stock.transformer), flux)
    torch.testing.assert_close(theirs, output(staged.layers, flux), rtol=1e-4, atol=1e-5)
