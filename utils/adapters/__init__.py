"""Adapters on a frozen denoiser: the file of a kind declares it in its `KINDS`, one `[adapter] type` each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

from torch import nn

from utils.adapters.kinds import AdapterKind
from utils.declared import kinds_in
from utils.settings.choices import Choice, type_of

NOT_KINDS = (
    "attach",
    "base_weight",
    "differences",
    "dropping",
    "file_names",
    "in_full",
    "kinds",
    "lora_factors",
    "lora_starts",
    "lycoris",
    "magnitudes",
    "mixed",
    "norms",
    "peft_layers",
    "peft_settings",
    "presets",
    "soundness",
    "tools",
)


def available() -> Mapping[str, AdapterKind]:
    """All kinds of adapters, by `type`."""
    return _by_type(kinds_in(__name__, __path__, NOT_KINDS))


@cache
def _by_type(kinds: tuple[AdapterKind, ...]) -> Mapping[str, AdapterKind]:
    """Made once: every module of a model is asked for its kind."""
    return MappingProxyType({type_of(kind.settings): kind for kind in kinds})


def find(adapter_type: str) -> AdapterKind:
    """The kind of a type.

    Raises:
        ValueError: there is no such kind; names the existing ones.
    """
    kinds = available()
    if adapter_type not in kinds:
        raise ValueError(f"no adapter is called '{adapter_type}'; known: {', '.join(map(repr, kinds))}")
    return kinds[adapter_type]


def choice() -> Choice:
    """The choice of `[adapter] type`."""
    return Choice(lambda name: find(name).settings, {name: kind.settings for name, kind in available().items()})


def kind_of(module: nn.Module) -> AdapterKind | None:
    """The kind of adapter that a module has; None for a module without one."""
    return next((kind for kind in available().values() if kind.base_of(module) is not None), None)


def base_of(module: nn.Module) -> nn.Module:
    """The original module of an adapted one; any other module itself."""
    kind = kind_of(module)
    return module if kind is None else kind.base_of(module)


def recognised(names: Iterable[str]) -> AdapterKind | None:
    """The kind of adapter in a file with tensors of these names."""
    names = list(names)
    return next((kind for kind in available().values() if is_in(kind, names)), None)


def is_in(kind: AdapterKind, names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names has some of a kind."""
    return any(name.endswith(tuple(kind.endings)) for name in names)
