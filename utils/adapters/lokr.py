"""LoKr: the update of a weight is the Kronecker product of a small matrix and a large one, whose rank may be low.

Yeh et al. 2024 ("Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation"); names and
first values are those of the LyCORIS library.

Shapes: R rank; of L*K outputs and M*N inputs w1 is (L, M), w2 (K, N), of a convolution (K, N, ...) with its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import nn

from utils.adapters.base_weight import shape_of, weight_of
from utils.adapters.kinds import ADAPTER, ALPHA, LowRankKeys, Tensors
from utils.adapters.lycoris import AdaptedLayer, LycorisKind, by_made_weight, low_or_whole, product
from utils.errors import UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, LargeCount, Positive

W1, W2 = "lokr_w1", "lokr_w2"
CORE = "lokr_t2"


class LokrSettings(AdapterSettings, LowRankKeys):
    """`type = "lokr"`: LoKr of LyCORIS, whose update is the Kronecker product of a small matrix and a large one."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = (
        *("type", "rank", "alpha", "conv_dim", "conv_alpha", "factor", "factors", "full_matrix", "decompose_both"),
        *("tucker", "include", "exclude"),
    )

    type: Literal["lokr"]
    """Kind of adapter."""
    factor: Count | None = None
    """Sides of the small matrix, at most; each divides that of the weight. Default: as close to the square root as
    possible, which makes both matrices alike."""
    factors: dict[str, Count] = {}
    """Other factors by glob pattern, as in `{ "attn" = 8, "FeedForward" = 16 }`: the first is taken that may match
    anywhere in a module's name, or is the class of a module around it."""
    rank: LargeCount | None = None
    """Rank of the large matrix; default, and where it saves nothing, as 1e6 does: the whole of it."""
    full_matrix: bool = False
    """Keep the large matrix whole, whatever `rank` says."""
    decompose_both: bool = False
    """Give the small matrix that rank too."""
    tucker: bool = False
    """Give the kernels of convolutions a core of their own (Tucker's form), which takes fewer parameters."""
    init_lokr_norm: Positive | None = None
    """Start from a small random update in place of none, as SimpleTuner does: the small matrix is ones, and the large
    one has this part of the mean and the spread of the weight, as in 1e-3. Both have to be whole, as with
    `full_matrix`."""

    def problems(self, model: ModelSettings) -> Iterator[tuple[str, str]]:
        """See `AdapterSettings`."""
        yield from super().problems(model)
        yield from self.problems_of_sizes()
        for number, rule in enumerate(self.rules, start=1):
            if self.full_matrix and (rule.rank or rule.alpha):
                yield (
                    f"rules[{number}]",
                    "has a rank or an alpha, which full_matrix leaves no use for; leave one out",
                )
        if self.tucker and not self.convolutions:
            yield "tucker", "is for convolutions only; set `convolutions = true` too, or leave this out"


def split(dimension: int, factor: int | None) -> tuple[int, int]:
    """Two numbers whose product is `dimension`; the first is as large as it can be and not above `factor` or the
    second."""
    most = math.isqrt(dimension)
    first = max(number for number in range(1, min(factor or most, most) + 1) if dimension % number == 0)
    return first, dimension // first


