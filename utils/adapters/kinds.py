"""The interface of a kind of adapter. A file in this folder declares its kinds as `KINDS`.

A kind replaces a module by one that contains the original as `base_layer`, and factors. Outside this folder a parameter
has one name, without `base_layer` and without the name of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, Positive, SettingsTable, Share

Tensors = dict[str, torch.Tensor]
ADAPTER = "default"
"""The name of the adapter in adapted modules."""
ADAPTER_FILE = "adapter_model.safetensors"
COMFYUI = "comfyui"
COMFYUI_FILE = f"adapter_model_{COMFYUI}.safetensors"
LAYOUT = "layout"
"""Where the header of a file of ours says in which layout it is, "diffusers" or "comfyui"."""
ALPHA, DORA_SCALE = "alpha", "dora_scale"
SHARED = {f".{name}": name for name in (ALPHA, DORA_SCALE)}
"""Endings of tensors that several kinds of adapters have."""


class LowRankKeys(SettingsTable):
    """The keys of adapters whose update has a low rank."""

    # Repeated here, so that it stays the first key in written files.
    type: str
    """Kind of adapter."""
    rank: Count | None = None
    """Rank of the update of each adapted layer."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank; default: the rank, for a scale of 1."""
    conv_dim: Count | None = None
    """Rank for convolutions whose kernel is larger than one cell, with `convolutions`; default: as `rank`."""
    conv_alpha: Positive | None = None
    """`alpha` for these convolutions; default: as `alpha`, or `conv_dim` if that is set."""
    rank_dropout: Share = 0.0
    """Fraction of the ranks that a sample trains without in a step; of LoHa and LoKr, of the rows of the update. What
    is left is as much stronger."""
    module_dropout: Share = 0.0
    """Fraction of the adapted modules that a step trains without."""

    def problems_of_sizes(self) -> Iterator[tuple[str, str]]:
        """See `AdapterSettings.problems`."""
        for key in ("conv_dim", "conv_alpha"):
            if getattr(self, key) is not None and not getattr(self, "convolutions", False):
                yield key, "is for convolutions only; set `convolutions = true` too, or leave this out"

    def size_for(self, module: nn.Module) -> tuple[int | None, float | None]:
        """Rank and alpha of a module's update, as far as they are set."""
        is_large = isinstance(module, nn.Conv2d) and math.prod(module.kernel_size) > 1
        if not is_large or (self.conv_dim is None and self.conv_alpha is None):
            return self.rank, self.alpha
        alpha = self.conv_alpha if self.conv_alpha is not None or self.conv_dim is not None else self.alpha
        return self.conv_dim or self.rank, alpha


class Target(NamedTuple):
    """What a file's module, or parameter, is here: some of ours, stacked along their outputs, whose halves may be
    swapped there."""

    modules: tuple[str, ...]
    swap_halves: bool = False


