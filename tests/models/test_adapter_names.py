"""Adapters of other programs on every model: every tensor is used, in each spelling, or named in an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from models.assembly.stage import model_names
from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from models.foundation.checkpoints.key_layouts import KeyLayout
from tests.models.tiny_folder import tiny
from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.kinds import ModelNames, Update
from utils.diffusion.seeds import normal
from utils.errors import UserError

Tensors = dict[str, torch.Tensor]
RANK = 2
DOTTED = ("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
UNDERSCORED = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
ENDINGS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft_default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "mochi": (".lora_A", ".lora_B"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "older": (".lora.down.weight", ".lora.up.weight"),
    "processors": ("_lora.down.weight", "_lora.up.weight"),
    "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
SHARED_NAMES = [{"flux", "chroma"}, {"qwen_image", "qwen_image_layered"}, {"sd15", "sdxl"}]
"""Types whose modules are called alike, and in these tiny models may be of the same size."""


class Known(NamedTuple):
    """A model, still without weights."""

    denoiser: nn.Module
    names: ModelNames
    blocks: tuple[str, ...]

    @property
    def layout(self) -> KeyLayout | None:
        return self.names.layout

    def linears(self) -> list[str]:
        """What is adapted by default."""
        found = self.names.modules.items()
        return [name for name, m in found if isinstance(m, nn.Linear) and attach.is_within(name, self.blocks)]

    def own(self, module: str) -> str:
        return module.removeprefix(f"{self.names.folder}.") if self.names.has_parts else module

    def read(self, tensors: Tensors, place: Path, metadata: Mapping[str, str] | None = None) -> Mapping[str, Update]:
        save_file(tensors, place / "adapter.safetensors", dict(metadata or {}))
        updates = read_updates(place / "adapter.safetensors", self.names)
        presets.check_fits(self.denoiser, updates, "")
        return updates

    def deltas(self, tensors: Tensors, place: Path) -> Tensors:
        updates = self.read(tensors, place)
        return {name: update.delta(torch.zeros(update.shape)) for name, update in updates.items()}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    made: dict[str, Known] = {}

    def find(name: str) -> Known:
        if name not in made:
            module = tiny(name)
            pipeline = module.pipeline(module.write_folder(tmp_path_factory.mktemp(name)))
            denoiser = pipeline.weights.build_empty()
            made[name] = Known(denoiser, model_names(pipeline, denoiser), tuple(pipeline.blocks))
        return made[name]

    return find


def pair(name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return normal((RANK, *shape[1:]), 0, name, "down"), normal((shape[0], RANK), 0, name, "up")


def lora(name: str, shape: tuple[int, ...], endings: tuple[str, str], alpha: float | None = None) -> Tensors:
    down, up = pair(name, shape)
    scale = {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return {f"{name}{endings[0]}": down, f"{name}{endings[1]}": up, **scale}


def spelled(prefix: str, name: str) -> str:
    return prefix + (name.replace(".", "_") if prefix in UNDERSCORED else name)


def product(name: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    down, up = pair(name, shape)
    return scale * up @ down


each_model = pytest.mark.parametrize("model", models.available())


@each_model
@pytest.mark.parametrize("prefix", [*DOTTED, *UNDERSCORED])
def test_diffusers_names_are_read(known: Callable[[str], Known], model: str, prefix: str, tmp_path: Path) -> None:
    """Among them those of OneTrainer, `lora_transformer_`, and of musubi-tuner, `lora_unet_layers_0_attention_to_q`."""
    chosen, tensors, expected = known(model), {}, {}
    for number, module in enumerate(chosen.linears()):
        name, shape = spelled(prefix, chosen.own(module)), chosen.names.shapes[f"{module}.weight"]
        endings = list(ENDINGS.values())[number % len(ENDINGS)]
        alpha = [None, 1.0][number % 2]
        tensors |= lora(name, shape, endings, alpha)
        expected[f"{module}.weight"] = product(name, shape, 1.0 if alpha is None else alpha / RANK)
    read = chosen.deltas(tensors, tmp_path)
    assert read.keys() == expected.keys() and len(expected) > 5
    for name, delta in expected.items():
        torch.testing.assert_close(read[name], delta)


@each_model
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model.", "lora_unet_", "lora_unet__"])
def test_the_publishers_names_are_read(known: Callable[[str], Known], model: str, prefix: str, tmp_path: Path) -> None:
    """All of the rank of a fused module serves every part of it; swapped halves are swapped back."""
    chosen = known(model)
    if chosen.layout is None:
        assert model == "cogview4", "ComfyUI has no such model"
        return
    adapted, tensors, expected = set(chosen.linears()), {}, {}
    for there, target in chosen.layout.targets(chosen.names.shapes):
        if adapted.issuperset(target.modules) and not there.endswith("linear1_qkv"):
            name, rows = spelled(prefix, there), sum(map(chosen.names.rows_of, target.modules))
            shape = (rows, chosen.names.shapes[f"{target.modules[0]}.weight"][1])
            tensors |= lora(name, shape, ENDINGS["kohya"], 1.0)
            expected[there] = (target, product(name, shape, 1.0 / RANK))
    read = chosen.deltas(tensors, tmp_path)
    assert {name.removesuffix(".weight") for name in read} == {m for t, _ in expected.values() for m in t.modules}
    for target, delta in expected.values():
        joined = torch.cat([read[f"{module}.weight"] for module in target.modules])
        halves = list(joined.chunk(2)) if target.swap_halves else [joined]
        torch.testing.assert_close(torch.cat(halves[::-1]), delta)


@each_model
def test_an_adapter_of_another_model_is_refused(known: Callable[[str], Known], model: str, tmp_path: Path) -> None:
    """In its own names, whichever they are: nothing is left out in silence."""
    chosen = known(model)
    for prefix in ("transformer.", "lora_unet_"):
        tensors: Tensors = {}
        for module in chosen.linears():
            tensors |= lora(
                spelled(prefix, chosen.own(module)), chosen.names.shapes[f"{module}.weight"], ENDINGS["peft"]
            )
        for other in models.available():
            if other != model and {model, other} not in SHARED_NAMES:
                with pytest.raises(UserError, match="of its .* modules are not this model's|of [0-9]+ fit"):
                    known(other).read(tensors, tmp_path)


@each_model
def test_what_is_not_read_is_named(known: Callable[[str], Known], model: str, tmp_path: Path) -> None:
    chosen = known(model)
    module = chosen.linears()[0]
    name, shape = f"lora_unet_{chosen.own(module).replace('.', '_')}", chosen.names.shapes[f"{module}.weight"]
    good, one = lora(name, shape, ENDINGS["kohya"]), torch.ones(2, 2)
    cases = {
        f"{name}.hada_w1_a": "1 of its 3 tensors are of a form that is not read here .LoHa",
        f"{name}.oft_blocks": "OFT",
        f"{name}.lora_magnitude_vector": "DoRA of PEFT",
        f"{name}.set_weight": "replacement of weights",
        f"{name}.weight": f"the first is '{name}.weight'",
        f"{name}.lora_B.bias": "LoRA with biases",
        f"{name}.lora_A.weight": "1 of its 3 tensors are of a form that is not read here, the first",
        f"{name}2.alpha": f"the first is '{name}2.alpha'",
        "lora_unet_somewhere.lora_up.weight": "1 of its 2 modules are not this model's, .*'lora_unet_somewhere'",
        "lora_te9_text_model_x.lora_up.weight": "1 of its 2 modules are a text encoder's, .*'lora_te9_text_model_x'",
    }
    for key, told in cases.items():
        with pytest.raises(UserError, match=told):
            chosen.read({**good, key: one}, tmp_path)
    assert len(chosen.read(good, tmp_path)) == 1


def test_two_names_of_one_module_are_refused(known: Callable[[str], Known], tmp_path: Path) -> None:
    """ComfyUI takes the last one alone."""
    one, other = (
        lora(f"{prefix}blocks.0.{own}", (24, 24), ENDINGS["peft"])
        for prefix, own in (("transformer.", "attn1.to_q"), ("diffusion_model.", "self_attn.q"))
    )
    with pytest.raises(UserError, match="both adapt 'blocks.0.attn1.to_q.weight'"):
        known("wan").read({**one, **other}, tmp_path)


def test_the_look_of_names_is_told(known: Callable[[str], Known], tmp_path: Path) -> None:
    chosen = known("wan")
    fits, other = (lora(f"blocks.{n}.attn1.to_q", (24, 24), ENDINGS["peft"]) for n in (0, 99))
    with pytest.raises(UserError, match="look like names of Wan; the other 1 fit; give an adapter .* in this size"):
        chosen.read({**fits, **other}, tmp_path)
    for name, told in {
        "diffusion_model.blocks.3.self_attn.q": "Wan",
        "lora_unet_double_blocks_0_img_attn_proj": "Flux.1 or Chroma",
        "lora_unet_input_blocks_4_1_proj_in": "Stable Diffusion 1.5, 2 or XL",
        "transformer.transformer_blocks.0.img_mlp.net.2": "Qwen-Image",
        "lora_unet_joint_blocks_1_x_block_mlp_fc1": "Stable Diffusion 3",
        "diffusion_model.layers.3.attention.qkv": "Z-Image or Lumina Image 2",
        "transformer.transformer_blocks.1.attn1.to_q": "LTX-Video",
    }.items():
        with pytest.raises(UserError, match=f"1 of its 1 modules are not this model's, .*look like names of {told}"):
            known("hidream").read(lora(name, (4, 4), ENDINGS["peft"]), tmp_path)


def test_names_of_text_encoders_are_read_where_those_are_trained(tmp_path: Path) -> None:
    module = tiny("sdxl_texts")
    pipeline = module.pipeline(module.write_folder(tmp_path))
    denoiser = pipeline.weights.build_empty()
    chosen = Known(denoiser, model_names(pipeline, denoiser), tuple(pipeline.blocks))
    within = "encoder.layers.0.self_attn.q_proj"
    prefixes = {
        "text_encoder": ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer."),
        "text_encoder_2": (
            "lora_te2_",
            "text_encoder_2.",
            "text_encoders.clip_g.transformer.",
            "lycoris_text_encoder_2_",
        ),
    }
    for part, names in prefixes.items():
        ours = next(name for name in chosen.names.modules if name.startswith(f"{part}.") and name.endswith(within))
        for number, prefix in enumerate(names):
            # transformers calls the inner model text_model in some of its versions.
            own = within if number % 2 else f"text_model.{within}"
            name = prefix + (own.replace(".", "_") if prefix.endswith("_") else own)
            read = chosen.deltas(lora(name, chosen.names.shapes[f"{ours}.weight"], ENDINGS["kohya"]), tmp_path)
            assert read.keys() == {f"{ours}.weight"}, name


def test_training_goes_on_from_plain_factors_alone(known: Callable[[str], Known], tmp_path: Path) -> None:
    chosen, name = known("wan"), "diffusion_model.blocks.0.self_attn.q"
    shape = chosen.names.shapes["blocks.0.attn1.to_q.weight"]
    factors = lora(name, shape, ENDINGS["kohya"])
    for further, told in (
        ({f"{name}.dora_scale": torch.ones(shape[0], 1)}, "has a dora_scale; training goes on from plain LoRAs alone"),
        ({f"{name}.diff_b": torch.ones(shape[0])}, "1 of its 1 modules have something else than LoRA factors"),
        ({"lycoris_blocks_0_attn1_to_k.lokr_w1": torch.ones(1, 1)}, "1 of its 2 modules have something else"),
    ):
        save_file({**factors, **further}, tmp_path / "adapter.safetensors")
        with pytest.raises(UserError, match=told):
            read_factors(tmp_path / "adapter.safetensors", adapters.find("lora"), chosen.names, {})


# Updates of other forms, as ComfyUI applies them


def applied(update: Update, base: torch.Tensor, weight: float) -> torch.Tensor:
    layer = nn.Linear(base.shape[1], base.shape[0])
    layer.weight.data.copy_(base)
    holder = nn.ModuleDict({"x": layer})
    presets.fuse(holder, [layer], {"x.weight": update}, weight)
    return layer.weight.data


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("on_rows", [True, False])
def test_the_scale_of_dora(known: Callable[[str], Known], on_rows: bool, weight: float, tmp_path: Path) -> None:
    """Rows are measured without the update, columns with it."""
    chosen, module = known("wan"), "blocks.0.attn1.to_q"
    shape = chosen.names.shapes[f"{module}.weight"]
    name, base = f"diffusion_model.{'blocks.0.self_attn.q'}", normal(shape, 0, "base")
    scale = normal((shape[0], 1) if on_rows else (1, shape[1]), 0, "scale").abs() + 0.5
    tensors = {**lora(name, shape, ENDINGS["kohya"], 1.0), f"{name}.dora_scale": scale}
    ((_, update),) = chosen.read(tensors, tmp_path).items()
    changed = base + product(name, shape, 1.0 / RANK)
    length = base.norm(dim=1, keepdim=True) if on_rows else changed.norm(dim=0, keepdim=True)
    expected = base + weight * (changed * scale / length - base)
    torch.testing.assert_close(applied(update, base, weight), expected)
    with pytest.raises(UserError, match="in a form that only fits into weights; set `fused = true`"):
        presets.check_beside(chosen.denoiser, {f"{module}.weight": update}, "")


def test_the_scale_of_dora_on_a_fused_module(known: Callable[[str], Known], tmp_path: Path) -> None:
    chosen, name = known("flux"), "lora_unet_double_blocks_0_img_attn_qkv"
    modules = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    width = chosen.names.shapes[f"{modules[0]}.weight"][1]
    base, scale = normal((3 * width, width), 0, "base"), normal((3 * width, 1), 0, "scale").abs()
    tensors = {**lora(name, (3 * width, width), ENDINGS["kohya"]), f"{name}.dora_scale": scale}
    updates = chosen.read(tensors, tmp_path)
    expected = (base + product(name, (3 * width, width))) * scale / base.norm(dim=1, keepdim=True)
    made = [applied(updates[f"{m}.weight"], piece, 1.0) for m, piece in zip(modules, base.chunk(3), strict=True)]
    torch.testing.assert_close(torch.cat(made), expected)
    tensors[f"{name}.dora_scale"] = torch.ones(1, width)
    with pytest.raises(UserError, match="dora_scale of '.*img_attn_qkv', .* is of a form that is not known"):
        chosen.read(tensors, tmp_path)


def test_whole_differences_of_weights_biases_and_parameters(known: Callable[[str], Known], tmp_path: Path) -> None:
    """As in files that were made by subtracting one Wan from another."""
    chosen = known("wan")
    ours = {
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "diffusion_model.blocks.0.norm3.w_norm": "blocks.0.norm2.weight",
        "diffusion_model.blocks.0.norm3.b_norm": "blocks.0.norm2.bias",
        "diffusion_model.blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "diffusion_model.head.modulation.diff": "scale_shift_table",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.text_embedding.0.bias.diff": "condition_embedder.text_embedder.linear_1.bias",
    }
    tensors = {key: normal(chosen.names.shapes[name], 0, key) for key, name in ours.items()}
    shape = chosen.names.shapes["blocks.0.attn1.to_q.weight"]
    factors = lora("diffusion_model.blocks.0.self_attn.q", shape, ENDINGS["kohya"])
    updates = chosen.read({**tensors, **factors}, tmp_path)
    assert updates.keys() == {*ours.values(), "blocks.0.attn1.to_q.weight"}
    denoiser = chosen.denoiser.to_empty(device="cpu")
    parameters = dict(denoiser.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1.0)
    presets.fuse(denoiser, [denoiser], updates, 0.5)
    for key, name in ours.items():
        torch.testing.assert_close(parameters[name].data, 1.0 + 0.5 * tensors[key])
    with pytest.raises(UserError, match="both adapt 'blocks.0.attn1.to_q.weight'"):
        chosen.read({**factors, "diffusion_model.blocks.0.self_attn.q.diff": torch.zeros(shape)}, tmp_path)
    with pytest.raises(UserError, match="as if it were .3., and it is"):
        chosen.read({"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(3)}, tmp_path)


def test_a_difference_of_a_fused_weight_is_divided(known: Callable[[str], Known], tmp_path: Path) -> None:
    chosen = known("hunyuan_dit")
    modules = [f"blocks.0.attn1.to_{part}.weight" for part in "qkv"]
    width = chosen.names.shapes[modules[0]][1]
    whole = normal((sum(chosen.names.shapes[m][0] for m in modules), width), 0, "whole")
    read = chosen.deltas({"diffusion_model.blocks.0.attn1.Wqkv.diff": whole}, tmp_path)
    assert torch.equal(torch.cat([read[module] for module in modules]), whole)
    # diffusers counts two norms in another order; which is meant, the other names of the file tell.
    norm = normal(chosen.names.shapes["blocks.0.norm2.weight"], 0, "norm")
    file = {"diffusion_model.blocks.0.attn1.Wqkv.diff": whole, "diffusion_model.blocks.0.norm2.diff": norm}
    assert "blocks.0.norm3.weight" in chosen.deltas(file, tmp_path)
    file = {"blocks.0.attn1.to_q.diff": whole[: len(whole) // 3], "blocks.0.norm2.diff": norm}
    assert "blocks.0.norm2.weight" in chosen.deltas(file, tmp_path)


def test_linears_may_be_convolutions_of_one_cell(known: Callable[[str], Known], tmp_path: Path) -> None:
    """And the other way round, in a file and in the model."""
    for model, within in (("sd15", "attn1.to_q"), ("sd15", "proj_in")):
        chosen = known(model)
        module = next(name for name in chosen.linears() + list(chosen.names.modules) if name.endswith(within))
        shape, name = chosen.names.shapes[f"{module}.weight"], f"lora_unet_{chosen.own(module).replace('.', '_')}"
        down, up = pair(name, shape[:2])
        for cells in ((), (1, 1)):
            factors = {f"{name}.lora_down.weight": down.view(*down.shape, *cells), f"{name}.lora_up.weight": up}
            ((_, delta),) = chosen.deltas(factors, tmp_path).items()
            torch.testing.assert_close(delta, (up @ down).view(shape))
    assert len(shape) == 4


def test_older_names_are_read(known: Callable[[str], Known], tmp_path: Path) -> None:
    """Attention's processors of old versions of diffusers; and a part of a fused layer of Flux, of USO."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for model, name, modules in (
        ("sd15", f"unet.{block}.processor.to_q", [f"unet.{block}.to_q"]),
        ("sd15", f"unet.{block}.processor.to_out", [f"unet.{block}.to_out.0"]),
        (
            "flux",
            "diffusion_model.single_blocks.0.linear1_qkv",
            [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"],
        ),
    ):
        chosen = known(model)
        shapes = [chosen.names.shapes[f"{module}.weight"] for module in modules]
        shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        read = chosen.deltas(lora(name, shape, ENDINGS["processors"]), tmp_path)
        made = torch.cat([read[f"{module}.weight"] for module in modules])
        torch.testing.assert_close(made, product(name, shape))


