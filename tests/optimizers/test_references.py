"""Ten steps of each optimizer on a fixed problem: those of its library, or of its paper in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
import transformers
from optimi import AdamW as OptimiAdamW
from optimi import Lion as OptimiLion
from optimi import StableAdamW
from torch import nn

import optimizers
from optimizers.averaging import has_averages, weights_to_use
from optimizers.parameter_groups import groups_of

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
Named = dict[str, nn.Parameter]
Make = Callable[..., torch.optim.Optimizer]


def problem(dtype: torch.dtype = torch.float32) -> Named:
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (6, 4), "wide": (3, 9), "kernel": (4, 2, 3, 3), "bias": (5,)}
    return {name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in shapes.items()}


def walk(named: Named, optimizer: torch.optim.Optimizer, steps: int = 10) -> None:
    """To a point of its own for each weight, with noise."""
    if has_averages(optimizer):
        optimizer.train()
    for step in range(steps):
        draw = torch.Generator().manual_seed(100 + step)
        for place, weight in enumerate(named.values()):
            noise = torch.randn(weight.shape, generator=draw, dtype=torch.float32).to(weight.dtype)
            weight.grad = (weight.detach() - 0.3 * place) * (1 + place) + 0.1 * noise
        optimizer.step()


def ours(name: str, dtype: torch.dtype = torch.float32, lr: float = 0.05, **keys: Any) -> Named:
    settings = optimizers.find(name).settings(type=name, lr=lr, weight_decay=0.1, **keys)
    named = problem(dtype)
    optimizer = optimizers.build(groups_of(named.items(), lr=lr, weight_decay=0.1), settings)
    walk(named, optimizer)
    with weights_to_use(optimizer):
        return {key: weight.detach().clone() for key, weight in named.items()}


def theirs(make: Make, dtype: torch.dtype = torch.float32, lr: float = 0.05, **keys: Any) -> Named:
    named = problem(dtype)
    groups = [
        {"params": [weight for weight in named.values() if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in named.values() if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=lr, **keys)
    walk(named, optimizer)
    if has_averages(optimizer):
        optimizer.eval()
    return {key: weight.detach() for key, weight in named.items()}


ADAM = {"betas": (0.8, 0.9), "eps": 1e-6}
SAME: dict[str, tuple[Make, dict[str, Any], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, ADAM, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.8}, {}),
    "radam": (torch.optim.RAdam, ADAM, {"decoupled_weight_decay": True}),
    "nadam": (torch.optim.NAdam, ADAM | {"momentum_decay": 0.1}, {"decoupled_weight_decay": True}),
    "adamw_optimi": (OptimiAdamW, ADAM, {}),
    "stableadamw": (StableAdamW, ADAM, {}),
    "lion": (OptimiLion, {"betas": (0.8, 0.9)}, {}),
    "adafactor": (
        transformers.optimization.Adafactor,
        {"clip_threshold": 0.5, "decay_rate": -0.7, "beta1": 0.5, "scale_parameter": True, "eps": (1e-20, 1e-2)},
        {"relative_step": False},
    ),
    "came": (pytorch_optimizer.CAME, {"betas": (0.8, 0.9, 0.95), "clip_threshold": 0.7, "eps1": 1e-20}, {}),
    "adamw_schedule_free": (schedulefree.AdamWScheduleFree, ADAM | {"r": 1.0, "weight_lr_power": 1.0}, {}),
    "radam_schedule_free": (schedulefree.RAdamScheduleFree, ADAM | {"silent_sgd_phase": False}, {}),
    "sgd_schedule_free": (schedulefree.SGDScheduleFree, {"momentum": 0.7}, {}),
}
"""Type -> its library's class, keys of both, and what the class is told beside them."""


@pytest.mark.parametrize("name", SAME)
def test_steps_are_the_librarys(name: str) -> None:
    make, keys, further = SAME[name]
    expected, found = theirs(make, **keys, **further), ours(name, **keys)
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
        assert not torch.allclose(weight, problem()[key], atol=1e-3)


@pytest.mark.parametrize("name", ["adamw_optimi", "stableadamw", "lion"])
def test_sums_in_bfloat16_are_the_librarys(name: str) -> None:
    make, keys, _ = SAME[name]
    bfloat16 = torch.bfloat16
    expected, found = theirs(make, bfloat16, lr=1e-3, **keys), ours(name, bfloat16, lr=1e-3, **keys)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


