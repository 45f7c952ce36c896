"""Every format keeps numbers within its own error, by the formula that it states, in the bytes that it is for."""

from __future__ import annotations

import sys

import pytest
import torch

from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.quantised.formats import FORMATS

# By format: half a step relative to the number, and half of the smallest step relative to the scale.
HALF_STEPS = {
    "float8": (2**-4, 2**-10),
    "float8_e4m3fn": (2**-4, 2**-10),
    "float8_e5m2": (2**-3, 2**-17),
    "int8": (0, 0.5),
}
WIDEST_HALF_GAP = (1 - 0.6961928) / 2
"""Of the numbers of NF4, which lie in [-1, 1]."""
SHAPES = [(32, 64), (5, 33), (7, 96), (40, 24)]
"""The last three have rows that end within a block."""


def weights(shape: tuple[int, int]) -> torch.Tensor:
    """Normal numbers in rows of very different sizes, one of them of zeros."""
    sizes = torch.logspace(-6, 3, shape[0])
    sizes[1] = 0
    return normal(shape, 0, "weights") * sizes[:, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", HALF_STEPS)
def test_rows_are_kept_within_half_a_step(name: str, shape: tuple[int, int]) -> None:
    values, form = weights(shape), FORMATS[name]
    codes = form.quantise(values)
    assert codes.scale.shape == (shape[0], 1) and codes.scale.dtype == torch.float32
    filled = values.abs().amax(dim=1) > 0
    expected_scale = values.abs().amax(dim=1, keepdim=True) / form.largest
    assert torch.equal(codes.scale[filled], expected_scale[filled])
    relative, smallest = HALF_STEPS[name]
    error = (form.dequantise(*codes, shape, torch.float32) - values).abs()
    assert (error <= 1.0001 * torch.maximum(relative * values.abs(), smallest * codes.scale)).all()
    assert error.max() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_nf4_are_kept_within_half_a_gap(shape: tuple[int, int]) -> None:
    values, form = weights(shape), FORMATS["nf4"]
    codes = form.quantise(values)
    largest = torch.stack([block.abs().max() for block in values.flatten().split(64)])
    assert torch.equal(codes.scale, largest)
    error = (form.dequantise(*codes, shape, torch.float32) - values).abs()
    bound = WIDEST_HALF_GAP * largest.repeat_interleave(64)[: values.numel()].view(shape)
    assert (error <= 1.0001 * bound).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_numbers_stay_finite_and_as_large(name: str) -> None:
    values = torch.tensor([[3e38, -3e38, 0.1] * 22, [1e-30, -1e-30, 0.0] * 22])
    made = FORMATS[name].dequantise(*FORMATS[name].quantise(values), (2, 66), torch.float32)
    assert made.isfinite().all()
    torch.testing.assert_close(made[0, :2], values[0, :2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    form, values = FORMATS[name], normal((16, 128), 0, "weights")
    codes = form.quantise(values)
    made = form.dequantise(*codes, (16, 128), dtype)
    assert made.dtype == dtype
    assert torch.equal(made, form.dequantise(*codes, (16, 128), torch.float32).to(dtype))


@pytest.mark.parametrize(("name", "bits"), [("float8", 8), ("float8_e5m2", 8), ("int8", 8), ("nf4", 4.5)])
def test_it_takes_the_bytes_that_it_is_for(name: str, bits: float) -> None:
    """NF4's half a bit is the scale of 64 numbers."""
    shape = (64, 1024)
    codes, empty = FORMATS[name].quantise(normal(shape, 0, "weights")), FORMATS[name].empty(shape)
    for made, planned in zip(codes, empty, strict=True):
        assert planned.is_meta and (planned.shape, planned.dtype) == (made.shape, made.dtype)
    scales = 0 if bits == 4.5 else codes.scale.nbytes
    assert 8 * (sum(part.nbytes for part in codes) - scales) == bits * 64 * 1024


def test_numbers_of_a_row_do_not_depend_on_other_rows() -> None:
    values = weights((6, 32))
    whole = FORMATS["float8"].quantise(values)
    for row in range(6):
        alone = FORMATS["float8"].quantise(values[row : row + 1])
        assert torch.equal(alone.weight, whole.weight[row : row + 1])
        assert torch.equal(alone.scale, whole.scale[row : row + 1])


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    FORMATS["nf4"].check("[model] transformer_dtype")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"\[model\] transformer_dtype.*pip install bitsandbytes"):
        FORMATS["nf4"].check("[model] transformer_dtype")
    FORMATS["float8"].check("[model] transformer_dtype")
