"""The contract of a model: what a pipeline class states and what it does. Nothing here knows a particular model.

Shapes: B batch; a latent has the dimensions of its model, (C h w) for pictures and (C f h w) for clips, written `...`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from models.foundation.checkpoints.denoiser import DenoiserWeights
from models.foundation.checkpoints.folders import TextPart, all_of, problems_of
from models.foundation.checkpoints.key_layouts import KeyLayout
from models.foundation.checkpoints.storage import StorageRules
from models.foundation.encoders.parts import ModelParts
from utils.dataset.buckets import MediaFacts
from utils.dataset.encoders import Encoder
from utils.dataset.samples import Sample
from utils.diffusion.objectives import FlowMatching, Objective
from utils.diffusion.timesteps import ResolutionShift
from utils.diffusion.training import TrainingMaths, remarks
from utils.errors import Problem, UserError
from utils.quantised.formats import FORMATS, Format
from utils.settings.dataset_schema import ControlFit
from utils.settings.model_schema import ModelSettings, torch_dtype
from utils.settings.run_tables import SamplingSettings

Features = Mapping[str, torch.Tensor]


class ModelEncoder(Encoder, Protocol):
    """An encoder of a model."""

    def check(self) -> None:
        """Whether its files are whole and fit one another, from headers alone.

        Raises:
            UserError: they do not.
        """


class BasePipeline(ABC):
    """A model that can be trained. Subclasses fill in the facts and the abstract methods.

    Attributes:
        Options: the `[model]` keys of this model.
        media: the multiples to which sizes of pictures and clips are rounded, and the number of frames.
        objective: what the denoiser predicts; a property if it follows from the model's files.
        blocks: names of the denoiser's lists of repeated blocks, or patterns of such names; adapters adapt these.
            Layers that are `recomputable` are recomputed.
        convolutional_blocks: further lists of blocks, which are adapted with `convolutions` of `[adapter]`.
        cross_attention: names, in a block, of the modules that attend to the text alone.
        stream_type: the NamedTuple that travels between layers.
        resolution_shift: the constants by which the timestep shift follows the picture's size.
        sampling_shift: the same of its scheduler, for models that are sampled with another shift than they are trained.
        keep_in_high_precision: parts of the names of parameters that stay float32 regardless of `dtype`.
        original_layout: names of the publisher's single-file checkpoint, if they differ from diffusers' names.
        spec_architecture: what ModelSpec, in the headers of weights, calls the model; default: its type with hyphens; a
            property if the model's files decide.
        comfyui_note: what one must do in ComfyUI to use an export, beyond loading it.
        denoiser_class: name of the stock class of diffusers.
        denoiser_folder: the denoiser's part of a diffusers folder; a property if an option chooses it.
        config_keys: keys that the denoiser's configuration must have.
        text_parts: the text encoders, and where a diffusers folder keeps them; a property if options or the folder
            decide which ones exist.
        folder_has_scheduler: whether a diffusers folder has a scheduler; otherwise inference makes it.
        scheduler_sets_levels: whether sampling uses the scheduler's own noise levels instead of `sampling_levels`.
        guided_by_second_prediction: whether samples are guided by a second prediction for the negative prompt
            (classifier-free guidance); otherwise guidance, if the model has any, is one of its inputs.
        noise_in_float32: whether the model's stock pipeline draws its noise in float32 whatever the type of the rest;
            a sample with a seed of its own begins with the same.
        unguided: why samples cannot be guided, for a model that is guided by what a run does not have.
        no_guidance: the `guidance` for which `guided` gives the prediction for the prompt, so that one is enough.
        loss_terms: names of the losses that layers add; see `utils.diffusion.auxiliary.Output`.
        variational_weight: the weight of the variational term, for models that learn the variance of a step; a property
            if an option gives it.
        block_format: the format of the Linears of the repeated blocks, if they are quantised.
        starts_from_picture: whether it makes clips, or layers, from a picture, which in training is the sample's own; a
            property if the model's files decide.
        ends_in_picture: whether clips that start from a picture also end in one, the second of a prompt, which in
            training is the clip's last frame; a property if files or options decide.
        follows_clip: whether its first control image may be a clip, as long as the sample's.
        frame_groups: frames of a clip -> how many of them each latent frame covers, for masks; None if the first one
            covers the first frame alone, and each of the others as many as the next.
        masks_weigh: whether masks of the data weigh the loss; otherwise they say what of the first control image is
            made anew, and prompts may have one too; a property if options decide.
        control_fit: how the control images of prompts are brought to the sample's shape, as in a dataset; a property if
            options decide.
        max_controls: the largest number of control images with which it is conditioned.
    """

    Options: ClassVar[type[ModelSettings]] = ModelSettings
    media: ClassVar[MediaFacts]
    objective: Objective = FlowMatching()
    blocks: ClassVar[tuple[str, ...]]
    convolutional_blocks: ClassVar[tuple[str, ...]] = ()
    cross_attention: ClassVar[tuple[str, ...]] = ("attn2", "cross_attn")
    stream_type: ClassVar[Callable[..., tuple]]
    resolution_shift: ClassVar[ResolutionShift] = ResolutionShift()
    sampling_shift: ClassVar[ResolutionShift | None] = None
    keep_in_high_precision: ClassVar[tuple[str, ...]] = ()
    original_layout: ClassVar[KeyLayout | None] = None
    spec_architecture: str | None = None
    comfyui_note: ClassVar[str | None] = None
    denoiser_class: ClassVar[str]
    denoiser_folder: str = "transformer"
    config_keys: ClassVar[tuple[str, ...]] = ()
    text_parts: tuple[TextPart, ...] = ()
    folder_has_scheduler: ClassVar[bool] = True
    scheduler_sets_levels: ClassVar[bool] = False
    guided_by_second_prediction: ClassVar[bool] = False
    noise_in_float32: ClassVar[bool] = False
    unguided: ClassVar[str | None] = None
    no_guidance: ClassVar[float] = 1.0
    loss_terms: ClassVar[tuple[str, ...]] = ()
    variational_weight: float = 0.0
    starts_from_picture: bool = False
    ends_in_picture: bool = False
    follows_clip: ClassVar[bool] = False
    frame_groups: Callable[[int], Sequence[int]] | None = None
    masks_weigh: bool = True
    control_fit: ControlFit = None
    max_controls: ClassVar[int] = 0

    def __init__(self, options: ModelSettings, seed: int = 0):
        self.options = options
        self.seed = seed
        self.dtype: torch.dtype = torch_dtype(options.dtype)
        self.block_format: Format | None = FORMATS.get(options.transformer_dtype)
        kept = options.dtype if self.block_format else options.transformer_dtype
        self.denoiser_dtype: torch.dtype = torch_dtype(kept or options.dtype)

    def check(self) -> None:
        """Whether the files that the options name exist and belong to this model, from their headers only.

        Raises:
            UserError: says what is missing or does not fit.
        """
        self.check_folder()
        if problems := all_of(self.problems_of_parts()):
            raise UserError(problems)
        self.check_tensors()

    def check_folder(self) -> None:
        """Whether all parts of the diffusers folder exist, or the files that replace their weights.

        Raises:
            UserError: lists everything that is missing or damaged.
        """
        self.parts.check()

    def problems_of_parts(self) -> Iterable[Problem]:
        """Why the parts of a complete folder do not belong to this model, or do not fit each other or the options.

        Raises:
            UserError: the configuration of a part belongs to another model.
        """
        return []

    def check_tensors(self) -> None:
        """Whether denoiser and encoders find their tensors in the files, by name and shape.

        Raises:
            UserError: lists all that do not fit.
        """
        encoders = [encoder.check for encoder in self.encoders()]
        problems = problems_of([lambda: self.weights.open(self.weights.build_empty()), *encoders])
        if problems:
            raise UserError(problems)

    @abstractmethod
    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        """The VAE first, then the others; with control images (if the model takes them) also their encoders."""

    def encoders_for(self, controls: int) -> list[Encoder]:
        """`encoders`, for a dataset with this many control images per sample.

        Raises:
            UserError: this model takes fewer.
        """
        if controls > self.max_controls:
            raise UserError.of(
                f"this model takes {self.max_controls or 'no'} control images, and there are {controls}; leave "
                "control_path or data_file_keys out, or some of them",
                where="[[directory]]",
            )
        return self.encoders(controls)

    def build_denoiser(self) -> nn.Module:
        """The whole diffusers module, from its configuration, with its initial weights."""
        return self.parts.made_denoiser()

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

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        """Why the model cannot be trained on these samples."""
        return []

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterable[Problem]:
        """What of `[model]` is said in vain for the samples of this run, and what these lack for the model."""
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

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        """How many of the first frames of a clip's latent (C, f, h, w) the model is trained to go on from: it receives
        them without noise, as `given_frames` among the features of `prepare_inputs`, and they do not count in the loss.

        Args:
            quantile: a number in [0, 1), drawn for the sample.
        """
        return 0

    def learning_rate(self, name: str) -> float | None:
        """The learning rate of a parameter that has its own; None for that of `[optimizer]`."""
        return None

    @cached_property
    def parts(self) -> ModelParts:
        """Denoiser and text encoders: where they are, and their configurations."""
        asked = self.options.text_encoder_dtype
        kept = asked if asked in FORMATS else None
        return ModelParts(
            self.options,
            self.denoiser_class,
            self.denoiser_folder,
            self.config_keys,
            self.text_parts,
            dtype=self.dtype if asked is None or kept else torch_dtype(asked),
            kept=kept,
            with_scheduler=self.folder_has_scheduler,
        )

    # Kept, as every micro-batch asks for it.
    @cached_property
    def maths(self) -> TrainingMaths:
        """Noise levels, noise, target and loss, as the options ask for them.

        Raises:
            ValueError: the options contradict each other.
        """
        return TrainingMaths.from_options(self.options, self.objective, self.resolution_shift, self.variational_weight)

    @property
    def storage(self) -> StorageRules:
        """In which form each parameter of the denoiser is kept."""
        return StorageRules.with_high_precision(self.denoiser_dtype, self.keep_in_high_precision)

    @property
    def weights(self) -> DenoiserWeights:
        """How the denoiser is built and where its weights lie."""
        seed = self.seed if self.options.from_scratch else None
        return DenoiserWeights(
            self.build_denoiser, self.options.type, self.parts.denoiser_path, self.original_layout, self.storage, seed
        )