DISTANCE = {"d0": 1e-3, "growth_rate": 1.5}
FOUND: dict[str, tuple[Make, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "prodigy": (
        pytorch_optimizer.Prodigy,
        {"betas": (0.8, 0.9), "beta3": 0.95, "d_coef": 0.7, "safeguard_warmup": True, "eps": 1e-6},
        {"use_bias_correction": True},
        {"bias_correction": True},
    ),
    "dadaptadam": (
        pytorch_optimizer.DAdaptAdam,
        {"betas": (0.8, 0.9), "eps": 1e-6},
        {"decouple": True, "use_bias_correction": True},
        {"weight_decouple": True, "bias_correction": True},
    ),
    "dadaptlion": (pytorch_optimizer.DAdaptLion, {"betas": (0.8, 0.9)}, {}, {"weight_decouple": True}),
    "dadaptsgd": (pytorch_optimizer.DAdaptSGD, {"momentum": 0.6}, {}, {}),
    "dadaptadagrad": (pytorch_optimizer.DAdaptAdaGrad, {"momentum": 0.3, "eps": 1e-3}, {}, {}),
}
"""Type -> a library's class, keys of both, further ones of ours and of theirs."""


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("name", FOUND)
def test_learning_rates_are_found_as_by_the_library(name: str, limited: bool) -> None:
    make, keys, own, others = FOUND[name]
    distance = DISTANCE if limited and name != "dadaptlion" else {"d0": 1e-2}
    expected = theirs(make, lr=1.0, **distance, **keys, **others)
    found = ours(name, lr=1.0, **distance, **keys, **own)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=2e-5, atol=2e-6)
        assert not torch.allclose(weight, problem()[key], atol=1e-4), key


def test_muon_is_torchs_for_matrices_and_adamw_for_vectors() -> None:
    def both(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        matrices, vectors = groups
        kept = [weight for weight in matrices["params"] if weight.ndim == 2]
        muon = torch.optim.Muon([{**matrices, "params": kept}], lr=lr, momentum=0.8, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW([vectors], lr=lr, betas=(0.8, 0.9), eps=1e-6)

        class Both:
            def step(self) -> None:
                muon.step()
                adamw.step()

        return Both()

    expected, found = theirs(both), ours("muon", momentum=0.8, betas=(0.8, 0.9), eps=1e-6)
    assert all(torch.equal(found[key], expected[key]) for key in ("matrix", "wide", "bias"))


def test_muon_takes_kernels_for_matrices_with_a_row_for_each_output() -> None:
    def flat(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        kernel = groups[0]["params"][2]
        matrix = nn.Parameter(kernel.detach().reshape(4, -1))
        muon = torch.optim.Muon([matrix], lr=lr, momentum=0.8, weight_decay=0.1, adjust_lr_fn="original")

        class Flat:
            def step(self) -> None:
                matrix.grad = kernel.grad.reshape(4, -1)
                muon.step()
                kernel.data.copy_(matrix.view(kernel.shape))

        return Flat()

    expected, found = theirs(flat), ours("muon", momentum=0.8, adjust_lr_fn="original")
    assert torch.equal(found["kernel"], expected["kernel"])


def test_nesterov_in_eight_bits_is_torchs_but_for_rounding() -> None:
    """Few elements have their momentum in 32 bits."""
    expected = theirs(torch.optim.SGD, momentum=0.8, nesterov=True)
    found = ours("sgd_nesterov8bit", momentum=0.8)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight)
    start = torch.randn(70, 100, generator=torch.Generator().manual_seed(0))
    ends = []
    for make in (
        lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.8, nesterov=True),
        lambda weights: optimizers.sgd.SGDNesterov8bit(weights, lr=0.05, weight_decay=0.0, momentum=0.8),
    ):
        weight = nn.Parameter(start.clone())
        walk({"weight": weight}, make([weight]))
        ends.append(weight.detach())
    moved = (ends[0] - start).abs().mean()
    assert 0 < (ends[1] - ends[0]).abs().mean() < 0.01 * moved


def test_relative_steps_are_adafactors_times_lr() -> None:
    make = transformers.optimization.Adafactor
    keys = {"relative_step": True, "scale_parameter": True, "warmup_init": False}
    expected = theirs(lambda groups, lr: make(groups, lr=None, **keys))
    found = ours("adafactor", lr=1.0, **keys)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    half = ours("adafactor", lr=0.5, **keys)
    assert not torch.equal(half["bias"], found["bias"])


def gradients_of(shape: tuple[int, ...], steps: int = 10) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(steps)]


