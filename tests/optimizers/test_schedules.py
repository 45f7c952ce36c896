"""Learning rates against values by hand, against torch's schedulers and against those of transformers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import optimization

from models.sdxl import SdxlOptions
from optimizers.schedules import Schedule, check, warn_of_warmup
from utils.adapters.lora import LoraSettings
from utils.errors import UserError
from utils.settings.lr_schedules import NAMES
from utils.settings.model_schema import ModelSettings
from utils.settings.rules import check_rules
from utils.settings.schema import Settings


def run_settings(**keys: object) -> Settings:
    own = {"model": ModelSettings(type="tiny"), "optimizer": {"type": "sgd", "lr": 1}}
    return Settings(output_dir="a", dataset="b", **{**own, **keys})


def rates(total_steps: int, steps: range, **keys: object) -> list[float]:
    schedule = Schedule(run_settings(**keys), total_steps)
    return [schedule.learning_rates(step, [1.0])[0] for step in steps]


def test_warm_up_rises_evenly_to_one() -> None:
    assert rates(10, range(6), warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(10, range(6), warmup_steps=0.3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0], "a fraction of all steps"


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ({"lr_scheduler": "constant"}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"lr_scheduler": "linear"}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"lr_scheduler": "linear", "lr_min_ratio": 0.2}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"lr_scheduler": "cosine"}, [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0]),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1.0, 0.5, 1.0, 0.5, 0.0]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [1.0, 0.5625, 0.25, 0.0625, 0.0]),
        ({"lr_scheduler": "step", "lr_step_size": 2, "lr_gamma": 0.5}, [1.0, 1.0, 0.5, 0.5, 0.25]),
        ({"lr_scheduler": "exponential", "lr_gamma": 0.5, "lr_min_ratio": 0.2}, [1.0, 0.5, 0.25, 0.2, 0.2]),
        ({"lr_scheduler": "rex"}, [1.0, 6 / 7, 2 / 3, 0.4, 0.0]),
        ({"lr_scheduler": "wsd", "lr_decay_steps": 2}, [1.0, 1.0, 1.0, 0.5, 0.0]),
        ({"lr_scheduler": "wsd", "lr_decay_steps": 0.5, "lr_min_ratio": 0.5}, [1.0, 1.0, 1.0, 0.75, 0.5]),
    ],
)
def test_courses_after_warm_up(keys: dict[str, object], values: list[float]) -> None:
    assert rates(6, range(2, 7), warmup_steps=2, **keys) == pytest.approx(values)
    if keys["lr_scheduler"] not in ("step", "exponential"):
        assert rates(6, range(100, 101), warmup_steps=2, **keys) == pytest.approx(values[-1:]), "kept after the last"


@pytest.mark.parametrize(
    ("keys", "reference"),
    [
        ({"lr_scheduler": "linear"}, partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=20)),
        ({"lr_scheduler": "cosine"}, partial(lr_scheduler.CosineAnnealingLR, T_max=20)),
        (
            {"lr_scheduler": "cosine", "lr_min_ratio": 0.1},
            partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.03),
        ),
        (
            {"lr_scheduler": "polynomial", "lr_power": 1.7},
            partial(lr_scheduler.PolynomialLR, total_iters=20, power=1.7),
        ),
        (
            {"lr_scheduler": "step", "lr_step_size": 3, "lr_gamma": 0.7},
            partial(lr_scheduler.StepLR, step_size=3, gamma=0.7),
        ),
        ({"lr_scheduler": "exponential", "lr_gamma": 0.9}, partial(lr_scheduler.ExponentialLR, gamma=0.9)),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
            partial(
                optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
                num_warmup_steps=0,
                num_training_steps=20,
                num_cycles=3,
            ),
        ),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 8, "lr_min_ratio": 0.1},
            partial(
                optimization.get_wsd_schedule,
                num_warmup_steps=0,
                num_decay_steps=8,
                num_training_steps=20,
                min_lr_ratio=0.1,
            ),
        ),
    ],
)
def test_courses_are_those_of_torch_and_transformers(keys: dict[str, object], reference: Callable[..., object]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, schedule = reference(optimizer), Schedule(run_settings(**keys), 20)
    for step in range(20):
        assert schedule.learning_rates(step, [0.3])[0] == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_schedule_by_its_path_is_that_schedule_after_warm_up_and_after_resuming() -> None:
    keys = {
        "lr_scheduler": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts",
        "lr_scheduler_args": {"T_0": 4, "eta_min": 0.01},
        "warmup_steps": 2,
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference, expected = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4, eta_min=0.01), [0.1, 0.2]
    for _ in range(8):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    whole = Schedule(run_settings(**keys), 10)
    assert [whole.learning_rates(step, [0.3])[0] for step in range(10)] == pytest.approx(expected)
    resumed = Schedule(run_settings(**keys), 10)
    assert [resumed.learning_rates(step, [0.3])[0] for step in range(7, 10)] == pytest.approx(expected[7:])


def test_the_length_of_a_schedule_by_its_path_is_filled_in() -> None:
    cosine = rates(10, range(10), lr_scheduler="torch.optim.lr_scheduler.CosineAnnealingLR", warmup_steps=2)
    assert cosine == pytest.approx(rates(10, range(10), lr_scheduler="cosine", warmup_steps=2))
    linear = rates(10, range(10), lr_scheduler="transformers.get_linear_schedule_with_warmup", warmup_steps=2)
    assert linear == pytest.approx(rates(10, range(10), lr_scheduler="linear", warmup_steps=2))


@pytest.mark.parametrize(
    ("path", "args", "words"),
    [
        ("torch.optim.lr_scheduler.NoneLR", {}, "cannot be imported"),
        ("nowhere.Schedule", {}, "No module named 'nowhere'"),
        ("torch.optim.lr_scheduler.StepLR", {"step": 3}, "no argument step; it has step_size, gamma"),
        ("torch.optim.lr_scheduler.StepLR", {}, "missing 1 required positional argument: 'step_size'"),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {}, "needs a measured value at each step"),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0}, "momentum"),
        ("torch.nn.Linear", {"in_features": 1, "out_features": 1}, "cannot be made"),
    ],
)
def test_a_schedule_that_cannot_be_used_is_refused(path: str, args: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(run_settings(lr_scheduler=path, lr_scheduler_args=args))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lr_power": 2.0}, 'is for lr_scheduler = "polynomial" only'),
        ({"lr_scheduler": "linear", "lr_scheduler_args": {"gamma": 1}}, "is for lr_scheduler = the dotted path of a"),
        ({"lr_scheduler": "wsd"}, 'is needed by lr_scheduler = "wsd"'),
        ({"lr_scheduler": "exponential"}, 'is needed by lr_scheduler = "exponential"'),
        ({"lr_min_ratio": 0.1}, "is for lr_scheduler = "),
    ],
)
def test_keys_that_a_schedule_does_not_use_or_lacks_are_told(keys: dict[str, object], words: str) -> None:
    problems = [problem for problem in check_rules(run_settings(**keys), 1) if words in problem.message]
    assert len(problems) == 1, problems


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"optimizer": {"rules": [{"pattern": "attn", "lr": 0.1}]}}, "[optimizer] rules"),
        ({"optimizer": {"mlp_lr": 0.1}}, "[optimizer] mlp_lr"),
        ({"adapter": LoraSettings(type="lora", rank=1, loraplus_lr_ratio=2.0)}, "[adapter] loraplus_lr_ratio"),
        ({"adapter": LoraSettings(type="lora", rank=1, rules=[{"pattern": "a", "lr": 0.1}])}, "[adapter] rules"),
        ({"optimizer": {"rules": [{"pattern": "attn", "lr": 0.0, "weight_decay": 0.1}]}}, None),
        ({"model": SdxlOptions(type="sdxl", unet_lr=0.1)}, "[model] unet_lr"),
        (
            {"model": SdxlOptions(type="sdxl", text_encoder_1_lr=0.0, text_encoder_2_lr=0.1)},
            "[model] text_encoder_2_lr",
        ),
        ({"model": SdxlOptions(type="sdxl", unet_lr=0.5, text_encoder_1_lr=0.5)}, None),
    ],
)
def test_one_constant_rate_is_no_rate_of_some(keys: dict[str, object], place: str | None) -> None:
    own = {"optimizer": {"type": "sgd", "lr": 1, **keys.get("optimizer", {})}}
    settings = run_settings(force_constant_lr=0.5, **{**keys, **own})
    told = [one.where for one in check_rules(settings, 1) if "force_constant_lr" in one.message]
    assert told == ([place] if place else [])


@pytest.mark.parametrize("name", ["coseine", "torch.", "7.lr"])
def test_a_name_that_is_no_schedule_lists_those_that_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"must be one of {', '.join(NAMES)}"):
        run_settings(lr_scheduler=name)


def test_a_warm_up_longer_than_the_run_is_no_error() -> None:
    assert rates(5, range(1, 2), lr_scheduler="cosine", warmup_steps=9) == pytest.approx([0.2])
    assert rates(5, range(9, 10), lr_scheduler="cosine", warmup_steps=9) == [1.0]


def test_rates_of_groups_are_scaled_alike_and_can_be_forced() -> None:
    schedule = Schedule(run_settings(warmup_steps=1, lr_scheduler="linear"), 5)
    assert schedule.learning_rates(0, [1.0, 0.1]) == pytest.approx([0.5, 0.05])
    assert schedule.learning_rates(3, [1.0, 0.1]) == pytest.approx([0.5, 0.05])
    forced = Schedule(run_settings(warmup_steps=1, lr_scheduler="linear", force_constant_lr=0.7), 5)
    assert forced.learning_rates(0, [1.0, 0.1]) == [0.7, 0.7]


@pytest.mark.parametrize(
    ("keys", "steps", "told"),
    [
        (
            {"warmup_steps": 99},
            20,
            ["the run has 20 steps, and warm-up takes 99: the learning rate comes to 20 % of lr"],
        ),
        ({"warmup_steps": 20}, 20, ["the learning rate comes to 95 % of lr"]),
        ({"warmup_steps": 19}, 20, []),
        ({"warmup_steps": 0.99}, 20, []),
        ({"warmup_steps": 99, "force_constant_lr": 0.7}, 20, []),
    ],
)
def test_a_rate_that_never_comes_to_its_full_value_is_told(
    caplog: pytest.LogCaptureFixture, keys: dict[str, float], steps: int, told: list[str]
) -> None:
    warn_of_warmup(run_settings(**keys), steps)
    assert len(caplog.messages) == len(told)
    assert all(words in line for words, line in zip(told, caplog.messages, strict=True))
    # The rate of the last step, by the schedule itself.
    if told and "20 %" in told[0]:
        assert rates(steps, range(steps - 1, steps), **keys) == pytest.approx([0.2])
