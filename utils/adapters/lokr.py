"""LoKr: the update of a Linear is the Kronecker product of a small matrix and a large one, whose rank may be low.

Yeh et al. 2024 ("Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation"); names and
first values are those of the LyCORIS library.

Shapes: R rank; of L*K outputs and M*N inputs w1 is (L, M), w2 (K, N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from typing import ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import nn

from utils.adapters.kinds import (
    ADAPTER,
    ADAPTER_FILE,
    AdapterFile,
    ExportWishes,
    LowRankKeys,
    ModelNames,
    Tensors,
    without_scale,
)
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, LargeCount

PREFIX = "lycoris_"
W1, W2 = "lokr_w1", "lokr_w2"


class LokrSettings(AdapterSettings, LowRankKeys):
    """`type = "lokr"`: LoKr of LyCORIS, whose update is the Kronecker product of a small matrix and a large one."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "rank", "alpha", "factor", "factors", "include", "exclude")

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
    convolutions: Literal[False] = False
    """Only Linears are adapted."""


def split(dimension: int, factor: int | None) -> tuple[int, int]:
    """Two numbers whose product is `dimension`; the first is as large as it can be and not above `factor` or the
    second."""
    most = math.isqrt(dimension)
    first = max(number for number in range(1, min(factor or most, most) + 1) if dimension % number == 0)
    return first, dimension // first


class LokrLinear(nn.Module):
    """A Linear and its update scale * kron(w1, w2); both factors, `lokr_w1` and `lokr_w2`, may be products themselves:
    `lokr_w2_a` (K, R) @ `lokr_w2_b` (R, N). They are on the meta device until `reset`.

    Attributes:
        scaling: the scale by name of the adapter, as in PEFT's layers.
    """

    def __init__(self, base_layer: nn.Linear, settings: LokrSettings, factor: int | None):
        super().__init__()
        self.base_layer = base_layer
        self.dropout = nn.Dropout(settings.dropout)
        outputs, inputs = split(base_layer.out_features, factor), split(base_layer.in_features, factor)
        rank = None if settings.full_matrix else settings.rank
        self.shapes = {
            **_shapes(W1, outputs[0], inputs[0], rank if settings.decompose_both else None),
            **_shapes(W2, outputs[1], inputs[1], rank),
        }
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
        # If both factors are full matrices, there is no rank to divide by.
        is_low = len(self.shapes) > 2 and settings.alpha is not None
        self.scaling = {ADAPTER: settings.alpha / rank if is_low else 1.0}

    def reset(self, dtype: torch.dtype) -> None:
        """Gives the factors their first values, which have no effect yet, on the CPU."""
        for name, shape in self.shapes.items():
            values = torch.zeros(shape, dtype=dtype)
            if name not in (W2, f"{W2}_b"):
                nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            self.register_parameter(name, nn.Parameter(values))

    def factor(self, name: str) -> torch.Tensor:
        """`lokr_w1` (L, M) or `lokr_w2` (K, N)."""
        if name in self.shapes:
            return self.get_parameter(name)
        return self.get_parameter(f"{name}_a") @ self.get_parameter(f"{name}_b")

    @property
    def out_features(self) -> int:
        """That of the base."""
        return self.base_layer.out_features

    @property
    def weight(self) -> torch.Tensor:
        """That of the base, which some blocks read."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """That of the base."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result, scale = self.base_layer(x), self.scaling[ADAPTER]
        if scale == 0:
            return result
        # In the type of the input: the factors are rounded when they are used, as with LoRA (`peft_layers.py`).
        w1_LM, w2_KN = self.factor(W1).to(x.dtype), self.factor(W2).to(x.dtype)
        return result + (scale * _product(self.dropout(x), w1_LM, w2_KN)).to(result.dtype)


def _product(x: torch.Tensor, w1_LM: torch.Tensor, w2_KN: torch.Tensor) -> torch.Tensor:
    """`x` @ kron(w1, w2).T.

    The Kronecker product is never computed: applied to a row of inputs it is w1 X w2^T with the row as a matrix X.
    """
    rows_MN = rearrange(x, "... (m n) -> ... m n", m=w1_LM.shape[1])
    return rearrange(w1_LM @ (rows_MN @ w2_KN.T), "... l k -> ... (l k)")


def _shapes(name: str, rows: int, columns: int, rank: int | None) -> dict[str, tuple[int, int]]:
    """The parameters of a factor. If two matrices of this rank would not be smaller than one, it is a full matrix."""
    if rank is None or rank >= max(rows, columns) / 2:
        return {name: (rows, columns)}
    return {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}


