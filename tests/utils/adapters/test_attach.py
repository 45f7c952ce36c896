"""LoRA factors on a denoiser: where they go, what they start from, what they load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.utils.adapters.toy_denoiser import BLOCKS, Block, denoiser, factors, initialised
from utils import adapters
from utils.adapters import attach
from utils.adapters.lora import LoraSettings
from utils.errors import UserError
from utils.settings.schema import AdapterSettings


def lora(**keys: Any) -> AdapterSettings:
    return LoraSettings(**{"type": "lora", "rank": 2, **keys})


ALL = [f"{block}.{part}" for block in ("first_blocks.0", "blocks.0", "blocks.1") for part in ("to_q", "to_k", "out")]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({}, ALL),
        ({"include": ["to_q"]}, [name for name in ALL if name.endswith("to_q")]),
        ({"include": ["blocks.?.to_*"], "exclude": ["to_k", "first_"]}, ["blocks.0.to_q", "blocks.1.to_q"]),
        ({"exclude": ["blocks.0.*"]}, [name for name in ALL if ".1." in name]),
        ({"include": ["Block"], "exclude": ["blocks.1"]}, [name for name in ALL if ".0." in name]),
        ({"include": ["*ock"], "exclude": ["*Linear", "out"]}, [name for name in ALL if not name.endswith("out")]),
        ({"include": ["out", "first*to_q"]}, ["first_blocks.0.to_q", *(name for name in ALL if name.endswith("out"))]),
    ],
)
def test_patterns_choose_the_linears_of_the_blocks(patterns: dict, expected: list[str]) -> None:
    adapted = initialised(lora(**patterns))
    assert {name.split(".lora_")[0] for name in factors(adapted)} == set(expected)
    trained = {attach.base_name(name) for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == factors(adapted).keys()


def test_modules_elsewhere_of_the_same_names_are_left_alone() -> None:
    adapted = denoiser()
    adapted.refiner = nn.Module()
    adapted.refiner.blocks = nn.ModuleList([Block()])
    attach.attach(adapted, BLOCKS, lora(include=["to_q"]))
    assert {name.split(".lora_")[0] for name in factors(adapted)} == {name for name in ALL if name.endswith("to_q")}


@pytest.mark.parametrize("patterns", [{"include": ["embed"]}, {"include": ["norm"]}, {"exclude": ["*"]}])
def test_patterns_that_leave_nothing_are_told(patterns: dict) -> None:
    with pytest.raises(UserError, match="leave nothing to adapt; .* are called like first_blocks.0.to_q"):
        attach.attach(denoiser(), BLOCKS, lora(**patterns))


def test_equals_a_model_adapted_by_peft() -> None:
    settings = lora(rank=3, alpha=1.5)
    adapted = initialised(settings)
    drawn = {name: torch.randn_like(tensor) for name, tensor in factors(adapted).items()}
    attach.load(adapted, [adapted], drawn, "a test")
    reference = get_peft_model(denoiser(), LoraConfig(r=3, lora_alpha=1.5, target_modules=ALL))
    theirs = {attach.base_name(name.removeprefix("base_model.model.")): p for name, p in reference.named_parameters()}
    ours = {attach.base_name(name): p for name, p in adapted.named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in ours.items()} == {
        name: (p.shape, p.requires_grad) for name, p in theirs.items()
    }
    with torch.no_grad():
        for name, tensor in drawn.items():
            theirs[name].copy_(tensor)
    x_BD = torch.randn(5, 4)
    assert torch.equal(adapted(x_BD), reference(x_BD))
    assert set(attach.scales(adapted).values()) == {0.5} and set(attach.scales(initialised(lora())).values()) == {1.0}


def test_starts_without_an_effect() -> None:
    x_BD = torch.randn(5, 4)
    assert torch.equal(initialised(lora())(x_BD), denoiser()(x_BD))


def test_switched_off_it_has_no_effect_and_comes_back() -> None:
    adapted, x_BD = initialised(lora()), torch.randn(5, 4)
    for name, tensor in factors(adapted).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(tensor)
    effect = adapted(x_BD)
    with pytest.raises(KeyError), attach.switched_off(adapted):
        assert torch.equal(adapted(x_BD), denoiser()(x_BD))
        raise KeyError
    assert torch.equal(adapted(x_BD), effect) and not torch.equal(effect, denoiser()(x_BD))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_strength_multiplies_the_update(kind: str) -> None:
    adapted, x_BD = (
        initialised(lora() if kind == "lora" else adapters.find(kind).settings(type=kind, rank=2)),
        torch.randn(5, 4),
    )
    for tensor in factors(adapted).values():
        torch.nn.init.normal_(tensor)
    _, (_, module) = next(iter(attach.adapted(adapted).items()))
    seen, effect = torch.randn(5, module.base_layer.in_features), adapted(x_BD)
    plain, whole = module.base_layer(seen), module(seen)
    with pytest.raises(KeyError), attach.at_strength(adapted, -0.5):
        torch.testing.assert_close(module(seen) - plain, -0.5 * (whole - plain), rtol=1e-4, atol=1e-5)
        raise KeyError
    with attach.at_strength(adapted, 0.0):
        assert torch.equal(adapted(x_BD), denoiser()(x_BD))
    assert torch.equal(adapted(x_BD), effect) and not torch.equal(effect, denoiser()(x_BD))


def test_first_values_are_the_same_however_the_denoiser_is_cut() -> None:
    whole = factors(initialised(lora()))
    cut = denoiser().to("meta")
    attach.attach(cut, BLOCKS, lora())
    torch.manual_seed(99)
    attach.initialise(cut, [cut.blocks[1]], lora(), seed=0)
    for name, tensor in factors(cut).items():
        assert tensor.is_meta != name.startswith("blocks.1."), name
        assert tensor.is_meta or torch.equal(tensor, whole[name]), name


def test_first_values_differ_by_seed_and_module() -> None:
    first = {name: tensor for name, tensor in factors(initialised(lora())).items() if ".lora_A." in name}
    second = factors(initialised(lora(), seed=1))
    values = [*first.values(), *(second[name] for name in first)]
    assert len({tuple(tensor.flatten().tolist()) for tensor in values}) == 2 * len(ALL)


def test_drawing_first_values_leaves_the_random_state() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    adapted = denoiser()
    attach.attach(adapted, BLOCKS, lora())
    torch.manual_seed(7)
    attach.initialise(adapted, [adapted], lora(), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_factors_have_their_own_type() -> None:
    adapted = denoiser().to(torch.bfloat16)
    attach.attach(adapted, BLOCKS, lora())
    attach.initialise(adapted, [adapted], lora(), seed=0)
    assert {tensor.dtype for tensor in factors(adapted).values()} == {torch.float32}
    attach.initialise(adapted, [adapted], lora(dtype="bfloat16"), seed=0)
    assert {tensor.dtype for tensor in factors(adapted).values()} == {torch.bfloat16}


def test_only_held_factors_are_loaded() -> None:
    adapted = denoiser().to("meta")
    attach.attach(adapted, BLOCKS, lora())
    attach.initialise(adapted, [adapted.blocks[0]], lora(), seed=0)
    given = {name: torch.full(tensor.shape, 2.0) for name, tensor in factors(adapted).items()}
    attach.load(adapted, [adapted.blocks[0]], given, "a test")
    for name, tensor in factors(adapted).items():
        assert tensor.is_meta or torch.equal(tensor, given[name]), name


@pytest.mark.parametrize(
    ("made_with", "message"),
    [
        ({"rank": 4}, "is [4, 6], this run's is [2, 6]; set [adapter] rank"),
        ({"include": ["to_q"]}, "'blocks.0.out.lora_A.weight' and 11 more are not in this adapter"),
    ],
)
def test_another_adapter_does_not_load(made_with: dict, message: str) -> None:
    adapted = initialised(lora())
    with pytest.raises(UserError) as raised:
        attach.load(adapted, [adapted], factors(initialised(lora(**made_with))), "other.safetensors")
    assert message in str(raised.value) and "other.safetensors" in str(raised.value)


def test_factors_without_a_place_do_not_load() -> None:
    adapted = initialised(lora(include=["to_q"]))
    with pytest.raises(UserError, match="'first_blocks.0.to_k.lora_A.weight' has no counterpart"):
        attach.load(adapted, [adapted], factors(initialised(lora())), "other.safetensors")
