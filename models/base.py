"""The contract of a model: what a pipeline class states and what it does. Nothing here knows a particular model.

Shapes: B batch; a latent has the dimensions of its model, (C h w) for pictures and (C f h w) for clips, written `...`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from models.contract.conditions import Conditions
from models.contract.files import Features, ModelEncoder
from models.contract.inference import Inference
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.diffusion.objectives import FlowMatching, Objective
from utils.diffusion.timesteps import ResolutionShift
from utils.diffusion.training import TrainingMaths, remarks
from utils.errors import Problem

__all__ = ["BasePipeline", "Features", "ModelEncoder"]


class BasePipeline(Conditions, Inference):
    """A model that can be trained: its denoiser, cut into layers, and the data that these take.

    A subclass states the facts that have no default and fills in the abstract methods: those below, `encoders` of
    `ModelFiles`, and `scheduler` of `Inference`. What else it may change stands beside them: its files in
    `models/contract/files.py`, conditions besides the text in `conditions.py`, samples in `inference.py`.

    Attributes:
        media: the multiples to which sizes of pictures and clips are rounded, and the number of frames.
        objective: what the denoiser predicts; a property if it follows from the model's files.
        blocks: names of the denoiser's lists of repeated blocks, or patterns of such names; adapters adapt these.
            Layers that are `recomputable` are recomputed.
        convolutional_blocks: further lists of blocks, which are adapted with `convolutions` of `[adapter]`.
        cross_attention: names, in a block, of the modules that attend to the text alone.
        stream_type: the NamedTuple that travels between layers.
        resolution_shift: the constants by which the timestep shift follows the picture's size.
        loss_terms: names of the losses that layers add; see `utils.diffusion.auxiliary.Output`.
        variational_weight: the weight of the variational term, for models that learn the variance of a step; a property
            if an option gives it.
    """

    media: ClassVar[MediaFacts]
    objective: Objective = FlowMatching()
    blocks: ClassVar[tuple[str, ...]]
    convolutional_blocks: ClassVar[tuple[str, ...]] = ()
    cross_attention: ClassVar[tuple[str, ...]] = ("attn2", "cross_attn")
    stream_type: ClassVar[Callable[..., tuple]]
    resolution_shift: ClassVar[ResolutionShift] = ResolutionShift()
    loss_terms: ClassVar[tuple[str, ...]] = ()
    variational_weight: float = 0.0

    @abstractmethod
    def to_layers(self, denoiser: nn.Module) -> list[nn.Module]:
        """[entry, one layer per block, exit]: each takes a stream and returns one. The exit returns what
        `TrainingMaths.loss` takes; in evaluation mode the prediction as a latent (B, ...)."""

    @abstractmethod
    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> tuple:
        """The inputs of the entry, a NamedTuple of CPU tensors.

        Args:
            features: the features from the encoders, each (B, ...).
            x_t: noised latents (B, ...).
            t_B: noise levels in [0, 1], float32.
            guidance: for a guidance-distilled model in sampling; None for the value that training uses.
        """

    @abstractmethod
    def tokens(self, latent_shape: Sequence[int]) -> int:
        """The number of image tokens of one frame of a latent of this shape (without the batch), by which the shift
        follows the size; of all frames if the model's rule was made for clips, as LTX-Video's.

        The other rules were made for pictures, and diffusion-pipe counts one frame for Wan too: with 21 of them the
        shift of Flux's rule would be 404 at 480 x 832, which leaves nothing but noise to train.
        """

    @abstractmethod
    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """The shape of a sample's latent, without the batch."""

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        """Why the model cannot be trained on these samples."""
        return []

    @property
    def places(self) -> tuple[int, int] | None:
        """The rows and columns of the table of positions, a place for each `media.spatial` pixels; None if positions
        are computed for any size."""
        return None

    def too_large(self, width: int, height: int) -> str | None:
        """What to tell of a picture of this size in pixels for which the model has no places; None if it has."""
        if self.places is None:
            return None
        rows, columns = (count * self.media.spatial for count in self.places)
        if height <= rows and width <= columns:
            return None
        return f"{width} x {height} is larger than the model's table of positions, which ends at {columns} x {rows}"

    def remarks(self) -> Iterable[tuple[str, str]]:
        """(option, what follows from it) for what the user may not expect, though it is allowed."""
        return remarks(self.options)

    def learning_rate(self, name: str) -> float | None:
        """The learning rate of a parameter that has its own; None for that of `[optimizer]`."""
        return None

    # Kept, as every micro-batch asks for it.
    @cached_property
    def maths(self) -> TrainingMaths:
        """Noise levels, noise, target and loss, as the options ask for them.

        Raises:
            ValueError: the options contradict each other.
        """
        return TrainingMaths.from_options(self.options, self.objective, self.resolution_shift, self.variational_weight)
