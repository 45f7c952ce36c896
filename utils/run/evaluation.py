"""The loss on held-out items at fixed noise levels.

Every item is evaluated at each timestep quantile with noise that depends only on (set, item, quantile): two evaluations
differ only by the weights, at any number of stages and data ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch

from utils import ranks as together
from utils.dataset.batches import EvaluationBatches, FeatureBatch
from utils.parallel.engine import Engine, MicroBatch
from utils.ranks import Ranks
from utils.run.attempts import Attempt

QUANTILES = tuple(round(0.1 * n, 1) for n in range(1, 10))
Prepare = Callable[[FeatureBatch, str, float], MicroBatch]
"""(features, set name, quantile) -> the micro-batch noised at that quantile."""


def evaluate(
    engine: Engine,
    ranks: Ranks,
    sets: Mapping[str, EvaluationBatches],
    prepare: Prepare,
    attempt: Attempt,
    prefix: str = "",
) -> dict[str, float]:
    """Mean losses, "<set>/loss_quantile_0.10" ... and "<set>/loss", the same on every rank.

    Args:
        attempt: of this evaluation; the ranks meet in it now and then.
        prefix: of the losses' names, such as "<set>/ema_loss".

    Raises:
        Failed, StopRequested: on every rank; see `Attempt.meet`.
    """
    results: dict[str, float] = {}
    for name, batches in sets.items():
        loss = f"{name}/{prefix}loss"
        losses_QN = _losses(engine, ranks, batches, prepare, name, attempt)
        attempt.meet()
        own = [losses_QN.sum(1).tolist(), losses_QN.shape[1]]
        # All stages of a pipeline hold the same losses; those of the first stage are used.
        pipelines = together.gather(ranks, f"{attempt.name}/{name}", own)[: ranks.data_ranks]
        count = sum(held for _, held in pipelines)
        for index, quantile in enumerate(QUANTILES):
            results[f"{loss}_quantile_{quantile:.2f}"] = sum(sums[index] for sums, _ in pipelines) / count
        results[loss] = sum(results[f"{loss}_quantile_{q:.2f}"] for q in QUANTILES) / len(QUANTILES)
    return results


def _losses(
    engine: Engine,
    ranks: Ranks,
    batches: EvaluationBatches,
    prepare: Prepare,
    name: str,
    attempt: Attempt,
) -> torch.Tensor:
    """The losses (quantiles, samples) of this data rank, in float64; each batch is read once."""
    reads = ranks.is_first_stage or ranks.is_last_stage
    prepared = (prepare(batch, name, quantile) for batch in batches for quantile in QUANTILES) if reads else None
    losses: list[torch.Tensor] = []
    # A deep pipeline is filled and drained at every turn, so its turns are longer.
    batches_a_turn = max(1, ranks.stages // 2)
    for start in range(0, batches.rounds, batches_a_turn):
        count = len(range(start, len(batches))[:batches_a_turn]) * len(QUANTILES)
        # Read before the stages begin, since one that lacks its data would leave the others waiting.
        read = attempt.alone(list, itertools.islice(prepared, count)) if prepared else None
        attempt.meet()
        if count:
            losses += attempt.in_pipeline(engine.evaluate, read, count) or []
    if not losses or attempt.error:
        return torch.zeros(len(QUANTILES), 0, dtype=torch.float64)
    by_quantile = [torch.cat(losses[index :: len(QUANTILES)]) for index in range(len(QUANTILES))]
    return torch.stack(by_quantile).double().cpu()
