"""Where the stages of a pipeline begin, by what is planned of them: `partition_method` "time" and "memory"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

from models.assembly.memory import GIB, Planner
from models.assembly.stage import blocks_of_pieces, weights_of_pieces
from utils.parallel.interleaved import Layout, waiting_share
from utils.parallel.partition import balanced_bounds, lacking, layers_text, of_stage
from utils.parallel.recompute import recomputed_positions
from utils.parallel.swap_plan import SwapPlan, numbers_of
from utils.quantised.linear import parameter_count
from utils.settings.advice import allows
from utils.settings.schema import Settings

CUT = ("partition_method", "partition_split", "stage_weights")
"""The keys by which settings say where stages begin."""
Cost = Callable[[int, int, int], float]
"""(piece, first layer, the layer after its last) -> what it takes with these layers. With one piece in each stage it is
the stage's."""


def with_cut(planner: Planner, settings: Settings) -> Settings:
    """The settings with the cut that their `partition_method` plans written out, as if by hand; those that plan none,
    as they are. A pure function of the model, the settings and the data's sizes."""
    if not settings.cut_is_planned:
        return settings
    layers, pieces = planner.staged.layers, settings.pipeline_stages * settings.pieces
    cost, too_few = _COSTS[settings.partition_method](planner, settings), lacking(layers, blocks_of_pieces(settings))
    weights = weights_of_pieces(settings)
    bounds = balanced_bounds(lambda *piece: too_few(*piece) or cost(*piece), len(layers), pieces, weights)
    assert bounds is not None, "partition() has seen to it that some cut has the blocks that are to be swapped"
    split = [start for start, _ in bounds[1:]]
    return settings.model_copy(update=dict(zip(CUT, ("manual", split, None), strict=True)))


def cut_text(planner: Planner, settings: Settings) -> str:
    """The cut, and the share of each stage of what was balanced, as text; nothing of a single stage.

    Args:
        settings: the planner's, with the cut written out.
    """
    if settings.pipeline_stages == 1:
        return ""
    asked = planner.settings
    pieces = f" of {settings.pieces} pieces each" if settings.pieces > 1 else ""
    title = f'cut into {settings.pipeline_stages} stages{pieces}, partition_method = "{asked.partition_method}":'
    return "\n".join([title, *_shares(planner, asked, settings), f"  {_waits(planner, settings)}"])


def _waits(planner: Planner, settings: Settings) -> str:
    """How long stages have nothing to do, and with which schedule they would have less of it."""

    def idle(pieces: int) -> str:
        waits = waiting_share(Layout(settings.pipeline_stages, pieces, settings.gradient_accumulation_steps))
        return f"{waits / (1 + waits):.0%}"

    count, pieces = settings.gradient_accumulation_steps, Settings.model_fields["pieces_per_stage"].default
    told = f"{idle(settings.pieces)} of a step of {count} micro-batch{'es' if count > 1 else ''}, if they are alike"
    could = settings.pieces == 1 < count and settings.pipeline_stages * pieces <= len(planner.staged.layers)
    if could and allows(planner.settings, schedule="interleaved"):
        told = f'{told}; with schedule = "interleaved" {idle(pieces)}'
    return f"stages wait for one another for {told}"


def operations_of(planner: Planner, settings: Settings) -> list[float]:
    """Of each stage in a micro-batch of a step.

    Args:
        settings: with the cut written out.
    """
    taken = _taken(planner, settings, "time")
    return [sum(of_stage(taken, stage, settings.pipeline_stages)) for stage in range(settings.pipeline_stages)]


def _taken(planner: Planner, settings: Settings, method: str) -> list[float]:
    """What each piece takes of what this method balances."""
    cost = _COSTS[method](planner, settings)
    return [cost(piece, start, stop) for piece, (start, stop) in enumerate(planner.bounds(settings))]


def _shares(planner: Planner, asked: Settings, settings: Settings) -> Iterator[str]:
    bounds, weights = planner.bounds(settings), weights_of_pieces(asked)
    # By hand or by their number: layers differ in size.
    method = asked.partition_method if asked.partition_method in _COSTS else "parameters"
    taken, told = _taken(planner, settings, method), _TOLD[method]
    for piece, ((start, stop), amount) in enumerate(zip(bounds, taken, strict=True)):
        stage, wanted = piece % settings.pipeline_stages, ""
        if weights:
            wanted = f", {weights[piece] / sum(weights):.1%} wanted"
        share = amount / sum(taken) if sum(taken) else 0.0
        yield f"  stage {stage} ({layers_text([(start, stop)])}): {told(planner, amount)}, {share:.1%}{wanted}"


def _parameters(planner: Planner, settings: Settings) -> Cost:
    sums = [0, *accumulate(parameter_count(layer) for layer in planner.staged.layers)]
    return lambda _, start, stop: sums[stop] - sums[start]


def _operations(planner: Planner, settings: Settings) -> Cost:
    """Of a micro-batch, forward and backward, with what is recomputed."""
    layers, passes = planner.staged.layers, 2 if planner.has_teacher else 1

    def cost(_: int, start: int, stop: int) -> float:
        recomputed = set(recomputed_positions(layers[start:stop], settings.recomputed_every))
        counted = enumerate(planner.operations[start:stop])
        return sum(one.of_step(recomputed=place in recomputed, passes=passes) for place, one in counted)

    return cost


def _memory(planner: Planner, settings: Settings) -> Cost:
    """At the peak of a step, with the micro-batches in flight."""
    numbers = numbers_of(settings.blocks_to_swap, settings.pipeline_stages)
    swap = SwapPlan.of_all(planner.staged.layers, trained=settings.adapter is None)

    def cost(stage: int, start: int, stop: int) -> float:
        blocks = {place: tensors for place, tensors in swap.blocks.items() if start <= place < stop}
        swapped = SwapPlan(blocks if numbers[stage] else {}).with_blocks(numbers[stage])
        return planner.plan_of(settings, stage, ((start, stop),), swapped).total

    return cost


_COSTS: dict[str, Callable[[Planner, Settings], Cost]] = {
    "parameters": _parameters,
    "time": _operations,
    "memory": _memory,
}
_TOLD: dict[str, Callable[[Planner, float], str]] = {
    "parameters": lambda _, amount: f"{amount:,} parameters",
    "time": lambda planner, amount: f"{amount / 1e12:.4g} TFLOP per micro-batch of {planner.frequent}",
    "memory": lambda _, amount: f"{amount / GIB:.2f} GiB",
}
