"""How samples of a model are drawn, as its stock pipeline draws them.

Shapes: a latent has the dimensions of its model, as in `models.base`, written `...`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from models.contract.files import Features
from utils.dataset.samples import Sample
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import Problem
from utils.settings.run_tables import SamplingSettings


class Inference(ABC):
    """The inference of a model; by default without guidance, at evenly spaced noise levels.

    Attributes:
        guided_by_second_prediction: whether samples are guided by a second prediction for the negative prompt
            (classifier-free guidance); otherwise guidance, if the model has any, is one of its inputs.
        unguided: why samples cannot be guided, for a model that is guided by what a run does not have.
        no_guidance: the `guidance` for which `guided` gives the prediction for the prompt, so that one is enough.
        sampling_shift: the same of its scheduler, for models that are sampled with another shift than they are trained.
        scheduler_sets_levels: whether sampling uses the scheduler's own noise levels instead of `sampling_levels`.
        noise_in_float32: whether the model's stock pipeline draws its noise in float32 whatever the type of the rest;
            a sample with a seed of its own begins with the same.
    """

    guided_by_second_prediction: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    no_guidance: ClassVar[float] = 1.0
    sampling_shift: ClassVar[ResolutionShift | None] = None
    scheduler_sets_levels: ClassVar[bool] = False
    noise_in_float32: ClassVar[bool] = False

    @abstractmethod
    def scheduler(self) -> Any:
        """The stock scheduler of diffusers that draws samples."""

    def sampling_levels(self, steps: int) -> Sequence[float] | None:
        """The noise levels of a sample's steps before the scheduler shifts them, as in the stock pipeline of the model;
        None for the scheduler's own."""
        if self.scheduler_sets_levels:
            return None
        return [1.0 - (1.0 - 1.0 / steps) * index / max(steps - 1, 1) for index in range(steps)]

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """The guided prediction n + g (p - n), where p is the prediction for the prompt and n that for the negative
        prompt. Ho and Salimans 2022, in the form of diffusers."""
        return negative + guidance * (prompted - negative)

    def contrasts(self, controls: int) -> Sequence[bool]:
        """Of each prediction for the negative prompt, by which a sample with this many control images is guided:
        whether it sees these. Further ones than the first are further arguments of `guided`."""
        return (True,)

    def before_steps(self, noise: torch.Tensor, features: Features) -> torch.Tensor:
        """The latents (1, ...) with which the steps of a sample begin. Only models that start from a picture are given
        the features of the prompt on every stage."""
        return noise

    def after_steps(self, latents: torch.Tensor, features: Features) -> torch.Tensor:
        """The latents (1, ...) of a sample after its last step; `features` as in `before_steps`."""
        return latents

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterable[Problem]:
        """What of `[model]` is said in vain for the samples of this run, and what these lack for the model."""
        return []

    def misfit_of_prompt(self, prompt: Sample) -> str | None:
        """Why the model cannot be shown the pictures and clips of a prompt; None if it can."""
        return None
