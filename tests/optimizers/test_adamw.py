"""Our AdamW against torch's, and in 16 bits against 32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizers import adamw
from optimizers.adamw import AdamW, in_parts
from tests.pretended_device import DEVICE, PretendedDevice

KEYS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in ((5, 3), (7,), ())]


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        for weight in weights[: 2 if step % 2 else 3]:
            weight.grad = torch.randn(weight.shape, generator=draw).bfloat16().to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_in_float32_it_is_torchs_to_the_bit() -> None:
    ours, torchs = parameters(torch.float32), parameters(torch.float32)
    train(AdamW(ours, **KEYS), ours, 6)
    train(torch.optim.AdamW(torchs, **KEYS), torchs, 6)
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))


def test_a_step_is_one_kernel_where_elements_lie_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes where torch's goes, also with a weight whose elements lie in another order than its gradient's."""
    taken, kernel = [], adamw.adamw
    monkeypatch.setattr(adamw, "adamw", lambda *given, **keys: (taken.append(keys["fused"]), kernel(*given, **keys)))
    ours, torchs = parameters(torch.float32), parameters(torch.float32)
    train(AdamW(ours, **KEYS), ours, 6)
    train(torch.optim.AdamW(torchs, **KEYS), torchs, 6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, torchs, strict=True))
    turned = [nn.Parameter(torch.ones(3, 5).T), nn.Parameter(torch.ones(5, 3))]
    for weight in turned:
        train(AdamW([weight], **KEYS), [weight], 3)
    assert torch.allclose(*turned, rtol=1e-5, atol=1e-6)
    assert taken == [True] * 6 + [False] * 3 + [True] * 3


@pytest.mark.parametrize("elements", [adamw.PART_ELEMENTS, 16, 1])
def test_in_bfloat16_the_master_goes_where_float32_goes(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parameters are updated together."""
    monkeypatch.setattr(adamw, "PART_ELEMENTS", elements)
    short = parameters(torch.bfloat16)
    whole = [nn.Parameter(weight.detach().float()) for weight in short]
    optimizer = AdamW(short, **{**KEYS, "lr": 1e-4})
    train(optimizer, short, 8)
    train(torch.optim.AdamW(whole, **{**KEYS, "lr": 1e-4}), whole, 8)
    for a, b in zip(short, whole, strict=True):
        assert torch.equal(optimizer.state[a]["master"], b)
        assert torch.equal(a, b.bfloat16())


def test_parts_hold_every_parameter_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "PART_ELEMENTS", 10)
    parameters = [nn.Parameter(torch.zeros(count)) for count in (4, 6, 1, 30, 9, 2, 0)]
    parts = list(in_parts(parameters))
    assert [[len(parameter) for parameter in part] for part in parts] == [[4, 6], [1], [30], [9], [2, 0]]
    assert list(in_parts([])) == []


def test_small_steps_are_not_lost() -> None:
    """Which they are for torch's, on the same weights."""
    moved = {}
    for name, kind in (("ours", AdamW), ("torchs", torch.optim.AdamW)):
        weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = kind([weight], **{**KEYS, "lr": 1e-5, "weight_decay": 0.0})
        for _ in range(500):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[name] = (1 - weight.float()).mean().item()
    assert moved["torchs"] == 0
    assert 0.003 < moved["ours"] < 0.007


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_with_found_inf_changes_nothing(dtype: torch.dtype, fused: bool) -> None:
    """As torch's GradScaler asks of its optimizers. The fused kernel takes no gradient that lies in another order."""
    torch.manual_seed(0)
    parameters = {skips: torch.nn.Parameter(torch.ones(4, 6).t().to(dtype)) for skips in (True, False)}
    optimizers = {
        skips: AdamW([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        for skips, parameter in parameters.items()
    }
    for step in range(3):
        gradient = torch.randn(6, 4).to(dtype)
        for skips, parameter in parameters.items():
            if step == 1 and not skips:
                continue
            laid = torch.empty_like(parameter) if fused else torch.empty(6, 4, dtype=dtype)
            parameter.grad = laid.copy_(gradient if step != 1 else torch.nan)
            optimizers[skips].found_inf = torch.tensor(float(step == 1))
            optimizers[skips].step()
    assert torch.equal(parameters[True], parameters[False]) and not torch.equal(parameters[True], torch.ones(6, 4))
    states = [optimizers[skips].state[parameter] for skips, parameter in parameters.items()]
    assert states[0].keys() == states[1].keys() and states[0]["step"] == 2
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_is_stepped_on_the_host_waits_for_found_inf() -> None:
    """It is a number of the device; a copy for which nobody waits would be read before it is there."""
    weights, device = parameters(torch.float32)[:2], PretendedDevice()
    optimizer = AdamW(weights, **KEYS)
    with device:
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        device.waits.clear()
        train(optimizer, weights, 1)
    assert [wait.partition(" at ")[0] for wait in device.waits] == ["a copy between devices"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_in_time_which_steps_the_host_leaves_out() -> None:
    (weight,), busy = parameters(torch.float32)[:1], torch.ones(4096, 4096, device="cuda")
    optimizer = AdamW([weight], **KEYS)
    for step in range(20):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.found_inf = (busy @ busy).sum().isfinite().float() * (step % 2)
        optimizer.step()
        assert torch.equal(weight, before) == bool(step % 2)
