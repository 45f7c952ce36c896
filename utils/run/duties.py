"""What is done between two steps: evaluation, samples, exports; of the weights, and of their moving averages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.dataset.batches import EvaluationBatches
from utils.ranks import gather
from utils.run.attempts import Attempt, reason_of
from utils.run.cadence import Cadence, Duty
from utils.run.evaluated import (
    CHANGE,
    CHANGE_ERROR,
    ENDINGS,
    ERROR,
    Evaluated,
    KeptEvaluations,
    change_of,
    extremes_of,
    groups_of,
)
from utils.run.evaluation import Prepare, evaluate
from utils.run.export import ExportPlan, export_name, export_with_averages, exports_in, remove_older_exports
from utils.run.export_metadata import of_progress
from utils.run.file_requests import EVALUATE, SAMPLE, STOP
from utils.run.parts import RunParts
from utils.run.progress import Progress
from utils.run.sampling import SampleModel, sample
from utils.run.time_limit import EXPORT

logger = logging.getLogger(__name__)

AVERAGED = "ema_"
"""What the names of the averages' losses begin with."""


def make_duties(
    run: RunParts,
    sets: Mapping[str, EvaluationBatches],
    prepare: Prepare,
    sampler: SampleModel,
    plan: ExportPlan,
) -> list[Duty]:
    """Evaluation, sampling and export, as the settings ask for them.

    Args:
        sets: what is evaluated, by name.
        prepare: makes micro-batches of them.
        sampler: how samples are drawn.
        plan: what exports contain.
    """
    return [
        *(_evaluations(run, sets, prepare) if sets else []),
        *([_sampling(run, sampler)] if run.settings.sampling.asks else []),
        _export(run, plan),
    ]


def _evaluations(run: RunParts, sets: Mapping[str, EvaluationBatches], prepare: Prepare) -> list[Duty]:
    """That of the weights, and that of the averages, which is one of its own: a stop between them takes neither away,
    and neither is made twice."""
    settings, ema = run.settings, run.ema

    kept = KeptEvaluations(run.folder)

    def measure(progress: Progress, prefix: str) -> None:
        attempt = _attempt(run, f"evaluation {prefix}{progress.step}")
        started = time.monotonic()
        found = evaluate(run.engine, run.ranks, sets, prepare, attempt, settings.eval_quantiles)
        took = time.monotonic() - started
        if run.ranks.is_main:
            results = _judge(run, kept, sets, found, progress.step, prefix)
            logger.info("step %d: evaluation took %.1f s%s", progress.step, took, run.page.in_steps(took))
            run.webhook.post("evaluation", step=progress.step, numbers=results)
        run.page.write()

    def of_weights(progress: Progress, epoch_ended: bool) -> None:
        with run.weights_to_use():
            measure(progress, "")
        run.patience.follow(run.page.measured(run.patience.loss))

    def of_averages(progress: Progress, epoch_ended: bool) -> None:
        with ema.swapped():
            measure(progress, AVERAGED)

    cadence = Cadence(settings.eval_every_n_steps, settings.eval_every_n_epochs, settings.eval_every_n_examples)
    when = {"cadence": cadence, "before_first_step": settings.eval_before_first_step, "at_end": True, "file": EVALUATE}
    duties = [Duty("evaluation", of_weights, measures=partial(is_loss_of, sets, ""), **when)]
    if ema and ema.settings.evaluate:
        measures = partial(is_loss_of, sets, AVERAGED)
        duties.append(Duty("evaluation of averages", of_averages, measures=measures, **when))
    return duties


def _attempt(run: RunParts, name: str) -> Attempt:
    return Attempt(name, run.ranks, run.stop.pending, partial(run.ways, name))


