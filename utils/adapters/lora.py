"""LoRA, implemented by PEFT: the update of a layer is the product of two matrices of low rank (Hu et al. 2021).

PEFT wraps each adapted module: `to_q.weight` becomes `to_q.base_layer.weight`, and `to_q.lora_A.default.weight` and
`to_q.lora_B.default.weight` are added.

Shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

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
    without_scale,
)
from utils.adapters.peft_settings import CONFIG_FILE, HEADER, peft_settings
from utils.first_values import none_without_memory
from utils.json_files import shown
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, Positive

A, B = ".lora_A.weight", ".lora_B.weight"
DOWN, UP, MID = "lora_A", "lora_B", "lora_mid"
FOLDED_SCALE = "folded_scale"
"""The key of our headers for the factor that is multiplied into every `lora_A`, since ComfyUI reads no header."""
LOST_IN_FLOAT16 = 2.0**-9
"""The part of a factor that may be lost by rounding, which is what bfloat16 loses."""


# kohya's, PEFT's and diffusers' names, and those of older versions of diffusers.
ENDINGS = {
    ".lora_mid.weight": MID,
    **{f".lora_{name}.weight": part for name, part in (("down", DOWN), ("up", UP))},
    **{f".{part}{ending}": part for part in (DOWN, UP) for ending in (".weight", ".default.weight", "")},
    **{
        f"{of}{name}.weight": part
        for of in (".lora.", "_lora.", ".lora_linear_layer.")
        for name, part in (("down", DOWN), ("up", UP))
    },
}


class LoraSettings(AdapterSettings, LowRankKeys):
    """`type = "lora"`: LoRA, whose update of a layer is the product of two matrices of low rank."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "rank", "alpha", "include", "exclude")

    type: Literal["lora"]
    """Kind of adapter."""
    rank: Count
    """Rank of the update of each adapted layer."""
    loraplus_lr_ratio: Positive | None = None
    """The second factors, which begin at zero, learn so many times as fast as the first: "LoRA+", whose authors take
    16; default: as fast."""