class FileLayout(Protocol):
    """A model's names in files of its publisher and of other programs; a model's `KeyLayout` is one.

    Attributes:
        part_prefixes: folder of a module that is trained beside the denoiser -> what the names of its modules begin
            with in files, first as ComfyUI reads them in every kind of adapter.
    """

    part_prefixes: Mapping[str, tuple[str, ...]]

    def targets(self, names: Iterable[str]) -> Iterable[tuple[str, Target]]:
        """The name there of each module and parameter that the layout knows, and what it is here.

        Args:
            names: of our parameters.
        """

    def comfyui_names(self, modules: Iterable[str]) -> dict[str, str]:
        """By which name ComfyUI reads an adapter of exactly one of our modules, of every kind; without those that it
        knows only as a part of another."""

    def lora_to_kohya(
        self,
        factors: Mapping[str, torch.Tensor],
        scale: float | Callable[[str], float],
        rows_of: Callable[[str], int],
        dora_scale: Callable[[str], torch.Tensor] | None = None,
    ) -> Tensors: ...

    def differences(self, values: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
        """Differences of parameters, by our names, as ComfyUI reads them in a file of an adapter.

        Args:
            shapes: of all parameters.

        Raises:
            ValueError: a parameter has no place there.
        """


@dataclass(frozen=True)
class ModelNames:
    """The names of a model's modules, here and in files.

    Attributes:
        folder: the denoiser's part of a diffusers folder. Names of modules begin with it if several parts are trained.
        modules: the modules that can be adapted or are adapted, by name.
        layout: their names in the publisher's files, which ComfyUI reads; None if they are not known.
        shapes: of all parameters, without those of an adapter, by name.
        beside: the same of those that the model has and that are not loaded, as nothing that is trained needs them.
        read: reads a parameter of the base by name, as it was before training, with presets that are fused.
    """

    folder: str
    modules: Mapping[str, nn.Module]
    layout: FileLayout | None
    shapes: Mapping[str, tuple[int, ...]]
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    read: Callable[[str], torch.Tensor] | None = None

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a module before training, in float32, on the CPU; read from the base's files.

        Raises:
            ValueError: it cannot be read here.
        """
        if self.read is None:
            raise ValueError(f"the weight of '{module}' is needed for this, and is not there")
        return self.read(f"{module}.weight").float()

    @property
    def has_parts(self) -> bool:
        """Whether names begin with the folder of a part."""
        return any(name.startswith(f"{self.folder}.") for name in self.shapes)

    def rows_of(self, module: str) -> int:
        """The number of outputs of a module.

        Raises:
            ValueError: it has no weight.
        """
        if f"{module}.weight" not in self.shapes:
            raise ValueError(f"'{module}' has no weight in this model that an adapter could be for")
        return self.shapes[f"{module}.weight"][0]


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
class Entry:
    """What a file has for one of its modules.

    Attributes:
        name: of the module in the file.
        target: what it is here.
        tensors: by the names that the kind's `endings` give them; perhaps `ALPHA`, and `DORA_SCALE` too.
        file: to which it belongs.
    """

    name: str
    target: Target
    tensors: Mapping[str, torch.Tensor]
    file: AdapterFile

    def lacks(self, part: str) -> ValueError:
        """The error about a tensor that is not there."""
        return ValueError(f"'{self.name}' has no {part}; is the file whole?")


@dataclass(frozen=True)
class ExportWishes:
    """How an adapter is exported.

    Attributes:
        formats: "diffusers", "comfyui".
        names: the names of the model's modules.
        parts: folder of each trained module -> its tensors' names within it -> their names here.
        metadata: about the run, for the header of every file.
        dtype: of the factors in files; None for that of training.
    """

    formats: tuple[str, ...]
    names: ModelNames
    parts: Mapping[str, Mapping[str, str]]
    metadata: Mapping[str, str]
    dtype: torch.dtype | None = None

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the type that files have."""
        return tensor.to(self.dtype or tensor.dtype)


class Update(Protocol):
    """The update of one weight by an adapter.

    Attributes:
        fits_beside: whether it can be applied beside a Linear, by `kept` and `applied`.
    """

    fits_beside: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The whole update of a weight whose values, in float32, are `base`; in float32 too."""

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
        mark: part of the name of every factor, and of no other tensor, here.
        endings: of the names of its tensors in files, in every spelling -> the names by which `Entry` has them.
        once: endings of the names of tensors that a file has for all of its modules together.
        formats: of the layouts of `ExportWishes.formats` those that programs read of this kind.
        read_by: who reads the file for diffusers, where that is not diffusers itself; empty where it is.
        mixes: whether modules of this kind may stand in one file with those of others, which LyCORIS reads for
            diffusers.
    """

    settings: ClassVar[type[AdapterSettings]]
    name: ClassVar[str]
    mark: ClassVar[str]
    endings: ClassVar[Mapping[str, str]]
    once: ClassVar[tuple[str, ...]]
    formats: ClassVar[tuple[str, ...]]
    read_by: ClassVar[str]
    mixes: ClassVar[bool]

    def put(self, denoiser: nn.Module, names: Sequence[str], settings: Any) -> None:
        """Replaces modules of the denoiser by adapted ones, whose factors are on the meta device."""

    def base_of(self, module: nn.Module) -> nn.Module | None:
        """The original module in an adapted one; None for a module that this kind has not adapted."""

    def reset(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Gives an adapted module's factors their first values, which have no effect, on the CPU; draws them from
        torch's random state."""

    def scale_of(self, module: nn.Module) -> float:
        """The factor by which the update of an adapted module is multiplied."""

    def beside(self, module: nn.Module) -> Tensors:
        """What an export needs of an adapted module beside its trained factors, by names that go on the module's;
        none of them is trained."""

    def switched_off(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which an adapted module computes the same as its base, bit for bit."""

    def at_strength(self, module: nn.Module, strength: float) -> AbstractContextManager[None]:
        """A context in which an adapted module's update is multiplied by a `strength` other than 0."""

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """A file's factors of a module under our names. With the scale of each module they have the same effect as the
        file has in the program that wrote it.

        Raises:
            ValueError: they are damaged, or of a form that is not trained here.
        """

    def updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """The updates of weights by a file's factors of a module, by the names of our modules.

        Raises:
            ValueError: they are damaged, or of an unknown form.
        """

    def bias_updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """The same of biases."""

    def to_files(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> dict[str, AdapterFile | str]:
        """The files of an export by name; a text is written as it is."""

    def in_lycoris(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> Tensors:
        """Factors as LyCORIS has them, of a kind that `mixes`.

        Raises:
            ValueError: LyCORIS has no such form.
        """


class WithoutMore:
    """What most kinds have in common."""

    once: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[str, ...]] = ("diffusers", COMFYUI)
    read_by: ClassVar[str] = ""
    mixes: ClassVar[bool] = False

    def bias_updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """None."""
        return {}

    def beside(self, module: nn.Module) -> Tensors:
        """Nothing."""
        return {}

    def in_lycoris(self, factors: Tensors, settings: Any, wishes: ExportWishes) -> Tensors:
        """Of kinds that mix alone."""
        raise AssertionError("it is in no file with others")


def without_scale(module: nn.Module) -> AbstractContextManager[None]:
    """`switched_off` for modules that skip their factors if their `scaling` is 0."""
    return with_scale(module, 0.0)


@contextmanager
def with_scale(module: nn.Module, strength: float) -> Iterator[None]:
    """A context in which a module's `scaling` is multiplied by `strength`."""
    scale = module.scaling[ADAPTER]
    module.scaling[ADAPTER] = scale * strength
    try:
        yield
    finally:
        module.scaling[ADAPTER] = scale