class KroneckerUpdate(NamedTuple):
    """The update of a Linear's weight by a LoKr: kron(w1, w2)."""

    w1_LM: torch.Tensor
    w2_KN: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(first * second for first, second in zip(self.w1_LM.shape, self.w2_KN.shape, strict=True))

    def delta(self) -> torch.Tensor:
        """The whole update in float32."""
        return torch.kron(self.w1_LM.float(), self.w2_KN.float())

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """Both factors."""
        return self.w1_LM * weight, self.w2_KN

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """`x` @ kron(w1, w2).T."""
        return _product(x, *kept)


class Lokr:
    """See `AdapterKind`."""

    settings = LokrSettings
    name = "LoKr"
    mark = ".lokr_"

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: LokrSettings) -> None:
        """Replaces Linears by `LokrLinear`."""
        for name in names:
            parent, _, own = name.rpartition(".")
            adapted = LokrLinear(denoiser.get_submodule(name), settings, _factor_of(denoiser, name, settings))
            setattr(denoiser.get_submodule(parent), own, adapted)

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The Linear in a `LokrLinear`."""
        return module.base_layer if isinstance(module, LokrLinear) else None

    def reset(self, module: LokrLinear, dtype: torch.dtype) -> None:
        """LyCORIS's first values."""
        module.reset(dtype)

    def scale_of(self, module: LokrLinear) -> float:
        """alpha / rank; 1 where both factors are whole."""
        return module.scaling[ADAPTER]

    def switched_off(self, module: LokrLinear) -> AbstractContextManager[None]:
        """A `LokrLinear` does nothing at a scale of 0."""
        return without_scale(module)

    def is_in(self, names: Sequence[str]) -> bool:
        """By the names of LyCORIS."""
        return any(self.mark in name for name in names)

    def from_file(self, file: AdapterFile, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """Reads LyCORIS's names. Tensors of modules that the model does not have keep their names."""
        known = {name.removeprefix(f"{names.folder}.").replace(".", "_"): name for name in names.modules}
        ranks, factors = _ranks(file.tensors), {}
        for key, tensor in file.tensors.items():
            there, _, part = key.rpartition(".")
            name = known.get(there.removeprefix(PREFIX).removeprefix("lora_unet_"), there)
            if part in (W1, f"{W1}_a"):
                alpha, rank = file.tensors.get(f"{there}.alpha"), ranks.get(there)
                scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
                tensor = tensor * (scale / scale_of(name))
            if part != "alpha":
                factors[f"{name}.{part}"] = tensor
        return factors

    def to_files(self, factors: Tensors, settings: LokrSettings, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """`adapter_model.safetensors` in the names of LyCORIS, which are all that other programs read of LoKr:
        `lycoris_<module, _ for .>.lokr_w1`, ..., `.alpha`. ComfyUI reads them for diffusers' modules too."""
        ranks, named = _ranks(factors), {}
        for name, tensor in factors.items():
            module, _, part = name.rpartition(".")
            there = PREFIX + module.removeprefix(f"{wishes.names.folder}.").replace(".", "_")
            named[f"{there}.{part}"] = tensor
            # Without an alpha the scale is 1.
            named[f"{there}.alpha"] = torch.tensor(float(settings.alpha or ranks.get(module, 1)))
        return {ADAPTER_FILE: AdapterFile(named, wishes.metadata)}

    def updates(self, factors: Mapping[str, torch.Tensor]) -> dict[str, KroneckerUpdate]:
        """One for each module."""
        by_module: dict[str, Tensors] = {}
        for name, tensor in factors.items():
            module, _, part = name.rpartition(".")
            by_module.setdefault(module, {})[part] = tensor
        return {
            module: KroneckerUpdate(_whole(own, W1, module), _whole(own, W2, module))
            for module, own in by_module.items()
        }


KINDS = (Lokr(),)


def _whole(parts: Tensors, name: str, module: str) -> torch.Tensor:
    """A factor, which may be the product of two matrices."""
    names = [name] if name in parts else [f"{name}_a", f"{name}_b"]
    if any(part not in parts or parts[part].ndim != 2 for part in names):
        raise ValueError(f"the LoKr of '{module}' is of another form than those of Linears, or it is not whole")
    return parts[name] if name in parts else parts[names[0]] @ parts[names[1]]


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


def _ranks(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The ranks of the modules of which a factor is a product."""
    return {name.rpartition(".")[0]: len(tensor) for name, tensor in tensors.items() if name.endswith("_b")}
