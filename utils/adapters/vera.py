"""VeRA: two random matrices, which all modules share and nothing trains, and two vectors of each module, which are
trained (Kopiczko et al. 2024), in PEFT's files.

The update of a weight is diag(b) B diag(d) A, of the first rows of B and columns of A that the weight has: a product of
two matrices of low rank, as which ComfyUI has it.

Shapes: R rank, O outputs and I inputs of a layer; the largest of all modules in the matrices that are shared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from utils.adapters.base_weight import shape_of
from utils.adapters.kinds import (
    ADAPTER_FILE,
    COMFYUI,
    COMFYUI_FILE,
    AdapterFile,
    Entry,
    ExportWishes,
    ModelNames,
    Tensors,
    Update,
)
from utils.adapters.lora import A, B, rounded_factors
from utils.adapters.lora_factors import LowRankUpdate, divided
from utils.adapters.lycoris import AdaptedLayer, LycorisKind
from utils.adapters.peft_settings import CONFIG_FILE, in_pefts_names
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, Natural, Positive, Share

D, B_VECTOR = "vera_lambda_d", "vera_lambda_b"
SHARED = ("vera_A", "vera_B")
PEFT_MODEL = "base_model."


class VeraSettings(AdapterSettings):
    """`type = "vera"`: VeRA of PEFT, which trains two vectors of each layer between random matrices."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "rank", "projection_prng_key", "include", "exclude")
    of_files: ClassVar[tuple[str, ...]] = ("rank", "projection_prng_key")

    type: Literal["vera"]
    """Kind of adapter."""
    rank: Count
    """Rank of the update of each layer. Of a layer as many numbers are trained as it has ranks and outputs, so that it
    may be large, as 256."""
    d_initial: Positive = 0.1
    """First value of the vectors between both matrices; those behind them begin at zero."""
    projection_prng_key: Natural = 0
    """Seed of the matrices, as PEFT draws them."""
    module_dropout: Share = 0.0
    """Fraction of the adapted modules that a step trains without."""

    def problems(self, model: ModelSettings) -> Iterator[tuple[str, str]]:
        """See `AdapterSettings`."""
        yield from super().problems(model)
        if self.convolutions:
            yield "convolutions", "are not adapted by VeRA, for which PEFT has Linears alone; leave it out"
        for number, rule in enumerate(self.rules, start=1):
            if rule.rank:
                yield f"rules[{number}].rank", "is one for all modules of VeRA, which share its matrices; leave it out"


