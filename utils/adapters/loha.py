"""LoHa: the update of a weight is the product, number by number, of two matrices of low rank.

Hyeon-Woo et al. 2022 (FedPara), as LyCORIS has it; names and first values are LyCORIS's. With rank R the update may
have the rank R * R.

Shapes: R rank, O outputs and I inputs of a layer, C cells of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from utils.adapters.base_weight import shape_of
from utils.adapters.kinds import ADAPTER, LowRankKeys, Tensors
from utils.adapters.lycoris import AdaptedLayer, LycorisKind, by_made_weight, product
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")
SMALL, LARGE = 0.1, 1.0
"""LyCORIS's spread of first values."""


class LohaSettings(AdapterSettings, LowRankKeys):
    """`type = "loha"`: LoHa of LyCORIS, whose update is the product of two matrices of low rank, number by number."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = (
        *("type", "rank", "alpha", "conv_dim", "conv_alpha", "tucker", "include", "exclude"),
    )

    type: Literal["loha"]
    """Kind of adapter."""
    rank: Count
    """Rank of both matrices, of each adapted layer."""
    tucker: bool = False
    """Give the kernels of convolutions a core of their own (Tucker's form), which takes fewer parameters."""

    def problems(self, model: ModelSettings) -> Iterator[tuple[str, str]]:
        """See `AdapterSettings`."""
        yield from super().problems(model)
        yield from self.problems_of_sizes()
        if self.tucker and not self.convolutions:
            yield "tucker", "is for convolutions only; set `convolutions = true` too, or leave this out"


class LohaLayer(AdaptedLayer):
    """A Linear or convolution, and its update scale * (w1_a w1_b) * (w2_a w2_b)."""

    def __init__(self, base_layer: nn.Module, settings: LohaSettings):
        rank, alpha = settings.size_for(base_layer)
        outputs, inputs, *kernel = self.shape = shape_of(base_layer)
        if settings.tucker and math.prod(kernel) > 1:
            sides = {"a": (rank, outputs), "b": (rank, inputs)}
            shapes = {core: (rank, rank, *kernel) for core in CORES}
        else:
            sides, shapes = {"a": (outputs, rank), "b": (rank, inputs * math.prod(kernel))}, {}
        super().__init__(base_layer, settings, shapes | {part: sides[part[-1]] for part in PARTS})
        self.scaling = {ADAPTER: 1.0 if alpha is None else alpha / rank}

    def first_values(self, name: str, values: torch.Tensor) -> None:
        """Zeros of one factor of the second product alone."""
        if name != "hada_w2_a":
            nn.init.normal_(values, std=LARGE if name.endswith("_b") else SMALL)

    def change(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        names = [*PARTS, *(CORES if CORES[0] in self.shapes else ())]
        made = by_made_weight(self.dropout(x), self.base_layer, self._made, [self.get_parameter(n) for n in names])
        return made * self.scaling[ADAPTER]

    def _made(self, *factors: torch.Tensor) -> torch.Tensor:
        return hadamard(*factors).reshape(self.shape)


def hadamard(
    w1_a: torch.Tensor,
    w1_b: torch.Tensor,
    w2_a: torch.Tensor,
    w2_b: torch.Tensor,
    t1: torch.Tensor | None = None,
    t2: torch.Tensor | None = None,
) -> torch.Tensor:
    """(O, I * C), or (O, I, ...) with cores."""
    return product(w1_a, w1_b, t1) * product(w2_a, w2_b, t2)


@dataclass(frozen=True)
class HadamardUpdate:
    """The update of a weight by a LoHa."""

    factors: tuple[torch.Tensor, ...]
    scale: float
    shape: tuple[int, ...]
    needs_base = False

    @property
    def fits_beside(self) -> bool:
        """Without a core."""
        return len(self.factors) == len(PARTS)

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The product."""
        return hadamard(*(factor.float() for factor in self.factors)).reshape(self.shape) * self.scale

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """All factors."""
        first, *others = self.factors
        return first * (weight * self.scale), *others

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """`x` @ ((w1_a w1_b) * (w2_a w2_b)).T."""
        return functional.linear(x, hadamard(*kept))


class Loha(LycorisKind):
    """See `AdapterKind`."""

    settings = LohaSettings
    name = "LoHa"
    mark = ".hada_"
    endings = {f".{part}": part for part in (*PARTS, *CORES)}
    layer = LohaLayer
    scaled = ("hada_w1_a",)

    def rank_of(self, tensors: Tensors) -> int | None:
        """The rows of the second factor."""
        return len(tensors["hada_w1_b"]) if "hada_w1_b" in tensors else None

    def update_from(self, tensors: Tensors, scale: float, shape: tuple[int, ...], name: str) -> HadamardUpdate:
        """See `LycorisKind`."""
        if lacking := [part for part in PARTS if part not in tensors]:
            raise ValueError(f"'{name}' has no {lacking[0]}; is the file whole?")
        factors = [tensors[part] for part in (*PARTS, *(core for core in CORES if core in tensors))]
        if len(factors) != len(PARTS) + 1:
            factors[1], factors[3] = factors[1].flatten(1), factors[3].flatten(1)
            made = products_of([factor.to("meta") for factor in factors])
            if (
                made
                and {len(one) for one in made} == {shape[0]}
                and {one.numel() for one in made} == {math.prod(shape)}
            ):
                return HadamardUpdate(tuple(factors), scale, shape)
        shapes = ", ".join(str(list(factor.shape)) for factor in factors)
        raise ValueError(
            f"the factors of the LoHa of '{name}' are {shapes}, which do not fit each other, or a weight "
            f"of {list(shape)}"
        )


def products_of(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Both products; none if the factors do not fit each other."""
    cores = factors[len(PARTS) :] or [None, None]
    try:
        return [product(*factors[:2], cores[0]), product(*factors[2:4], cores[1])]
    except (RuntimeError, ValueError):
        return []


KINDS = (Loha(),)
