"""LoRA, implemented by PEFT: the update of a layer is the product of two matrices of low rank (Hu et al. 2021).

PEFT wraps each adapted module: `to_q.weight` becomes `to_q.base_layer.weight`, and `to_q.lora_A.default.weight` and
`to_q.lora_B.default.weight` are added.

Shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from utils.adapters.kinds import (
    ADAPTER,
    ADAPTER_FILE,
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
    with_scale,
    without_scale,
)
from utils.adapters.lora_factors import DOWN, FOLDED_SCALE, FOLDED_SCALES, MID, UP, LowRankUpdate, divided, pair_of
from utils.adapters.magnitudes import MAGNITUDE, dora_scale, magnitudes, with_magnitudes
from utils.adapters.peft_settings import CONFIG_FILE, HEADER
from utils.first_values import none_without_memory
from utils.settings.model_schema import ModelSettings, torch_dtype
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, Positive

A, B, M = ".lora_A.weight", ".lora_B.weight", f".{MAGNITUDE}.weight"
START_A, START_B = ".lora_start_A", ".lora_start_B"
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
    **{f".{MAGNITUDE}{ending}": MAGNITUDE for ending in ("", ".weight", ".default.weight")},
}


class LoraSettings(AdapterSettings, LowRankKeys):
    """`type = "lora"`: LoRA, whose update of a layer is the product of two matrices of low rank."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = (
        *("type", "rank", "alpha", "conv_dim", "conv_alpha", "rslora", "dora", "init"),
        *("dim_from_weights", "include", "exclude"),
    )
    of_runs: ClassVar[tuple[str, ...]] = ("dim_from_weights", "loraplus_lr_ratio", "scale_weight_norms")
    of_files: ClassVar[tuple[str, ...]] = ("dora",)

    type: Literal["lora"]
    """Kind of adapter."""
    rank: Count | None = None
    """Rank of the update of each adapted layer; required, unless `dim_from_weights` gives each its own."""
    dim_from_weights: bool = False
    """Take the rank of each module from the file of `init_from_existing`, and adapt no others."""
    loraplus_lr_ratio: Positive | None = None
    """The second factors, which begin at zero, learn so many times as fast as the first: "LoRA+", whose authors take
    16; default: as fast."""
    scale_weight_norms: Positive | None = None
    """Largest norm of the update of a module: both factors of a larger one are made smaller after each step; kohya's
    users take 1; default: no limit."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank, so that large ranks learn as fast as small ones (rsLoRA)."""
    dora: bool = False
    """Train the lengths of the weight's rows too, apart from their directions, which the low rank changes (DoRA)."""
    init: Literal["pissa", "olora"] | None = None
    """Start from directions of the weight: of its largest singular values ("pissa"), or its first by QR ("olora");
    default: from random ones. An export is a LoRA of twice the rank, for the same base."""
    dylora_unit: Count | None = None
    """Train in each step the first ranks alone, a random multiple of this number, so that an export can be cut to any
    of them (DyLoRA)."""

    def problems(self, model: ModelSettings) -> Iterator[tuple[str, str]]:
        """See `AdapterSettings`."""
        yield from super().problems(model)
        yield from self._problems_of_ranks()
        if self.dora and self.dtype != "float32":
            yield "dora", 'needs dtype = "float32": lengths of rows, rounded to 16 bits, would change the whole weight'
        beside = [number for number, preset in enumerate(model.preset_adapters, start=1) if not preset.fused]
        if self.dora and beside:
            yield "dora", f"measures weights, of which preset {beside[0]} is no part; set `fused = true` there"
        if self.scale_weight_norms and (self.init or self.dtype != "float32"):
            start = "limits updates, and a start of `init` is none; leave one of them out"
            short = 'needs dtype = "float32": the optimizer would keep what 16 bits lose of larger factors'
            yield "scale_weight_norms", start if self.init else short
        if self.init and self.init_from_existing:
            yield (
                "init",
                "says where factors start, and so does init_from_existing; leave one out. An export of a run with "
                "init has twice its rank, and is gone on from with that",
            )
        for key in ("rank_dropout", "dylora_unit"):
            if self.init and getattr(self, key):
                yield key, "would leave out a part of the weight itself beside `init`; leave one of them out"
        if self.dylora_unit and self.dora:
            yield "dylora_unit", "would measure weights without a part of their update; leave it or `dora` out"
        yield from self.problems_of_sizes()

    def _problems_of_ranks(self) -> Iterator[tuple[str, str]]:
        if self.rank is None and not self.dim_from_weights:
            yield "rank", "is required and not given"
        if self.dim_from_weights:
            for key in ("rank", "conv_dim"):
                if getattr(self, key) is not None:
                    yield key, "is not used with dim_from_weights; leave one of them out"
            if self.init_from_existing is None:
                yield "dim_from_weights", "needs the file of an adapter: set `init_from_existing`"
        ranks = [rank for rank in (self.rank, *(rule.rank for rule in self.rules)) if rank]
        if self.dylora_unit and ranks and self.dylora_unit > min(ranks):
            yield "dylora_unit", f"is above the rank, {min(ranks)}; set a number that divides it"


