"""What the rest of the house asks of a kind of adapter. A file of this folder declares it in its `KINDS`.

A kind replaces a module by one that holds it as `base_layer` and factors beside it. Outside this folder a parameter has
one name, without `base_layer` and the name of the adapter.
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
"""What adapters are called, within adapted modules."""
ADAPTER_FILE = "adapter_model.safetensors"


class LowRankKeys(SettingsTable):
    """The keys of adapters whose update has a low rank."""

    # Here too, so that it stays the first key of those that are written.
    type: str
    """Kind of adapter."""
    rank: Count | None = None
    """Rank of the update of each adapted layer."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank; default: the rank, for a scale of 1."""


class FileLayout(Protocol):
    """A model's names in kohya's files, for kinds that know such; a model's `KeyLayout` is one."""

    def lora_to_kohya(
        self, factors: Mapping[str, torch.Tensor], scale_of: Callable[[str], float], rows_of: Callable[[str], int]
    ) -> Tensors: ...

    def lora_from_kohya(
        self, tensors: Mapping[str, torch.Tensor], modules: Sequence[str], rows_of: Callable[[str], int]
    ) -> Tensors: ...


@dataclass(frozen=True)
class ModelNames:
    """What a model's modules are called, here and in files.

    Attributes:
        folder: of a diffusers folder that has the denoiser. Names of modules begin with it where several are trained.
        modules: those that can be adapted, or are; by name.
        layout: their names in kohya's files, which ComfyUI reads; None if they are not known.
    """

    folder: str
    modules: Mapping[str, nn.Module]
    layout: FileLayout | None

    def rows_of(self, module: str) -> int:
        """Outputs of a module."""
        return self.modules[module].out_features


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file of an adapter.

    Attributes:
        tensors: under the names of the program that wrote it, or is to read it.
        metadata: of its header.
        path: where it lies; None before it is written.
    """

    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None


@dataclass(frozen=True)
class ExportWishes:
    """How an adapter is to be exported.

    Attributes:
        formats: "diffusers", "comfyui".
        names: of the model's modules.
        parts: folder of each trained module -> its tensors' names within it -> their names here.
        metadata: about the run, for the header of every file.
    """

    formats: tuple[str, ...]
    names: ModelNames
    parts: Mapping[str, Mapping[str, str]]
    metadata: Mapping[str, str]


class Update(Protocol):
    """What an adapter adds to the weight of one module."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""

    def delta(self) -> torch.Tensor:
        """The whole of it, in float32."""

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """What is kept beside a Linear so that so much of it can work there."""

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """What is added to the outputs for `x`, by what is `kept`."""


class AdapterKind(Protocol):
    """One `[adapter] type`.

    Attributes:
        settings: the class of its keys, whose `type` is a Literal of one name.
        name: what it is called in messages.
        mark: part of the name of every factor, and of no other tensor, here and in its files.
    """

    settings: ClassVar[type[AdapterSettings]]
    name: ClassVar[str]
    mark: ClassVar[str]

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: Any) -> None:
        """Replaces modules of the denoiser by adapted ones, whose factors are on the meta device."""

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The module that an adapted one holds; None of a module that this kind does not adapt."""

    def reset(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Gives an adapted module's factors their first values, which have no effect, on the CPU; draws them from
        torch's random state."""

    def scale_of(self, module: nn.Module) -> float:
        """The factor on what an adapted module's factors make of their input."""

    def switched_off(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within it an adapted module does what its base does, bit for bit."""

    def is_in(self, names: Sequence[str]) -> bool:
        """Whether a file with tensors of these names is one of this kind."""

    def from_file(self, file: AdapterFile, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """A file's factors under our names, such that with the scale of each module they have the effect that the file
        has in the program which wrote it.

        Raises:
            UserError: the file is damaged, or its names are not known for this model.
        """

    def to_files(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """The files of an export by their names; a text is written as it is."""

    def updates(self, factors: Mapping[str, torch.Tensor]) -> Mapping[str, Update]:
        """What factors under our names add to the weights of their modules, by module, at a scale of 1.

        Raises:
            ValueError: they are of a form that is not known.
        """


@contextmanager
def without_scale(module: nn.Module) -> Iterator[None]:
    """`switched_off` of modules that leave their factors out where their `scaling` is 0."""
    scale = module.scaling[ADAPTER]
    module.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        module.scaling[ADAPTER] = scale
