"""Every model computes in the types in which people train it, in which its tiny folders are used nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import models
from tests import test_models as generic
from tests.models.batches import batch_of, sizes_of
from tests.models.tiny_folder import tiny
from utils.adapters.lora import LoraSettings
from utils.quantised.linear import QuantisedLinear


@pytest.mark.parametrize("name", models.available())
def test_it_computes_in_bfloat16_and_on_a_quantised_base(name: str, tmp_path: Path) -> None:
    """Within their rounding, and with gradients: parameters that stay float32 must not meet others unconverted."""
    model = generic.Model(name, tiny(name).write_folder(tmp_path), tiny(name))
    exact, rounded = model.pipeline(), model.pipeline(dtype="bfloat16")
    batch = batch_of(model, exact, sizes_of(model)[0])
    with torch.no_grad():
        expected = generic.output(exact, generic.loaded(exact).layers, batch)
    result = generic.output(rounded, generic.loaded(rounded).layers, batch)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert (result - expected).norm() < 0.1 * expected.norm()

    coded = model.pipeline(transformer_dtype="int8")
    staged = generic.loaded(coded, LoraSettings(type="lora", rank=4))
    assert any(isinstance(part, QuantisedLinear) for part in staged.denoiser.modules())
    result = generic.output(coded, staged.layers, batch)
    result.square().mean().backward()
    assert 0 < (result - expected).norm() < 0.1 * expected.norm()
    assert any(factor.grad is not None and factor.grad.any() for factor in staged.trained(staged.layers).values())
