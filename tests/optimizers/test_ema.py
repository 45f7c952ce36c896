"""The moving average against its closed form and diffusers', across checkpoints and changes of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from optimizers.ema import EMA, EMASettings
from utils.diffusion.seeds import normal

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


def run(ema: EMA, model: nn.Module, steps: range) -> None:
    for step in steps:
        move(model, step)
        ema.update(step)


def closed_form(settings: EMASettings) -> dict[str, torch.Tensor]:
    """theta_0 prod d_i + sum theta_i (1 - d_i) prod of the later d, over the updates i, in float64."""
    model = layers()
    updates = list(range(settings.update_interval, STEPS + 1, settings.update_interval))
    ratio = {
        "none": lambda n: 1.0,
        "ratio": lambda n: (1 + n) / (10 + n),
        "power": lambda n: 1 - (1 + n) ** -settings.power,
    }[settings.warmup]
    decays = [min(settings.decay, ratio(n)) for n in range(len(updates))]
    weights = {0: torch.tensor(decays, dtype=torch.float64).prod().item()}
    for index, step in enumerate(updates):
        weights[step] = (1 - decays[index]) * torch.tensor(decays[index + 1 :], dtype=torch.float64).prod().item()
    assert sum(weights.values()) == pytest.approx(1.0)
    averages = {name: weights[0] * value.double() for name, value in model.state_dict().items()}
    for step in range(1, STEPS + 1):
        move(model, step)
        for name, value in model.state_dict().items():
            averages[name] += weights.get(step, 0.0) * value.double()
    return averages


SETTINGS = [
    EMASettings(0.9, "none"),
    EMASettings(0.9, "none", update_interval=5),
    EMASettings(0.9, "ratio"),
    EMASettings(0.3, "ratio", update_interval=2),
    EMASettings(0.9999, "power", 2 / 3),
    EMASettings(0.7, "power", 1.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_after_n_steps_it_is_the_closed_form(settings: EMASettings) -> None:
    model = layers()
    ema = EMA(model.named_parameters(), settings)
    run(ema, model, range(1, STEPS + 1))
    for name, expected in closed_form(settings).items():
        assert ema.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(ema.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_across_a_checkpoint_and_a_change_of_stages(settings: EMASettings, tmp_path: Path) -> None:
    """Five steps in one process, the rest in two, each with a layer."""
    model = layers()
    whole = EMA(model.named_parameters(), settings)
    run(whole, model, range(1, 6))
    save_file(whole.state_dict(), tmp_path / "ema.safetensors")

    stages = [
        EMA([entry for entry in model.named_parameters() if entry[0].startswith(layer)], settings) for layer in "01"
    ]
    for stage in stages:
        stage.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    for step in range(6, STEPS + 1):
        move(model, step)
        for stage in stages:
            stage.update(step)
    averages = {**stages[0].state_dict(), **stages[1].state_dict()}
    for name, expected in closed_form(settings).items():
        torch.testing.assert_close(averages[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_warm_up_by_power_is_that_of_diffusers() -> None:
    settings, model = EMASettings(0.9999, "power", 2 / 3), layers().float()
    ema = EMA(model.named_parameters(), settings)
    reference = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=2 / 3)
    for step in range(1, STEPS + 1):
        move(model, step)
        ema.update(step)
        reference.step(model.parameters())
    for ours, theirs in zip(ema.state_dict().values(), reference.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_small_step_is_not_lost_in_16_bits() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMA([("weight", parameter)], EMASettings(0.999, "none"))
    parameter.data += 0.0625
    ema.update(1)
    assert ema.state_dict()["weight"].item() == pytest.approx(1 + 0.0625e-3, rel=1e-7)


def test_masters_are_averaged_where_there_are_some() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = {parameter: torch.tensor([1.0])}
    ema = EMA([("weight", parameter)], EMASettings(0.5, "none"), values=lambda one: masters[one])
    masters[parameter] = torch.tensor([1.001])
    ema.update(1)
    assert ema.state_dict()["weight"].item() == pytest.approx(1.0005, rel=1e-6)


def test_swapped_parameters_are_the_averages_and_come_back() -> None:
    model = layers()
    ema = EMA(model.named_parameters(), EMASettings(0.9, "none"))
    run(ema, model, range(1, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    averages = {name: value.clone() for name, value in ema.state_dict().items()}
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
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in averages.items())


@pytest.mark.parametrize(
    ("saved", "reason"),
    [({"a": torch.zeros(2)}, "no moving average of b"), ({"a": torch.zeros(3), "b": torch.zeros(2)}, "shape")],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved: dict, reason: str) -> None:
    ema = EMA([(name, nn.Parameter(torch.ones(2))) for name in "ab"], EMASettings())
    with pytest.raises(ValueError, match=reason):
        ema.load_state_dict(saved)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"decay": 1.0}, "ema_decay"),
        ({"decay": -0.1}, "ema_decay"),
        ({"warmup": "linear"}, "none, ratio, power"),
        ({"power": 0.0}, "ema_power"),
        ({"update_interval": 0}, "ema_update_interval"),
    ],
)
def test_wrong_values_are_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EMASettings(**wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_averages_of_gpu_parameters_may_stay_on_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = layers().to("cuda")
        ema = EMA(model.named_parameters(), EMASettings(0.9, "ratio"), device)
        for step in range(1, 4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 + 0.1 * step)
            ema.update(step)
        with ema.swapped():
            results.append([parameter.detach().float().cpu() for parameter in model.parameters()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_cpu, on_gpu)
