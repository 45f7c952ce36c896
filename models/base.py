"""The contract of a model: what a pipeline class states and what it does. Nothing here knows any one model.

Shapes: B batch; a latent has the dimensions of its model, (C h w) for pictures and (C f h w) for clips, written `...`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

from models.foundation.checkpoints.folders import TextPart, check_diffusers_folder, problems_of, read_config
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.key_layouts import KeyLayout
from models.foundation.checkpoints.recognition import explained
from models.foundation.checkpoints.weights import Weights, build_empty, materialise
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import TextFeatures
from utils.adapters.attach import base_name, is_factor
from utils.dataset.buckets import MediaFacts
from utils.dataset.encoders import Encoder
from utils.dataset.samples import Sample
from utils.diffusion import seeds
from utils.diffusion.checks import DEMANDS, refusals
from utils.diffusion.learned_variance import hybrid_factor, variational_bound
from utils.diffusion.losses import Labels, Loss
from utils.diffusion.noise import NoiseOptions
from utils.diffusion.objectives import FlowMatching, Objective
from utils.diffusion.schedules import over_sample
from utils.diffusion.timesteps import ResolutionShift, TimestepSampler
from utils.diffusion.weights import LossWeighting
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings, torch_dtype

Features = Mapping[str, torch.Tensor]
Value = TypeVar("Value")
_KEYS = {"log_snr": 'timestep_sample_method = "log_snr"'}
"""The option whose value has a demand of its own."""


class ModelEncoder(Encoder, Protocol):
    """An encoder as a model gives it."""

    def check(self) -> None:
        """Whether its files are whole and fit one another, from headers alone.

        Raises:
            UserError: they do not.
        """


class BasePipeline(ABC):
    """A model that can be trained. Subclasses fill in the facts and the abstract methods.

    Attributes:
        Options: the `[model]` keys of this model.
        media: to what multiples pictures and clips are rounded, and how many frames it takes.
        objective: what the denoiser predicts; a property where it follows from the model's files.
        blocks: names of the denoiser's lists of repeated blocks, or patterns of them, which are what is adapted.
            Recomputed are the layers that say `recomputable`.
        convolutional_blocks: further lists of them, which are adapted with `convolutions` of `[adapter]`.
        stream_type: the NamedTuple that travels between layers.
        resolution_shift: the constants by which the timestep shift follows the picture's size.
        keep_in_high_precision: parts of parameter names that stay float32 whatever `dtype` says.
        original_layout: names of the publisher's single-file checkpoint, if they differ from diffusers'.
        denoiser_class: the stock class of diffusers.
        denoiser_folder: where a diffusers folder keeps the denoiser; a property where an option chooses it.
        config_keys: what the denoiser's configuration must have.
        text_parts: the text encoders, and where a diffusers folder keeps them; a property where options or the folder
            decide which there are.
        scheduler_sets_levels: samples go through the scheduler's own noise levels; without it through
            `sampling_levels`.
        guided_by_second_prediction: samples are guided by the difference to a prediction for the negative prompt
            (classifier-free guidance); without it guidance, if the model knows any, is one of its inputs.
        no_guidance: the `guidance` at which `guided` gives the prediction for the prompt, so that no other is needed.
        loss_terms: names of the losses that layers add on their way; see `utils.diffusion.auxiliary.Output`.
        variational_weight: of the variational term, of models that learn the variance of a step; a property where an
            option says it.
        starts_from_picture: it makes clips of a first picture, or layers of one: in training of the sample's own; a
            property where the model's files decide.
        max_controls: how many control images it is conditioned on, of a dataset that has some.
    """

    Options: ClassVar[type[ModelSettings]] = ModelSettings
    media: ClassVar[MediaFacts]
    objective: Objective = FlowMatching()
    blocks: ClassVar[tuple[str, ...]]
    convolutional_blocks: ClassVar[tuple[str, ...]] = ()
    stream_type: ClassVar[Callable[..., tuple]]
    resolution_shift: ClassVar[ResolutionShift] = ResolutionShift()
    keep_in_high_precision: ClassVar[tuple[str, ...]] = ()
    original_layout: ClassVar[KeyLayout | None] = None
    denoiser_class: ClassVar[type[nn.Module]]
    denoiser_folder: str = "transformer"
    config_keys: ClassVar[tuple[str, ...]] = ()
    text_parts: tuple[TextPart, ...] = ()
    scheduler_sets_levels: ClassVar[bool] = False
    guided_by_second_prediction: ClassVar[bool] = False
    no_guidance: ClassVar[float] = 1.0
    loss_terms: ClassVar[tuple[str, ...]] = ()
    variational_weight: float = 0.0
    starts_from_picture: bool = False
    max_controls: ClassVar[int] = 0

    def __init__(self, options: ModelSettings, seed: int = 0):
        self.options = options
        self.seed = seed
        self.dtype: torch.dtype = torch_dtype(options.dtype)
        self.denoiser_dtype: torch.dtype = torch_dtype(options.transformer_dtype or options.dtype)

    def check(self) -> None:
        """Whether the files that the options name are there and are this model's, from their headers alone.

        Raises:
            UserError: what is missing or does not fit.
        """
        self.check_folder()
        if problems := list(self.problems_of_parts()):
            raise UserError(problems)
        self.check_tensors()

    def check_folder(self) -> None:
        """Whether all parts of the diffusers folder are there, or the files that replace their weights.

        Raises:
            UserError: telling all that is missing or damaged.
        """
        check_diffusers_folder(self.options, self.denoiser_folder, self.text_parts)

    def problems_of_parts(self) -> Iterable[Problem]:
        """Why the parts of a whole folder are not this model's, or do not fit one another or the options.

        Raises:
            UserError: a part's configuration is another model's.
        """
        return []

    def misfit(self, message: str) -> Problem:
        """A problem of the denoiser's configuration, for `problems_of_parts`."""
        return Problem(str(self.options.diffusers_path / self.denoiser_folder / "config.json"), "", message)

    def check_tensors(self) -> None:
        """Whether denoiser and encoders find their tensors in the files, by name and shape.

        Raises:
            UserError: all that do not fit.
        """
        encoders = [encoder.check for encoder in self.encoders()]
        problems = problems_of([lambda: self.open_weights(build_empty(self.build_denoiser)), *encoders])
        if problems:
            raise UserError(problems)

    @abstractmethod
    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        """The VAE first, then the rest; with control images (models that take them) also what reads those."""

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

    def text_encoder(
        self, features: TextFeatures, kind: type[TextEncoder] = TextEncoder, **further: Any
    ) -> TextEncoder:
        """The text encoder that gives these features, with the weights that the options name.

        Args:
            kind: the class of the encoder.
            further: what this class takes beside the arguments of `TextEncoder`.

        Raises:
            UserError: its configuration is missing or damaged, or another model's.
        """
        part, folder = self.text_part(features.encoder), self.options.diffusers_path
        return kind(part, folder, part.override(self.options), self.dtype, features, **further)

    def text_config(self, name: str) -> dict[str, Any]:
        """The configuration of the text encoder of this name.

        Raises:
            UserError: it is missing or damaged, or another model's.
        """
        return self.text_part(name).config(self.options.diffusers_path)

    def text_part(self, name: str) -> TextPart:
        """The text encoder of this name, among those that the model has."""
        return next(part for part in self.text_parts if part.name == name)

    # Kept: every micro-batch asks for it.
    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The configuration of the denoiser.

        Raises:
            UserError: it is missing or damaged, or another model's.
        """
        folder, name = self.options.diffusers_path, self.denoiser_class.__name__
        return read_config(folder, self.denoiser_folder, model=name, keys=self.config_keys)

    def build_denoiser(self) -> nn.Module:
        """The whole diffusers module, from its configuration, with whatever weights it is born with."""
        return self.denoiser_class.from_config(self.denoiser_config)

    @abstractmethod
    def to_layers(self, denoiser: nn.Module) -> list[nn.Module]:
        """[entry, one layer per block, exit]: each takes a stream and returns one. The exit returns what `loss` takes;
        in evaluation mode the prediction as a latent (B, ...)."""

    @abstractmethod
    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> tuple:
        """What the entry takes: NamedTuple of CPU tensors.

        Args:
            features: what the encoders yielded, each (B, ...).
            x_t: noised latents (B, ...).
            t_B: noise levels in [0, 1], float32.
            guidance: of a guidance-distilled model in sampling; None for the value that training uses.
        """

    @abstractmethod
    def tokens(self, latent_shape: Sequence[int]) -> int:
        """How many image tokens the denoiser makes of a latent of this shape, without the batch."""

    @abstractmethod
    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """The shape of a sample's latent, without the batch."""

    @abstractmethod
    def scheduler(self) -> Any:
        """The stock scheduler of diffusers with which samples are drawn."""

    def sampling_levels(self, steps: int) -> Sequence[float] | None:
        """The noise levels of a sample's steps before the scheduler shifts them, as the stock pipeline of the model has
        them; None for the scheduler's own."""
        if self.scheduler_sets_levels:
            return None
        return [1.0 - (1.0 - 1.0 / steps) * index / max(steps - 1, 1) for index in range(steps)]

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """The prediction for the prompt, that much further away from the one for the negative prompt: n + g (p - n).
        Ho & Salimans 2022, as diffusers writes it."""
        return negative + guidance * (prompted - negative)

    def latents(self, features: Features, draw: Callable[[torch.Size], torch.Tensor]) -> torch.Tensor:
        """The clean latents (B, ...) among the features, in float32; `draw` gives standard normal numbers of a shape
        where the features hold a distribution of latents."""
        if "latents" in features:
            return features["latents"].float()
        mean, std = features["latents_mean"].float(), features["latents_std"].float()
        return mean + std * draw(mean.shape)

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        """Why the model cannot be trained on these samples."""
        return []

    def loss_weight_map(self, latent_shape: Sequence[int]) -> torch.Tensor | None:
        """What each place of a latent (C, ...) counts in the loss, 1 on average, to multiply (B, C, ...); None where
        all count alike."""
        return None

    def learning_rate(self, name: str) -> float | None:
        """The rate of a parameter that has its own; None for that of `[optimizer]`."""
        return None

    def loss(self, prediction: torch.Tensor, labels: Labels) -> torch.Tensor:
        """Loss per sample (B,)."""
        losses_B = self.loss_function()(self.objective.compared(prediction), labels)
        if labels.variational is None:
            return losses_B
        bound_B = variational_bound(prediction, *labels.variational, self.objective, labels.weight)
        return losses_B + hybrid_factor(self.objective.schedule, self.variational_weight) * bound_B

    def with_teacher_target(self, labels: Labels, output: torch.Tensor) -> Labels:
        """The labels on the output's device; of regularisation data the output, another model's, is the target."""
        parents = self.objective.compared(output).float()
        regularising = over_sample(labels.regularising, parents).to(parents.device)
        return labels._replace(target=torch.where(regularising, parents, labels.target.to(parents.device)))

    def with_folded_guidance(self, labels: Labels, output: torch.Tensor) -> Labels:
        """The labels on the output's device; where there is a caption, the target is what guidance makes of itself and
        the output u, the model's own for the empty caption: u + g (target - u).

        Ho and Salimans 2022, equation 6, as a target: Tang et al. 2025 ("Diffusion models without classifier-free
        guidance"), for models that are distilled (Meng et al. 2023) and shall stay so.
        """
        unprompted = self.objective.compared(output).float()
        target = labels.target.to(unprompted.device)
        strength_B = torch.where(labels.captioned, self.options.folded_guidance, 1.0)
        strength = over_sample(strength_B, target).to(target)
        return labels._replace(target=unprompted + strength * (target - unprompted))

    def check_training(self, file: str = "") -> None:
        """Whether the objective can honour what the options ask of timesteps, noise and loss.

        Args:
            file: where the options are written.

        Raises:
            UserError: it cannot, or some of them contradict each other.
        """
        refused = refusals(self._asked(), self.objective.kind)
        problems = [Problem(file, f"[model] {_KEYS.get(name, name)}", reason) for name, reason in refused.items()]
        for build in (self.timestep_sampler, self.loss_weighting, self.noise_options, self.loss_function):
            try:
                build()
            except ValueError as error:
                problems.append(Problem(file, "[model]", str(error)))
        if problems:
            raise UserError(problems)

    def timestep_sampler(self) -> TimestepSampler:
        """The distribution of noise levels that the options ask for."""
        options = self.options
        shift = self.resolution_shift if options.flux_shift else options.shift
        return self._from_options(TimestepSampler, method=options.timestep_sample_method, shift=shift)

    def loss_weighting(self) -> LossWeighting:
        """What the loss counts at a noise level."""
        return self._from_options(LossWeighting)

    def noise_options(self) -> NoiseOptions:
        """How noise is made in training."""
        return self._from_options(NoiseOptions)

    def loss_function(self) -> Loss:
        """The distance of prediction and target."""
        return self._from_options(Loss)

    def _from_options(self, cls: Callable[..., Value], **others: Any) -> Value:
        """A dataclass whose fields, but for `others`, are called as the options are."""
        names = {field.name for field in dataclasses.fields(cls)} - others.keys()
        return cls(**{name: getattr(self.options, name) for name in names}, **others)

    def _asked(self) -> list[str]:
        """What the options ask of the objective, by the names in DEMANDS."""
        options = self.options
        defaults = {name: info.default for name, info in type(options).model_fields.items() if name in DEMANDS}
        changed = [name for name, default in defaults.items() if getattr(options, name) != default]
        return [*changed, options.timestep_sample_method]

    def load_denoiser(self) -> nn.Module:
        """The whole denoiser: on the meta device until `fill` reads what a stage needs, or, with `from_scratch`, with
        random weights that depend on the seed alone."""
        if self.options.from_scratch:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeds.derive(self.seed, "denoiser"))
                denoiser = self.build_denoiser()
        else:
            denoiser = build_empty(self.build_denoiser)
        self.set_types(denoiser)
        return denoiser

    def open_weights(self, denoiser: nn.Module) -> Weights | None:
        """The denoiser's tensors on disk, checked against its shapes; None if it starts from scratch."""
        if self.options.from_scratch:
            return None
        path = self.denoiser_path
        layout = self.original_layout
        if layout is not None:
            layout = layout if layout.recognises(read_header(path).files) else None
        try:
            return Weights(path, denoiser, layout)
        except UserError as error:
            raise explained(error, read_header(path).shapes, self.options.type) from error

    @property
    def denoiser_path(self) -> Path:
        """File or folder of the denoiser's weights."""
        return self.options.transformer_path or self.options.diffusers_path / self.denoiser_folder

    def fill(self, denoiser: nn.Module, weights: Weights | None, layers: Sequence[nn.Module]) -> None:
        """Reads the base weights of `layers`, which are some of the layers of `denoiser`."""
        wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
        names = [
            name
            for name, parameter in denoiser.named_parameters()
            if id(parameter) in wanted and parameter.is_meta and not is_factor(name)
        ]
        if weights is not None:
            materialise(denoiser, names, lambda name: weights.read(base_name(name)), self.parameter_dtype)

    def set_types(self, denoiser: nn.Module) -> None:
        """Brings every parameter of a denoiser as it was built to the type in which it is kept."""
        for name, parameter in denoiser.named_parameters():
            parameter.data = parameter.data.to(self.parameter_dtype(name))

    def parameter_dtype(self, name: str) -> torch.dtype:
        """The type in which a parameter of the denoiser is kept."""
        high = any(part in name for part in self.keep_in_high_precision)
        return torch.float32 if high else self.denoiser_dtype
