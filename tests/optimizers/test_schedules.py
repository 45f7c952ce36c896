"""Learning rates against values by hand and against torch's schedulers."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from optimizers.schedules import factor, learning_rates, warn_of_warmup
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import Settings


def run_settings(**keys: object) -> Settings:
    model = ModelSettings(type="tiny")
    return Settings(output_dir="a", dataset="b", model=model, optimizer={"type": "sgd", "lr": 1}, **keys)


def test_warm_up_rises_evenly_to_one() -> None:
    rates = [factor(step, kind="constant", warmup_steps=3, total_steps=10) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0]),
    ],
)
def test_courses_after_warm_up(kind: str, values: list[float]) -> None:
    rates = [factor(step, kind=kind, warmup_steps=2, total_steps=6) for step in range(2, 7)]
    assert rates == pytest.approx(values)
    last = factor(100, kind=kind, warmup_steps=2, total_steps=6)
    assert last == pytest.approx(values[-1]), "steps past the last keep its value"


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("linear", lambda optimizer: LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=20)),
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, T_max=20)),
    ],
)
def test_courses_are_those_of_torch(kind: str, reference: object) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = reference(optimizer)
    for step in range(20):
        ours = 0.3 * factor(step, kind=kind, warmup_steps=0, total_steps=20)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_warm_up_longer_than_the_run_is_no_error() -> None:
    assert factor(1, kind="cosine", warmup_steps=9, total_steps=5) == pytest.approx(0.2)
    assert factor(9, kind="cosine", warmup_steps=9, total_steps=5) == 1.0


def test_rates_of_groups_are_scaled_alike_and_can_be_forced() -> None:
    settings = run_settings(warmup_steps=1, lr_scheduler="linear")
    assert learning_rates(0, [1.0, 0.1], settings, total_steps=5) == pytest.approx([0.5, 0.05])
    assert learning_rates(3, [1.0, 0.1], settings, total_steps=5) == pytest.approx([0.5, 0.05])
    forced = run_settings(warmup_steps=1, lr_scheduler="linear", force_constant_lr=0.7)
    assert learning_rates(0, [1.0, 0.1], forced, total_steps=5) == [0.7, 0.7]


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
        assert learning_rates(steps - 1, [1.0], run_settings(**keys), steps) == pytest.approx([0.2])