class LowRankUpdate(NamedTuple):
    """The update of a layer's weight by a LoRA: up @ down. For a convolution they are (R, I, ...) and (O, R, 1,
    ...)."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def fits_beside(self) -> bool:
        """Always."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return len(self.up), *self.down.shape[1:]

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The product in the shape of the weight."""
        return (self.up.flatten(1).float() @ self.down.flatten(1).float()).view(self.shape)

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """Both factors."""
        return self.down * weight, self.up

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """`x` through both factors."""
        down, up = kept
        return functional.linear(functional.linear(x, down), up)


class Lora:
    """See `AdapterKind`."""

    settings = LoraSettings
    name = "LoRA"
    mark = ".lora_"
    endings = ENDINGS

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: LoraSettings) -> None:
        """PEFT's layers, as ours correct them. `inject_adapter_in_model` would put the same in several times as long:
        it looks at all modules, and asks for each target how seven libraries quantise."""
        # PEFT is imported here, since reading settings does not need it.
        from peft import LoraConfig

        from utils.adapters.peft_layers import LAYERS

        config = LoraConfig(r=settings.rank, lora_alpha=_alpha(settings), lora_dropout=settings.dropout, bias="none")
        with none_without_memory(), torch.device("meta"):
            for name in names:
                parent, _, own = name.rpartition(".")
                target = denoiser.get_submodule(name)
                adapted = next(layer for kind, layer in LAYERS.items() if isinstance(target, kind))
                layer = adapted(target, ADAPTER, config=config, r=config.r, lora_alpha=config.lora_alpha)
                setattr(denoiser.get_submodule(parent), own, layer)

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The module in PEFT's layer."""
        from peft.tuners.lora import LoraLayer

        return module.get_base_layer() if isinstance(module, LoraLayer) else None

    def reset(self, module: nn.Module, dtype: torch.dtype) -> None:
        """PEFT's first values."""
        for factor in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
            factor.to_empty(device="cpu").to(dtype)
        module.reset_lora_parameters(ADAPTER, init_lora_weights=True)

    def scale_of(self, module: nn.Module) -> float:
        """alpha / rank."""
        return module.scaling[ADAPTER]

    def switched_off(self, module: nn.Module) -> AbstractContextManager[None]:
        """The layers skip their factors at a scale of 0."""
        return without_scale(module)

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """The factors of each of our modules, of which that of the file may be made."""
        if DORA_SCALE in entry.tensors:
            raise ValueError(f"'{entry.name}' has a dora_scale; training goes on from plain LoRAs alone")
        down, up, scale = _pair(entry)
        factors = {}
        for module, (own_down, own_up) in _divided(down, up, entry, names).items():
            ratio = scale / scale_of(module)
            factors[f"{module}{A}"] = own_down
            # In float32: float16 would lose small values.
            factors[f"{module}{B}"] = own_up if ratio == 1.0 else own_up.float() * ratio
        return factors

    def updates(self, entry: Entry, names: ModelNames) -> dict[str, LowRankUpdate]:
        """One for each of our modules."""
        down, up, scale = _pair(entry)
        up = up if scale == 1.0 else up.float() * scale
        return {module: LowRankUpdate(*pair) for module, pair in _divided(down, up, entry, names).items()}

    def to_files(self, factors: Tensors, settings: LoraSettings, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """`adapter_model.safetensors` with keys "transformer.<module>.lora_A.weight", and PEFT's `adapter_config.json`;
        for ComfyUI a file with kohya's names.

        diffusers assumes alpha = rank unless the header says otherwise, and ComfyUI in any case unless a tensor does,
        which diffusers would not read. So alpha is the rank in the first file, and the scale is in `lora_A`, whose
        values do not begin at zero.
        """
        scale = _alpha(settings) / settings.rank
        config = {
            "peft_type": "LORA",
            "r": settings.rank,
            "lora_alpha": settings.rank,
            "lora_dropout": settings.dropout,
            "bias": "none",
            "target_modules": sorted({name.split(self.mark)[0] for name in factors}),
            "base_model_name_or_path": wishes.metadata.get("base_model"),
        }
        files: dict[str, AdapterFile | str] = {}
        if "diffusers" in wishes.formats:
            known_to_diffusers = json.dumps(_diffusers_metadata(wishes, config), sort_keys=True)
            folded = _rounded(factors, scale, wishes)
            named = {
                f"{part}.{own}": folded[name] for part, names in wishes.parts.items() for own, name in names.items()
            }
            own = {"rank": str(settings.rank), "alpha": str(settings.rank), FOLDED_SCALE: repr(scale)}
            metadata = {**wishes.metadata, **own, HEADER: known_to_diffusers}
            files[ADAPTER_FILE] = AdapterFile(named, metadata)
            files[CONFIG_FILE] = json.dumps(config, indent=2)
        layout = wishes.names.layout
        if COMFYUI in wishes.formats and layout:
            kohya = layout.lora_to_kohya(_rounded(factors, 1.0, wishes), scale, wishes.names.rows_of)
            metadata = {**wishes.metadata, "rank": str(settings.rank), "alpha": str(_alpha(settings))}
            files[COMFYUI_FILE] = AdapterFile(kohya, metadata)
        return files


KINDS = (Lora(),)


def _alpha(settings: LoraSettings) -> float:
    return settings.rank if settings.alpha is None else settings.alpha


def _rounded(factors: Tensors, scale: float, wishes: ExportWishes) -> Tensors:
    """Factors in the type of files, with a scale in each `lora_A`. What float16 would lose stays float32, together with
    its other half."""
    rounded = {}
    for name in factors:
        if name.endswith(A):
            names = (name, f"{name.removesuffix(A)}{B}")
            down = factors[name] if scale == 1.0 else factors[name].float() * scale
            pair, dtype = (down, factors[names[1]]), wishes.dtype or factors[name].dtype
            if wishes.dtype == torch.float16 and any(map(_is_lost, pair)):
                dtype = torch.float32
            rounded |= zip(names, [tensor.to(dtype) for tensor in pair], strict=True)
    return rounded


def _is_lost(tensor: torch.Tensor) -> bool:
    """Whether float16 would lose too much of a tensor."""
    values = tensor.float()
    return bool((values - values.half().float()).norm() > LOST_IN_FLOAT16 * values.norm())


def _pair(entry: Entry) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Both factors of a file's module, (R, I, ...) and (O, R, ...), and the scale of their product.

    Raises:
        ValueError: one is missing, or they do not fit each other.
    """
    for part in (DOWN, UP):
        if part not in entry.tensors:
            raise entry.lacks(part)
    down, up, mid = entry.tensors[DOWN], entry.tensors[UP], entry.tensors.get(MID)
    rank = len(down)
    fits = up.ndim >= 2 and down.ndim >= 2 and up.shape[1] == (rank if mid is None else len(mid))
    if not fits or up[0].numel() != up.shape[1]:
        raise ValueError(f"the factors of '{entry.name}' are {list(down.shape)} and {list(up.shape)}, which is no LoRA")
    if mid is not None:
        # Tucker's form, whose core is a convolution between both.
        if mid.ndim != 4 or mid.shape[1] != rank:
            raise ValueError(f"the lora_mid of '{entry.name}', {list(mid.shape)}, does not fit its other factors")
        down = torch.einsum("rshw,si->rihw", mid.float(), down.flatten(1).float())
    return _undone(down, entry), up, _scale(entry, rank)


def _folded(file: AdapterFile) -> float:
    """The scale that is in every `lora_A` of a file of ours; 1 in others.

    Raises:
        ValueError: the header has something else than such a scale.
    """
    said = file.metadata.get(FOLDED_SCALE, "1.0")
    try:
        folded = float(said)
    except ValueError:
        folded = 0.0
    if not (math.isfinite(folded) and folded > 0):
        raise ValueError(
            f"`{FOLDED_SCALE}` in its header is {shown(said)}, and a number above 0 is meant; the file is damaged: "
            "export it again"
        )
    return folded


def _undone(down: torch.Tensor, entry: Entry) -> torch.Tensor:
    """`lora_A` as it was trained, if the file is ours and a scale is in it."""
    folded = _folded(entry.file)
    return down if folded == 1.0 else down.float() / folded


def _scale(entry: Entry, rank: int) -> float:
    """The factor of the product: alpha / rank by the alpha of this module, of its part, or 1."""
    if ALPHA in entry.tensors:
        return entry.tensors[ALPHA].item() / rank
    if FOLDED_SCALE in entry.file.metadata:
        return _folded(entry.file)
    module = entry.target.modules[0]
    known = peft_settings(entry.file, module)
    # As PEFT finds the alpha of a module that has its own.
    patterns = known.get("alpha_pattern") or {}
    own = next((alpha for name, alpha in patterns.items() if re.match(rf"(.*\.)?({name})$", module)), None)
    alpha = known.get("lora_alpha") if own is None else own
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if known.get("use_rslora") else rank)


def _divided(
    down: torch.Tensor, up: torch.Tensor, entry: Entry, names: ModelNames
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both factors of each of our modules of which the file's is made.

    A block-diagonal LoRA, as our exports have it, is split into those of its parts. If a program has trained the whole
    module, all of its rank serves every part.
    """
    modules, swap = entry.target
    up = torch.cat(list(reversed(up.chunk(2)))) if swap else up
    down, up = _shaped(down, up, names.shapes.get(f"{modules[0]}.weight", ()))
    if len(modules) == 1:
        return {modules[0]: (down, up)}
    rows = [names.rows_of(module) for module in modules]
    if sum(rows) != len(up):
        raise ValueError(f"'{entry.name}' adapts {len(up)} rows, and the model has {sum(rows)}")
    pieces = dict(zip(modules, up.split(rows), strict=True))
    columns = _columns_of(pieces, names) or {module: piece.any(dim=0) for module, piece in pieces.items()}
    return {
        module: (down[used].contiguous(), pieces[module][:, used].contiguous())
        for module, used in columns.items()
        if used.any()
    }


def _shaped(down: torch.Tensor, up: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with as many dimensions as the weight has: programs take Linears for convolutions of 1 x 1 cells, and the
    other way round."""
    if len(shape) < 2 or down.ndim == len(shape) or math.prod(down.shape[1:]) != math.prod(shape[1:]):
        return down, up
    return down.reshape(len(down), *shape[1:]), up.reshape(*up.shape[:2], *[1] * (len(shape) - 2))


def _columns_of(pieces: Mapping[str, torch.Tensor], names: ModelNames) -> dict[str, torch.Tensor] | None:
    """Which part of the rank belongs to which module, if the file is made of the LoRAs of this run's modules: then a
    module may have zeros alone. None if it is not."""
    ranks = {
        module: len(names.modules[module].lora_A[ADAPTER].weight)
        for module in pieces
        if hasattr(names.modules.get(module), "lora_A")
    }
    total, start, columns = next(iter(pieces.values())).shape[1], 0, {}
    if sum(ranks.values()) != total:
        return None
    for module, rank in ranks.items():
        columns[module] = torch.zeros(total, dtype=torch.bool)
        columns[module][start : start + rank] = True
        start += rank
    nothing = torch.zeros(total, dtype=torch.bool)
    others = (piece[:, ~columns.get(module, nothing)] for module, piece in pieces.items())
    return None if any(piece.any() for piece in others) else columns


def _diffusers_metadata(wishes: ExportWishes, config: Mapping[str, Any]) -> dict[str, object]:
    """The metadata of each part's adapter that diffusers reads."""
    known: dict[str, object] = {}
    for part, names in wishes.parts.items():
        # Without the prefix of CLIP's files, diffusers finds them in newer and older CLIPs.
        modules = [name.removeprefix("text_model.") for name in sorted({own.split(Lora.mark)[0] for own in names})]
        values = {**config, "target_modules": modules}
        if modules:
            keys = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")
            known |= {f"{part}.{key}": values[key] for key in keys}
    return known
