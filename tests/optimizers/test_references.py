"""Ten steps of each optimizer on a fixed problem: those of its library, or of its paper in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

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
from optimizers.subspaces import PROJECTIONS

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
    "adamw": (torch.optim.AdamW, ADAM, {"fused": True}),
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


def projected(kind: str, gradient: torch.Tensor, rank: int, draw: torch.Generator) -> torch.Tensor:
    """As the settings say, in float64."""
    if kind == "svd":
        return torch.linalg.svd(gradient).U[:, :rank].T
    if kind == "topk":
        return torch.eye(len(gradient), dtype=torch.float64)[gradient.norm(dim=1).argsort(descending=True)[:rank]]
    return PROJECTIONS[kind](gradient, rank, draw)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_momentum_in_a_subspace_is_the_papers_in_float64(kind: str, tall: bool) -> None:
    """A step by the momentum of the part inside, and by the gradient of the part outside, over norms of rows."""
    shape, rank = ((8, 5) if tall else (5, 8)), 2
    weight, mean, square, projection = torch.ones(5, 8, dtype=torch.float64), 0.0, 0.0, None
    for step, gradient in enumerate(gradients_of(shape), 1):
        rows = gradient.T if tall else gradient
        if step % 4 == 1:
            draw = torch.Generator().manual_seed(crc32(b"weight") * 2**16 + step)
            chosen = projected(kind, rows, rank, draw)
            mean = chosen @ projection.T @ mean if projection is not None else mean
            projection = chosen
        inside = projection @ rows
        mean = 0.5 * mean + 0.5 * inside
        square = 0.9 * square + 0.1 * (rows**2).sum(1, keepdim=True)
        update = projection.T @ mean / (1 - 0.5**step) + rows - projection.T @ inside
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * update / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
    keys = {"momentum_type": "subspace", "second_moment_type": "subset_norm", "proj_type": kind, "rank": rank}
    keys |= {"betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.1, "update_proj_gap": 4}
    found = stepped("genericoptim", shape, 0.02, **keys)
    torch.testing.assert_close(found.T if tall else found, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize(("rows", "rank"), [(5, 2), (8, 8), (1, 1), (33, 7)])
def test_subspaces_have_orthonormal_rows_and_follow_from_chance_alone(kind: str, rows: int, rank: int) -> None:
    matrix = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))
    one, same, other = (PROJECTIONS[kind](matrix, rank, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    torch.testing.assert_close(one @ one.T, torch.eye(rank), rtol=0, atol=1e-5)
    assert torch.equal(one, same)
    if kind in ("uniform", "srht") and rows == 33:
        assert not torch.equal(one, other)


def test_hadamards_rows_have_elements_of_one_size_where_none_are_left_out() -> None:
    found = PROJECTIONS["srht"](torch.randn(16, 20), 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.abs(), torch.full((5, 16), 0.25))


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5,), (2, 3, 2, 2)])
@pytest.mark.parametrize("size", [None, 4])
def test_subset_norms_are_the_papers_in_float64(shape: tuple[int, ...], size: int | None) -> None:
    weight, mean, square = torch.ones(shape, dtype=torch.float64), 0.0, 0.0
    count = weight.numel()
    decay = 0.1 if len(shape) > 1 else 0.0
    if size:
        subset = torch.arange(count) // size
    elif len(shape) == 1:
        subset = torch.zeros(count, dtype=torch.long)
    else:
        rows, columns = shape[0], count // shape[0]
        places = torch.arange(count).view(rows, columns)
        subset = (places // columns if rows <= columns else places % columns).flatten()
    for step, gradient in enumerate(gradients_of(shape), 1):
        mean = 0.5 * mean + 0.5 * gradient
        norms = torch.stack([(gradient.flatten()[subset == one] ** 2).sum() for one in range(subset.max() + 1)])
        square = 0.9 * square + 0.1 * norms
        divided = ((square / (1 - 0.9**step)).sqrt() + 1e-6)[subset].view(shape)
        weight = weight * (1 - 0.02 * decay) - 0.02 * mean / (1 - 0.5**step) / divided
    keys = {"second_moment_type": "subset_norm", "subset_size": size, "betas": (0.5, 0.9), "eps": 1e-6}
    found = stepped("genericoptim", shape, 0.02, weight_decay=0.1, **keys)
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)


def test_genericoptim_can_be_adamw_stableadamw_and_muon() -> None:
    for name, keys in (("adamw", {}), ("adamw8bitkahan", {"stabilize": True})):
        expected = stepped(name, (5, 7), 0.02, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.1)
        found = stepped("genericoptim", (5, 7), 0.02, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.1, **keys)
        assert (found - 1).abs().max() > 0.02
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Without a momentum, Muon's is one of Nesterov's that forgets all.
    found = stepped("genericoptim", (5, 7), 0.02, momentum_type="none", second_moment_type="muon")
    expected = stepped("muon", (5, 7), 0.02, momentum=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - 1).abs().max() > 0.02


@pytest.mark.parametrize("name", ["adamw", "adamw8bitkahan", "genericoptim"])
def test_a_half_life_is_counted_in_samples(name: str) -> None:
    """After so many the square of a gradient has half of its part, by steps of any size."""
    settings = optimizers.find(name).settings(type=name, lr=0.1, beta2_half_life=100)
    assert optimizers.counts_samples(settings)
    for samples in (1.0, 10.0, 12.5):
        optimizer = optimizers.build([{"params": [nn.Parameter(torch.ones(3))]}], settings, samples)
        first, second = optimizer.param_groups[0]["betas"]
        assert first == 0.9 and second ** (100 / samples) == pytest.approx(0.5)
    assert not optimizers.counts_samples(optimizers.find(name).settings(type=name, lr=0.1))
