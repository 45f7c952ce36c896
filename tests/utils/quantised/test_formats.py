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


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_of_int4_are_kept_within_half_a_step(shape: tuple[int, int]) -> None:
    values, form = weights(shape), FORMATS["int4"]
    codes = form.quantise(values)
    groups = values.flatten().split(64)
    spans = torch.stack([torch.cat([group, group.new_zeros(1)]).amax() for group in groups])
    spans = spans - torch.stack([torch.cat([group, group.new_zeros(1)]).amin() for group in groups])
    torch.testing.assert_close(codes.scale.flatten().float(), (spans / 15).clamp(min=1e-38), rtol=2**-8, atol=1e-38)
    made = form.dequantise(*codes, shape, torch.float32)
    # The last numbers are cut off where the scale was rounded down.
    bound = (0.5 + 15 * 2**-8) * codes.scale.float().repeat_interleave(64)[: values.numel()].view(shape)
    assert ((made - values).abs() <= bound).all() and (made != values).any()
    assert (made[values == 0] == 0).all()


def test_numbers_of_int4_are_where_they_are_said_to_be() -> None:
    values = torch.arange(-3, 13).repeat(4)[None].float()
    codes = FORMATS["int4"].quantise(values)
    assert codes.scale.item() == 1 and codes.weight[0, -1] == 3
    assert (codes.weight[0, :32] & 15).tolist() == list(range(16)) * 2 == (codes.weight[0, :32] >> 4).tolist()
    assert torch.equal(FORMATS["int4"].dequantise(*codes, (1, 64), torch.float32), values)


def test_int4_is_closer_to_weights_like_normal_numbers_and_nf4_to_long_tails() -> None:
    """What the documentation says of the two."""
    errors = {}
    for name in ("nf4", "int4"):
        for tail in (1, 3):
            values = normal((256, 1024), 0, "weights")
            values = values * values.abs() ** (tail - 1)
            made = FORMATS[name].dequantise(*FORMATS[name].quantise(values), (256, 1024), torch.float32)
            errors[name, tail] = ((made - values).norm() / values.norm()).item()
    assert 0.08 < errors["int4", 1] < errors["nf4", 1] < 0.1
    assert errors["nf4", 3] < 0.98 * errors["int4", 3]


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_numbers_stay_finite_and_as_large(name: str) -> None:
    values = torch.tensor([[3e38, -3e38, 0.1] * 22, [1e-30, -1e-30, 0.0] * 22])
    made = FORMATS[name].dequantise(*FORMATS[name].quantise(values), (2, 66), torch.float32)
    assert made.isfinite().all()
    torch.testing.assert_close(made[0, :2], values[0, :2], rtol=1 / 14 if name == "int4" else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    form, values = FORMATS[name], normal((16, 128), 0, "weights")
    codes = form.quantise(values)
    made = form.dequantise(*codes, (16, 128), dtype)
    assert made.dtype == dtype
    assert torch.equal(made, form.dequantise(*codes, (16, 128), torch.float32).to(dtype))


@pytest.mark.parametrize(
    ("name", "bits"), [("float8", 8), ("float8_e5m2", 8), ("int8", 8), ("nf4", 4.5), ("int4", 4.375)]
)
def test_it_takes_the_bytes_that_it_is_for(name: str, bits: float) -> None:
    """The parts of a bit are the scales of 64 numbers, and int4's zero points."""
    shape = (64, 1024)
    codes, empty = FORMATS[name].quantise(normal(shape, 0, "weights")), FORMATS[name].empty(shape)
    for made, planned in zip(codes, empty, strict=True):
        assert planned.is_meta and (planned.shape, planned.dtype) == (made.shape, made.dtype)
    scales = 0 if bits < 8 else codes.scale.nbytes
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