def test_the_core_of_a_convolution(known: Callable[[str], Known], tmp_path: Path) -> None:
    """Tucker's form, as LoCon has it: three convolutions after one another."""
    chosen = known("sd15")
    module, name = "unet.down_blocks.0.resnets.0.conv1", "lora_unet_down_blocks_0_resnets_0_conv1"
    outputs, inputs, *kernel = chosen.names.shapes[f"{module}.weight"]
    down, mid, up = (
        normal((3, inputs, 1, 1), 0, "d"),
        normal((3, 3, *kernel), 0, "m"),
        normal((outputs, 3, 1, 1), 0, "u"),
    )
    tensors = {f"{name}.lora_{part}.weight": t for part, t in (("down", down), ("mid", mid), ("up", up))}
    read = chosen.deltas({**tensors, f"{name}.alpha": torch.tensor(1.5)}, tmp_path)
    x = normal((1, inputs, 5, 5), 0, "x")
    conv = nn.functional.conv2d
    expected = 0.5 * conv(conv(conv(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv(x, read[f"{module}.weight"], padding=1), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_that_peft_was_told(known: Callable[[str], Known], tmp_path: Path) -> None:
    """Of single modules, and of rank-stabilised LoRA."""
    chosen = known("flux")
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qk"]
    shape = chosen.names.shapes[f"{names[0]}.weight"]
    tensors = {k: t for n in names for k, t in lora(f"transformer.{n}", shape, ENDINGS["peft"]).items()}
    told = (
        '{"text_encoder.lora_alpha": 9, "transformer.lora_alpha": 4, '
        '"transformer.alpha_pattern": {"attn.to_k": 1}, "transformer.use_rslora": %s}'
    )
    for flag, root in (("false", RANK), ("true", RANK**0.5)):
        updates = chosen.read(tensors, tmp_path, {"lora_adapter_metadata": told % flag})
        for name, alpha in zip(names, (4.0, 1.0), strict=True):
            delta = updates[f"{name}.weight"].delta(torch.zeros(shape))
            torch.testing.assert_close(delta, product(f"transformer.{name}", shape, alpha / root))


def test_a_folder_of_several_files_is_refused(known: Callable[[str], Known], tmp_path: Path) -> None:
    read = partial(known("wan").read, {"x.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(UserError):
        read(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "another.safetensors")
    with pytest.raises(UserError, match="there are 2 files here, adapter.safetensors, another.safetensors"):
        read_updates(tmp_path, known("wan").names)
