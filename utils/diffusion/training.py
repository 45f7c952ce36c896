"""The maths of one model's training, as its options ask for it: noise levels, noise, target, weight and loss.

Shapes: B batch, `...` the latent's own dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from utils.diffusion.checks import DEMANDS, refusals
from utils.diffusion.learned_variance import hybrid_factor, variational_bound
from utils.diffusion.losses import Labels, Loss
from utils.diffusion.noise import NoiseOptions
from utils.diffusion.objectives import Objective
from utils.diffusion.schedules import over_sample
from utils.diffusion.timesteps import ResolutionShift, TimestepSampler
from utils.diffusion.weights import LossWeighting

Value = TypeVar("Value")


@dataclass(frozen=True)
class TrainingMaths:
    """What follows from the options of a run and from the objective of its model.

    Attributes:
        objective: what the model predicts.
        timesteps: the distribution of noise levels.
        weighting: what the loss counts at a noise level.
        noise: how noise is made in training.
        distance: of prediction and target.
        variational_weight: of the variational term, for models that learn the variance of a step.
        folded_guidance: the strength of guidance that is folded into the target; None for none.
    """

    objective: Objective
    timesteps: TimestepSampler = TimestepSampler()
    weighting: LossWeighting = LossWeighting()
    noise: NoiseOptions = NoiseOptions()
    distance: Loss = Loss()
    variational_weight: float = 0.0
    folded_guidance: float | None = None

    @classmethod
    def from_options(
        cls, options: Any, objective: Objective, resolution_shift: ResolutionShift, variational_weight: float = 0.0
    ) -> TrainingMaths:
        """The maths that `options` ask for, whose attributes have the names of the fields of the values above.

        Args:
            resolution_shift: the model's own, for `flux_shift`.

        Raises:
            ValueError: a value is out of its range, or two contradict each other.
        """
        parts = {name: build() for name, build in _builders(options, resolution_shift).items()}
        return cls(
            objective,
            **parts,
            variational_weight=variational_weight,
            folded_guidance=getattr(options, "folded_guidance", None),
        )

    def loss(self, prediction: torch.Tensor, labels: Labels) -> torch.Tensor:
        """Loss per sample (B,)."""
        losses_B = self.distance(self.objective.compared(prediction), labels)
        if labels.variational is None:
            return losses_B
        bound_B = variational_bound(prediction, *labels.variational, self.objective, labels.weight)
        return losses_B + hybrid_factor(self.objective.schedule, self.variational_weight) * bound_B

    def with_teacher_target(self, labels: Labels, output: torch.Tensor) -> Labels:
        """The labels on the output's device; for regularisation data the target is the output of the teacher."""
        parents = self.objective.compared(output).float()
        regularising = over_sample(labels.regularising, parents).to(parents.device)
        return labels._replace(target=torch.where(regularising, parents, labels.target.to(parents.device)))

    def with_folded_guidance(self, labels: Labels, output: torch.Tensor) -> Labels:
        """The labels on the output's device; where a sample has a caption, its target becomes what guidance makes of
        the target and the output u, the model's own prediction for the empty caption: u + g (target - u).

        Ho and Salimans 2022, equation 6, as a target: Tang et al. 2025 ("Diffusion models without classifier-free
        guidance"), for models that are distilled (Meng et al. 2023) and shall stay so.
        """
        unprompted = self.objective.compared(output).float()
        target = labels.target.to(unprompted.device)
        strength_B = torch.where(labels.captioned, self.folded_guidance, 1.0)
        strength = over_sample(strength_B, target).to(target)
        return labels._replace(target=unprompted + strength * (target - unprompted))


def faults(options: Any, objective: Objective, resolution_shift: ResolutionShift) -> Iterator[tuple[str, str]]:
    """(option, reason) for everything that the objective cannot honour, and ("", reason) for values that are out of
    their range or contradict each other."""
    yield from refusals(requested_features(options), objective.kind).items()
    for build in _builders(options, resolution_shift).values():
        try:
            build()
        except ValueError as error:
            yield "", str(error)


BY_SNR = ("min_snr_gamma", "soft_min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred")
"""Options that weigh a noise level by its signal-to-noise ratio; of v, all but the third weigh plain noise by 0."""


def remarks(options: Any) -> Iterator[tuple[str, str]]:
    """(option, what it does together with others) for what is allowed and may surprise."""
    weighing = [name for name in BY_SNR if getattr(options, name)]
    if len(weighing) > 1:
        yield weighing[0], f"multiplies with {' and '.join(weighing[1:])}: one weight by the noise level is usual"
    if options.weighting_scheme == "cosmap" and options.timestep_sample_method == "cosmap":
        yield "weighting_scheme", "cosmap weighs what the timesteps are drawn by already; one of the two is usual"
    if options.rescale_betas_zero_snr:
        for name in weighing:
            if name != "debiased_estimation_loss":
                yield name, "weighs the last step by 0, for which rescale_betas_zero_snr is there: it is not trained"


def requested_features(options: Any) -> list[str]:
    """What the options ask of the objective, by the names in `DEMANDS`: options that differ from their defaults, and
    the method by which timesteps are drawn."""
    defaults = {name: info.default for name, info in type(options).model_fields.items() if name in DEMANDS}
    changed = [name for name, default in defaults.items() if getattr(options, name) != default]
    return [*changed, options.timestep_sample_method]


def _builders(options: Any, resolution_shift: ResolutionShift) -> dict[str, Callable[[], Any]]:
    """What makes the parts of a `TrainingMaths`, by field."""
    shift = resolution_shift if options.flux_shift else options.shift
    return {
        "timesteps": lambda: _from_options(
            TimestepSampler, options, method=options.timestep_sample_method, shift=shift
        ),
        "weighting": lambda: _from_options(LossWeighting, options),
        "noise": lambda: _from_options(NoiseOptions, options),
        "distance": lambda: _from_options(Loss, options),
    }


def _from_options(cls: Callable[..., Value], options: Any, **others: Any) -> Value:
    """A dataclass whose fields, except for `others`, have the names of options."""
    names = {field.name for field in dataclasses.fields(cls)} - others.keys()
    return cls(**{name: getattr(options, name) for name in names}, **others)
