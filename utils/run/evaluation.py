"""The loss on held-out items at fixed noise levels.

Every item is evaluated at each timestep quantile with noise that depends only on (set, item, quantile): two evaluations
differ only by the weights, at any number of stages and data ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

from utils import ranks as together
from utils.dataset.batches import EvaluationBatches, FeatureBatch
from utils.parallel.engine import Engine, MicroBatch
from utils.ranks import Ranks
from utils.run.attempts import Attempt
from utils.run.evaluated import Evaluated

Prepare = Callable[[FeatureBatch, str, float], MicroBatch]
"""(features, set name, quantile) -> the micro-batch noised at that quantile."""


def evaluate(
    engine: Engine,
    ranks: Ranks,
    sets: Mapping[str, EvaluationBatches],
    prepare: Prepare,
    attempt: Attempt,
    quantiles: Sequence[float],
) -> dict[str, Evaluated]:
    """The losses of every sample of each set, the same on every rank.

    Args:
        attempt: of this evaluation; the ranks meet in it now and then.
        quantiles: of the noise levels at which each sample is evaluated.

    Raises:
        Failed, StopRequested: on every rank; see `Attempt.meet`.
    """
    results: dict[str, Evaluated] = {}
    for name, batches in sets.items():
        losses_QN = _losses(engine, ranks, batches, prepare, name, attempt, quantiles)
        attempt.meet()
        own = dict(zip((sample.id for sample in batches.own), losses_QN.T.tolist(), strict=True))
        # All stages of a pipeline hold the same losses; those of the first stage are used.
        pipelines = together.gather(ranks, f"{attempt.name}/{name}", own)[: ranks.data_ranks]
        of_all = {sample: losses for one in pipelines for sample, losses in one.items()}
        # In one order at any number of data ranks.
        results[name] = Evaluated(quantiles, {sample.id: of_all[sample.id] for sample in batches.samples})
    return results


def _losses(
    engine: Engine,
    ranks: Ranks,
    batches: EvaluationBatches,
    prepare: Prepare,
    name: str,
    attempt: Attempt,
    quantiles: Sequence[float],
) -> torch.Tensor:
    """The losses (quantiles, samples) of this data rank, in float64; each batch is read once."""
    reads = ranks.is_first_stage or ranks.is_last_stage
    prepared = (prepare(batch, name, quantile) for batch in batches for quantile in quantiles) if reads else None
    losses: list[torch.Tensor] = []
    # A deep pipeline is filled and drained at every turn, so its turns are longer.
    batches_a_turn = max(1, ranks.stages // 2)
    for start in range(0, batches.rounds, batches_a_turn):
        count = len(range(start, len(batches))[:batches_a_turn]) * len(quantiles)
        # Read before the stages begin, since one that lacks its data would leave the others waiting.
        read = attempt.alone(list, itertools.islice(prepared, count)) if prepared else None
        attempt.meet()
        swap = engine.module.swap
        with swap.hand_in_hand():
            if count:
                losses += attempt.in_pipeline(engine.evaluate, read, count, all_ranks=swap.needs_all_ranks) or []
    if not losses or attempt.error:
        return torch.zeros(len(quantiles), 0, dtype=torch.float64)
    by_quantile = [torch.cat(losses[index :: len(quantiles)]) for index in range(len(quantiles))]
    return torch.stack(by_quantile).double().cpu()
