"""Models with DDPM's steps: their common `[model]` keys, and the objective and scheduler that follow from these keys
and from the folder's scheduler."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from models.foundation.checkpoints.configs import SCHEDULER_FILE, kinds_of, made_of
from utils.diffusion.objectives import Epsilon, VPrediction
from utils.diffusion.schedules import NoiseSchedule
from utils.errors import UserError
from utils.json_files import ANEW, check_types, read_json, shown
from utils.settings.model_schema import ModelSettings
from utils.settings.values import TimestepMethod

KINDS = {
    "_class_name": str,
    "prediction_type": str,
    "beta_schedule": str,
    "beta_start": float,
    "beta_end": float,
    "num_train_timesteps": Annotated[int, 2],
    "rescale_betas_zero_snr": bool,
    "snr_shift_scale": float,
}
"""The types of what is read of a scheduler's configuration here."""
OF_COGVIDEOX = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "snr_shift_scale": 3.0,
}
DEFAULTS = {"CogVideoXDDIMScheduler": OF_COGVIDEOX, "CogVideoXDPMScheduler": OF_COGVIDEOX}
"""What schedulers of diffusers have for keys that their configurations leave out, if not what DDPM's has."""
OBJECTIVES = {"epsilon": Epsilon, "v_prediction": VPrediction}


class DDPMOptions(ModelSettings):
    """The keys of models that are trained at DDPM's integer steps."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = (
        *ModelSettings.binds_checkpoint,
        "prediction_type",
        "beta_schedule",
    )

    timestep_sample_method: TimestepMethod = "uniform"
    """Distribution from which training timesteps t are drawn, 0 being the clean picture and 1 noise: step t * 1000 of
    DDPM."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts; default: what the folder's scheduler says, or a checkpoint by the mark `v_pred`."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    """How noise grows over the steps; default: what the folder's scheduler says."""


def ddpm_objective(options: DDPMOptions, *, learns_sigma: bool = False) -> Epsilon:
    """The objective according to the options and, for missing options, the folder's scheduler.

    Raises:
        UserError: the scheduler's configuration is missing, damaged or of another kind; or the options contradict each
            other.
    """
    file = options.diffusers_path / SCHEDULER_FILE
    config = scheduler_config(options)
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in OBJECTIVES:
        raise UserError.of(
            f"prediction_type '{predicts}' is not trained; set [model] prediction_type to "
            f"{' or '.join(OBJECTIVES)} if this is a mistake",
            str(file),
        )
    try:
        return OBJECTIVES[predicts](NoiseSchedule.from_config(config), learns_sigma)
    except ValueError as error:
        raise UserError.of(str(error), where="[model]") from error


def scheduler_config(options: DDPMOptions) -> dict[str, Any]:
    """The configuration of the folder's scheduler with the changes of the options: a stock scheduler with this
    configuration samples as the model is trained.

    Raises:
        UserError: it is missing or damaged.
    """
    config = read_json(options.diffusers_path / SCHEDULER_FILE, kinds=KINDS)
    config = {**DEFAULTS.get(config.get("_class_name"), {}), **config}
    if options.rescale_betas_zero_snr:
        config["rescale_betas_zero_snr"] = True
    for key in ("prediction_type", "beta_schedule"):
        if getattr(options, key) is not None:
            config[key] = getattr(options, key)
    return config


def ddpm_scheduler(options: DDPMOptions) -> Any:
    """The folder's stock scheduler with the changes of the options.

    Raises:
        UserError: its configuration is missing or damaged, or does not describe a scheduler.
    """
    config, file = scheduler_config(options), options.diffusers_path / SCHEDULER_FILE
    import diffusers

    name = config.get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError.of(f"`_class_name` is {shown(name)}, which is no scheduler of diffusers; {ANEW}", str(file))
    check_types(config, kinds_of(kind), str(file), ANEW)
    return made_of(name, config, file)
