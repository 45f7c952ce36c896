"""The learning rate as a function of the step only, so that resuming needs no state."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from math import cos, pi
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from utils.errors import UserError
from utils.settings.lr_schedules import NAMES
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

LENGTHS = ("T_max", "total_steps", "num_training_steps")
"""Arguments of others' schedules that are the number of steps after warm-up, unless they are given."""
WARM_UPS = ("num_warmup_steps", "warmup_steps")
"""Arguments of others' schedules for a warm-up of their own."""


class _Point(NamedTuple):
    """Where a schedule is: `step` of the `steps` that follow warm-up."""

    step: int
    steps: int

    @property
    def share(self) -> float:
        """From 0 at the end of warm-up to 1 at the end of the last step, and after it."""
        return min(1.0, self.step / max(1, self.steps))


def _restarted(point: _Point, settings: Settings) -> float:
    """SGDR with cycles of equal length (Loshchilov and Hutter 2017, equation 5)."""
    return 0.0 if point.share >= 1.0 else _half_wave(point.share * settings.lr_num_cycles % 1.0)


def _rex(point: _Point, settings: Settings) -> float:
    """REX (Chen et al. 2021, "REX: Revisiting Budgeted Training with an Improved Schedule")."""
    left = 1.0 - point.share
    return left / (0.5 + 0.5 * left)


def _wsd(point: _Point, settings: Settings) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, "MiniCPM", section 4), the decay along half a wave."""
    falling = _steps_of(settings.lr_decay_steps, point.steps)
    return _half_wave(min(1.0, max(0, point.step - (point.steps - falling)) / max(1, falling)))


def _half_wave(share: float) -> float:
    return 0.5 * (1.0 + cos(pi * share))


# By kind: the factor on the part of the learning rate above the minimum.
_COURSES: Mapping[str, Callable[[_Point, Settings], float]] = {
    "constant": lambda point, settings: 1.0,
    "linear": lambda point, settings: 1.0 - point.share,
    "cosine": lambda point, settings: _half_wave(point.share),
    "cosine_with_restarts": _restarted,
    "polynomial": lambda point, settings: (1.0 - point.share) ** settings.lr_power,
    "rex": _rex,
    "wsd": _wsd,
}
# By kind: the factor on the whole learning rate, which the minimum bounds.
_DECAYS: Mapping[str, Callable[[_Point, Settings], float]] = {
    "step": lambda point, settings: settings.lr_gamma ** (point.step // settings.lr_step_size),
    "exponential": lambda point, settings: settings.lr_gamma**point.step,
}


class Schedule:
    """The learning rates of a run.

    Warm-up rises by 1 / (warmup_steps + 1) per step, so that no step is lost to a rate of 0, and reaches 1 at step
    `warmup_steps`. What follows comes to its end at step `total_steps`, the first that is not taken. Lengths that are
    fractions are those of `total_steps`.

    Args:
        settings: the run's; those of its keys that begin with `lr_`, `warmup_steps` and `force_constant_lr` are used.
        total_steps: of the run, on whatever number of ranks.
    """

    def __init__(self, settings: Settings, total_steps: int) -> None:
        self._settings = settings
        self._total = total_steps
        self.warmup_steps = _steps_of(settings.warmup_steps, total_steps)
        self._others: _OthersSchedule | None = None

    def factor(self, step: int) -> float:
        """The factor on the learning rate at `step`, counted from 0; not for others' schedules."""
        point, settings = self._point(step), self._settings
        lowest, kind = settings.lr_min_ratio, settings.lr_scheduler
        if kind in _DECAYS:
            after = max(lowest, _DECAYS[kind](point, settings))
        else:
            after = lowest + (1.0 - lowest) * _COURSES[kind](point, settings)
        return self._warm_up(step) * after

    def learning_rates(self, step: int, base_lrs: Sequence[float]) -> list[float]:
        """The learning rate of each parameter group at `step`, given the rates after warm-up, the same at each call."""
        settings = self._settings
        if settings.force_constant_lr is not None:
            return [settings.force_constant_lr] * len(base_lrs)
        if settings.lr_scheduler in NAMES:
            scale = self.factor(step)
            return [base * scale for base in base_lrs]
        if self._others is None or self._others.step > self._point(step).step:
            self._others = _OthersSchedule(settings, base_lrs, self._point(step).steps)
        scale = self._warm_up(step)
        return [rate * scale for rate in self._others.rates_at(self._point(step).step)]

    def _warm_up(self, step: int) -> float:
        assert step >= 0, step
        return min(1.0, (step + 1) / (self.warmup_steps + 1))

    def _point(self, step: int) -> _Point:
        return _Point(max(0, step - self.warmup_steps), self._total - self.warmup_steps)


