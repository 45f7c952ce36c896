"""Puts an adapter onto a denoiser, and names its parts.

PEFT wraps each adapted module: `to_q.weight` becomes `to_q.base_layer.weight`, beside it stand
`to_q.lora_A.default.weight` and `to_q.lora_B.default.weight`. Outside this file a parameter has one name, without
`base_layer` and `default`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch, fnmatchcase

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.adapters import lokr
from utils.adapters.lokr import LokrLinear
from utils.diffusion import seeds
from utils.errors import UserError
from utils.settings.model_schema import torch_dtype
from utils.settings.schema import AdapterSettings, LokrSettings

ADAPTER = "default"


def base_name(name: str) -> str:
    """A parameter's name as it is without an adapter, or as an adapter's file has it."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def is_factor(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's."""
    return ".lora_" in name or lokr.MARK in name


def targets(denoiser: nn.Module, blocks: Sequence[str], settings: AdapterSettings) -> list[str]:
    """Names of the Linears, and convolutions if they are asked for, inside the denoiser's repeated blocks that the
    patterns let through.

    Args:
        blocks: names of lists of blocks, or patterns of such names.

    Raises:
        UserError: none is left.
    """
    kinds = (nn.Linear, nn.Conv2d) if settings.convolutions else nn.Linear
    modules = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, kinds) and any(fnmatchcase(name, f"{block}.*") for block in blocks)
    ]
    chosen = [name for name in modules if _chosen(name, settings)]
    if not chosen:
        raise UserError.of(
            f"include = {settings.include}, exclude = {settings.exclude} leave nothing to adapt; the model's modules "
            f"are called like {modules[0]}",
            where="[adapter]",
        )
    return chosen


def _chosen(name: str, settings: AdapterSettings) -> bool:
    included = not settings.include or any(fnmatch(name, f"*{pattern}*") for pattern in settings.include)
    return included and not any(fnmatch(name, f"*{pattern}*") for pattern in settings.exclude)


def attach(denoiser: nn.Module, blocks: Sequence[str], settings: AdapterSettings) -> None:
    """Freezes the denoiser and puts factors on its target modules, still without values (on the meta device)."""
    names = targets(denoiser, blocks, settings)
    denoiser.requires_grad_(False)
    if isinstance(settings, LokrSettings):
        lokr.replace_linears(denoiser, names, settings, ADAPTER)
        return
    # As a pattern, which has to fit a whole name: of names in a list PEFT also takes what ends like one.
    pattern = "|".join(map(re.escape, names))
    config = LoraConfig(
        r=settings.rank, lora_alpha=_alpha(settings), lora_dropout=settings.dropout, bias="none", target_modules=pattern
    )
    inject_adapter_in_model(config, denoiser, low_cpu_mem_usage=True)


@contextmanager
def switched_off(denoiser: nn.Module) -> Iterator[None]:
    """Within it the denoiser does what it does without its adapter, bit for bit."""
    adapted = [module for module in denoiser.modules() if isinstance(module, (LoraLayer, LokrLinear))]
    scales = [module.scaling[ADAPTER] for module in adapted]
    try:
        for module in adapted:
            module.scaling[ADAPTER] = 0.0
        yield
    finally:
        for module, scaling in zip(adapted, scales, strict=True):
            module.scaling[ADAPTER] = scaling


def initialise(denoiser: nn.Module, layers: Iterable[nn.Module], settings: AdapterSettings, seed: int) -> None:
    """Gives the factors in `layers` their first values: PEFT's own, drawn from (seed, module name), so that they are
    the same however the denoiser is cut."""
    held = {id(module) for layer in layers for module in layer.modules()}
    dtype = torch_dtype(settings.dtype)
    for name, module in denoiser.named_modules():
        if not isinstance(module, (LoraLayer, LokrLinear)) or id(module) not in held:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "adapter", name))
            if isinstance(module, LokrLinear):
                module.reset(dtype)
                continue
            for factor in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
                factor.to_empty(device="cpu").to(dtype)
            module.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def load(denoiser: nn.Module, layers: Iterable[nn.Module], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copies an adapter's tensors (`<module>.lora_A.weight`, ...) into the factors held by `layers`.

    Raises:
        UserError: a tensor has no place, or another shape (another rank or another model).
    """
    parameters = {base_name(name): p for name, p in denoiser.named_parameters() if is_factor(name)}
    check_fits({name: tuple(p.shape) for name, p in parameters.items()}, tensors, source)
    held = {id(parameter) for layer in layers for parameter in layer.parameters()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if id(parameters[name]) in held:
                parameters[name].copy_(tensor)


def check_fits(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Whether an adapter's tensors are those of this configuration; see `load`."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise UserError.of(
                f"'{name}' has no counterpart; this adapter was made for another model or other modules "
                "([adapter] include/exclude)",
                source,
            )
        if tuple(tensor.shape) != shapes[name]:
            raise UserError.of(
                f"'{name}' is {list(tensor.shape)}, this run's is {list(shapes[name])}; set [adapter] rank to that of "
                f"the file (of LoKr the factors too), or leave init_from_existing out",
                source,
            )
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise UserError.of(
            f"'{missing[0]}' and {len(missing) - 1} more are not in this adapter; adapt the same "
            "modules ([adapter] include/exclude)",
            source,
        )


def scale(settings: AdapterSettings) -> float:
    """alpha / rank, the factor on the update."""
    return _alpha(settings) / settings.rank


def _alpha(settings: AdapterSettings) -> float:
    return settings.rank if settings.alpha is None else settings.alpha
