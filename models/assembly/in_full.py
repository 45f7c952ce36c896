"""What is trained in full: the parameters that `[model] train` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from torch import nn

from models.base import BasePipeline
from models.foundation.layers.ensemble import Ensemble
from utils.errors import Problem, UserError
from utils.quantised.linear import QuantisedLinear

WHERE = "[model] train"
DENOISER = "denoiser"
NOT_TRAINED = ("vae", "image_encoder", *(f"text_encoder{number}" for number in ("", "_1", "_2", "_3", "_4")))
"""Parts of diffusers' folders whose outputs are in the cache."""


def named_in_full(pipeline: BasePipeline, denoiser: nn.Module) -> frozenset[str]:
    """The names of the parameters that the settings name; none if they name nothing.

    Args:
        denoiser: without an adapter, with its quantised Linears.

    Raises:
        UserError: something of it is no part that is trained, matches nothing, or is quantised.
    """
    patterns = pipeline.options.train
    found = [_Named(pattern, pipeline, denoiser) for pattern in patterns]
    problems = [Problem("", WHERE, message) for one in found for message in one.problems()]
    if problems:
        raise UserError(problems)
    return frozenset(name for one in found for name in one.names)


class _Named:
    """A word of the settings, and what it names.

    Attributes:
        names: of parameters that can be trained.
        coded: of weights that are quantised.
    """

    def __init__(self, word: str, pipeline: BasePipeline, denoiser: nn.Module) -> None:
        self.word, self.pipeline = word, pipeline
        self.all = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        self.part = _beginnings(pipeline, denoiser).get(word)
        self.names = self._of(self.all)
        modules = denoiser.named_modules()
        self.coded = self._of([f"{name}.weight" for name, one in modules if isinstance(one, QuantisedLinear)])

    def _of(self, names: Sequence[str]) -> list[str]:
        if self.part is not None:
            return [name for name in names if name.startswith(self.part)]
        return [name for name in names if fnmatch(name, f"*{self.word}*")]

    def problems(self) -> Iterator[str]:
        own = {text: part for part in self.pipeline.text_parts for text in (part.name, part.folder)}
        if self.part is None and (self.word in own or self.word in NOT_TRAINED):
            rate = getattr(own.get(self.word), "lr_option", None)
            how = f"set `{rate}` to train it too" if rate else "leave it out"
            yield (
                f'"{self.word}" is no part of the denoiser, and stays as it is: what it makes of the data is cached '
                f"before training begins; {how}"
            )
        elif self.coded:
            yield (
                f"\"{self.word}\" names '{self.coded[0]}', which transformer_dtype keeps in codes that are not "
                "trained; name less, or leave transformer_dtype out"
            )
        elif not self.names:
            yield f'"{self.word}" matches nothing that can be trained; the parameters are called like {self.all[0]}'


def _beginnings(pipeline: BasePipeline, denoiser: nn.Module) -> dict[str, str]:
    """Name of a part -> what the names of its parameters begin with."""
    folder = pipeline.denoiser_folder
    if not isinstance(denoiser, Ensemble):
        return {DENOISER: "", folder: ""}
    return {DENOISER: f"{folder}.", **{part: f"{part}." for part in denoiser.configs}}
