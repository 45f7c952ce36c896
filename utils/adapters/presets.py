"""Adapters that are there before training begins: fused into the base weights, or at work beside them, frozen. What is
trained then learns the difference to them.

Shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from utils.adapters.lokr import LokrLinear
from utils.errors import UserError


class Update(NamedTuple):
    """What an adapter adds to a layer's weight: up @ down. Of a convolution they are (R, I, ...) and (O, R, 1, ...)."""

    down: torch.Tensor
    up: torch.Tensor

    def delta(self) -> torch.Tensor:
        """The whole of it in float32, in the shape of the weight."""
        change = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return change.view(len(self.up), *self.down.shape[1:])


def updates_of(denoiser: nn.Module, factors: Mapping[str, torch.Tensor], source: str) -> dict[str, Update]:
    """LoRA factors (`<module>.lora_A.weight`, `.lora_B.weight`) by module, checked against the denoiser.

    Raises:
        UserError: a module is not there, or of another size.
    """
    shapes = {name: tuple(p.shape) for name, p in denoiser.named_parameters()}
    updates = {}
    for key, down in factors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        update = Update(down, factors[f"{module}.lora_B.weight"])
        shape = shapes.get(f"{module}.weight", shapes.get(f"{module}.base_layer.weight"))
        if shape is None:
            raise UserError.of(f"adapts '{module}', which this model has not; is it another model's?", source)
        if (len(update.up), *down.shape[1:]) != shape:
            raise UserError.of(
                f"adapts '{module}' as if it were {[len(update.up), *down.shape[1:]]}, and it is {list(shape)}; is it "
                "another model's?",
                source,
            )
        updates[module] = update
    return updates


@torch.no_grad()
def fuse(denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update], weight: float) -> None:
    """Adds so much of the updates to the weights that `layers` hold."""
    for module, update in _held(denoiser, layers, updates):
        changed = module.weight.float() + weight * update.delta().to(module.weight.device)
        module.weight.copy_(changed.to(module.weight.dtype))


def attach_frozen(
    denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update], weight: float
) -> None:
    """Lets so much of the updates work in the modules that `layers` hold, beside weights that stay as they are."""
    for module, update in _held(denoiser, layers, updates):
        assert isinstance(module, nn.Linear), "checked before"
        number = sum(name.startswith("preset_down") for name, _ in module.named_buffers())
        # Buffers follow the module to its device, and are no parameters: neither trained nor exported.
        for name, factor in (("down", update.down * weight), ("up", update.up)):
            module.register_buffer(f"preset_{name}{number}", factor.to(module.weight.dtype), persistent=False)
        module.register_forward_hook(partial(_add, number))


def check_beside(denoiser: nn.Module, updates: Mapping[str, Update], source: str) -> None:
    """Whether updates can work beside their modules.

    Raises:
        UserError: one is of a layer that is not a Linear.
    """
    others = [name for name in updates if not isinstance(_base(denoiser, name), nn.Linear)]
    if others:
        raise UserError.of(
            f"adapts '{others[0]}', which is no Linear; set `fused = true` in [[model.preset_adapters]]", source
        )


def _add(number: int, module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    down, up = module.get_buffer(f"preset_down{number}"), module.get_buffer(f"preset_up{number}")
    return output + functional.linear(functional.linear(inputs[0], down), up)


def _held(
    denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update]
) -> list[tuple[nn.Module, Update]]:
    held = {id(module) for layer in layers for module in layer.modules()}
    found = [(_base(denoiser, name), update) for name, update in updates.items()]
    return [(module, update) for module, update in found if id(module) in held]


def _base(denoiser: nn.Module, name: str) -> nn.Module:
    module = denoiser.get_submodule(name)
    return module.get_base_layer() if isinstance(module, (BaseTunerLayer, LokrLinear)) else module
