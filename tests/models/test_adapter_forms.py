"""Updates of other forms than factors of low rank, as ComfyUI applies them, and other writings of those."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.foundation.checkpoints.adapter_files import read_updates
from tests.models.adapters_of_others import (
    ENDINGS,
    RANK,
    Known,
    known_models,
    lora,
    pair,
    product,
)
from utils.adapters import presets
from utils.adapters.kinds import Update
from utils.diffusion.seeds import normal
from utils.errors import UserError


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    return known_models(tmp_path_factory)


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
