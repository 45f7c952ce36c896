"""Quantised Linears in a text encoder of transformers, filled while it reads the weights, one after another.

transformers knows the names of older files, which tensors are tied, and what stays in float32, and lets others declare
how weights are quantised, which is done here. Since this module imports transformers, which takes seconds, it is itself
imported only where an encoder is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from models.foundation.encoders.text import PRECISE
from utils.quantised.formats import Format
from utils.quantised.linear import QuantisedLinear, quantise

METHOD = "penstock"


class Quantisation(QuantizationConfigMixin):
    """What `from_pretrained` is given as `quantization_config`: the format."""

    def __init__(self, form: Format):
        self.quant_method = METHOD
        self.form = form


class _Fill(ConversionOps):
    """Gives a quantised Linear the weight that was just read. All of it is on the device of the weight."""

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **_: Any) -> dict[str, torch.Tensor]:
        ((name, (values_OI,)),) = input_dict.items()
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        assert tuple(values_OI.shape) == linear.shape, f"{name}: the header said otherwise"
        linear.fill(values_OI)
        return {name: linear.weight, f"{path}.scale": linear.scale}


@register_quantizer(METHOD)
class _Quantiser(HfQuantizer):
    """Puts the quantised Linears in their places, and says which tensors fill them."""

    is_serializable = is_trainable = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        quantise(model, list(linears_of_blocks(model)), self.quantization_config.form)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        path, _, own = param_name.rpartition(".")
        return own == "weight" and isinstance(model.get_submodule(path), QuantisedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Fill()


def quantise_blocks(module: nn.Module, form: Format) -> None:
    """Quantises the Linears in the repeated blocks of a module that has its weights."""
    weights = {name: module.get_submodule(name).weight for name in linears_of_blocks(module)}
    quantise(module, weights, form)
    for name, weight in weights.items():
        module.get_submodule(name).fill(weight)


def quantise_empty(module: nn.Module, form: Format) -> None:
    """The same for a module without memory."""
    quantise(module, list(linears_of_blocks(module)), form)


def linears_of_blocks(model: nn.Module) -> Iterator[str]:
    """The names of the Linears in the repeated blocks of a text encoder, which have nearly all of its weights, but for
    embeddings. Those that transformers keeps in float32 where it can (T5's `wo`, whose inputs are very large) are none
    of them: transformers looks at the types of their weights, too."""
    kept_precise = (getattr(model, name, None) for name in PRECISE)
    precise = {name for names in kept_precise for name in names or ()}
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.startswith(lists) and not precise & set(name.split(".")):
            yield name
