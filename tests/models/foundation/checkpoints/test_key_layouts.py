"""Flux's renaming table against the converters of diffusers, whose sizes are those of the real model.

All rows are real; the matrices have one column, which is all that renaming and stacking can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline as StockPipeline
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import nn

from models.flux import BFL_LAYOUT, FluxPipeline
from models.foundation.checkpoints.key_layouts import Piece, swap_halves
from models.foundation.checkpoints.weights import build_empty
from utils.adapters.attach import adaptable, attach, targets
from utils.adapters.file_names import contents
from utils.adapters.kinds import AdapterFile, ModelNames
from utils.adapters.lora import Lora, LoraSettings
from utils.adapters.presets import base_shapes
from utils.diffusion.seeds import normal

Tensors = dict[str, torch.Tensor]
WIDTH, HEAD = 3072, 128
MLP = 4 * WIDTH
# Modules of one double and one single block of Black Forest Labs' checkpoint, and their outputs.
ROWS = {
    "img_in": WIDTH,
    "txt_in": WIDTH,
    "final_layer.linear": 64,
    "final_layer.adaLN_modulation.1": 2 * WIDTH,
    **{f"{part}_in.{layer}_layer": WIDTH for part in ("time", "vector", "guidance") for layer in ("in", "out")},
    **{
        f"double_blocks.0.{stream}_{module}": rows
        for stream in ("img", "txt")
        for module, rows in {
            "mod.lin": 6 * WIDTH,
            "attn.qkv": 3 * WIDTH,
            "attn.proj": WIDTH,
            "mlp.0": MLP,
            "mlp.2": WIDTH,
        }.items()
    },
    "single_blocks.0.linear1": 3 * WIDTH + MLP,
    "single_blocks.0.linear2": WIDTH,
    "single_blocks.0.modulation.lin": 3 * WIDTH,
}
NORMS = [
    f"{where}.{which}_norm.scale"
    for where in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm")
    for which in ("query", "key")
]


@pytest.fixture(scope="module")
def original() -> Tensors:
    """A checkpoint in Black Forest Labs' names."""
    weights = {f"{name}.weight": normal((rows, 1), 0, name, "weight") for name, rows in ROWS.items()}
    biases = {f"{name}.bias": normal((rows,), 0, name, "bias") for name, rows in ROWS.items()}
    return {**weights, **biases, **{name: normal((HEAD,), 0, name) for name in NORMS}}


@pytest.fixture(scope="module")
def converted(original: Tensors) -> Tensors:
    return convert_flux_transformer_checkpoint_to_diffusers(dict(original))


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    """The real Flux with one block of each kind, without memory."""
    return build_empty(lambda: FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True))


def cut(tensors: Mapping[str, torch.Tensor], piece: Piece) -> torch.Tensor:
    tensor = tensors[piece.key][slice(*piece.rows) if piece.rows else slice(None)]
    return swap_halves(tensor) if piece.swap_halves else tensor


def test_the_table_names_what_the_model_has(converted: Tensors, denoiser: nn.Module) -> None:
    assert converted.keys() == denoiser.state_dict().keys()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_pieces_are_what_diffusers_converts(prefix: str, original: Tensors, converted: Tensors) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    prefixed = {f"{prefix}{key}": tensor for key, tensor in original.items()}
    prefixed["vae.decoder.conv_in.bias"] = torch.zeros(1)
    pieces = BFL_LAYOUT.pieces(shapes, prefixed)
    assert pieces.keys() == converted.keys()
    for name, tensor in converted.items():
        assert torch.equal(cut(prefixed, pieces[name]), tensor), name


def test_back_to_the_original(original: Tensors, converted: Tensors) -> None:
    returned = BFL_LAYOUT.to_original(converted)
    assert returned.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(returned[key], tensor), key


