"""LoKr: the update of a Linear is the Kronecker product of a small matrix and a large one, whose rank may be low.

Yeh et al. 2024 ("Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation"); names and
first values are those of the LyCORIS library.

Shapes: R rank; of L*K outputs and M*N inputs w1 is (L, M), w2 (K, N).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from typing import ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import nn

from utils.adapters.differences import rows_of_update
from utils.adapters.kinds import (
    ADAPTER,
    ADAPTER_FILE,
    ALPHA,
    COMFYUI,
    COMFYUI_FILE,
    DORA_SCALE,
    AdapterFile,
    Entry,
    ExportWishes,
    LowRankKeys,
    ModelNames,
    Tensors,
    Update,
    WithoutMore,
    without_scale,
)
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, LargeCount

logger = logging.getLogger(__name__)

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
    def fits_beside(self) -> bool:
        """Always."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(first * second for first, second in zip(self.w1_LM.shape, self.w2_KN.shape, strict=True))

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The product."""
        return torch.kron(self.w1_LM.float(), self.w2_KN.float())

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """Both factors."""
        return self.w1_LM * weight, self.w2_KN

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """`x` @ kron(w1, w2).T."""
        return _product(x, *kept)


class Lokr(WithoutMore):
    """See `AdapterKind`."""

    settings = LokrSettings
    name = "LoKr"
    mark = ".lokr_"
    endings = {f".{name}{part}": f"{name}{part}" for name in (W1, W2) for part in ("", "_a", "_b")}

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

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """LyCORIS's factors of a module, which is one of ours."""
        if DORA_SCALE in entry.tensors:
            raise ValueError(f"'{entry.name}' has a dora_scale; training goes on from plain LoKrs alone")
        modules, swap = entry.target
        if len(modules) > 1 or swap:
            raise ValueError(
                f"the LoKr of '{entry.name}' is for {len(modules)} modules of this model at once ({modules[0]} ...), "
                "and cannot be divided among them; it can be a [[model.preset_adapters]] with `fused = true`"
            )
        for name in (W1, W2):
            _parts_of(entry, name)
        ratio = _scale(entry) / scale_of(modules[0])
        return {
            # In float32: float16 would lose small values.
            f"{modules[0]}.{part}": tensor.float() * ratio if part in (W1, f"{W1}_a") and ratio != 1.0 else tensor
            for part, tensor in entry.tensors.items()
            if part != ALPHA
        }

    def updates(self, entry: Entry, names: ModelNames) -> dict[str, Update]:
        """One for each of our modules."""
        w1_LM, w2_KN = (_whole(entry, name) for name in (W1, W2))
        return rows_of_update(entry, names, KroneckerUpdate(w1_LM.float() * _scale(entry), w2_KN))

    def to_files(self, factors: Tensors, settings: LokrSettings, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """`adapter_model.safetensors` in the names of LyCORIS, `lycoris_<module, _ for .>.lokr_w1`, ..., `.alpha`; for
        ComfyUI, which knows these of some models only, a file with names by which it finds each module. What it knows
        only as a part of another module is there as a whole difference."""
        by_module = _by_module(factors, settings, wishes)
        files: dict[str, AdapterFile | str] = {}
        if "diffusers" in wishes.formats:
            ours = {
                module: PREFIX + module.removeprefix(f"{wishes.names.folder}.").replace(".", "_")
                for module in by_module
            }
            files[ADAPTER_FILE] = AdapterFile(_named(by_module, ours), wishes.metadata)
        layout = wishes.names.layout
        if COMFYUI in wishes.formats and layout:
            theirs = layout.comfyui_names(by_module)
            whole = _differences(factors, set(by_module) - set(theirs), settings, wishes)
            files[COMFYUI_FILE] = AdapterFile({**_named(by_module, theirs), **whole}, wishes.metadata)
        return files


KINDS = (Lokr(),)


def _whole(entry: Entry, name: str) -> torch.Tensor:
    """A factor, which may be the product of two matrices."""
    tensors = _parts_of(entry, name)
    return tensors[0] if len(tensors) == 1 else tensors[0].float() @ tensors[1].float()


def _parts_of(entry: Entry, name: str) -> list[torch.Tensor]:
    """The tensors of a factor: itself, or the two matrices whose product it is.

    Raises:
        ValueError: one is missing, there is one too many, or they do not fit each other.
    """
    there = [part for part in (name, f"{name}_a", f"{name}_b") if part in entry.tensors]
    if there not in ([name], [f"{name}_a", f"{name}_b"]):
        has = ", ".join(there) or "nothing"
        raise ValueError(
            f"the LoKr of '{entry.name}' has {has} of its factor {name}, and either {name} is meant or {name}_a with "
            f"{name}_b; is the file whole?"
        )
    tensors = [entry.tensors[part] for part in there]
    if any(tensor.ndim != 2 for tensor in tensors):
        raise ValueError(f"the LoKr of '{entry.name}' is of another form than those of Linears, or it is not whole")
    if len(tensors) == 2 and tensors[0].shape[1] != tensors[1].shape[0]:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ValueError(f"{name}_a and {name}_b of '{entry.name}' are {shapes}, which do not fit each other")
    return tensors


def _scale(entry: Entry) -> float:
    """alpha / rank of a file's module; 1 where both factors are whole, or without an alpha."""
    rank = next((len(tensor) for part, tensor in entry.tensors.items() if part.endswith("_b")), None)
    return 1.0 if rank is None or ALPHA not in entry.tensors else entry.tensors[ALPHA].item() / rank


def _by_module(factors: Tensors, settings: LokrSettings, wishes: ExportWishes) -> dict[str, Tensors]:
    """The tensors that a file has for each module, without the module's name."""
    ranks, found = _ranks(factors), {}
    for name, tensor in factors.items():
        module, _, part = name.rpartition(".")
        # Without an alpha the scale is 1.
        alpha = torch.tensor(float(settings.alpha or ranks.get(module, 1)))
        found.setdefault(module, {ALPHA: alpha})[part] = wishes.rounded(tensor)
    return found


def _named(by_module: Mapping[str, Tensors], names: Mapping[str, str]) -> Tensors:
    return {
        f"{names[module]}.{part}": tensor
        for module, own in by_module.items()
        if module in names
        for part, tensor in own.items()
    }


def _differences(factors: Tensors, modules: set[str], settings: LokrSettings, wishes: ExportWishes) -> Tensors:
    """The updates of these modules as whole differences of those of which they are parts there."""
    ranks, names, found, left = _ranks(factors), wishes.names, {}, set(modules)

    def update(module: str) -> torch.Tensor:
        if f"{module}.{W2}" not in factors and f"{module}.{W2}_a" not in factors:
            return next(iter(factors.values())).new_zeros(names.shapes[f"{module}.weight"], dtype=torch.float32)
        w1, w2 = (
            factors[whole]
            if (whole := f"{module}.{name}") in factors
            else factors[f"{whole}_a"] @ factors[f"{whole}_b"]
            for name in (W1, W2)
        )
        scale = settings.alpha / ranks[module] if settings.alpha and module in ranks else 1.0
        return scale * torch.kron(w1.float(), w2.float())

    for there, (parts, swap) in names.layout.targets(names.shapes) if left else ():
        if left.intersection(parts):
            whole = torch.cat([update(part) for part in parts])
            whole = torch.cat(list(reversed(whole.chunk(2)))) if swap else whole
            found[f"diffusion_model.{there}.diff"] = whole.to(wishes.dtype or next(iter(factors.values())).dtype)
            left -= set(parts)
    if left:
        raise ValueError(f"no place in the original layout for adapters of {len(left)} modules, first '{min(left)}'")
    if found:
        size = sum(tensor.nbytes for tensor in found.values()) / 2**20
        logger.info(
            "the LoKr for ComfyUI has %d whole differences of weights, %.0f MiB, since ComfyUI does not know their "
            'parts; save_format = "diffusers" leaves that file out',
            len(found),
            size,
        )
    return found


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
