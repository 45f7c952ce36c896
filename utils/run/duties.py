"""What is done between two steps: evaluation, samples, exports; of the weights, and of their moving averages."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from utils.dataset.batches import EvaluationBatches
from utils.ranks import gather
from utils.run.cadence import Cadence, Duty
from utils.run.evaluation import Prepare, evaluate
from utils.run.export import OF_AVERAGES, ExportPlan, export, export_name
from utils.run.parts import RunParts
from utils.run.progress import Progress
from utils.run.sampling import SampleModel, sample

logger = logging.getLogger(__name__)

AVERAGES = {"weights": "exponential moving average"}
"""Metadata of an export of the averages."""


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
        *([_evaluation(run, sets, prepare)] if sets else []),
        *([_sampling(run, sampler)] if run.settings.sampling.prompts else []),
        _export(run, plan),
    ]


def _evaluation(run: RunParts, sets: Mapping[str, EvaluationBatches], prepare: Prepare) -> Duty:
    settings, ema = run.settings, run.ema

    def measure(progress: Progress, prefix: str = "") -> None:
        tag = f"{prefix}{progress.step}"
        results = evaluate(run.engine, run.ranks, sets, prepare, tag, run.raise_if_stopping, prefix)
        run.metrics.scalars(results, progress.step)
        for name in sets:
            loss = f"{name}/{prefix}loss"
            logger.info("step %d: %s %.5f", progress.step, loss, results[loss])

    def perform(progress: Progress, epoch_ended: bool) -> None:
        measure(progress)
        if ema and ema.settings.evaluate:
            with ema.swapped():
                measure(progress, "ema_")

    cadence = Cadence(settings.eval_every_n_steps, settings.eval_every_n_epochs, settings.eval_every_n_examples)
    return Duty(perform, cadence, before_first_step=settings.eval_before_first_step, at_end=True)


def _sampling(run: RunParts, sampler: SampleModel) -> Duty:
    settings, ema = run.settings.sampling, run.ema

    def perform(progress: Progress, epoch_ended: bool) -> None:
        with ema.swapped() if ema and ema.settings.sample else nullcontext():
            sample(
                run.engine,
                run.ranks,
                sampler,
                settings,
                run.folder,
                run.metrics,
                progress.step,
                run.raise_if_stopping,
            )

    cadence = Cadence(settings.sample_every_n_steps, settings.sample_every_n_epochs)
    return Duty(perform, cadence, before_first_step=settings.sample_before_first_step, at_end=True)


def _export(run: RunParts, plan: ExportPlan) -> Duty:
    settings, ema = run.settings, run.ema

    def perform(progress: Progress, epoch_ended: bool) -> None:
        name = export_name(run.folder, progress, epoch_ended)
        folder = run.folder / gather(run.ranks, f"export/{progress.step}", name)[0]
        instead = ema is not None and ema.settings.export == "instead"
        if not instead:
            export(folder, run.ranks, run.parameters, plan, progress.step)
        if ema:
            target = folder if instead else folder.with_name(folder.name + OF_AVERAGES)
            averaged = replace(plan, metadata={**plan.metadata, **AVERAGES})
            with ema.swapped():
                export(target, run.ranks, run.parameters, averaged, progress.step)

    cadence = Cadence(settings.save_every_n_steps, settings.save_every_n_epochs, settings.save_every_n_examples)
    return Duty(perform, cadence, at_end=True, interruptible=False)
