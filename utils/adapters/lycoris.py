"""What the kinds of adapters have in common whose files are LyCORIS's: a layer, and a kind.

Shapes: O outputs of a layer, I inputs; of convolutions too the cells of a kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from utils.adapters.base_weight import shape_of
from utils.adapters.differences import rows_of_update
from utils.adapters.dropping import keeps
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
    ModelNames,
    Tensors,
    Update,
    WithoutMore,
    without_scale,
)
from utils.settings.schema import AdapterSettings

logger = logging.getLogger(__name__)

PREFIX = "lycoris_"


class AdaptedLayer(nn.Module):
    """A Linear or a convolution with an adapter, whose factors are on the meta device until `reset`.

    Attributes:
        shapes: of the factors, by name.
        scaling: the scale by name of the adapter, as in PEFT's layers.
        strength: by which its change is multiplied in addition, for a while.
    """

    def __init__(self, base_layer: nn.Module, settings: AdapterSettings, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.base_layer, self.shapes = base_layer, dict(shapes)
        self.dropout = nn.Dropout(settings.dropout)
        self.of_rows = getattr(settings, "rank_dropout", 0.0)
        self.of_module = getattr(settings, "module_dropout", 0.0)
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
        self.scaling = {ADAPTER: 1.0}
        self.strength = 1.0

    def reset(self, dtype: torch.dtype) -> None:
        """Gives the factors their first values, which have no effect yet, on the CPU."""
        for name, shape in self.shapes.items():
            values = torch.zeros(shape, dtype=dtype)
            self.first_values(name, values)
            self.register_parameter(name, nn.Parameter(values))

    def first_values(self, name: str, values: torch.Tensor) -> None:
        """Draws the first values of a factor; otherwise they are zeros."""

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a training step does, beside `dropout`."""
        return bool(self.of_rows or self.of_module)

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.base_layer, nn.Conv2d)

    @property
    def out_features(self) -> int:
        """That of the base, or its channels."""
        return shape_of(self.base_layer)[0]

    @property
    def weight(self) -> torch.Tensor:
        """That of the base, which some blocks read."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """That of the base."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        if self.scaling[ADAPTER] == 0:
            return result
        change = self.change(x, result).to(result.dtype)
        if self.strength != 1.0:
            change = change * self.strength
        if self.training and self.of_rows:
            kept = (torch.rand(self.out_features, device=x.device) >= self.of_rows).to(x.dtype) / (1 - self.of_rows)
            change = change * (kept[:, None, None] if self.is_convolution else kept)
        if self.training and self.of_module:
            change = change * keeps(self.of_module, x)
        return result + change

    def change(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the base's `result` for the inputs `x`."""
        raise NotImplementedError


class _OfFactors(torch.autograd.Function):
    """A Linear or convolution of `x` by a weight that is made of factors. Only these are kept for the backward pass,
    since each weight is as large as the one that it changes."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, make: Callable[..., torch.Tensor], base: nn.Module, *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.make, ctx.base = make, base
        weight = make(*(factor.to(x.dtype) for factor in factors))
        if isinstance(base, nn.Conv2d):
            return functional.conv2d(x, weight, None, *_geometry(base))
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_() for factor in factors]
            made = ctx.make(*(leaf.to(x.dtype) for leaf in leaves))
        weight, of_x = made.detach(), None
        if isinstance(ctx.base, nn.Conv2d):
            geometry = _geometry(ctx.base)
            if ctx.needs_input_grad[0]:
                of_x = nn.grad.conv2d_input(x.shape, weight, gradient, *geometry)
            of_weight = nn.grad.conv2d_weight(x, weight.shape, gradient, *geometry)
        else:
            if ctx.needs_input_grad[0]:
                of_x = gradient @ weight
            of_weight = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return of_x, None, None, *torch.autograd.grad(made, leaves, of_weight)


def _geometry(base: nn.Conv2d) -> tuple[Any, ...]:
    return base.stride, base.padding, base.dilation, base.groups


def by_made_weight(
    x: torch.Tensor, base: nn.Module, make: Callable[..., torch.Tensor], factors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`x` through a weight of the form of `base`'s, which `make` makes of factors in the type of `x`."""
    return _OfFactors.apply(x, make, base, *factors)


class LycorisKind(WithoutMore):
    """What the kinds have in common; see `AdapterKind`. A subclass has its facts, and what is not defined here."""

    name: ClassVar[str]
    read_by: ClassVar[str] = "diffusers itself reads no such adapter, LyCORIS applies the file to diffusers' models"
    mixes: ClassVar[bool] = True
    layer: ClassVar[type[AdaptedLayer]]
    scaled: ClassVar[tuple[str, ...]] = ()
    """Of the factors of which another scale can be a part, those that take it: the first that is there."""

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: Any) -> None:
        """Replaces modules by the kind's layers."""
        for name in names:
            parent, _, own = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), own, self.adapted(denoiser, name, settings))

    def adapted(self, denoiser: nn.Module, name: str, settings: Any) -> AdaptedLayer:
        """The layer in place of a module."""
        return self.layer(denoiser.get_submodule(name), settings)

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The module in the layer."""
        return module.base_layer if isinstance(module, self.layer) else None

    def reset(self, module: AdaptedLayer, dtype: torch.dtype) -> None:
        """LyCORIS's first values."""
        module.reset(dtype)

    def scale_of(self, module: AdaptedLayer) -> float:
        """alpha / rank; 1 where there is no rank."""
        return module.scaling[ADAPTER]

    def switched_off(self, module: AdaptedLayer) -> AbstractContextManager[None]:
        """A layer does nothing at a scale of 0."""
        return without_scale(module)

    @contextmanager
    def at_strength(self, module: AdaptedLayer, strength: float) -> Iterator[None]:
        """See `AdapterKind`."""
        module.strength = strength
        try:
            yield
        finally:
            module.strength = 1.0

    def update_from(self, tensors: Tensors, scale: float, shape: tuple[int, ...], name: str) -> Update:
        """The update by a module's tensors, for a weight of this shape.

        Raises:
            ValueError: one is missing, or they do not fit each other; `name` is what the module is called.
        """
        raise NotImplementedError

    def rank_of(self, tensors: Tensors) -> int | None:
        """The rank by which an alpha is divided; None where none is."""
        raise NotImplementedError

    def alpha_of(self, tensors: Tensors, scale: float) -> float | None:
        """What a file says as `.alpha`; None if that is nothing."""
        return scale * (self.rank_of(tensors) or 1)

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """LyCORIS's factors of a module, which is one of ours."""
        if DORA_SCALE in entry.tensors:
            raise ValueError(f"'{entry.name}' has a dora_scale; training goes on from plain {self.name}s alone")
        modules, swap = entry.target
        if len(modules) > 1 or swap:
            raise ValueError(
                f"the {self.name} of '{entry.name}' is for {len(modules)} modules of this model at once ({modules[0]} "
                "...), and cannot be divided among them; it can be a [[model.preset_adapters]] with `fused = true`"
            )
        self._update(entry, names)
        ratio = self._scale(entry) / scale_of(modules[0])
        strong = next((part for part in self.scaled if part in entry.tensors), None)
        layer = names.modules.get(modules[0])
        shapes = layer.shapes if isinstance(layer, self.layer) else {}
        return {
            # In float32: float16 would lose small values.
            f"{modules[0]}.{part}": _shaped(
                tensor.float() * ratio if part == strong and ratio != 1.0 else tensor, shapes.get(part)
            )
            for part, tensor in entry.tensors.items()
            if part != ALPHA
        }

    def updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """One for each of our modules."""
        return rows_of_update(entry, names, self._update(entry, names))

    def _update(self, entry: Entry, names: ModelNames) -> Update:
        modules = entry.target.modules
        shape = (sum(map(names.rows_of, modules)), *names.shapes[f"{modules[0]}.weight"][1:])
        return self.update_from(dict(entry.tensors), self._scale(entry), shape, entry.name)

    def _scale(self, entry: Entry) -> float:
        """alpha / rank of a file's module; 1 without one of them."""
        rank = self.rank_of(dict(entry.tensors))
        return 1.0 if rank is None or ALPHA not in entry.tensors else entry.tensors[ALPHA].item() / rank

    def to_files(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """`adapter_model.safetensors` in the names of LyCORIS, `lycoris_<module, _ for .>.lokr_w1`, ..., `.alpha`; for
        ComfyUI, which knows these of some models only, a file with names by which it finds each module. What it knows
        only as a part of another module is there as a whole difference."""
        by_module = self._by_module(factors, wishes)
        files: dict[str, AdapterFile | str] = {}
        if "diffusers" in wishes.formats:
            files[ADAPTER_FILE] = AdapterFile(self.in_lycoris(factors, settings, wishes), wishes.metadata)
        layout = wishes.names.layout
        if COMFYUI in wishes.formats and layout:
            theirs = layout.comfyui_names(by_module)
            whole = self._differences(factors, set(by_module) - set(theirs), wishes)
            files[COMFYUI_FILE] = AdapterFile({**_named(by_module, theirs), **whole}, wishes.metadata)
        return files

    def in_lycoris(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> Tensors:
        """See `AdapterKind`."""
        by_module = self._by_module(factors, wishes)
        beginning = f"{wishes.names.folder}."
        return _named(by_module, {own: PREFIX + own.removeprefix(beginning).replace(".", "_") for own in by_module})

    def _by_module(self, factors: Tensors, wishes: ExportWishes) -> dict[str, Tensors]:
        """The tensors that a file has for each module, without the module's name."""
        found: dict[str, Tensors] = {}
        for module, own in _grouped(factors).items():
            alpha = self.alpha_of(own, self.scale_of(wishes.names.modules[module]))
            found[module] = {} if alpha is None else {ALPHA: torch.tensor(float(alpha))}
            found[module] |= {part: wishes.rounded(tensor) for part, tensor in own.items()}
        return found

    def _differences(self, factors: Tensors, modules: set[str], wishes: ExportWishes) -> Tensors:
        """The updates of these modules as whole differences of those of which they are parts there."""
        names, found, left, adapted = wishes.names, {}, set(modules), _grouped(factors)
        dtype = wishes.dtype or next(iter(factors.values())).dtype

        def delta(module: str) -> torch.Tensor:
            shape = names.shapes[f"{module}.weight"]
            if module not in adapted:
                return next(iter(factors.values())).new_zeros(shape, dtype=torch.float32)
            update = self.update_from(adapted[module], self.scale_of(names.modules[module]), shape, module)
            return update.delta(names.weight(module) if update.needs_base else torch.empty(shape, device="meta"))

        for there, (parts, swap) in names.layout.targets(names.shapes) if left else ():
            if left.intersection(parts):
                whole = torch.cat([delta(part) for part in parts])
                whole = torch.cat(list(reversed(whole.chunk(2)))) if swap else whole
                found[f"diffusion_model.{there}.diff"] = whole.to(dtype)
                left -= set(parts)
        if left:
            raise ValueError(
                f"no place in the original layout for adapters of {len(left)} modules, first '{min(left)}'"
            )
        if found:
            logger.info(
                "the %s for ComfyUI has %d whole differences of weights, %.0f MiB, since ComfyUI does not know their "
                'parts; save_format = "diffusers" leaves that file out',
                self.name,
                len(found),
                sum(tensor.nbytes for tensor in found.values()) / 2**20,
            )
        return found


def _shaped(tensor: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    """A factor in the shape that it has here, of as many numbers: kernels may be a row in files, or not."""
    fits = shape is not None and tensor.numel() == math.prod(shape) and tensor.shape[:1] == shape[:1]
    return tensor.reshape(shape) if fits else tensor


def _grouped(factors: Tensors) -> dict[str, Tensors]:
    """The tensors of each module, without its name."""
    found: dict[str, Tensors] = {}
    for name, tensor in factors.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


def _named(by_module: Mapping[str, Tensors], names: Mapping[str, str]) -> Tensors:
    return {
        f"{names[module]}.{part}": tensor
        for module, own in by_module.items()
        if module in names
        for part, tensor in own.items()
    }


def product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """(O, R) @ (R, I * C); with a core (R, R, ...), where the others are (R, O) and (R, I), (O, I, ...)."""
    return a @ b if core is None else torch.einsum("rshw,ro,si->oihw", core, a, b)


def low_or_whole(name: str, rows: int, columns: int, rank: int | None, cells: int = 1) -> Iterator[tuple[str, tuple]]:
    """The parameters of a factor (rows, columns * cells). If two matrices of this rank would not be smaller than one,
    it is a whole one."""
    if rank is None or rank >= max(rows, columns) / 2:
        yield name, (rows, columns * cells)
    else:
        yield f"{name}_a", (rows, rank)
        yield f"{name}_b", (rank, columns * cells)
