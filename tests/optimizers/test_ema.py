"""The moving average against its closed form and diffusers'; in runs: tests/test_train_ema.py."""

from __future__ import annotations

from math import prod

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from optimizers.adamw import AdamW
from optimizers.ema import EMA
from optimizers.rounding import MASTER
from utils.diffusion.seeds import normal
from utils.settings.run_tables import EMASettings

STEPS = 12


def layers() -> nn.Sequential:
    """With a parameter in 16 bits."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(tuple(parameter.shape), 0, "start", index))
    model[1].to(torch.bfloat16)
    return model


def move(model: nn.Module, step: int) -> None:
    """What an optimizer would do, by name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * normal(tuple(parameter.shape), 0, "step", step, name).to(parameter.dtype))


def averaged(model: nn.Module, settings: EMASettings) -> EMA:
    """By an optimizer that keeps no masters."""
    return EMA(model.named_parameters(), settings, torch.optim.SGD(model.parameters(), lr=1.0))


def run(ema: EMA, model: nn.Module, steps: range) -> None:
    for step in steps:
        move(model, step)
        ema.update(step)


def coefficients(settings: EMASettings, steps: int) -> dict[int, float]:
    """Step -> what the average after `steps` steps has of the weights after that one: prod d_i for those at the start,
    (1 - d_i) times the product of the later d for those of an update i."""
    updates = list(range(settings.update_interval, steps + 1, settings.update_interval))
    ratio = {
        "none": lambda n: 1.0,
        "ratio": lambda n: (1 + n) / (10 + n),
        "power": lambda n: 1 - (1 + n) ** -settings.power,
    }[settings.warmup]
    decays = [min(settings.decay, ratio(n)) for n in range(len(updates))]
    found = {0: prod(decays)}
    for index, step in enumerate(updates):
        found[step] = (1 - decays[index]) * prod(decays[index + 1 :])
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def closed_form(settings: EMASettings) -> dict[str, torch.Tensor]:
    """In float64."""
    model, parts = layers(), coefficients(settings, STEPS)
    averages = {name: parts[0] * value.double() for name, value in model.state_dict().items()}
    for step in range(1, STEPS + 1):
        move(model, step)
        for name, value in model.state_dict().items():
            averages[name] += parts.get(step, 0.0) * value.double()
    return averages


SETTINGS = [
    EMASettings(decay=0.9, warmup="none"),
    EMASettings(decay=0.9, warmup="none", update_interval=5),
    EMASettings(decay=0.9, warmup="ratio"),
    EMASettings(decay=0.3, warmup="ratio", update_interval=2),
    EMASettings(decay=0.9999, warmup="power", power=2 / 3),
    EMASettings(decay=0.7, warmup="power", power=1.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_after_n_steps_it_is_the_closed_form(settings: EMASettings) -> None:
    model = layers()
    ema = averaged(model, settings)
    run(ema, model, range(1, STEPS + 1))
    for name, expected in closed_form(settings).items():
        assert ema.averages[name].dtype == torch.float32
        torch.testing.assert_close(ema.averages[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_warm_up_by_power_is_that_of_diffusers() -> None:
    model = layers().float()
    ema = averaged(model, EMASettings())
    reference = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=2 / 3)
    for step in range(1, STEPS + 1):
        move(model, step)
        ema.update(step)
        reference.step(model.parameters())
    for ours, theirs in zip(ema.averages.values(), reference.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_warm_up_begins_where_averaging_does() -> None:
    models = [layers(), layers()]
    early, late = (averaged(model, EMASettings(warmup="ratio", update_interval=2)) for model in models)
    late.since = 100
    for step in range(1, STEPS + 1):
        for model in models:
            move(model, step)
        early.update(step)
        late.update(100 + step)
    assert all(torch.equal(late.averages[name], average) for name, average in early.averages.items())


def test_a_small_step_is_not_lost_in_16_bits() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = averaged(model, EMASettings(decay=0.999, warmup="none"))
    model.weight.data += 0.0625
    ema.update(1)
    assert ema.averages["weight"].item() == pytest.approx(1 + 0.0625e-3, rel=1e-7)


def test_masters_are_averaged_where_there_are_some() -> None:
    """Steps that the 16-bit weight alone does not show."""
    model = nn.Linear(3, 4, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ema = EMA(model.named_parameters(), EMASettings(decay=0.5, warmup="none"), optimizer)
    expected = torch.ones(4, 3)
    for step in (1, 2):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        ema.update(step)
        expected = 0.5 * expected + 0.5 * optimizer.state[model.weight][MASTER]
    assert torch.equal(model.weight, torch.ones_like(model.weight))
    assert (expected < 1).all()
    torch.testing.assert_close(ema.averages["weight"], expected, rtol=0, atol=1e-7)


def test_swapped_parameters_are_the_averages_and_come_back() -> None:
    model = layers()
    ema = averaged(model, EMASettings(decay=0.9, warmup="none"))
    run(ema, model, range(1, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    averages = {name: value.clone() for name, value in ema.averages.items()}
    memory = [parameter.data_ptr() for parameter in model.parameters()]

    def check(expected: dict[str, torch.Tensor]) -> None:
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name].to(value.dtype))

    with ema.swapped():
        check(averages)
        assert not torch.equal(model[0].weight, before["0.weight"])
    check(before)
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        raise KeyboardInterrupt
    check(before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory
    assert all(torch.equal(ema.averages[name], value) for name, value in averages.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_averages_of_gpu_parameters_may_stay_on_the_cpu() -> None:
    results = []
    for device in ("cpu", "gpu"):
        model = layers().to("cuda")
        ema = averaged(model, EMASettings(decay=0.9, warmup="ratio", device=device))
        assert {average.device.type for average in ema.averages.values()} == {device.replace("gpu", "cuda")}
        for step in range(1, 4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 + 0.1 * step)
            ema.update(step)
        with ema.swapped():
            results.append([parameter.detach().float().cpu() for parameter in model.parameters()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_cpu, on_gpu)
