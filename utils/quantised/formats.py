"""Formats of quantised weights: from numbers to codes and scales, and back.

Shapes: O outputs, I inputs of a Linear; G groups of N numbers in M bytes. Codes are kept as bytes (uint8), which no
conversion to another floating-point type reaches.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch.nn import functional

from utils.errors import UserError


class Codes(NamedTuple):
    """A weight in its format: what is kept of it.

    Attributes:
        weight: the codes, bytes.
        scale: the factors of rows or blocks, a floating-point type that no conversion changes.
    """

    weight: torch.Tensor
    scale: torch.Tensor


class Format(Protocol):
    """How a weight (O, I) is kept."""

    def empty(self, shape: tuple[int, int]) -> Codes:
        """Codes of a weight of this shape on the meta device."""

    def quantise(self, values_OI: torch.Tensor) -> Codes:
        """The codes of float32 values, on their device."""

    def dequantise(
        self, codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight (O, I) that the codes mean, rounded to `dtype` once."""

    def check(self, option: str) -> None:
        """Whether it can be used here.

        Args:
            option: the key that asks for it.

        Raises:
            UserError: a library is missing.
        """


@dataclass(frozen=True)
class RowScaled:
    """8-bit numbers, symmetric around 0, with one scale for each row of outputs:

        scale = max|row| / (largest finite number of the type),   weight = scale * number

    where the number is row / scale, rounded to the nearest of the type, and to the even one of two.

    Attributes:
        number: the type of the numbers: an 8-bit float, or int8, of which -128 is not used.
    """

    number: torch.dtype

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return (torch.finfo if self.number.is_floating_point else torch.iinfo)(self.number).max

    def empty(self, shape: tuple[int, int]) -> Codes:
        scale_O1 = torch.empty(shape[0], 1, dtype=torch.float32, device="meta")
        return Codes(torch.empty(shape, dtype=torch.uint8, device="meta"), scale_O1)

    def quantise(self, values_OI: torch.Tensor) -> Codes:
        # A GPU would multiply by the reciprocal of a plain number, and give other scales than a CPU.
        scale_O1 = values_OI.abs().amax(dim=1, keepdim=True) / values_OI.new_tensor(self.largest)
        # A row of zeros has a scale too, for a division by it.
        scale_O1 = scale_O1.clamp(min=torch.finfo(torch.float32).tiny)
        # Rounding may lead beyond the largest number, where float8 has only NaN.
        numbers_OI = (values_OI / scale_O1).clamp(-self.largest, self.largest)
        # Conversion rounds to the nearest float, but cuts off to an integer.
        numbers_OI = numbers_OI if self.number.is_floating_point else numbers_OI.round()
        return Codes(numbers_OI.to(self.number).view(torch.uint8), scale_O1)

    def dequantise(
        self, codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        # The numbers are exact in 16 bits. In place, the product is computed in float32, rounded once, and takes no
        # float32 copy of the weight on a GPU.
        return codes.view(self.number).to(dtype).mul_(scale)

    def check(self, option: str) -> None:
        pass


@dataclass(frozen=True)
class NormalFloat4:
    """4-bit NormalFloat of bitsandbytes (Dettmers et al. 2023): the nearest of 16 quantiles of the normal distribution,
    scaled to [-1, 1], times the largest absolute value of each block of consecutive numbers, which is the scale.

    Attributes:
        block: numbers in a block.
    """

    block: int = 64

    def empty(self, shape: tuple[int, int]) -> Codes:
        blocks = -(-math.prod(shape) // self.block)
        weight = torch.empty(blocks * self.block // 2, 1, dtype=torch.uint8, device="meta")
        return Codes(weight, torch.empty(blocks, dtype=torch.float32, device="meta"))

    def quantise(self, values_OI: torch.Tensor) -> Codes:
        # bitsandbytes is imported where it is used, since other formats do without.
        from bitsandbytes.functional import quantize_4bit

        values = values_OI.flatten()
        whole_blocks = functional.pad(values, (0, -len(values) % self.block)).view(-1, self.block)
        packed, state = quantize_4bit(whole_blocks, blocksize=self.block, quant_type="nf4")
        return Codes(packed, state.absmax)

    def dequantise(
        self, codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # A row for each block: on CPUs, rows that end within a block take the scale of another one.
        rows = (len(scale), self.block)
        state = QuantState(absmax=scale, shape=rows, dtype=dtype, blocksize=self.block, quant_type="nf4")
        return dequantize_4bit(codes, state).flatten()[: math.prod(shape)].view(shape)

    def check(self, option: str) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError.of(
                '"nf4" needs bitsandbytes, which is not installed: pip install bitsandbytes', where=option
            )


@dataclass(frozen=True)
class GroupedInt4:
    """4-bit whole numbers, with a scale and a zero point for each group of numbers that lie side by side in a row:

        weight = scale * (number - zero),   scale = (max - min) / 15,   zero = -min / scale

    where number and zero are whole, 0 to 15, and max and min are those of the group and of 0, so that 0 stays 0. Groups
    lie along the inputs, since these are side by side in memory: many numbers share one read scale. The scale is
    bfloat16, whose range is that of all weights; it is rounded before it is used, and much less than numbers to 4 bits.
    A group's bytes are its numbers, the first half in the lower four bits and the second in the upper, and its zero
    point.

    Attributes:
        group: numbers in a group, even.
    """

    group: int = 64
    largest: ClassVar[int] = 15

    def empty(self, shape: tuple[int, int]) -> Codes:
        groups = -(-math.prod(shape) // self.group)
        weight = torch.empty(groups, self.group // 2 + 1, dtype=torch.uint8, device="meta")
        return Codes(weight, torch.empty(groups, 1, dtype=torch.bfloat16, device="meta"))

    def quantise(self, values_OI: torch.Tensor) -> Codes:
        values = values_OI.flatten()
        # Where rows are no whole groups, a group goes on in the next row.
        values_GN = functional.pad(values, (0, -len(values) % self.group)).view(-1, self.group)
        low_G1, high_G1 = values_GN.amin(1, keepdim=True).clamp(max=0), values_GN.amax(1, keepdim=True).clamp(min=0)
        # A GPU would multiply by the reciprocal of a plain number. A group of zeros has a scale too.
        steps = values.new_tensor(self.largest)
        scale_G1 = (high_G1 / steps - low_G1 / steps).clamp(min=torch.finfo(torch.float32).tiny)
        scale_G1 = scale_G1.bfloat16()
        zero_G1 = (-low_G1 / scale_G1.float()).round().clamp(0, self.largest)
        numbers_GN = ((values_GN / scale_G1.float()).round() + zero_G1).clamp(0, self.largest).to(torch.uint8)
        lower_GM, upper_GM = numbers_GN.chunk(2, dim=1)
        return Codes(torch.cat([lower_GM | upper_GM << 4, zero_G1.to(torch.uint8)], dim=1), scale_G1)

    def dequantise(
        self, codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        packed_GM, zero_G1 = codes[:, :-1], codes[:, -1:]
        numbers_GN = torch.cat([packed_GM & self.largest, packed_GM >> 4], dim=1).view(torch.int8)
        # Whole numbers are exact in 16 bits; see `RowScaled` for the product.
        values_GN = numbers_GN.sub_(zero_G1.view(torch.int8)).to(dtype).mul_(scale)
        return values_GN.flatten()[: math.prod(shape)].view(shape)

    def check(self, option: str) -> None:
        pass


FORMATS: Mapping[str, Format] = {
    "float8": RowScaled(torch.float8_e4m3fn),
    "float8_e4m3fn": RowScaled(torch.float8_e4m3fn),
    "float8_e5m2": RowScaled(torch.float8_e5m2),
    "int8": RowScaled(torch.int8),
    "nf4": NormalFloat4(),
    "int4": GroupedInt4(),
}
"""The formats by their names in `[model] transformer_dtype` and `text_encoder_dtype`."""
FOUR_BITS = ("nf4", "int4")
"""Those of half of the bytes of the others."""


def unaliased(name: str) -> str:
    """The name of a format, the same for all names that mean it."""
    return {form: own for own, form in FORMATS.items()}[FORMATS[name]]
