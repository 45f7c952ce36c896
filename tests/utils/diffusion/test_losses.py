"""The loss against torch's.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import huber_loss, l1_loss, mse_loss, smooth_l1_loss

from utils.diffusion.losses import LOSSES, Labels, Loss
from utils.diffusion.objectives import FlowMatching
from utils.diffusion.seeds import normal

MEAN_SQUARES = Loss("mse")


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (3, 4, 5, 6, 8)])
def test_is_the_mean_squared_error_of_each_sample(shape: tuple[int, ...]) -> None:
    prediction, target = normal(shape, 0, "prediction").requires_grad_(), normal(shape, 0, "target")
    losses_B = MEAN_SQUARES(prediction, Labels(target, torch.ones(3, *[1] * (target.ndim - 1))))
    expected = [mse_loss(one, other) for one, other in zip(prediction, target, strict=True)]
    torch.testing.assert_close(losses_B, torch.stack(expected))
    (gradient,) = torch.autograd.grad(losses_B.mean(), prediction)
    torch.testing.assert_close(gradient, torch.autograd.grad(mse_loss(prediction, target), prediction)[0])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A value of several is computed by a thread, one alone by all."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_that_of_a_sample_is_the_same_in_any_batch() -> None:
    prediction, target = normal((4, 16, 64, 64), 0, "prediction"), normal((4, 16, 64, 64), 0, "target")

    def losses(start: int, end: int) -> list[float]:
        labels = Labels(target[start:end], torch.ones(end - start, 1, 1, 1))
        return MEAN_SQUARES(prediction[start:end], labels).tolist()

    alone = [losses(index, index + 1)[0] for index in range(4)]
    # What it would be otherwise.
    assert alone != losses(0, 4)
    with torch.no_grad():
        alone = [losses(index, index + 1)[0] for index in range(4)]
        assert alone == losses(0, 4)


def test_weights_are_factors_on_the_samples() -> None:
    prediction, target = normal((3, 4), 0, "prediction"), normal((3, 4), 0, "target")
    plain_B = MEAN_SQUARES(prediction, Labels(target, torch.ones(3, 1)))
    weight_B = torch.tensor([0.0, 1.0, 2.5])
    torch.testing.assert_close(MEAN_SQUARES(prediction, Labels(target, weight_B[:, None])), plain_B * weight_B)


def test_weights_are_factors_on_places() -> None:
    prediction, target = normal((2, 3, 4), 0, "prediction"), normal((2, 3, 4), 0, "target")
    weight = torch.tensor([[[0.0, 0.0, 1.0, 3.0]], [[1.0, 1.0, 1.0, 1.0]]])
    losses_B = MEAN_SQUARES(prediction, Labels(target, weight))
    square = (prediction - target).square()
    torch.testing.assert_close(losses_B, torch.stack([(square[0] * weight[0]).sum() / 12, square[1].mean()]))


def test_is_computed_in_float32() -> None:
    """In bfloat16 the two would be equal."""
    prediction, target = torch.full((1, 4), 256.0, dtype=torch.bfloat16), torch.full((1, 4), 256.5)
    losses_B = MEAN_SQUARES(prediction, Labels(target, torch.ones(1)))
    assert losses_B.dtype == torch.float32
    assert losses_B.item() == 0.25


DELTA = torch.tensor([0.05, 0.4, 2.0])
LEVELS = torch.tensor([0.1, 0.5, 0.9])


def labels_of(loss: Loss, target: torch.Tensor, delta_B: torch.Tensor = DELTA) -> Labels:
    ones = [1] * (target.ndim - 1)
    needs_delta = loss.loss_type not in ("mse", "mae")
    return Labels(target, torch.ones(3, *ones), delta_B.view(-1, *ones) if needs_delta else None)


def formula(loss_type: str, error: torch.Tensor, delta: float) -> torch.Tensor:
    """Elementwise, float64."""
    size = error.abs()
    return {
        "mse": size**2,
        "mae": size,
        "huber": torch.where(size < delta, size**2 / 2, delta * (size - delta / 2)),
        "smooth_l1": torch.where(size < delta, size**2 / 2 / delta, size - delta / 2),
        "pseudo_huber": 2 * delta * ((size**2 + delta**2).sqrt() - delta),
    }[loss_type]


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (3, 4, 5, 6, 8)])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_are_those_of_the_formula(loss_type: str, shape: tuple[int, ...]) -> None:
    loss = Loss(loss_type)
    prediction, target = normal(shape, 0, "prediction").requires_grad_(), normal(shape, 0, "target")
    losses_B = loss(prediction, labels_of(loss, target))
    (gradient,) = torch.autograd.grad(losses_B.sum(), prediction)
    exact = prediction.detach().double().requires_grad_()
    expected = [
        formula(loss_type, exact[n] - target[n].double(), delta).mean() for n, delta in enumerate(DELTA.tolist())
    ]
    (exact_gradient,) = torch.autograd.grad(sum(expected), exact)
    torch.testing.assert_close(losses_B.double(), torch.stack(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-9)


def test_those_of_torch() -> None:
    prediction, target = normal((3, 4, 5), 0, "prediction"), normal((3, 4, 5), 0, "target")
    delta_B = torch.full((3,), 0.4)
    for loss_type, reference in (
        ("mae", l1_loss(prediction, target)),
        ("huber", huber_loss(prediction, target, delta=0.4)),
        ("smooth_l1", smooth_l1_loss(prediction, target, beta=0.4)),
    ):
        loss = Loss(loss_type)
        torch.testing.assert_close(loss(prediction, labels_of(loss, target, delta_B)).mean(), reference)


def test_pseudo_huber_is_the_square_near_zero_and_linear_far_out() -> None:
    loss, target = Loss("pseudo_huber"), torch.zeros(3, 1)
    near, far = torch.full((3, 1), 1e-4), torch.full((3, 1), 1e4)
    torch.testing.assert_close(loss(near, labels_of(loss, target)), torch.full((3,), 1e-8), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss(far, labels_of(loss, target)), 2e4 * DELTA, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1, 0.1, 0.1]),
        ("exponential", [0.1**0.1, 0.1**0.5, 0.1**0.9]),
        # SNR^(-1/2) of flow matching is t / (1 - t), so 1 / (1 + it)^2 is (1 - t)^2.
        ("snr", [0.9 * 0.9**2 + 0.1, 0.9 * 0.5**2 + 0.1, 0.9 * 0.1**2 + 0.1]),
    ],
)
def test_widths_follow_the_noise_level(schedule: str, expected: list[float]) -> None:
    delta_B = Loss("huber", 0.1, schedule, huber_scale=2.0).delta(LEVELS, FlowMatching().snr(LEVELS))
    assert delta_B.tolist() == pytest.approx([2.0 * value for value in expected], rel=1e-5)
    assert Loss("mse").delta(LEVELS, FlowMatching().snr(LEVELS)) is None


def test_width_by_snr_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    delta_B = Loss("huber", 0.1, "snr").delta(ends, FlowMatching().snr(ends))
    assert delta_B.tolist() == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"loss_type": "l3"}, "mse, mae"),
        ({"huber_schedule": "linear"}, "constant, exponential, snr"),
        ({"huber_c": 0.0}, "huber_c"),
        ({"huber_scale": -1.0}, "huber_scale"),
    ],
)
def test_wrong_values_are_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Loss(**wrong)
