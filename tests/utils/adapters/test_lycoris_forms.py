"""LoHa and LoKr, on Linears and convolutions, with and without cores: against weights made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from tests.utils.adapters.toy_unet import begun, exported, factors_of, frozen, inputs, moved, names_of, net
from utils import adapters
from utils.adapters import attach, presets
from utils.errors import UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import AdapterSettings

Tensors = dict[str, torch.Tensor]
FORMS: dict[str, dict[str, Any]] = {
    "loha": {"type": "loha", "rank": 2, "alpha": 1.0},
    "loha with cores": {"type": "loha", "rank": 3, "tucker": True},
    "loha of another rank": {"type": "loha", "rank": 3, "conv_dim": 1, "conv_alpha": 0.5},
    "lokr": {"type": "lokr", "factor": 2, "rank": 1, "alpha": 0.5},
    "lokr with cores": {"type": "lokr", "factor": 2, "rank": 1, "alpha": 2.0, "tucker": True},
    "lokr of both low": {"type": "lokr", "rank": 1, "decompose_both": True},
    "lokr whole": {"type": "lokr", "factor": 4, "full_matrix": True},
}
each = pytest.mark.parametrize("keys", FORMS.values(), ids=FORMS)


def chosen(keys: dict[str, Any], **further: Any) -> AdapterSettings:
    return adapters.find(keys["type"]).settings(**{"convolutions": True, **keys, **further})


def by_hand(own: Tensors, shape: torch.Size) -> torch.Tensor:
    """The update of a weight by the tensors that LyCORIS's file has for its module."""
    if "hada_w1_a" in own:
        if "hada_t1" in own:
            sides = [
                torch.einsum("ijkl,ip,jr->prkl", own[f"hada_t{n}"], own[f"hada_w{n}_a"], own[f"hada_w{n}_b"])
                for n in (1, 2)
            ]
        else:
            sides = [own[f"hada_w{n}_a"] @ own[f"hada_w{n}_b"] for n in (1, 2)]
        return (own["alpha"] / len(own["hada_w1_b"]) * sides[0] * sides[1]).reshape(shape)
    w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_w2" in own:
        w2 = own["lokr_w2"]
    elif "lokr_t2" in own:
        w2 = torch.einsum("ijkl,ip,jr->prkl", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        w2 = own["lokr_w2_a"] @ own["lokr_w2_b"]
    w2 = w2.reshape(w2.shape[0], shape[1] // w1.shape[1], *shape[2:])
    rank = next((len(own[part]) for part in ("lokr_w2_b", "lokr_w1_b") if part in own), None)
    scale = own["alpha"] / rank if rank else 1.0
    # Of each number of the small matrix a block of the weight.
    rows = [torch.cat([number * w2 for number in row], dim=1) for row in w1]
    return scale * torch.cat(rows)


def taken_apart(file: Path) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for key, tensor in load_file(file).items():
        name, _, part = key.rpartition(".")
        found.setdefault({f"lycoris_blocks_0_{own}": own for own in ("conv", "cell", "to_q")}[name], {})[part] = tensor
    return found


@each
def test_a_file_says_what_is_computed(keys: dict[str, Any], tmp_path: Path) -> None:
    """And so do the gradients of the factors."""
    settings = chosen(keys)
    model, x = moved(settings), inputs().requires_grad_()
    result = model(x)
    weights = dict(net().named_parameters())
    files = taken_apart(exported(model, settings, tmp_path))
    assert files.keys() == {"conv", "cell", "to_q"}
    for own in files.values():
        for part, tensor in own.items():
            own[part] = tensor.clone().requires_grad_(part != "alpha")
    changed = {
        f"blocks.0.{name}.weight": weights[f"blocks.0.{name}.weight"]
        + by_hand(own, weights[f"blocks.0.{name}.weight"].shape)
        for name, own in files.items()
    }
    again = inputs().requires_grad_()
    expected = functional_call(net(), changed, (again,))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert (expected - net()(again)).abs().mean() > 1e-3
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
    for name, factor in factors_of(model).items():
        _, _, module, part = name.split(".")
        theirs = files[module][part].grad.view(factor.shape)
        torch.testing.assert_close(factor.grad, theirs, rtol=1e-3, atol=1e-4, msg=name)


@each
def test_it_is_a_preset_and_gone_on_from(keys: dict[str, Any], tmp_path: Path) -> None:
    settings = chosen(keys)
    model, x = moved(settings), inputs()
    file = exported(model, settings, tmp_path)
    fused = net()
    presets.fuse(fused, [fused], read_updates(file, names_of(fused)), 1.0)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    again = begun(chosen(keys, **({"conv_alpha": 3.0} if "conv_dim" in keys else {"alpha": 3.0})))
    read = read_factors(file, adapters.find(settings.type), names_of(again), attach.scales(again))
    attach.load(again, [again], read, "a test")
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("form", [None, "int8"])
def test_at_first_and_switched_off_there_is_no_effect(keys: dict[str, Any], form: str | None) -> None:
    x, settings = inputs(), chosen(keys)
    plain = frozen(net(form))(x)
    assert torch.equal(begun(settings, net(form))(x), plain)
    changed = moved(settings, net(form))
    with attach.switched_off(changed):
        assert torch.equal(changed(x), plain)
    assert (changed(x) - plain).abs().mean() > 1e-3


def test_kernels_may_be_rows_in_files(tmp_path: Path) -> None:
    """And Linears convolutions of one cell."""
    settings = chosen(FORMS["lokr whole"])
    model = moved(settings)
    file, shapes = exported(model, settings, tmp_path), {name: p.shape for name, p in factors_of(model).items()}
    tensors = {k: t.flatten(1) if t.ndim == 4 else t for k, t in load_file(file).items()}
    tensors["lycoris_blocks_0_to_q.lokr_w2"] = tensors["lycoris_blocks_0_to_q.lokr_w2"][:, :, None, None]
    save_file(tensors, tmp_path / "other.safetensors")
    read = read_factors(
        tmp_path / "other.safetensors",
        adapters.find("lokr"),
        names_of(begun(settings)),
        {f"blocks.0.{name}": 1.0 for name in ("conv", "cell", "to_q")},
    )
    assert {name: tensor.shape for name, tensor in read.items()} == shapes


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 54), "hada_w2_a": (8, 2)}, "has no hada_w2_b; is the file whole"),
        (
            {"hada_w1_a": (8, 2), "hada_w1_b": (2, 54), "hada_w2_a": (8, 3), "hada_w2_b": (2, 54)},
            "do not fit each other",
        ),
        (
            {"hada_w1_a": (7, 2), "hada_w1_b": (2, 54), "hada_w2_a": (7, 2), "hada_w2_b": (2, 54)},
            "or a weight of .8, 6",
        ),
        ({"lokr_w1": (2, 2)}, "has nothing of its factor lokr_w2"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (2, 27)}, "of the LoKr of .* do not fit each other"),
    ],
)
def test_damaged_files_are_told(tensors: dict[str, tuple[int, ...]], told: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({f"lycoris_blocks_0_conv.{part}": torch.ones(shape) for part, shape in tensors.items()}, file)
    with pytest.raises(UserError, match=told):
        read_updates(file, names_of(net()))


def test_what_is_kept_for_the_backward_pass_is_small() -> None:
    """No weight that is made of factors, each as large as the one that it changes."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(64, 64))])})
    settings = chosen({"type": "loha", "rank": 2}, convolutions=False)
    attach.attach(model, ["blocks"], settings)
    attach.initialise(model, [model], settings, 0)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model["blocks"][0](torch.randn(3, 64))
    # The base's weight, which is there anyway, is kept for its gradient of x alone.
    assert kept and all(size <= 3 * 64 for size in kept)


def test_rows_and_modules_are_left_out() -> None:
    """What makes up for them keeps the average."""
    model = moved(chosen(FORMS["loha"], rank_dropout=0.5, convolutions=False))
    layer, x = model.blocks[0]["to_q"], torch.ones(1, 8)
    whole = layer.eval()(x) - layer.base_layer(x)
    layer.train()
    torch.manual_seed(0)
    drawn = torch.cat([layer(x) - layer.base_layer(x) for _ in range(600)])
    assert 0.4 < (drawn.abs() < 1e-7).float().mean() < 0.6
    torch.testing.assert_close(drawn.mean(dim=0), whole[0], rtol=0.25, atol=0.02)
    model = moved(chosen(FORMS["lokr"], module_dropout=0.5))
    x = inputs()
    torch.manual_seed(0)
    assert len({tuple(model(x).flatten().tolist()) for _ in range(100)}) == 2**3


def test_the_norm_of_a_lokr_is_a_part_of_the_weights() -> None:
    settings = chosen({"type": "lokr", "factor": 2, "full_matrix": True, "init_lokr_norm": 1e-3})
    model = begun(settings)
    for module, (_, layer) in attach.adapted(model).items():
        weight = net().get_submodule(module).weight
        assert torch.equal(layer.lokr_w1, torch.ones(2, 2)), module
        torch.testing.assert_close(layer.lokr_w2.std(), 1e-3 * weight.std())
        torch.testing.assert_close(layer.lokr_w2.mean(), 1e-3 * weight.mean())
    with pytest.raises(UserError, match="needs factors that are whole, .* set `full_matrix = true`"):
        begun(chosen({"type": "lokr", "factor": 2, "rank": 1, "init_lokr_norm": 1e-3}))


def test_cores_are_for_convolutions() -> None:
    for kind in ("loha", "lokr"):
        settings = chosen({"type": kind, "rank": 2, "tucker": True}, convolutions=False)
        ((key, told),) = settings.problems(ModelSettings.model_construct())
        assert key == "tucker" and "set `convolutions = true`" in told
    assert math.isclose(chosen(FORMS["loha with cores"]).size_for(net().blocks[0]["conv"])[0], 3)