def _judge(
    run: RunParts,
    kept: KeptEvaluations,
    sets: Mapping[str, EvaluationBatches],
    found: Mapping[str, Evaluated],
    step: int,
    prefix: str,
) -> dict[str, float]:
    """Tells what an evaluation has found, and keeps it; the main rank does so. Returns its numbers."""
    since, before = kept.before(step, prefix)
    results: dict[str, float] = {}
    keeps = {}
    for name, evaluated in found.items():
        loss, means = f"{name}/{prefix}loss", evaluated.means()
        results |= evaluated.numbers(loss)
        sure = f" ± {results[loss + ERROR]:.5f}" if loss + ERROR in results else ""
        change = change_of(means, before.get(name, {}).get("samples", {}), since)
        if change:
            results |= {f"{loss}{CHANGE}": change.value, f"{loss}{CHANGE_ERROR}": change.error}
        logger.info("step %d: %s %.5f%s%s", step, loss, results[loss], sure, f"; {change}" if change else "")
        samples = sets[name].samples
        groups, extremes = groups_of(samples, means), extremes_of(samples, means)
        keeps[name] = {"samples": means, "groups": groups, "extremes": extremes}
    run.metrics.scalars(results, step)
    try:
        kept.keep(step, prefix, keeps)
    except OSError as error:
        logger.error("the losses of the samples are not kept, and the run goes on: %s", reason_of(error))
    return results


def is_loss_of(sets: Iterable[str], prefix: str, name: str) -> bool:
    """Whether `name` is one of the numbers that an evaluation of these sets yields; see `_judge`."""
    losses = [f"{own}/{prefix}loss" for own in sets]
    return any(
        name.startswith(f"{loss}_quantile_") or name in (loss, *(loss + end for end in ENDINGS)) for loss in losses
    )


def _sampling(run: RunParts, sampler: SampleModel) -> Duty:
    settings, ema = run.settings.sampling, run.ema

    def perform(progress: Progress, epoch_ended: bool) -> None:
        with ema.swapped() if ema and ema.settings.sample else run.weights_to_use():
            attempt = _attempt(run, f"samples {progress.step}")
            sample(run.engine, run.ranks, sampler, run.folder, run.metrics, progress.step, attempt)
        run.page.write()

    cadence = Cadence(settings.sample_every_n_steps, settings.sample_every_n_epochs)
    return Duty(
        "samples", perform, cadence, before_first_step=settings.sample_before_first_step, at_end=True, file=SAMPLE
    )


def _export_from(
    run: RunParts,
    folder: Path,
    plan: ExportPlan,
    progress: Progress,
    *,
    epoch_ended: bool = False,
    adds: bool = False,
) -> None:
    plan = replace(plan, metadata={**plan.metadata, **of_progress(progress, epoch_ended=epoch_ended)})
    export_with_averages(
        folder, run.ranks, run.shares.written, plan, progress.step, run.ema, adds=adds, to_use=run.weights_to_use
    )


def _export(run: RunParts, plan: ExportPlan) -> Duty:
    settings = run.settings

    def perform(progress: Progress, epoch_ended: bool) -> None:
        name = gather(run.ranks, f"export/{progress.step}", export_name(run.folder, progress, epoch_ended))[0]
        _export_from(run, run.folder / name, plan, progress, epoch_ended=epoch_ended)
        if settings.keep_exports and run.ranks.is_main:
            remove_older_exports(run.folder, settings.keep_exports)

    def what_is_lacking(progress: Progress) -> None:
        there = [str(made.folder) for made in exports_in(run.folder) if made.is_by(plan, progress.step)]
        found = gather(run.ranks, "exports", there)[0]
        if found:
            logger.info("what is asked for has been exported: %s", found[0])
        else:
            # Not by the name of an epoch: exports with other settings stay as they are.
            folder = run.folder / f"step{progress.step}"
            _export_from(run, folder, plan, progress, adds=True)

    cadence = Cadence(settings.save_every_n_steps, settings.export_epochs, settings.save_every_n_examples)
    # A whole model takes longer than a launcher may wait for processes that were asked to stop.
    return Duty(
        EXPORT,
        perform,
        cadence,
        at_end=True,
        file=STOP,
        at_stop=plan.adapter is not None,
        interruptible=False,
        without_steps=what_is_lacking,
    )
