"""A model with convolutions and a Linear, to be adapted; and what is done with its adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.kinds import AdapterFile, ExportWishes, ModelNames
from utils.diffusion.seeds import normal
from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise
from utils.run.tensor_file import write_tensors
from utils.settings.schema import AdapterSettings

PREFIX = "transformer"


class Net(nn.Module):
    """A convolution of several cells, one of a single cell, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        block = {"conv": nn.Conv2d(6, 8, 3, padding=1), "cell": nn.Conv2d(8, 8, 1), "to_q": nn.Linear(8, 6)}
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.blocks[0]
        x = block["cell"](block["conv"](x).relu())
        return block["to_q"](x.flatten(2).transpose(1, 2))


def net(form: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    if form:
        values = model.blocks[0]["to_q"].weight.detach().clone()
        quantise(model, ["blocks.0.to_q"], FORMATS[form])
        model.blocks[0]["to_q"].fill(values)
    return model


def frozen(model: nn.Module) -> nn.Module:
    """The model as it is under an adapter: torch multiplies by weights that need gradients in another order."""
    return model.requires_grad_(False)


def inputs() -> torch.Tensor:
    return normal((3, 6, 5, 5), 0, "x")


def begun(settings: AdapterSettings, model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    model = net() if model is None else model
    attach.attach(model, ["blocks"], settings)
    attach.initialise(model, [model], settings, seed)
    return model


def factors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {attach.base_name(name): p for name, p in model.named_parameters() if attach.is_factor(name)}


def moved(settings: AdapterSettings, model: nn.Module | None = None) -> nn.Module:
    """With an adapter that has an effect."""
    model = begun(settings, model)
    with torch.no_grad():
        for name, factor in factors_of(model).items():
            factor.add_(normal(tuple(factor.shape), 0, "moved", name), alpha=0.1)
    return model


def names_of(model: nn.Module) -> ModelNames:
    base = dict(net().named_parameters())
    return ModelNames(
        PREFIX, attach.adaptable(model), None, presets.base_shapes(model), read=lambda name: base[name].detach()
    )


def exported(model: nn.Module, settings: AdapterSettings, folder: Path) -> Path:
    """The safetensors file of an export."""
    tensors = {name: tensor.detach() for name, tensor in factors_of(model).items()}
    for module, (kind, layer) in attach.adapted(model).items():
        tensors |= {f"{module}{ending}": tensor for ending, tensor in kind.beside(layer).items()}
    wishes = ExportWishes(("diffusers",), names_of(model), {PREFIX: {name: name for name in tensors}}, {})
    for name, file in adapters.find(settings.type).to_files(tensors, settings, wishes).items():
        if isinstance(file, AdapterFile):
            write_tensors(folder / name, file.tensors, dict(file.metadata))
        else:
            (folder / name).write_text(file)
    return folder / "adapter_model.safetensors"