def stepped(name: str, shape: tuple[int, ...], lr: float, **keys: Any) -> torch.Tensor:
    """A weight of ones after ten steps."""
    settings = optimizers.find(name).settings(type=name, lr=lr, **keys)
    weight = nn.Parameter(torch.ones(shape))
    optimizer = optimizers.build(groups_of([("weight", weight)], lr=lr, weight_decay=settings.weight_decay), settings)
    for gradient in gradients_of(shape):
        weight.grad = gradient.float()
        optimizer.step()
    return weight.detach().double()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (9,)])
def test_automagic_is_its_formula_in_float64(shape: tuple[int, ...]) -> None:
    keys = {"min_lr": 0.005, "max_lr": 0.03, "lr_bump": 0.004, "beta2": 0.9, "clip_threshold": 0.8, "weight_decay": 0.1}
    weight, rates, sign = torch.ones(shape, dtype=torch.float64), torch.full(shape, 0.01, dtype=torch.float64), None
    rows = columns = square = 0.0
    decay = 0.1 if len(shape) > 1 else 0.0
    for gradient in gradients_of(shape):
        power = gradient**2 + 1e-30
        if len(shape) > 1:
            rows = 0.9 * rows + 0.1 * power.mean(-1)
            columns = 0.9 * columns + 0.1 * power.mean(-2)
            square = rows[..., None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
        else:
            square = 0.9 * square + 0.1 * power
        update = gradient / square.sqrt()
        update = update / max(1.0, float((update**2).mean().sqrt()) / 0.8)
        if sign is not None:
            agrees = (update > 0) == sign
            rates = torch.where(agrees, rates + 0.004, rates - 0.004).clamp(0.005, 0.03)
        sign = update > 0
        weight = weight - rates * decay * weight - rates * update
    torch.testing.assert_close(stepped("automagic", shape, 0.01, **keys), weight, rtol=1e-5, atol=1e-6)
    assert len(rates.unique()) > 3


@pytest.mark.parametrize("stabilize", [True, False])
def test_adamw8bitkahan_is_adamw_where_few_elements_have_32_bits(stabilize: bool) -> None:
    shape = (5, 7)
    keys = {"betas": (0.5, 0.6), "eps": 1e-6, "weight_decay": 0.1, "stabilize": stabilize}
    weight, mean, square = torch.ones(shape, dtype=torch.float64), 0.0, 0.0
    shorter = 0
    for step, gradient in enumerate(gradients_of(shape), 1):
        mean, square = 0.5 * mean + 0.5 * gradient, 0.6 * square + 0.4 * gradient**2
        unbiased = square / (1 - 0.6**step)
        beyond = float((gradient**2 / unbiased.clamp(min=1e-12)).mean().sqrt()) if stabilize else 1.0
        rate = 0.01 / max(1.0, beyond)
        shorter += rate < 0.01
        weight = weight - rate * (mean / (1 - 0.5**step) / (unbiased.sqrt() + 1e-6) + 0.1 * weight)
    torch.testing.assert_close(stepped("adamw8bitkahan", shape, 0.01, **keys), weight, rtol=1e-5, atol=1e-6)
    assert (shorter > 0) == stabilize


def test_adamw8bitkahan_stays_near_adamw_and_loses_no_small_step_in_bfloat16() -> None:
    """Of 50 steps of 1e-4, which are less than what bfloat16 tells apart."""
    ends = {}
    for name, dtype in (("adamw", torch.float32), ("adamw8bitkahan", torch.bfloat16)):
        weight = nn.Parameter(torch.ones(70, 60, dtype=dtype))
        settings = optimizers.find(name).settings(type=name, lr=1e-4, weight_decay=0.0)
        optimizer = optimizers.build([{"params": [weight]}], settings)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[name] = 1 - weight.detach().float().mean()
    # The weights are 0.995, and bfloat16 has 0.9961 and 0.9922.
    assert ends["adamw"] == pytest.approx(0.005, rel=3e-3)
    assert 0.0035 < ends["adamw8bitkahan"] < 0.0085
    compensation = optimizer.state[weight]["compensation"].float()
    assert ((1 - weight.detach().float() - compensation) - 0.005).abs().max() < 2e-4
