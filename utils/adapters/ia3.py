"""IA3: each output of a layer is multiplied by a number that is trained (Liu et al. 2022), in PEFT's files.

What is trained is how far the number is from 1, so that a decay of weights pulls it to where it has no effect.

Shapes: O outputs of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from utils.adapters.base_weight import shape_of
from utils.adapters.kinds import ADAPTER_FILE, AdapterFile, Entry, ExportWishes, ModelNames, Tensors, Update
from utils.adapters.lycoris import AdaptedLayer, LycorisKind
from utils.adapters.peft_settings import CONFIG_FILE, in_pefts_names
from utils.settings.schema import AdapterSettings
from utils.settings.values import Share

PART = "ia3_l"


class Ia3Settings(AdapterSettings):
    """`type = "ia3"`: IA3 of PEFT, which multiplies each output of a layer by a trained number."""

    type: Literal["ia3"]
    """Kind of adapter."""
    dropout: Share = 0.0
    """Fraction of the outputs that a training step does not multiply."""
    module_dropout: Share = 0.0
    """Fraction of the adapted modules that a step trains without."""


class Ia3Layer(AdaptedLayer):
    """A Linear or convolution with multiplied outputs, bias included. `ia3_l` is the number less 1, (O, 1), or
    (1, O, 1, 1) of a convolution, as PEFT has it."""

    def __init__(self, base_layer: nn.Module, settings: Ia3Settings):
        outputs = shape_of(base_layer)[0]
        shape = (1, outputs, 1, 1) if isinstance(base_layer, nn.Conv2d) else (outputs, 1)
        super().__init__(base_layer, settings, {PART: shape})

    def change(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        factor = self.get_parameter(PART).flatten()
        if self.training and self.dropout.p:
            factor = factor * (torch.rand(factor.shape, device=x.device) >= self.dropout.p)
        factor = factor.to(result.dtype)
        return result * (factor[:, None, None] if self.is_convolution else factor)


@dataclass(frozen=True)
class FactorUpdate:
    """The update of a weight or bias whose rows are multiplied."""

    factors_O: torch.Tensor
    shape: tuple[int, ...]
    fits_beside = False
    needs_base = True

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """What the factors less 1 add to the base."""
        return base * (self.factors_O.float().to(base.device) - 1).view(-1, *[1] * (base.ndim - 1))


class Ia3(LycorisKind):
    """See `AdapterKind`."""

    settings = Ia3Settings
    name = "IA3"
    mark = ".ia3_"
    endings = {f".{PART}{ending}": PART for ending in ("", ".default")}
    layer = Ia3Layer
    mixes: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...]] = ("diffusers",)
    read_by: ClassVar[str] = "diffusers itself and ComfyUI read no such adapter, PEFT applies it to diffusers' models"

    def rank_of(self, tensors: Tensors) -> int | None:
        """None."""
        return None

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """The numbers less 1."""
        return {name: tensor.float() - 1 for name, tensor in super().factors(entry, names, scale_of).items()}

    def updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """Of the weight of one of our modules."""
        return {entry.target.modules[0]: self._update(entry, names)}

    def bias_updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """Of its bias."""
        module = entry.target.modules[0]
        shape = names.shapes.get(f"{module}.bias")
        return {} if shape is None else {module: FactorUpdate(entry.tensors[PART].flatten(), shape)}

    def update_from(self, tensors: Tensors, scale: float, shape: tuple[int, ...], name: str) -> FactorUpdate:
        """See `LycorisKind`."""
        if PART not in tensors or tensors[PART].numel() != shape[0]:
            what = list(tensors[PART].shape) if PART in tensors else "nothing"
            raise ValueError(f"the factors of the IA3 of '{name}' are {what}, and the module has {shape[0]} outputs")
        return FactorUpdate(tensors[PART].flatten(), shape)

    def to_files(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """PEFT's `adapter_model.safetensors` and `adapter_config.json`."""
        whole = {name: wishes.rounded(tensor.float() + 1) for name, tensor in factors.items()}
        config = {
            "peft_type": "IA3",
            "target_modules": sorted({own.rpartition(".")[0] for names in wishes.parts.values() for own in names}),
            "feedforward_modules": [],
            "base_model_name_or_path": wishes.metadata.get("base_model"),
        }
        return {
            ADAPTER_FILE: AdapterFile(in_pefts_names(whole, wishes), wishes.metadata),
            CONFIG_FILE: json.dumps(config, indent=2),
        }


KINDS = (Ia3(),)
