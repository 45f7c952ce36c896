"""The interface of a kind of adapter. A file in this folder declares its kinds as `KINDS`.

A kind replaces a module by one that contains the original as `base_layer`, and factors. Outside this folder a parameter
has one name, without `base_layer` and without the name of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, Positive, SettingsTable

Tensors = dict[str, torch.Tensor]
ADAPTER = "default"
"""The name of the adapter in adapted modules."""
ADAPTER_FILE = "adapter_model.safetensors"


class LowRankKeys(SettingsTable):
    """The keys of adapters whose update has a low rank."""

    # Repeated here, so that it stays the first key in written files.
    type: str
    """Kind of adapter."""
    rank: Count | None = None
    """Rank of the update of each adapted layer."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank; default: the rank, for a scale of 1."""


class FileLayout(Protocol):
    """A model's names in kohya's files, for kinds that have such files; a model's `KeyLayout` is one."""

    def lora_to_kohya(
        self, factors: Mapping[str, torch.Tensor], scale_of: Callable[[str], float], rows_of: Callable[[str], int]
    ) -> Tensors: ...

    def lora_from_kohya(
        self, tensors: Mapping[str, torch.Tensor], modules: Sequence[str], rows_of: Callable[[str], int]
    ) -> Tensors: ...


@dataclass(frozen=True)
class ModelNames:
    """The names of a model's modules, here and in files.

    Attributes:
        folder: the denoiser's part of a diffusers folder. Names of modules begin with it if several parts are trained.
        modules: the modules that can be adapted or are adapted, by name.
        layout: their names in kohya's files, which ComfyUI reads; None if they are not known.
    """

    folder: str
    modules: Mapping[str, nn.Module]
    layout: FileLayout | None

    def rows_of(self, module: str) -> int:
        """The number of outputs of a module."""
        return self.modules[module].out_features


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file of an adapter.

    Attributes:
        tensors: under the names of the program that wrote it or that will read it.
        metadata: of its header.
        path: None before it is written.
    """

    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None


@dataclass(frozen=True)
class ExportWishes:
    """How an adapter is exported.

    Attributes:
        formats: "diffusers", "comfyui".
        names: the names of the model's modules.
        parts: folder of each trained module -> its tensors' names within it -> their names here.
        metadata: about the run, for the header of every file.
    """

    formats: tuple[str, ...]
    names: ModelNames
    parts: Mapping[str, Mapping[str, str]]
    metadata: Mapping[str, str]


class Update(Protocol):
    """The update of one module's weight by an adapter."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""

    def delta(self) -> torch.Tensor:
        """The whole update, in float32."""

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """The tensors that are kept beside a Linear to apply `weight` times the update there."""

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """The addition to the outputs for `x`, computed from the `kept` tensors."""


class AdapterKind(Protocol):
    """One `[adapter] type`.

    Attributes:
        settings: the class of its keys, whose `type` is a Literal of one name.
        name: its name in messages.
        mark: part of the name of every factor, and of no other tensor, here and in its files.
    """

    settings: ClassVar[type[AdapterSettings]]
    name: ClassVar[str]
    mark: ClassVar[str]

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: Any) -> None:
        """Replaces modules of the denoiser by adapted ones, whose factors are on the meta device."""

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The original module in an adapted one; None for a module that this kind has not adapted."""

    def reset(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Gives an adapted module's factors their first values, which have no effect, on the CPU; draws them from
        torch's random state."""

    def scale_of(self, module: nn.Module) -> float:
        """The factor by which the update of an adapted module is multiplied."""

    def switched_off(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which an adapted module computes the same as its base, bit for bit."""

    def is_in(self, names: Sequence[str]) -> bool:
        """Whether a file with tensors of these names is one of this kind."""

    def from_file(self, file: AdapterFile, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """A file's factors under our names. With the scale of each module they have the same effect as the file has in
        the program that wrote it.

        Raises:
            UserError: the file is damaged, or its names are not known for this model.
        """

    def to_files(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """The files of an export by name; a text is written as it is."""

    def updates(self, factors: Mapping[str, torch.Tensor]) -> Mapping[str, Update]:
        """The updates of weights by factors under our names, by module, with a scale of 1.

        Raises:
            ValueError: the factors have an unknown form.
        """


@contextmanager
def without_scale(module: nn.Module) -> Iterator[None]:
    """`switched_off` for modules that skip their factors if their `scaling` is 0."""
    scale = module.scaling[ADAPTER]
    module.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        module.scaling[ADAPTER] = scale
