"""The loss against torch's.

Shapes: B batch.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

from utils.diffusion.losses import Labels, mean_squared_error
from utils.diffusion.seeds import normal


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (3, 4, 5, 6, 8)])
def test_is_the_mean_squared_error_of_each_sample(shape: tuple[int, ...]) -> None:
    prediction, target = normal(shape, 0, "prediction").requires_grad_(), normal(shape, 0, "target")
    losses_B = mean_squared_error(prediction, Labels(target, torch.ones(3)))
    expected = [mse_loss(one, other) for one, other in zip(prediction, target, strict=True)]
    torch.testing.assert_close(losses_B, torch.stack(expected))
    (gradient,) = torch.autograd.grad(losses_B.mean(), prediction)
    torch.testing.assert_close(gradient, torch.autograd.grad(mse_loss(prediction, target), prediction)[0])


def test_weights_are_factors_on_the_samples() -> None:
    prediction, target = normal((3, 4), 0, "prediction"), normal((3, 4), 0, "target")
    plain_B = mean_squared_error(prediction, Labels(target, torch.ones(3)))
    weight_B = torch.tensor([0.0, 1.0, 2.5])
    torch.testing.assert_close(mean_squared_error(prediction, Labels(target, weight_B)), plain_B * weight_B)


def test_is_computed_in_float32() -> None:
    """In bfloat16 the two would be equal."""
    prediction, target = torch.full((1, 4), 256.0, dtype=torch.bfloat16), torch.full((1, 4), 256.5)
    losses_B = mean_squared_error(prediction, Labels(target, torch.ones(1)))
    assert losses_B.dtype == torch.float32
    assert losses_B.item() == 0.25
