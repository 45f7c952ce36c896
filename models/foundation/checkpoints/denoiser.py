"""The weights of a denoiser: their source, and how a process loads those of its stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.key_layouts import KeyLayout
from models.foundation.checkpoints.recognition import explained, likeness
from models.foundation.checkpoints.storage import StorageRules
from models.foundation.checkpoints.weights import EnsembleWeights, Weights, build_empty, materialise
from utils.adapters.attach import base_name, is_factor
from utils.adapters.presets import TensorSource
from utils.diffusion import seeds
from utils.errors import UserError


@dataclass(frozen=True)
class Built:
    """The tensors with which a denoiser was built.

    Attributes:
        tensors: by name.
    """

    tensors: Mapping[str, torch.Tensor]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self.tensors[name].detach()


@dataclass(frozen=True)
class DenoiserWeights:
    """How a denoiser is built, where its weights lie, and in which form each parameter is kept.

    Attributes:
        factory: builds the whole module with its initial weights.
        model_type: the `type` of `[model]`, for messages about files of other models.
        path: file or folder of the weights.
        layout: the names in the publisher's files, if they differ from ours.
        storage: in which form each parameter is kept.
        seed: for a denoiser that starts from random weights; None if the weights are read.
    """

    factory: Callable[[], nn.Module]
    model_type: str
    path: Path
    layout: KeyLayout | None
    storage: StorageRules
    seed: int | None = None

    def build(self) -> nn.Module:
        """The whole denoiser: on the meta device until `fill` reads what a stage needs, or with random weights that
        depend only on the seed."""
        return self.build_empty() if self.seed is None else self._stored(self._drawn(self.factory))

    def build_empty(self) -> nn.Module:
        """The whole denoiser without memory, each parameter in its form."""
        return self._stored(build_empty(self.factory))

    def open(self, denoiser: nn.Module) -> TensorSource:
        """The denoiser's tensors on disk, checked against its shapes; those that it has, if it starts from random
        weights. Its Linears are still plain ones.

        Raises:
            UserError: a tensor is missing or has another shape; says what the file looks like.
        """
        return self._opened(denoiser) if self.seed is None else Built(dict(denoiser.named_parameters()))

    def anew(self) -> TensorSource:
        """The tensors of the whole denoiser as they are before training, once more."""
        return self.open(self.build_empty()) if self.seed is None else Built(dict(self.build().named_parameters()))

    def fill(self, denoiser: nn.Module, source: TensorSource, layers: Sequence[nn.Module]) -> None:
        """Reads those base weights of `layers`, which are some of the layers of `denoiser`, that have no values."""
        wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
        names = [
            name
            for name, parameter in denoiser.named_parameters()
            if id(parameter) in wanted and parameter.is_meta and not is_factor(name)
        ]
        materialise(denoiser, names, lambda name: source.read(base_name(name)), self.storage)

    def beside(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """What reads each tensor that a whole model needs and that is no part of the denoiser, by name."""
        return {}

    def shapes_beside(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of these tensors."""
        return {}

    def check_fit(self) -> None:
        """Whether the file has all tensors of this denoiser, and no others.

        Raises:
            UserError: it has not.
        """
        if unused := self._weights(self._read_part(self.build_empty())).unused:
            raise UserError.of(f"'{unused[0]}' is no tensor of this model", str(self.path))

    def _opened(self, denoiser: nn.Module) -> TensorSource:
        weights = self._weights(self._read_part(denoiser))
        weights.tell_unused(likeness(weights.header.shapes, self.model_type))
        return weights

    def _weights(self, module: nn.Module) -> Weights:
        header = read_header(self.path, with_gguf=True)
        layout = self.layout if self.layout and self.layout.recognises(header.files) else None
        try:
            return Weights(self.path, module, layout)
        except UserError as error:
            raise explained(error, header.shapes, self.model_type) from error

    def _read_part(self, denoiser: nn.Module) -> nn.Module:
        """What is read from `path`."""
        return denoiser

    def _drawn(self, factory: Callable[[], nn.Module]) -> nn.Module:
        """What `factory` makes, with random weights that depend only on the seed."""
        with torch.random.fork_rng(devices=[]):
            seeds.seed_devices(seeds.derive(self.seed, "denoiser"))
            return factory()

    def _stored(self, denoiser: nn.Module) -> nn.Module:
        for name, parameter in denoiser.named_parameters():
            parameter.data = self.storage.of(name).keep(parameter.data)
        return denoiser


@dataclass(frozen=True)
class EnsembleDenoiserWeights(DenoiserWeights):
    """The same for an ensemble of which one part is read from `path`.

    Attributes:
        part: the name of that part.
        loaders: name of another part -> a function that loads the whole module with its own library.
    """

    part: str = ""
    loaders: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)

    def _opened(self, denoiser: nn.Module) -> TensorSource:
        return EnsembleWeights({self.part: super()._opened(denoiser)}, self.loaders)

    def _read_part(self, denoiser: nn.Module) -> nn.Module:
        return denoiser.get_submodule(self.part)


@dataclass(frozen=True)
class PartialDenoiserWeights(DenoiserWeights):
    """The same for a denoiser that is a part of what its file holds, and its exports hold.

    Attributes:
        whole: builds all of it, by the same names. What `factory` builds is a part of that, drawn alike.
    """

    whole: Callable[[], nn.Module] = field(kw_only=True)

    def beside(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        source = cache(self._source)
        return {name: partial(self._beside, source, name) for name in self.shapes_beside()}

    def shapes_beside(self) -> Mapping[str, tuple[int, ...]]:
        own, whole = (dict(build_empty(one).named_parameters()) for one in (self.factory, self.whole))
        return {name: tuple(parameter.shape) for name, parameter in whole.items() if name not in own}

    def _source(self) -> TensorSource:
        if self.seed is None:
            return self._opened(build_empty(self.whole))
        return Built(dict(self._drawn(self.whole).named_parameters()))

    def _beside(self, source: Callable[[], TensorSource], name: str) -> torch.Tensor:
        return self.storage.of(name).keep(source().read(name))

    def _read_part(self, denoiser: nn.Module) -> nn.Module:
        return build_empty(self.whole)
