"""The loss on held-out items at fixed noise levels.

Every item is evaluated at each timestep quantile with noise that depends only on (set, item, quantile): two evaluations
differ by the weights alone, at any number of stages and data ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from utils import ranks as together
from utils.dataset.batches import EvaluationBatches, FeatureBatch
from utils.parallel.engine import Engine, MicroBatch
from utils.ranks import Ranks

QUANTILES = tuple(round(0.1 * n, 1) for n in range(1, 10))
Prepare = Callable[[FeatureBatch, str, float], MicroBatch]
"""(features, set name, quantile) -> the micro-batch noised at that quantile."""


def evaluate(
    engine: Engine, ranks: Ranks, sets: Mapping[str, EvaluationBatches], prepare: Prepare, tag: str
) -> dict[str, float]:
    """Mean losses, "<set>/loss_quantile_0.10" ... and "<set>/loss", the same on every rank.

    Args:
        tag: tells this evaluation from the others of the run.
    """
    results: dict[str, float] = {}
    for name, batches in sets.items():
        losses_QN = _losses(engine, ranks, batches, prepare, name)
        own = [losses_QN.sum(1).tolist(), losses_QN.shape[1]]
        # The stages of a pipeline hold the same losses: those of the first stage stand for all.
        pipelines = together.share(ranks, f"evaluation/{tag}/{name}", own)[: ranks.data_ranks]
        count = sum(held for _, held in pipelines)
        for index, quantile in enumerate(QUANTILES):
            results[f"{name}/loss_quantile_{quantile:.2f}"] = sum(sums[index] for sums, _ in pipelines) / count
        results[f"{name}/loss"] = sum(results[f"{name}/loss_quantile_{q:.2f}"] for q in QUANTILES) / len(QUANTILES)
    return results


def _losses(engine: Engine, ranks: Ranks, batches: EvaluationBatches, prepare: Prepare, name: str) -> torch.Tensor:
    """The losses (quantiles, samples) of this data rank, in float64; each batch is read once."""
    if not len(batches):
        return torch.zeros(len(QUANTILES), 0, dtype=torch.float64)
    prepared = None
    if ranks.is_first_stage or ranks.is_last_stage:
        prepared = (prepare(batch, name, quantile) for batch in batches for quantile in QUANTILES)
    losses = engine.evaluate(prepared, len(batches) * len(QUANTILES))
    by_quantile = [torch.cat(losses[index :: len(QUANTILES)]) for index in range(len(QUANTILES))]
    return torch.stack(by_quantile).double().cpu()
