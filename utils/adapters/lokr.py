"""LoKr: the update of a Linear is the Kronecker product of a small matrix and a large one, whose rank may be low.

Yeh et al. 2024 ("Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation"); names and
first values are those of the LyCORIS library.

Shapes: R rank; of L*K outputs and M*N inputs w1 is (L, M), w2 (K, N).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

import torch
from einops import rearrange
from torch import nn

from utils.settings.schema import LokrSettings

MARK = ".lokr_"
PREFIX = "lycoris_"


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
        scaling: the scale, as PEFT's layers have it: by name of the adapter.
    """

    def __init__(self, base_layer: nn.Linear, settings: LokrSettings, factor: int | None, adapter: str):
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter
        self.dropout = nn.Dropout(settings.dropout)
        outputs, inputs = split(base_layer.out_features, factor), split(base_layer.in_features, factor)
        rank = None if settings.full_matrix else settings.rank
        self.shapes = {
            **_shapes("lokr_w1", outputs[0], inputs[0], rank if settings.decompose_both else None),
            **_shapes("lokr_w2", outputs[1], inputs[1], rank),
        }
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
        # Where both factors are whole there is no rank to divide by.
        is_low = len(self.shapes) > 2 and settings.alpha is not None
        self.scaling = {adapter: settings.alpha / rank if is_low else 1.0}

    def reset(self, dtype: torch.dtype) -> None:
        """Gives the factors their first values, which have no effect yet, on the CPU."""
        for name, shape in self.shapes.items():
            values = torch.zeros(shape, dtype=dtype)
            if name not in ("lokr_w2", "lokr_w2_b"):
                nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            self.register_parameter(name, nn.Parameter(values))

    def factor(self, name: str) -> torch.Tensor:
        """`lokr_w1` (L, M) or `lokr_w2` (K, N)."""
        if name in self.shapes:
            return self.get_parameter(name)
        return self.get_parameter(f"{name}_a") @ self.get_parameter(f"{name}_b")

    def get_base_layer(self) -> nn.Linear:
        """The Linear, as PEFT's layers give it."""
        return self.base_layer

    @property
    def out_features(self) -> int:
        """The base's, by which files that split a module's update are read."""
        return self.base_layer.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The base's, at which blocks look."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result, scale = self.base_layer(x), self.scaling[self.adapter]
        if scale == 0:
            return result
        w1_LM, w2_KN = self.factor("lokr_w1"), self.factor("lokr_w2")
        # kron(w1, w2) is never made: what it does to a row of inputs is w1 X w2^T with the row as a matrix X.
        rows_MN = rearrange(self.dropout(x).to(w1_LM.dtype), "... (m n) -> ... m n", m=w1_LM.shape[1])
        update_LK = w1_LM @ (rows_MN @ w2_KN.T)
        return result + scale * rearrange(update_LK, "... l k -> ... (l k)").to(result.dtype)


def _shapes(name: str, rows: int, columns: int, rank: int | None) -> dict[str, tuple[int, int]]:
    """The parameters of a factor. Where two matrices of this rank would be no smaller than one, it is whole."""
    if rank is None or rank >= max(rows, columns) / 2:
        return {name: (rows, columns)}
    return {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}


def replace_linears(denoiser: nn.Module, names: Iterable[str], settings: LokrSettings, adapter: str) -> None:
    """Replaces Linears by `LokrLinear`."""
    for name in names:
        parent, _, own = name.rpartition(".")
        linear, factor = denoiser.get_submodule(name), _factor_of(denoiser, name, settings)
        setattr(denoiser.get_submodule(parent), own, LokrLinear(linear, settings, factor, adapter))


def _factor_of(denoiser: nn.Module, name: str, settings: LokrSettings) -> int | None:
    """That of the first pattern which is found in the module's name, or is the class of a module that it is part of."""
    parts = name.split(".")
    wholes = [type(denoiser.get_submodule(".".join(parts[:count]))).__name__ for count in range(1, len(parts) + 1)]
    fitting = (
        factor
        for pattern, factor in settings.factors.items()
        if fnmatch(name, f"*{pattern}*") or any(fnmatch(whole, pattern) for whole in wholes)
    )
    return next(fitting, settings.factor)


def to_lycoris(tensors: Mapping[str, torch.Tensor], alpha: float | None, folder: str) -> dict[str, torch.Tensor]:
    """Factors (`<module>.lokr_w1`, ...) under the names of LyCORIS, which ComfyUI reads for diffusers' modules too:
    `lycoris_<module, _ for .>.lokr_w1`, ..., `.alpha`.

    Args:
        alpha: of `[adapter]`; None for a scale of 1.
        folder: what names begin with that are one of several trained modules.
    """
    ranks, named = _ranks(tensors), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        there = PREFIX + module.removeprefix(f"{folder}.").replace(".", "_")
        named[f"{there}.{part}"] = tensor
        named[f"{there}.alpha"] = torch.tensor(float(alpha or ranks.get(module, 1)))
    return named


def from_lycoris(tensors: Mapping[str, torch.Tensor], denoiser: nn.Module, folder: str) -> dict[str, torch.Tensor]:
    """The inverse for a denoiser with `LokrLinear`s, such that the run's scale gives the effect that the file has.
    Tensors of modules that it has not stay under the names that they have."""
    modules = {name: module for name, module in denoiser.named_modules() if isinstance(module, LokrLinear)}
    known = {name.removeprefix(f"{folder}.").replace(".", "_"): name for name in modules}
    ranks, factors = _ranks(tensors), {}
    for key, tensor in tensors.items():
        there, _, part = key.rpartition(".")
        name = known.get(there.removeprefix(PREFIX).removeprefix("lora_unet_"), there)
        if part in ("lokr_w1", "lokr_w1_a") and name in modules:
            alpha, rank = tensors.get(f"{there}.alpha"), ranks.get(there)
            scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
            tensor = tensor * (scale / modules[name].scaling[modules[name].adapter])
        if part != "alpha":
            factors[f"{name}.{part}"] = tensor
    return factors


def _ranks(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Of the modules of which a factor is a product."""
    return {name.rpartition(".")[0]: len(tensor) for name, tensor in tensors.items() if name.endswith("_b")}
