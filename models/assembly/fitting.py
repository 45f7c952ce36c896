"""Chooses what is "auto" by a GPU's memory: which blocks are recomputed and how many are swapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import optimizers
from models.assembly.cut import with_cut
from models.assembly.memory import Planner, StagePlan
from models.assembly.room import parallelism_of, planned, planned_with
from utils.device_memory import size_text
from utils.errors import UserError
from utils.run.savings import to_train
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
        return f"{chosen}: {size_text(self.total)}"


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
    stays = _why_none_is_swapped(settings) if settings.blocks_to_swap == "auto" else ""
    ways = "; ".join(way.says for way in to_train(settings, parallelism_of(planner, settings), planned=True))
    raise UserError.of(
        f"of {size_text(memory)}, {planned(memory)}, and nothing fits:{listed}\n"
        f"The last falls short by {size_text(short)}{f'. No block is swapped: {stays}' if stays else ''}. What "
        f"would take less: {ways}",
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
    if settings.blocks_to_swap == "auto" and not _why_none_is_swapped(settings):
        swapped = planner.least_swapped(chosen, budget)
        number = swapped[0] if len(swapped) == 1 else swapped
        yield Attempt(chosen.model_copy(update={"blocks_to_swap": number}), planner.plans(chosen, swapped))


def _why_none_is_swapped(settings: Settings) -> str:
    """Why "auto" swaps no blocks that are trained, and what to do; "" where it may."""
    if settings.adapter:
        return ""
    if advice := optimizers.find(settings.optimizer.type).not_on.get("cpu"):
        return f'the processor would step it, and "{settings.optimizer.type}" {advice}'
    if settings.zero_stage == DIVIDES_GRADIENTS:
        others = "1 or 3" if settings.pipeline_stages == 1 else "1"
        return f"zero_stage = 2 divides the gradients that it would keep in the machine's memory; set {others}"
    return ""