class _StandIn(torch.optim.Optimizer):
    """Parameter groups that nothing trains. They have no momentum: a schedule that would change one says so."""

    def __init__(self, base_lrs: Sequence[float]) -> None:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in base_lrs]
        super().__init__(groups, {"lr": base_lrs[0]})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Nothing; torch warns of a scheduler that steps before its optimizer has."""


class _OthersSchedule:
    """A schedule of torch, or with its interface, which counts its steps on a stand-in.

    Raises:
        UserError: see `check`.
    """

    def __init__(self, settings: Settings, base_lrs: Sequence[float], steps: int) -> None:
        self._optimizer = _StandIn(base_lrs)
        self._schedule = _made(settings, self._optimizer, steps)
        self.step = 0

    def rates_at(self, step: int) -> list[float]:
        """Those of the groups, at the step at which it is or a later one."""
        while self.step < step:
            self._optimizer.step()
            self._schedule.step()
            self.step += 1
        return [float(group["lr"]) for group in self._optimizer.param_groups]


def check(settings: Settings) -> None:
    """Whether a schedule that another library has can be used as it is written.

    Raises:
        UserError: there is no such schedule, its arguments do not fit, or it needs more than the number of the step.
    """
    if settings.lr_scheduler not in NAMES:
        _OthersSchedule(settings, [settings.optimizer.lr], steps=2)


def _made(settings: Settings, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    path, args = settings.lr_scheduler, settings.lr_scheduler_args
    make = _imported(path)
    try:
        schedule = make(optimizer, **_arguments(path, make, args, steps))
    except UserError:
        raise
    except Exception as error:
        raise UserError.of(
            f"{path} cannot be made with {args}: {type(error).__name__}: {error}", where="key `lr_scheduler_args`"
        ) from error
    reason = "is no LRScheduler" if not isinstance(schedule, LRScheduler) else ""
    if isinstance(schedule, ReduceLROnPlateau):
        reason = "needs a measured value at each step"
    if reason:
        where = "key `lr_scheduler`"
        raise UserError.of(f'"{path}" {reason}, and the learning rate follows from the step alone', where=where)
    return schedule


def _arguments(path: str, make: Callable[..., Any], args: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Those that are given, and the numbers of steps that are not."""
    known = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    unknown = [] if takes_any else [name for name in args if name not in known]
    if unknown:
        names = [name for name in known if name not in ("optimizer", "last_epoch", "verbose")]
        raise UserError.of(
            f"{path} has no argument {', '.join(unknown)}; it has {', '.join(names)}", where="key `lr_scheduler_args`"
        )
    lengths = {name: max(1, steps) for name in LENGTHS if name in known}
    without = {name: 0 for name in WARM_UPS if name in known and known[name].default is inspect.Parameter.empty}
    return {**lengths, **without, **args}


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError.of(f'"{path}" cannot be imported: {error}', where="key `lr_scheduler`") from error


def _steps_of(length: float | None, steps: int) -> int:
    """A length in steps, which may be given as a fraction of `steps`."""
    return round(length * steps) if isinstance(length, float) else length or 0


def warn_of_warmup(settings: Settings, total_steps: float) -> None:
    """Tells if the learning rate does not come to its full value in `total_steps`."""
    warmup = settings.warmup_steps
    if settings.force_constant_lr is None and not isinstance(warmup, float) and 0 < total_steps <= warmup:
        logger.warning(
            "key `warmup_steps`: the run has %d steps, and warm-up takes %d: the learning rate comes to %.0f %% of lr",
            total_steps,
            warmup,
            100 * int(total_steps) / (warmup + 1),
        )
