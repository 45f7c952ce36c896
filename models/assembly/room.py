"""Which phases of a run do not fit a card, by how much, and what to set: told before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from models.assembly.encoder_needs import GIB, Need
from models.assembly.memory import Planner, StagePlan
from models.assembly.phases import caching_needs
from models.foundation.encoders.text import TextEncoder
from utils.dataset.encoders import Encoder
from utils.dataset.samples import Bucket, Sample
from utils.device_memory import size_text
from utils.errors import Problem, UserError
from utils.ranks import Ranks, gather
from utils.run.savings import Parallelism, of_weights, to_evaluate, to_sample, to_train
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

MARGIN, SHARE = 1.0, 0.04
"""Of a GPU's memory so many GiB and this share are left for what is not planned: CUDA itself, the libraries' work
areas, holes between allocations, and errors of the plan."""
NO_LIMIT = float("inf")


def planned_with(memory: float) -> float:
    """The bytes of a card's memory that can be planned with."""
    return memory * (1 - SHARE) - MARGIN * GIB


def planned(memory: float) -> str:
    """The same as text; of a card that is smaller than what is left, why there is nothing."""
    if (budget := planned_with(memory)) > 0:
        return f"{size_text(budget)} can be planned with"
    return f"nothing can be planned with, since {MARGIN:g} GiB and {SHARE:.0%} are left for CUDA and its libraries"


def card_of(ranks: Ranks) -> float | None:
    """The bytes of this rank's GPU; None without one."""
    return torch.cuda.mem_get_info(ranks.device)[1] if ranks.device.type == "cuda" else None


def memory_of(settings: Settings, ranks: Ranks) -> float | None:
    """The bytes that the settings name, or those of this rank's GPU; None without either."""
    return settings.memory_budget_gb * GIB if settings.memory_budget_gb else card_of(ranks)


def check_caching(
    settings: Settings,
    ranks: Ranks,
    wanted: Mapping[str, tuple[Encoder, Sequence[Sample]]],
    lacks: Callable[[Encoder, Sequence[Sample]], bool],
) -> None:
    """Whether the smallest card has room for each encoder that has something to encode; warns of those for which it
    probably has not. All ranks call it together.

    Args:
        wanted: of each encoder, the samples that it is to be encoded from.
        lacks: whether any of them is not in the cache, as the main rank finds it.

    Raises:
        UserError: the weights of an encoder alone are larger than the card.
    """
    memory, card = smallest(settings, ranks, "caching/memory")
    if memory == NO_LIMIT:
        return
    problems: list[Problem] = []
    if ranks.is_main:
        for encoder, samples in wanted.values():
            largest = max({sample.bucket for sample in samples}, key=lambda bucket: bucket.pixels)
            told = [
                one
                for need in caching_needs([encoder], largest, settings.caching_batch_size)
                for one in of_encoder(need, encoder, settings, memory, card, largest)
            ]
            if told and lacks(encoder, samples):
                problems += _told(told)
    raise_together(ranks, "caching/room", problems)


def smallest(settings: Settings, ranks: Ranks, name: str) -> tuple[float, float]:
    """What all ranks can plan with of a card's memory in bytes, and the smallest card; infinite where that is not
    known. All ranks call it together, under a name."""
    mine = [memory_of(settings, ranks) or NO_LIMIT, card_of(ranks) or NO_LIMIT]
    memory, card = map(min, zip(*gather(ranks, name, mine), strict=True))
    return memory, card


def raise_together(ranks: Ranks, name: str, problems: Iterable[Problem]) -> None:
    """All ranks call it together, under a name.

    Raises:
        UserError: the main rank has problems.
    """
    texts = gather(ranks, name, [[one.file, one.where, one.message] for one in problems])[0]
    if texts:
        raise UserError(Problem(*text) for text in texts)


def _told(found: Iterable[tuple[Problem, bool]]) -> list[Problem]:
    """The problems that are sure; warns of the others."""
    found = list(found)
    for problem, is_sure in found:
        if not is_sure:
            logger.warning("%s: %s", problem.where, problem.message)
    return [problem for problem, is_sure in found if is_sure]


