"""Adapters that are applied before training begins: fused into the base weights, or frozen beside them. Training then
learns the difference.

Updates are known by the names of the parameters that they change.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
            values = values.float()
            values = values + weight * update.delta(values).to(values.device)
        return values


def base_shapes(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a denoiser's parameters and quantised weights, by name, without the factors of an adapter."""
    parameters = {
        attach.base_name(name): tuple(parameter.shape)
        for name, parameter in denoiser.named_parameters()
        if not attach.is_factor(name)
    }
    return parameters | {
        attach.base_name(f"{name}.weight"): tuple(module.shape) for name, module in _quantised(denoiser)
    }


def check_fits(denoiser: nn.Module, updates: Mapping[str, Update], source: str) -> None:
    """Whether updates fit the denoiser's parameters.

    Raises:
        UserError: a parameter does not exist, or has another size; says how many do fit.
    """
    shapes = base_shapes(denoiser)
    wrong = {name: update for name, update in updates.items() if update.shape != shapes.get(name)}
    if not wrong:
        return
    name, update = next(iter(wrong.items()))
    module, counted = name.removesuffix(".weight"), f"{len(updates) - len(wrong)} of {len(updates)} fit"
    if name not in shapes:
        raise UserError.of(
            f"adapts '{module}', which has no weight in this model; {counted}; is it another model's?", source
        )
    raise UserError.of(
        f"adapts '{module}' as if it were {list(update.shape)}, and it is {list(shapes[name])}; {counted}; is it "
        "another model's, or one of another size?",
        source,
    )


@torch.no_grad()
def fuse(denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update], weight: float) -> None:
    """Adds `weight` times the updates to the plain parameters that `layers` hold; quantised ones have theirs from
    `before_quantising`."""
    for module, own, update in _held(denoiser, layers, updates):
        if isinstance(module, QuantisedLinear) and own == "weight":
            continue
        parameter = getattr(module, own)
        base = parameter.float()
        # Not into its own memory: pages of a mapped file that are written to stay as long as the file is open.
        parameter.data = (base + weight * update.delta(base).to(base.device)).to(parameter.dtype)


def changes_of(
    given: Iterable[tuple[Mapping[str, Update], float]], names: Container[str] | None = None
) -> dict[str, list[tuple[Update, float]]]:
    """The updates of each tensor, with their weights; of these tensors, or of all."""
    changes: dict[str, list[tuple[Update, float]]] = {}
    for updates, weight in given:
        for name, update in updates.items():
            if names is None or name in names:
                changes.setdefault(name, []).append((update, weight))
    return changes


def before_quantising(
    denoiser: nn.Module, source: TensorSource, presets: Iterable[tuple[Mapping[str, Update], float]]
) -> FusedSource:
    """`source` for the weights of a denoiser, with updates and their weights added to those that are quantised when
    they are read, since afterwards they cannot be changed."""
    quantised = {attach.base_name(f"{name}.weight") for name, _ in _quantised(denoiser)}
    return FusedSource(source, changes_of(presets, quantised))


def attach_frozen(
    denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update], weight: float
) -> None:
    """Applies `weight` times the updates in the modules that `layers` hold, without changing their weights."""
    for module, own, update in _held(denoiser, layers, updates):
        assert isinstance(module, nn.Linear) and own == "weight", "checked before"
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
        UserError: an update belongs to something else than the weight of a Linear, or is no sum.
    """
    for name, update in updates.items():
        module, _, own = name.rpartition(".")
        is_linear = isinstance(adapters.base_of(denoiser.get_submodule(module)), nn.Linear)
        if not (is_linear and own == "weight" and update.fits_beside):
            reason = "in a form that only fits into weights" if is_linear and own == "weight" else "which is no Linear"
            raise UserError.of(
                f"adapts '{name.removesuffix('.weight')}', {reason}; set `fused = true` in [[model.preset_adapters]]",
                source,
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
) -> list[tuple[nn.Module, str, Update]]:
    """(module, name of its parameter, update) of the parameters that `layers` hold."""
    held = {id(part) for layer in layers for part in (*layer.modules(), *layer.parameters())}
    found = []
    for name, update in updates.items():
        path, _, own = name.rpartition(".")
        module = adapters.base_of(denoiser.get_submodule(path))
        # A parameter of the whole denoiser lies in a layer of its own.
        if id(module) in held or id(getattr(module, own, None)) in held:
            found.append((module, own, update))
    return found


def _quantised(denoiser: nn.Module) -> list[tuple[str, QuantisedLinear]]:
    return [(name, module) for name, module in denoiser.named_modules() if isinstance(module, QuantisedLinear)]