class LokrLayer(AdaptedLayer):
    """A Linear or convolution and its update scale * kron(w1, w2); both factors, `lokr_w1` and `lokr_w2`, may be
    products themselves: `lokr_w2_a` (K, R) @ `lokr_w2_b` (R, N), or with a core `lokr_t2` (R, R, ...) of (R, K) and
    (R, N)."""

    def __init__(self, base_layer: nn.Module, settings: LokrSettings, factor: int | None):
        self.shape = shape_of(base_layer)
        outputs, inputs = split(self.shape[0], factor), split(self.shape[1], factor)
        rank, alpha = (None, None) if settings.full_matrix else settings.size_for(base_layer)
        self.kernel = self.shape[2:]
        large = dict(low_or_whole(W2, outputs[1], inputs[1], rank, math.prod(self.kernel)))
        if W2 in large:
            large = {W2: (outputs[1], inputs[1], *self.kernel)}
        elif settings.tucker and math.prod(self.kernel) > 1:
            large = {CORE: (rank, rank, *self.kernel), f"{W2}_a": (rank, outputs[1]), f"{W2}_b": (rank, inputs[1])}
        small = dict(low_or_whole(W1, outputs[0], inputs[0], rank if settings.decompose_both else None))
        super().__init__(base_layer, settings, {**small, **large})
        self.norm = settings.init_lokr_norm
        # If both factors are full matrices, there is no rank to divide by.
        is_low = len(self.shapes) > 2 and alpha is not None
        self.scaling = {ADAPTER: alpha / rank if is_low else 1.0}

    def first_values(self, name: str, values: torch.Tensor) -> None:
        """Zeros of one factor alone; or, of `init_lokr_norm`, numbers like the weight's."""
        if self.norm is None:
            if name not in (W2, f"{W2}_b"):
                nn.init.kaiming_uniform_(values, a=math.sqrt(5))
        elif name == W1:
            values.fill_(1.0)
        else:
            weight = weight_of(self.base_layer).detach().float().cpu()
            drawn = torch.randn(values.shape)
            values.copy_(self.norm * ((drawn - drawn.mean()) * (weight.std() / drawn.std()) + weight.mean()))

    def change(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        # In the type of the input: the factors are rounded when they are used, as with LoRA (`peft_layers.py`).
        x, factors = self.dropout(x), {name: self.get_parameter(name) for name in self.shapes}
        if self.kernel:
            names = list(factors)
            made = by_made_weight(
                x, self.base_layer, lambda *own: self._made(dict(zip(names, own, strict=True))), [*factors.values()]
            )
        else:
            made = _product(x, whole_of(factors, W1).to(x.dtype), whole_of(factors, W2).to(x.dtype))
        return made * self.scaling[ADAPTER]

    def _made(self, factors: Tensors) -> torch.Tensor:
        return kronecker(whole_of(factors, W1), whole_of(factors, W2).reshape(-1, self.large[1], *self.kernel))

    @property
    def large(self) -> tuple[int, int]:
        """K, N."""
        one = self.shapes[W1] if W1 in self.shapes else (self.shapes[f"{W1}_a"][0], self.shapes[f"{W1}_b"][1])
        return self.shape[0] // one[0], self.shape[1] // one[1]


def whole_of(factors: Tensors, name: str) -> torch.Tensor:
    """A factor, which may be the product of two matrices, or of these and a core."""
    if name in factors:
        return factors[name]
    return product(factors[f"{name}_a"], factors[f"{name}_b"], factors.get(CORE) if name == W2 else None)


def kronecker(w1_LM: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """(L * K, M * N, ...) of (L, M) and (K, N, ...)."""
    return torch.kron(w1_LM.view(*w1_LM.shape, *[1] * (w2.ndim - 2)), w2.contiguous())


def _product(x: torch.Tensor, w1_LM: torch.Tensor, w2_KN: torch.Tensor) -> torch.Tensor:
    """`x` @ kron(w1, w2).T.

    The Kronecker product is never computed: applied to a row of inputs it is w1 X w2^T with the row as a matrix X.
    """
    rows_MN = rearrange(x, "... (m n) -> ... m n", m=w1_LM.shape[1])
    return rearrange(w1_LM @ (rows_MN @ w2_KN.T), "... l k -> ... (l k)")


class KroneckerUpdate(NamedTuple):
    """The update of a weight by a LoKr: kron(w1, w2)."""

    w1_LM: torch.Tensor
    w2: torch.Tensor
    needs_base = False

    @property
    def fits_beside(self) -> bool:
        """Beside a Linear."""
        return self.w2.ndim == 2

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        (rows, columns), (k, n, *kernel) = self.w1_LM.shape, self.w2.shape
        return rows * k, columns * n, *kernel

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The product."""
        return kronecker(self.w1_LM.float(), self.w2.float())

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """Both factors."""
        return self.w1_LM * weight, self.w2

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """`x` @ kron(w1, w2).T."""
        return _product(x, *kept)


class Lokr(LycorisKind):
    """See `AdapterKind`."""

    settings = LokrSettings
    name = "LoKr"
    mark = ".lokr_"
    endings = {
        **{f".{name}{part}": f"{name}{part}" for name in (W1, W2) for part in ("", "_a", "_b")},
        f".{CORE}": CORE,
    }
    layer = LokrLayer
    scaled = (W1, f"{W1}_a")

    def adapted(self, denoiser: nn.Module, name: str, settings: LokrSettings) -> LokrLayer:
        """With the factor that belongs to the module.

        Raises:
            UserError: its factors are not whole, and `init_lokr_norm` needs that.
        """
        layer = LokrLayer(denoiser.get_submodule(name), settings, _factor_of(denoiser, name, settings))
        if settings.init_lokr_norm is not None and len(layer.shapes) > 2:
            raise UserError.of(
                f"needs factors that are whole, and those of '{name}' are products; set `full_matrix = true` and leave "
                "`decompose_both` out",
                where="[adapter] init_lokr_norm",
            )
        return layer

    def rank_of(self, tensors: Tensors) -> int | None:
        """That of the large matrix, or of the small one; None where both are whole."""
        return next((len(tensors[f"{name}_b"]) for name in (W2, W1) if f"{name}_b" in tensors), None)

    def update_from(self, tensors: Tensors, scale: float, shape: tuple[int, ...], name: str) -> KroneckerUpdate:
        """See `LycorisKind`."""
        for part in (W1, W2):
            _check_parts(tensors, part, name)
        try:
            w1_LM, w2 = whole_of(tensors, W1), whole_of(tensors, W2)
        except RuntimeError as error:
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items() if part != ALPHA)
            raise ValueError(f"the factors of the LoKr of '{name}', {shapes}, do not fit each other") from error
        if w1_LM.ndim != 2 or w2.ndim < 2:
            raise ValueError(f"the LoKr of '{name}' is of a form that is not known here, or it is not whole")
        # What a kernel has may be a row in files, and a Linear a convolution of one cell.
        kernel = shape[2:]
        if w2.flatten(1).shape[1] * w1_LM.shape[1] == math.prod(shape[1:]):
            w2 = w2.reshape(len(w2), -1, *kernel)
        return KroneckerUpdate(w1_LM.float() * scale, w2)


KINDS = (Lokr(),)


def _check_parts(tensors: Tensors, name: str, module: str) -> None:
    """Whether a factor is there: itself, or the two matrices whose product it is.

    Raises:
        ValueError: one is missing, or there is one too many.
    """
    there = [part for part in (name, f"{name}_a", f"{name}_b") if part in tensors]
    if there not in ([name], [f"{name}_a", f"{name}_b"]):
        has = ", ".join(there) or "nothing"
        raise ValueError(
            f"the LoKr of '{module}' has {has} of its factor {name}, and either {name} is meant or {name}_a with "
            f"{name}_b; is the file whole?"
        )


def _factor_of(denoiser: nn.Module, name: str, settings: LokrSettings) -> int | None:
    """The factor of the first pattern that occurs in the module's name, or that is the class of a module around it."""
    parts = name.split(".")
    wholes = [type(denoiser.get_submodule(".".join(parts[:count]))).__name__ for count in range(1, len(parts) + 1)]
    fitting = (
        factor
        for pattern, factor in settings.factors.items()
        if fnmatch(name, f"*{pattern}*") or any(fnmatch(whole, pattern) for whole in wholes)
    )
    return next(fitting, settings.factor)