def of_encoder(
    need: Need, encoder: Encoder, settings: Settings, memory: float, card: float, bucket: Bucket
) -> Iterator[tuple[Problem, bool]]:
    """What is wrong with the room for an encoder while it fills the cache, and whether that is sure.

    Args:
        memory: of a card in bytes, or what the settings name in its place.
        card: of the card itself; infinite if there is none.
        bucket: the largest size.
    """
    budget = planned_with(memory)
    if need.least <= budget:
        return
    by_weights = need.weights > budget
    ways = []
    if formats := getattr(encoder, "smaller_formats", ()):
        ways.append("[model] text_encoder_dtype = " + ", or ".join(f'"{name}"' for name in formats))
    if not by_weights and settings.caching_batch_size > 1:
        ways.append("caching_batch_size = 1")
    if not by_weights and not isinstance(encoder, TextEncoder):
        shorter = " or shorter clips" if bucket.frames > 1 else ""
        ways.append(f"smaller `resolutions`{shorter} in the dataset's file ({bucket} is the largest size)")
    what = "its weights alone" if by_weights else f"{size_text(need.weights)} of them weights"
    message = f"{_short(need.least, budget, memory, what, ways)}; or fill the cache on a larger card, by --cache_only"
    yield Problem("", f"caching, {need.name}", message), need.weights > card


def of_plans(
    planner: Planner, settings: Settings, plans: Sequence[StagePlan], memory: float, card: float
) -> Iterator[tuple[Problem, bool]]:
    """The same of training, evaluation and sampling.

    Args:
        settings: the planner's, with what was chosen.
    """
    budget, parallelism = planned_with(memory), parallelism_of(planner, settings)
    peaks = planner.phases.peaks(plans)
    largest = max(plan.weights + plan.live[0] for plan in plans)
    if largest > budget:
        ways = of_weights(settings, parallelism, planned=True)
        message = _short(largest, budget, memory, "its weights alone", [way.says for way in ways])
        yield Problem("", "training", message), largest > card
        return
    for phase, ways_of in {"training": to_train, "evaluation": to_evaluate, "sampling": to_sample}.items():
        if peaks[phase] > budget:
            what, ways = f"{size_text(largest)} of them weights", ways_of(settings, parallelism, planned=True)
            message = _short(peaks[phase], budget, memory, what, [way.says for way in ways])
            yield Problem("", phase, message), False


def parallelism_of(planner: Planner, settings: Settings) -> Parallelism:
    """That of a planned run."""
    bounds, stages = planner.bounds(settings), settings.pipeline_stages
    return Parallelism.of(planner.staged.layers, bounds, stages, planner.data_ranks)


def _short(bytes_: float, budget: float, memory: float, what: str, ways: Sequence[str]) -> str:
    return (
        f"takes {size_text(bytes_)}, {what}; of the {size_text(memory)} of a card {planned(memory)}, "
        f"{size_text(bytes_ - budget)} too few{'; what would take less: ' if ways else ''}{'; '.join(ways)}"
    )


def check_plans(
    planner: Planner,
    settings: Settings,
    plans: Sequence[StagePlan],
    memory: float,
    card: float | None,
    *,
    caches: bool = False,
) -> None:
    """Whether a card has room for training, evaluation and sampling; warns of what it probably has none for.

    Args:
        memory: see `of_encoder`.
        card: the same; None if there is none.
        caches: whether there may be something to encode yet, of which it warns too.

    Raises:
        UserError: the weights of a stage alone are larger than the card.
    """
    card = card or NO_LIMIT
    if caches:
        bucket, _ = planner.phases.caching
        by_name = {encoder.name: encoder for encoder in planner.phases.cached if hasattr(encoder, "name")}
        for need in planner.phases.caching_needs:
            # The cache may have all that it makes.
            for problem, _ in of_encoder(need, by_name[need.name], settings, memory, card, bucket):
                _told([(problem, False)])
    if problems := _told(of_plans(planner, settings, plans, memory, card)):
        raise UserError(problems)
