"""Which options an objective can honour. An option that it cannot is an error, never ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from utils.diffusion.objectives import Kind


@dataclass(frozen=True)
class Demand:
    """What an option needs.

    Attributes:
        kinds: the objectives that can honour it.
        reason: why others cannot.
    """

    kinds: tuple[Kind, ...]
    reason: str


TITLES: Mapping[Kind, str] = {
    "flow": "flow matching",
    "epsilon": "noise prediction (DDPM)",
    "v": "v-prediction (DDPM)",
    "edm": "EDM",
}
_DDPM = "weighs by the signal-to-noise ratio of DDPM's steps"
_LEVELS = "moves noise levels whose signal-to-noise ratio follows from t alone, and DDPM's has its schedule"
_STEPS = "changes DDPM's schedule of steps, and this model has none"
# By the option's name.
DEMANDS: Mapping[str, Demand] = {
    "weighting_scheme": Demand(("flow",), "weighs by the sigma of flow matching"),
    "shift": Demand(("flow", "edm"), _LEVELS),
    "flux_shift": Demand(("flow",), _LEVELS),
    "log_snr": Demand(("flow", "edm"), _LEVELS),
    "min_snr_gamma": Demand(("epsilon", "v"), _DDPM),
    "soft_min_snr_gamma": Demand(("epsilon", "v"), _DDPM),
    "debiased_estimation_loss": Demand(("epsilon", "v"), _DDPM),
    "scale_v_pred_loss_like_noise_pred": Demand(("v",), "makes of the loss of v that of the noise"),
    "v_pred_like_loss": Demand(("epsilon",), "adds to the loss of the noise one like that of v"),
    "rescale_betas_zero_snr": Demand(("v",), _STEPS + ", or predicts the noise, which needs some picture left"),
    "beta_schedule": Demand(("epsilon", "v"), _STEPS),
    "vlb_weight": Demand(("epsilon", "v"), "trains the variance of DDPM's steps"),
}


def refusals(options: Iterable[str], kind: Kind) -> dict[str, str]:
    """The `options` (names of those that are set) that an objective of this kind cannot honour -> the reason."""
    return {name: _refusal(name, kind) for name in options if name in DEMANDS and kind not in DEMANDS[name].kinds}


def _refusal(name: str, kind: Kind) -> str:
    needed = " or ".join(TITLES[one] for one in DEMANDS[name].kinds)
    return f"{DEMANDS[name].reason}: it needs {needed}, and this model has {TITLES[kind]}; leave it out"
