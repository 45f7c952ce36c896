"""Adapters that are applied before training begins: fused into the base weights, or frozen beside them. Training then
learns the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from utils import adapters
from utils.adapters import attach
from utils.adapters.kinds import Update
from utils.errors import UserError
from utils.quantised.linear import QuantisedLinear


class TensorSource(Protocol):
    """A model's tensors, which are read one by one under our names."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""


@dataclass(frozen=True)
class FusedSource:
    """The tensors of a model with adapters fused into them as they are read.

    Attributes:
        source: the tensors without them.
        changes: name of a tensor -> the updates that it gets, and their weights.
    """

    source: TensorSource
    changes: Mapping[str, Sequence[tuple[Update, float]]]

    def read(self, name: str) -> torch.Tensor:
        """One tensor; in float32 if it is changed."""
        values = self.source.read(name)
        for update, weight in self.changes.get(name, ()):
            values = values.float() + weight * update.delta().to(values.device)
        return values


def check_fits(denoiser: nn.Module, updates: Mapping[str, Update], source: str) -> None:
    """Whether updates fit the denoiser's modules.

    Raises:
        UserError: a module does not exist, or has another size.
    """
    shapes = {name: tuple(p.shape) for name, p in denoiser.named_parameters()}
    shapes |= {f"{name}.weight": module.shape for name, module in _quantised(denoiser)}
    for module, update in updates.items():
        shape = shapes.get(f"{module}.weight", shapes.get(f"{module}.base_layer.weight"))
        if shape is None:
            raise UserError.of(f"adapts '{module}', which this model does not have; is it another model's?", source)
        if update.shape != shape:
            raise UserError.of(
                f"adapts '{module}' as if it were {list(update.shape)}, and it is {list(shape)}; is it another "
                "model's?",
                source,
            )


@torch.no_grad()
def fuse(denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update], weight: float) -> None:
    """Adds `weight` times the updates to the plain weights that `layers` hold; quantised ones have theirs from
    `before_quantising`."""
    for module, update in _held(denoiser, layers, updates):
        if isinstance(module, QuantisedLinear):
            continue
        changed = module.weight.float() + weight * update.delta().to(module.weight.device)
        module.weight.copy_(changed.to(module.weight.dtype))


def before_quantising(
    denoiser: nn.Module, source: TensorSource, presets: Iterable[tuple[Mapping[str, Update], float]]
) -> FusedSource:
    """`source` for the weights of a denoiser, with updates and their weights added to those that are quantised when
    they are read, since afterwards they cannot be changed."""
    quantised = {attach.base_name(f"{name}.weight") for name, _ in _quantised(denoiser)}
    changes: dict[str, list[tuple[Update, float]]] = {}
    for updates, weight in presets:
        for module, update in updates.items():
            if f"{module}.weight" in quantised:
                changes.setdefault(f"{module}.weight", []).append((update, weight))
    return FusedSource(source, changes)


def attach_frozen(
    denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update], weight: float
) -> None:
    """Applies `weight` times the updates in the modules that `layers` hold, without changing their weights."""
    for module, update in _held(denoiser, layers, updates):
        assert isinstance(module, nn.Linear), "checked before"
        before = sum(name.startswith("preset") for name, _ in module.named_buffers())
        kept = {f"preset{number}": tensor for number, tensor in enumerate(update.kept(weight), start=before)}
        # Buffers move with the module, and are not parameters: they are neither trained nor exported.
        for name, tensor in kept.items():
            dtype = module.dtype if isinstance(module, QuantisedLinear) else module.weight.dtype
            module.register_buffer(name, tensor.to(dtype), persistent=False)
        module.register_forward_hook(partial(_add, update.applied, tuple(kept)))


def check_beside(denoiser: nn.Module, updates: Mapping[str, Update], source: str) -> None:
    """Whether updates can be applied beside their modules.

    Raises:
        UserError: an update belongs to a layer that is not a Linear.
    """
    others = [name for name in updates if not isinstance(adapters.base_of(denoiser.get_submodule(name)), nn.Linear)]
    if others:
        raise UserError.of(
            f"adapts '{others[0]}', which is no Linear; set `fused = true` in [[model.preset_adapters]]", source
        )


def _add(
    applied: Callable[..., torch.Tensor],
    kept: tuple[str, ...],
    module: nn.Linear,
    inputs: tuple[torch.Tensor],
    output: torch.Tensor,
) -> torch.Tensor:
    return output + applied(inputs[0], *map(module.get_buffer, kept))


def _held(
    denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update]
) -> list[tuple[nn.Module, Update]]:
    held = {id(module) for layer in layers for module in layer.modules()}
    found = [(adapters.base_of(denoiser.get_submodule(name)), update) for name, update in updates.items()]
    return [(module, update) for module, update in found if id(module) in held]


def _quantised(denoiser: nn.Module) -> list[tuple[str, QuantisedLinear]]:
    return [(name, module) for name, module in denoiser.named_modules() if isinstance(module, QuantisedLinear)]