class Projections(nn.Module):
    """The matrices that all adapted modules of a denoiser share, on the meta device until `draw`.

    Attributes:
        largest: outputs and inputs that the modules have at most.
    """

    def __init__(self, rank: int, key: int) -> None:
        super().__init__()
        self.rank, self.key, self.largest = rank, key, (0, 0)
        self._values: tuple[torch.Tensor, torch.Tensor] | None = None

    def make_room(self, outputs: int, inputs: int) -> None:
        """For a module of this size."""
        self.largest, self._values = (max(self.largest[0], outputs), max(self.largest[1], inputs)), None
        for name, shape in zip(SHARED, ((self.rank, self.largest[1]), (self.largest[0], self.rank)), strict=True):
            self.register_buffer(name, torch.empty(shape, device="meta"), persistent=False)

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Their values, on the CPU, which are drawn once."""
        self._values = self._values or drawn(self.key, self.rank, self.largest)
        return self._values

    def draw(self) -> None:
        """Gives them their values unless they have them."""
        if self.get_buffer(SHARED[0]).is_meta:
            for name, values in zip(SHARED, self.values(), strict=True):
                self.register_buffer(name, values, persistent=False)


def drawn(key: int, rank: int, largest: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, I) and B (O, R) as PEFT draws them: uniformly, by He's rule for the inputs of each."""
    generator, (outputs, inputs) = torch.Generator(device="cpu").manual_seed(key), largest
    made = []
    for shape, fan in (((rank, inputs), inputs), ((outputs, rank), rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(fan))
        made.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return made[0], made[1]


class VeraLayer(AdaptedLayer):
    """A Linear and its update diag(b) B diag(d) A."""

    def __init__(self, base_layer: nn.Module, settings: VeraSettings, projections: Projections) -> None:
        self.outputs, self.inputs = shape_of(base_layer)
        super().__init__(base_layer, settings, {D: (settings.rank,), B_VECTOR: (self.outputs,)})
        self.d_initial, self.projections = settings.d_initial, projections

    def reset(self, dtype: torch.dtype) -> None:
        """See `AdaptedLayer`."""
        self.projections.draw()
        super().reset(dtype)

    def first_values(self, name: str, values: torch.Tensor) -> None:
        """PEFT's."""
        values.fill_(self.d_initial if name == D else 0.0)

    def change(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        a, b = (self.projections.get_buffer(name) for name in SHARED)
        d, behind = (self.get_parameter(name).to(x.dtype) for name in (D, B_VECTOR))
        inner = functional.linear(self.dropout(x), a[:, : self.inputs].to(x.dtype)) * d
        return functional.linear(inner, b[: self.outputs].to(x.dtype)) * behind


class Vera(LycorisKind):
    """See `AdapterKind`."""

    settings = VeraSettings
    name = "VeRA"
    mark = ".vera_"
    endings = {f".{part}{ending}": part for part in (D, B_VECTOR) for ending in ("", ".default")}
    once = tuple(f"{name}{ending}" for name in SHARED for ending in ("", ".default"))
    layer = VeraLayer
    mixes: ClassVar[bool] = False
    read_by: ClassVar[str] = (
        "diffusers itself reads no such adapter, PEFT applies it to diffusers' models; ComfyUI has it as a LoRA"
    )

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: VeraSettings) -> None:
        """All of a denoiser share their matrices, also those of other rules."""
        there = (module.projections for module in denoiser.modules() if isinstance(module, VeraLayer))
        shared = next(there, None) or Projections(settings.rank, settings.projection_prng_key)
        for name in names:
            parent, _, own = name.rpartition(".")
            target = denoiser.get_submodule(name)
            shared.make_room(*shape_of(target))
            setattr(denoiser.get_submodule(parent), own, VeraLayer(target, settings, shared))

    def rank_of(self, tensors: Tensors) -> int | None:
        """None: there is no alpha."""
        return None

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """The vectors of a module of ours, which have the same matrices there as here.

        Raises:
            ValueError: they have others.
        """
        factors, layer = super().factors(entry, names, scale_of), names.modules.get(entry.target.modules[0])
        if not isinstance(layer, VeraLayer):
            # What is not adapted here is told with all that have no counterpart.
            return factors
        sizes = (slice(None), slice(layer.inputs)), (slice(layer.outputs), slice(None))
        for ours, theirs, size in zip(layer.projections.values(), _projections_of(entry), sizes, strict=True):
            own, there = ours[size], theirs[size].float()
            if there.shape != own.shape or not torch.allclose(there, own, atol=1e-6):
                raise ValueError(
                    f"the matrices that its modules share are other ones than this run's, at '{entry.name}'; set rank "
                    "and `projection_prng_key` to what its adapter_config.json says, and adapt the same modules; as it "
                    "is, it can be a [[model.preset_adapters]]"
                )
        return factors

    def update_from(self, tensors: Tensors, scale: float, shape: tuple[int, ...], name: str) -> LowRankUpdate:
        """See `LycorisKind`; with the matrices among the tensors."""
        for part, size in ((B_VECTOR, shape[0]), (D, None)):
            if part not in tensors or tensors[part].ndim != 1 or size not in (None, len(tensors[part])):
                what = list(tensors[part].shape) if part in tensors else "nothing"
                raise ValueError(f"the {part} of the VeRA of '{name}' is {what}, and the module is {list(shape)}")
        a, b = (tensors[key] for key in SHARED)
        rank = len(tensors[D])
        if len(shape) != 2 or a.shape[1] < shape[1] or len(b) < shape[0] or not len(a) == b.shape[1] == rank:
            raise ValueError(
                f"the matrices of the VeRA, {list(a.shape)} and {list(b.shape)}, do not fit '{name}', {list(shape)}, "
                f"with {rank} ranks"
            )
        return _product(a, b, tensors[D], tensors[B_VECTOR], shape)

    def _update(self, entry: Entry, names: ModelNames) -> Update:
        found = dict(zip(SHARED, _projections_of(entry), strict=True))
        modules = entry.target.modules
        shape = (sum(map(names.rows_of, modules)), *names.shapes[f"{modules[0]}.weight"][1:])
        return self.update_from({**entry.tensors, **found}, 1.0, shape, entry.name)

    def updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """One for each of our modules."""
        update = self._update(entry, names)
        return {module: LowRankUpdate(*pair) for module, pair in divided(*update, entry, names).items()}

    def to_files(self, factors: Tensors, settings: VeraSettings, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """PEFT's `adapter_model.safetensors`, with the matrices, and `adapter_config.json`; for ComfyUI the same as a
        LoRA."""
        modules = sorted(name.removesuffix(f".{D}") for name in factors if name.endswith(f".{D}"))
        shapes = {module: wishes.names.shapes[f"{module}.weight"] for module in modules}
        own = wishes.names.modules[modules[0]]
        if not isinstance(own, VeraLayer):
            raise ValueError("a VeRA is written with the matrices of a run; `merge` writes it as a LoRA")
        a, b = own.projections.values()
        files: dict[str, AdapterFile | str] = {}
        if "diffusers" in wishes.formats:
            tensors = in_pefts_names({name: wishes.rounded(tensor) for name, tensor in factors.items()}, wishes)
            tensors |= _shared_of_parts(a, b, shapes, wishes)
            config = {
                "peft_type": "VERA",
                "r": settings.rank,
                "target_modules": sorted({one.rpartition(".")[0] for names in wishes.parts.values() for one in names}),
                "projection_prng_key": settings.projection_prng_key,
                "save_projection": True,
                "vera_dropout": 0.0,
                "d_initial": settings.d_initial,
                "bias": "none",
                "base_model_name_or_path": wishes.metadata.get("base_model"),
            }
            files[ADAPTER_FILE] = AdapterFile(tensors, wishes.metadata)
            files[CONFIG_FILE] = json.dumps(config, indent=2)
        if COMFYUI in wishes.formats and wishes.names.layout:
            pairs: Tensors = {}
            for module in modules:
                vectors = (factors[f"{module}.{part}"].float() for part in (D, B_VECTOR))
                pairs |= zip((f"{module}{A}", f"{module}{B}"), _product(a, b, *vectors, shapes[module]), strict=True)
            rounded = rounded_factors(pairs, dict.fromkeys(modules, 1.0), wishes)
            metadata = {**wishes.metadata, "rank": str(settings.rank), "alpha": str(settings.rank)}
            kohya = wishes.names.layout.lora_to_kohya(rounded, 1.0, wishes.names.rows_of)
            files[COMFYUI_FILE] = AdapterFile(kohya, metadata)
        return files


KINDS = (Vera(),)


def _product(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, behind: torch.Tensor, shape: tuple[int, ...]
) -> LowRankUpdate:
    """The update of a weight of this shape: (R, I) and (O, R)."""
    down, up = a[:, : shape[1]].to(d.device).float(), b[: shape[0]].to(d.device).float()
    return LowRankUpdate(d.float()[:, None] * down, behind.float()[:, None] * up)


def _shared_of_parts(a: torch.Tensor, b: torch.Tensor, shapes: Mapping[str, Any], wishes: ExportWishes) -> Tensors:
    """The matrices as large as PEFT makes them for the modules of each part. They stay float32: 16 bits of them would
    be other matrices."""
    found: Tensors = {}
    parts = {part: [name.removesuffix(f".{D}") for name in names.values()] for part, names in wishes.parts.items()}
    for part, names in parts.items():
        own = [shapes[name] for name in names if name in shapes]
        if own:
            beginning = f"{part}." if sum(map(bool, parts.values())) > 1 else ""
            outputs, inputs = (max(sizes) for sizes in zip(*own, strict=True))
            for name, values in zip(SHARED, (a[:, :inputs], b[:outputs]), strict=True):
                found[f"{beginning}{PEFT_MODEL}{name}"] = values.contiguous().clone()
    return found


def _projections_of(entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices that a file has for a module.

    Raises:
        ValueError: it has none.
    """
    beginning, found = entry.name.partition(PEFT_MODEL)[0], []
    for name in SHARED:
        keys = [f"{beginning}{PEFT_MODEL}{name}", f"{beginning}{PEFT_MODEL}{name}.default", name]
        tensor = next((entry.file.tensors[key] for key in keys if key in entry.file.tensors), None)
        if tensor is None or tensor.ndim != 2:
            raise ValueError(
                f"the file has no {name}, which '{entry.name}' shares with other modules; save it with "
                "`save_projection=True`, as PEFT does unless it is told otherwise"
            )
        found.append(tensor)
    return found[0], found[1]