class Lora(WithoutMore):
    """See `AdapterKind`."""

    settings = LoraSettings
    name = "LoRA"
    mark = ".lora_"
    endings = ENDINGS
    mixes = True

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: LoraSettings) -> None:
        """PEFT's layers, as ours correct them. `inject_adapter_in_model` would put the same in several times as long:
        it looks at all modules, and asks for each target how seven libraries quantise."""
        # PEFT is imported here, since reading settings does not need it.
        from peft import LoraConfig

        from utils.adapters.peft_layers import LAYERS, Drawn, Magnitude, put_start

        drawn = Drawn(settings.rank_dropout, settings.module_dropout, settings.dylora_unit, settings.rslora)
        config = LoraConfig(lora_dropout=settings.dropout, bias="none", use_rslora=settings.rslora)
        with none_without_memory(), torch.device("meta"):
            for name in names:
                parent, _, own = name.rpartition(".")
                target = denoiser.get_submodule(name)
                rank, alpha = settings.size_for(target)
                adapted = next(layer for kind, layer in LAYERS.items() if isinstance(target, kind))
                layer = adapted(target, ADAPTER, config=config, r=rank, lora_alpha=rank if alpha is None else alpha)
                layer.drawn, layer.start = drawn, settings.init
                if settings.init:
                    put_start(layer, torch_dtype(settings.dtype))
                if settings.dora:
                    layer.lora_magnitude_vector[ADAPTER] = Magnitude(target)
                setattr(denoiser.get_submodule(parent), own, layer)

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The module in PEFT's layer."""
        from peft.tuners.lora import LoraLayer

        return module.get_base_layer() if isinstance(module, LoraLayer) else None

    def reset(self, module: nn.Module, dtype: torch.dtype) -> None:
        """PEFT's first values; or a start, and the lengths of rows, of the weight, which has its values."""
        from utils.adapters.peft_layers import set_lengths, set_start

        for factor in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
            factor.to_empty(device="cpu").to(dtype)
        module.reset_lora_parameters(ADAPTER, init_lora_weights=True)
        if module.start:
            set_start(module, dtype)
        if module.lora_magnitude_vector:
            set_lengths(module)

    def scale_of(self, module: nn.Module) -> float:
        """alpha / rank."""
        return module.scaling[ADAPTER]

    def beside(self, module: nn.Module) -> Tensors:
        """What a start has taken out of the weight."""
        return dict(zip((START_A, START_B), module.start_at_home, strict=True)) if module.start else {}

    def switched_off(self, module: nn.Module) -> AbstractContextManager[None]:
        """The layers skip their factors at a scale of 0."""
        return without_scale(module)

    def at_strength(self, module: nn.Module, strength: float) -> AbstractContextManager[None]:
        """See `AdapterKind`. With DoRA, the trained lengths stay those of the rows, as PEFT has it."""
        return with_scale(module, strength)

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """The factors of each of our modules, of which that of the file may be made."""
        down, up, scale = pair_of(entry)
        pairs, factors = divided(down, up, entry, names), {}
        trains_lengths = any(getattr(names.modules.get(module), MAGNITUDE, None) for module in pairs)
        if not trains_lengths and (DORA_SCALE in entry.tensors or MAGNITUDE in entry.tensors):
            what = DORA_SCALE if DORA_SCALE in entry.tensors else MAGNITUDE
            raise ValueError(f"'{entry.name}' has a {what}; set `dora = true` in [adapter] to go on from it")
        for module, (own_down, own_up) in pairs.items():
            ratio = scale / scale_of(module)
            factors[f"{module}{A}"] = own_down
            # In float32: float16 would lose small values.
            factors[f"{module}{B}"] = own_up if ratio == 1.0 else own_up.float() * ratio
        if trains_lengths:
            for module, lengths_O in magnitudes(entry, pairs, scale, names).items():
                if module in pairs:
                    shape = getattr(names.modules[module], MAGNITUDE)[ADAPTER].weight.shape
                    factors[f"{module}{M}"] = lengths_O.float().view(shape)
        return factors

    def ranks(self, entry: Entry, names: ModelNames) -> dict[str, int]:
        """The rank that a file has for each of our modules."""
        down, up, _ = pair_of(entry)
        return {module: len(own) for module, (own, _) in divided(down, up, entry, names).items()}

    def updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """One for each of our modules."""
        down, up, scale = pair_of(entry)
        up = up if scale == 1.0 else up.float() * scale
        updates = {module: LowRankUpdate(*pair) for module, pair in divided(down, up, entry, names).items()}
        return with_magnitudes(updates, entry, names) if MAGNITUDE in entry.tensors else updates

    def to_files(self, factors: Tensors, settings: LoraSettings, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """`adapter_model.safetensors` with keys "transformer.<module>.lora_A.weight", and PEFT's `adapter_config.json`;
        for ComfyUI a file with kohya's names.

        diffusers assumes alpha = rank unless the header says otherwise, and ComfyUI in any case unless a tensor does,
        which diffusers would not read. So alpha is the rank in the first file, and the scale is in `lora_A`, whose
        values do not begin at zero.
        """
        whole = _with_starts(factors)
        scales = {name.removesuffix(A): self._scale(name.removesuffix(A), wishes) for name in _downs(whole)}
        files: dict[str, AdapterFile | str] = {}
        if "diffusers" in wishes.formats:
            files |= _for_diffusers(whole, scales, settings, wishes)
        layout = wishes.names.layout
        if COMFYUI in wishes.formats and layout:
            lengths = partial(_dora_scale, whole, scales, wishes) if settings.dora else None
            pairs = rounded_factors(whole, dict.fromkeys(scales, 1.0), wishes)
            kohya = layout.lora_to_kohya(pairs, scales.__getitem__, wishes.names.rows_of, lengths)
            rank = _rank_of_most(whole)
            alpha = (settings.rank or rank) if settings.alpha is None else settings.alpha
            metadata = {**wishes.metadata, "rank": str(rank), "alpha": str(alpha)}
            files[COMFYUI_FILE] = AdapterFile(kohya, metadata)
        return files

    def in_lycoris(self, factors: Tensors, settings: LoraSettings, wishes: ExportWishes) -> Tensors:
        """See `AdapterKind`."""
        if settings.dora:
            raise ValueError("DoRA is in no file with other kinds of adapters")
        whole = _with_starts(factors)
        scales = {name.removesuffix(A): self._scale(name.removesuffix(A), wishes) for name in _downs(whole)}
        return in_lycoris_names(rounded_factors(whole, dict.fromkeys(scales, 1.0), wishes), wishes, scales)

    def _scale(self, module: str, wishes: ExportWishes) -> float:
        return self.scale_of(wishes.names.modules[module])


KINDS = (Lora(),)


def in_lycoris_names(factors: Tensors, wishes: ExportWishes, scales: Mapping[str, float] | None = None) -> Tensors:
    """Factors of a LoRA as LyCORIS has them: `lycoris_<module, _ for .>.lora_down.weight`, `.lora_up.weight`, and
    `.alpha`.

    Args:
        scales: of each module; default: 1.
    """
    named: Tensors = {}
    for name in _downs(factors):
        module, folder = name.removesuffix(A), f"{wishes.names.folder}."
        stem = f"lycoris_{module.removeprefix(folder).replace('.', '_')}"
        named |= {
            f"{stem}.lora_down.weight": factors[name],
            f"{stem}.lora_up.weight": factors[f"{module}{B}"],
            f"{stem}.alpha": torch.tensor(len(factors[name]) * (scales[module] if scales else 1.0)),
        }
    return named


def _downs(factors: Tensors) -> list[str]:
    return [name for name in factors if name.endswith(A)]


def _with_starts(factors: Tensors) -> Tensors:
    """Factors of twice the rank, where a start has been taken out of the weight: of what is trained less the start."""
    whole = {name: tensor for name, tensor in factors.items() if not name.endswith((START_A, START_B))}
    for name in [name for name in factors if name.endswith(START_A)]:
        module = name.removesuffix(START_A)
        down, up, start = (factors[f"{module}{part}"] for part in (A, B, START_A))
        whole[f"{module}{A}"] = torch.cat([down, start.to(down.dtype)])
        whole[f"{module}{B}"] = torch.cat([up, -factors[f"{module}{START_B}"].to(up.dtype)], dim=1)
    return whole


def _rank_of_most(factors: Tensors) -> int:
    return Counter(len(factors[name]) for name in _downs(factors)).most_common(1)[0][0]


def _for_diffusers(
    factors: Tensors, scales: Mapping[str, float], settings: LoraSettings, wishes: ExportWishes
) -> dict[str, AdapterFile | str]:
    rank, ranks = _rank_of_most(factors), {name.removesuffix(A): len(factors[name]) for name in _downs(factors)}
    others = {module: own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        # PEFT's layers come to those who load them in training mode, and would drop inputs when they draw.
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        # Of other ranks, with alphas for a scale of 1 too.
        **({"rank_pattern": others, "alpha_pattern": others} if others else {}),
        **({"use_dora": True} if settings.dora else {}),
        "base_model_name_or_path": wishes.metadata.get("base_model"),
    }
    folded = rounded_factors(factors, scales, wishes)
    named = {
        f"{part}.{own.removesuffix('.weight') if own.endswith(M) else own}": folded[name]
        for part, names in wishes.parts.items()
        for own, name in names.items()
        if name in folded
    }
    scale = Counter(scales.values()).most_common(1)[0][0]
    own = {"rank": str(rank), "alpha": str(rank), FOLDED_SCALE: repr(scale)}
    if different := {module: own for module, own in scales.items() if own != scale}:
        own[FOLDED_SCALES] = json.dumps(different)
    known_to_diffusers = json.dumps(_diffusers_metadata(wishes, config), sort_keys=True)
    return {
        ADAPTER_FILE: AdapterFile(named, {**wishes.metadata, **own, HEADER: known_to_diffusers}),
        CONFIG_FILE: json.dumps(config, indent=2),
    }


def _dora_scale(factors: Tensors, scales: Mapping[str, float], wishes: ExportWishes, module: str) -> torch.Tensor:
    """What ComfyUI is told of a module, which may be one without an update."""
    pair = (factors[f"{module}{A}"], factors[f"{module}{B}"]) if module in scales else None
    return dora_scale(wishes.names.weight(module), pair, scales.get(module, 1.0), factors.get(f"{module}{M}"))


def rounded_factors(factors: Tensors, scales: Mapping[str, float], wishes: ExportWishes) -> Tensors:
    """Factors in the type of files, with a scale in each `lora_A`. What float16 would lose stays float32, together with
    its other half; so do lengths of rows."""
    rounded = {name: tensor for name, tensor in factors.items() if name.endswith(M)}
    for name in _downs(factors):
        scale = scales[name.removesuffix(A)]
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


def _diffusers_metadata(wishes: ExportWishes, config: Mapping[str, Any]) -> dict[str, object]:
    """The metadata of each part's adapter that diffusers reads."""
    known: dict[str, object] = {}
    further = [key for key in ("rank_pattern", "alpha_pattern", "use_dora") if key in config]
    for part, names in wishes.parts.items():
        # Without the prefix of CLIP's files, diffusers finds them in newer and older CLIPs.
        modules = [name.removeprefix("text_model.") for name in sorted({own.split(Lora.mark)[0] for own in names})]
        values = {**config, "target_modules": modules}
        for pattern in ("rank_pattern", "alpha_pattern"):
            if pattern in config:
                own = {there: name.split(Lora.mark)[0] for there, name in names.items()}
                ranks = {there.split(Lora.mark)[0]: config[pattern].get(name) for there, name in own.items()}
                values[pattern] = {there: rank for there, rank in ranks.items() if rank}
        if modules:
            keys = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", *further)
            known |= {f"{part}.{key}": values[key] for key in keys}
    return known
