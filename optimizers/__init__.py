"""How weights move: the file of a family of optimizers declares them as its `KINDS`, one `[optimizer] type` each."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from optimizers import by_path
from optimizers.averaging import begin_training
from optimizers.kinds import Groups, OptimizerKind
from optimizers.rounding import is_short
from optimizers.saved_state import remember_groups
from utils.declared import kinds_in
from utils.errors import UserError
from utils.settings.choices import Choice
from utils.settings.schema import OptimizerSettings, Settings

ALSO_CALLED = {"optimiadamw": "adamwoptimi", "optimilion": "lion", "optimistableadamw": "stableadamw"}
"""Names of the same in other trainers, in small letters without hyphens."""
logger = logging.getLogger(__name__)

NOT_FAMILIES = (
    "averaging",
    "by_parameter",
    "by_path",
    "distance",
    "eight_bits",
    "ema",
    "found_rates",
    "kinds",
    "libraries",
    "parameter_groups",
    "rounding",
    "saved_state",
    "schedules",
    "subspaces",
    "sums",
)


def available() -> dict[str, OptimizerKind]:
    """All optimizers, by `type`."""
    return {kind.type: kind for kind in kinds_in(__name__, __path__, NOT_FAMILIES)}


def find(optimizer_type: str) -> OptimizerKind:
    """The optimizer of a type: one of ours, for which upper and lower case are alike, and hyphens and underlines mean
    nothing; or a class by its path, or by its name in pytorch-optimizer.

    Raises:
        ValueError: there is no such optimizer; names the existing ones.
    """
    kinds = available()
    plain = _plain(optimizer_type)
    kind = {_plain(name): kind for name, kind in kinds.items()}.get(ALSO_CALLED.get(plain, plain))
    kind = kind or by_path.kind_of(optimizer_type)
    if kind is None:
        raise ValueError(
            f'no optimizer is called "{optimizer_type}"; known: {", ".join(kinds)}; or those of pytorch-optimizer, by '
            "their names, or the path of any class, as in some.module.Class"
        )
    return kind


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def choice() -> Choice:
    """The choice of `[optimizer] type`."""
    return Choice(lambda name: find(name).settings, {name: kind.settings for name, kind in available().items()})


def build(groups: Groups, settings: OptimizerSettings, samples_of_step: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer that `settings` describe, over `groups` (see `parameter_groups.groups_of`).

    A group's own `weight_decay` and `lr` override those of `settings`.
    Raises UserError if the algorithm cannot run on this machine; see `check`.

    Args:
        samples_of_step: how many samples a step sees, in the mean; for what is given in samples.
    """
    check(settings, "cuda" if torch.cuda.is_available() else "cpu")
    return made(groups, settings, samples_of_step)


def made(groups: Groups, settings: OptimizerSettings, samples_of_step: float = 1.0) -> torch.optim.Optimizer:
    """As `build`, also where the algorithm is not offered."""
    kind = find(settings.type)
    assert isinstance(settings, kind.settings), type(settings)
    keys = settings.arguments()
    half_life = keys.pop("beta2_half_life", None)
    if half_life is not None:
        keys["betas"] = keys["betas"][0], 0.5 ** (samples_of_step / half_life)
    optimizer = kind.build(groups, **keys)
    begin_training(optimizer)
    remember_groups(optimizer)
    return optimizer


def counts_samples(settings: OptimizerSettings) -> bool:
    """Whether a key is given in samples, so that `build` has to be told how many a step sees."""
    return getattr(settings, "beta2_half_life", None) is not None


def check(settings: OptimizerSettings, device: torch.device | str, reason: str = "") -> None:
    """Whether the algorithm can run on a device of this type ("cuda", "cpu").

    Args:
        device: that of this process, which takes none of another one's memory.
        reason: why it has to; begins the message.

    Raises:
        UserError: it cannot, or keys do not go together; says why, and what to do. A class of which no more is known is
            tried.
    """
    kind, device = find(settings.type), torch.device(device)
    advice = kind.not_on.get(device.type)
    if advice:
        raise UserError.of(f'{reason}"{settings.type}" {advice}', where="[optimizer] type")
    if problem := kind.refuses(settings):
        key, _, says = problem.partition(": ")
        raise UserError.of(says, where=f"[optimizer] {key}")
    if kind.unknown and (device.type == "cpu" or torch.cuda.is_available()):
        by_path.tried(settings, device=device)


def check_schedule(settings: Settings) -> None:
    """Whether the optimizer may have the schedule.

    Raises:
        UserError: it may not; says why, and what to do.
    """
    kind = find(settings.optimizer.type)
    if kind.constant_rate and settings.lr_scheduler != "constant" and settings.force_constant_lr is None:
        raise UserError.of(
            f'"{kind.type}" {kind.constant_rate}: it takes lr_scheduler = "constant", with warmup_steps or without',
            where="key `lr_scheduler`",
        )


def check_steps(settings: Settings) -> None:
    """Whether the optimizer can step layer by layer, or let weights be changed after its steps, if the settings ask for
    it.

    Raises:
        UserError: it cannot.
    """
    if find(settings.optimizer.type).averages and getattr(settings.adapter, "scale_weight_norms", None):
        raise UserError.of(
            f'does not go with "{settings.optimizer.type}", which trains other weights than those to be used',
            where="[adapter] scale_weight_norms",
        )
    if settings.optimizer.gradient_release and not find(settings.optimizer.type).steps_alone:
        fitting = ", ".join(name for name, kind in available().items() if kind.steps_alone)
        raise UserError.of(
            f'"{settings.optimizer.type}" has to step all parameters together; leave it out, or take one of {fitting}',
            where="[optimizer] gradient_release",
        )


def warn_of_sums(settings: Settings) -> None:
    """Tells what is not known of somebody's class where each process steps parameters of its own."""
    divided = settings.pipeline_stages > 1 or settings.zero_stage > 0
    if divided and find(settings.optimizer.type).unknown:
        logger.warning(
            '[optimizer] type: each process steps its own parameters with "%s": what it sums over parameters, such as '
            "their norm, it sums over those of one process",
            settings.optimizer.type,
        )


def warn_of_lost_steps(settings: OptimizerSettings, trained: Mapping[str, torch.Tensor]) -> None:
    """Tells that nothing keeps small steps of weights of 16 bits, if there are some among those that are trained.

    Args:
        trained: by name.
    """
    kind = find(settings.type)
    short = [name for name, parameter in trained.items() if is_short(parameter)]
    if not short or not kind.loses_small_steps(settings):
        return
    keeps = "keeps nothing" if not kind.unknown else "is not known to keep anything"
    logger.warning(
        '[optimizer] type: "%s" %s of steps that are too small for the digits of weights of 16 bits, as %d of %d '
        'trained tensors have, "%s" first: with small learning rates they hardly move. Train in float32, or take one '
        'that keeps them, as "adamw" (a float32 master), "adamw_optimi" or "adamw8bitkahan" (16 further bits)',
        settings.type,
        keeps,
        len(short),
        len(trained),
        short[0],
    )


def state_bytes(settings: OptimizerSettings, parameter: torch.Tensor) -> int:
    """The bytes of optimizer state for a parameter; see `OptimizerKind`."""
    return find(settings.type).state_bytes(settings, parameter)
