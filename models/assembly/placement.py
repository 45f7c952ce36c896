"""Where a process keeps what its stage trains and what it runs with: on its device, in the machine's memory, or divided
among data ranks."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import Parameter

from models.assembly.stage import StagedModel
from utils.parallel.divided import Division
from utils.parallel.homes import BlockHomes
from utils.parallel.sharding import Shares, owner_of
from utils.parallel.swap import BlockSwap
from utils.parallel.swap_plan import SwapPlan
from utils.ranks import Ranks
from utils.settings.schema import Settings


def shares_of(settings: Settings, ranks: Ranks, staged: StagedModel, parameters: Mapping[str, Parameter]) -> Shares:
    """Which of the trained parameters of this stage, by name, this data rank steps, and where."""
    return Shares(
        parameters,
        ranks,
        settings.zero_stage,
        offload=settings.offload_optimizer,
        pinned=ranks.device.type == "cuda",
        at_home=stepped_at_home(settings, ranks, staged),
        apart=apart(settings, ranks, staged),
    )


def stepped_at_home(settings: Settings, ranks: Ranks, staged: StagedModel) -> list[Parameter]:
    """What is trained of this stage in the machine's memory: the swapped blocks of a full fine-tune."""
    if not settings.swaps_trained:
        return []
    plan = SwapPlan.of(staged.stage_layers(ranks.stage), staged.swapped[ranks.stage], trained=True)
    return [parameter for block in plan.trained.values() for parameter in block]


def apart(settings: Settings, ranks: Ranks, staged: StagedModel) -> list[Parameter]:
    """The trained weights of this stage that data ranks divide."""
    if not settings.divides_weights or settings.adapter:
        return []
    plan = SwapPlan.of_divided(staged.stage_layers(ranks.stage), trained=True)
    return [parameter for block in plan.trained.values() for parameter in block]


def homes_of(settings: Settings, ranks: Ranks, staged: StagedModel, *, trained: bool) -> BlockHomes:
    """Which blocks of this stage wait in the machine's memory, or are divided among data ranks; whether they are
    `trained` there."""
    layers, division = staged.stage_layers(ranks.stage), None
    if settings.divides_weights and ranks.data_ranks > 1:
        owned_by = owner_of(staged.trained(layers), ranks.data_ranks) if trained else None
        division = Division(ranks.data_rank, ranks.data_ranks, owned_by)
    return BlockHomes(
        layers,
        staged.swapped[ranks.stage],
        pinned=ranks.device.type == "cuda",
        trained=trained,
        ranks=ranks if ranks.data_ranks > 1 and any(staged.swapped) else None,
        division=division,
    )


def block_swap(settings: Settings, homes: BlockHomes) -> BlockSwap:
    """The swap of these blocks."""
    return BlockSwap(homes, resident_in_evaluation=settings.disable_block_swap_for_eval)