def test_what_has_no_place_is_told(converted: Tensors) -> None:
    with pytest.raises(ValueError, match="first 'controlnet.weight'"):
        BFL_LAYOUT.to_original({**converted, "controlnet.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="first 'transformer_blocks.0.attn.to_q.weight'"):
        BFL_LAYOUT.to_original({"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)})


def test_recognises_its_own_only(original: Tensors, converted: Tensors) -> None:
    assert BFL_LAYOUT.recognises(original)
    assert BFL_LAYOUT.recognises(f"model.diffusion_model.{key}" for key in original)
    assert not BFL_LAYOUT.recognises(converted)


def module_sizes(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every Linear."""
    linears = (pair for pair in denoiser.named_modules() if isinstance(pair[1], nn.Linear))
    return {name: (module.in_features, module.out_features) for name, module in linears}


def random_lora(denoiser: nn.Module, rank: int, **patterns: Any) -> Tensors:
    settings = LoraSettings(type="lora", rank=rank, **patterns)
    sizes, factors = module_sizes(denoiser), {}
    for name in targets(denoiser, FluxPipeline.blocks, settings):
        inputs, outputs = sizes[name]
        factors[f"{name}.lora_A.weight"] = normal((rank, inputs), 0, name, "A")
        factors[f"{name}.lora_B.weight"] = normal((outputs, rank), 0, name, "B")
    return factors


def update(factors: Mapping[str, torch.Tensor], module: str, inputs: int) -> torch.Tensor | None:
    """What a LoRA adds to a module's output for a fixed random input; None where it has no factors."""
    if f"{module}.lora_A.weight" not in factors:
        return None
    x_D = normal((inputs,), 0, "x", module)
    return factors[f"{module}.lora_B.weight"] @ (factors[f"{module}.lora_A.weight"] @ x_D)


def taken_apart(kohya: Tensors, denoiser: nn.Module) -> Tensors:
    """The factors of our modules, with the scale in them; all of the file is used."""
    names = ModelNames("transformer", adaptable(denoiser), BFL_LAYOUT, base_shapes(denoiser))
    found = contents(AdapterFile(kohya), names)
    assert not (found.strangers or found.unread)
    factors: Tensors = {}
    for _, entry in found.entries:
        factors |= Lora().factors(entry, names, lambda module: 1.0)
    return factors


def stock_reading(kohya: Tensors) -> Tensors:
    read = StockPipeline.lora_state_dict(dict(kohya))
    return {name.removeprefix("transformer."): tensor for name, tensor in read.items()}


TARGETS = {
    "all": {},
    "queries": {"include": ["attn.to_q"]},
    "keys and mlp": {"include": ["to_k", "add_k_proj", "mlp"]},
    "double blocks": {"exclude": ["single_transformer_blocks"]},
}


@pytest.mark.parametrize("patterns", TARGETS)
@pytest.mark.parametrize(("rank", "scale"), [(3, 0.5), (4, 2.0)])
def test_kohya_file_has_the_same_effect_in_diffusers(
    denoiser: nn.Module, patterns: str, rank: int, scale: float
) -> None:
    factors, sizes = random_lora(denoiser, rank, **TARGETS[patterns]), module_sizes(denoiser)
    kohya = BFL_LAYOUT.lora_to_kohya(factors, scale, lambda module: sizes[module][1])
    theirs = stock_reading(kohya)
    assert any(f"{name}.lora_A.weight" in factors for name in sizes)
    for name, (inputs, outputs) in sizes.items():
        ours, read = update(factors, name, inputs), update(theirs, name, inputs)
        expected = torch.zeros(outputs) if ours is None else scale * ours
        torch.testing.assert_close(torch.zeros(outputs) if read is None else read, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("patterns", TARGETS)
def test_kohya_file_comes_back_taken_apart(denoiser: nn.Module, patterns: str) -> None:
    factors, sizes = random_lora(denoiser, 3, **TARGETS[patterns]), module_sizes(denoiser)
    kohya = BFL_LAYOUT.lora_to_kohya(factors, 0.5, lambda module: sizes[module][1])
    returned = taken_apart(kohya, denoiser)
    assert returned.keys() == factors.keys()
    for name, tensor in factors.items():
        assert torch.equal(returned[name], tensor * 0.5 if ".lora_B." in name else tensor), name


def test_a_fused_kohya_lora_serves_every_part(denoiser: nn.Module) -> None:
    """One that a program trained on the fused projections: its columns belong to all parts."""
    sizes, rank = module_sizes(denoiser), 4
    kohya = {}
    for module in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "double_blocks.0.txt_mlp.0"):
        name = "lora_unet_" + module.replace(".", "_")
        kohya |= {
            f"{name}.lora_down.weight": normal((rank, WIDTH), 0, name, "down"),
            f"{name}.lora_up.weight": normal((ROWS[module], rank), 0, name, "up"),
            f"{name}.alpha": torch.tensor(1.0),
        }
    ours = taken_apart(kohya, denoiser)
    theirs = stock_reading(kohya)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 8
    for name, (inputs, _) in sizes.items():
        if f"{name}.lora_A.weight" in ours:
            expected = update(theirs, name, inputs)
            torch.testing.assert_close(update(ours, name, inputs), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("patterns", [{}, {"include": ["to_k", "to_q", "mlp"]}, {"include": ["single*to_v"]}])
@pytest.mark.parametrize("zeros", ["", "to_q", "to_k", "proj_mlp"])
def test_zeros_keep_their_rank(patterns: dict[str, Any], zeros: str) -> None:
    """Those that no gradient has moved: all of them, the first of a fused module, one between others, or the last."""
    whole = build_empty(lambda: FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True))
    sizes = module_sizes(whole)
    factors = {
        name: torch.zeros_like(tensor) if ".lora_B." in name and zeros in name else tensor
        for name, tensor in random_lora(whole, 2, **patterns).items()
    }
    kohya = BFL_LAYOUT.lora_to_kohya(factors, 1.0, lambda module: sizes[module][1])
    attach(whole, FluxPipeline.blocks, LoraSettings(type="lora", rank=2, **patterns))
    returned = taken_apart(kohya, whole)
    assert returned.keys() == factors.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in factors.items())
