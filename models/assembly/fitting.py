"""Chooses what is "auto" by a GPU's memory: which blocks are recomputed and how many are swapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import optimizers
from models.assembly.cut import with_cut
from models.assembly.memory import GIB, Planner, StagePlan
from models.assembly.room import planned_with
from utils.errors import UserError
from utils.settings.plain import as_toml
from utils.settings.schema import Settings
from utils.settings.step_rules import DIVIDES_GRADIENTS

KEYS = ("activation_checkpointing", "blocks_to_swap")


@dataclass(frozen=True)
class Attempt:
    """Settings that may fit, and the plans that they lead to."""

    settings: Settings
    plans: Sequence[StagePlan]

    @property
    def total(self) -> int:
        """Of the stage that takes most."""
        return max(plan.total for plan in self.plans)

    def __str__(self) -> str:
        chosen = ", ".join(f"{key} = {as_toml(getattr(self.settings, key))}" for key in KEYS)
        return f"{chosen}: {self.total / GIB:.2f} GiB"


def fit(planner: Planner, memory: float) -> Settings:
    """The planner's settings with values in the place of "auto": those of the least time that fit into a card's
    `memory` in bytes. To recompute blocks comes before their inputs leave the device,
    and both before weights travel. A cut that is planned is that of the chosen settings, before weights travel.

    Raises:
        UserError: nothing fits.
    """
    settings = planner.settings
    if "auto" not in (settings.activation_checkpointing, settings.blocks_to_swap):
        return with_cut(planner, settings)
    budget = planned_with(memory)
    tried = []
    for attempt in _attempts(planner, budget):
        tried.append(attempt)
        if attempt.total <= budget:
            return attempt.settings
    short = tried[-1].total - budget
    listed = "".join(f"\n  {attempt}" for attempt in tried)
    raise UserError.of(
        f"of {memory / GIB:.1f} GiB, {budget / GIB:.2f} can be planned with, and nothing fits:{listed}\n"
        f"The last falls short by {short / GIB:.2f} GiB: take smaller samples, a smaller micro-batch or base "
        "(transformer_dtype), or more pipeline_stages",
        where="key `memory_budget_gb`" if settings.memory_budget_gb else "this card's memory",
    )


def _attempts(planner: Planner, budget: float) -> Iterator[Attempt]:
    """From the fastest to the smallest."""
    settings = planner.settings
    chooses = settings.activation_checkpointing == "auto"
    ways = (False, True, "offload") if chooses else (settings.activation_checkpointing,)
    for way in ways:
        chosen = with_cut(planner, settings.model_copy(update={"activation_checkpointing": way}))
        plain = {"blocks_to_swap": 0} if settings.blocks_to_swap == "auto" else {}
        yield Attempt(chosen.model_copy(update=plain), planner.plans(chosen, planner.swapped(chosen)))
    if settings.blocks_to_swap == "auto" and (settings.adapter or _may_step_on_host(settings)):
        swapped = planner.least_swapped(chosen, budget)
        number = swapped[0] if len(swapped) == 1 else swapped
        yield Attempt(chosen.model_copy(update={"blocks_to_swap": number}), planner.plans(chosen, swapped))


def _may_step_on_host(settings: Settings) -> bool:
    """Whether blocks that are trained may be swapped."""
    runs_there = "cpu" not in optimizers.find(settings.optimizer.type).not_on
    return runs_there and settings.zero_stage != DIVIDES_GRADIENTS
