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
    settings, ranks, ema = run.settings, run.ranks, run.ema

    def run_evaluation(progress: Progress, epoch_ended: bool) -> None:
        measure(progress)
        if ema and ema.settings.evaluate:
            with ema.swapped():
                measure(progress, "ema_")

    def measure(progress: Progress, prefix: str = "") -> None:
        tag = f"{prefix}{progress.step}"
        results = evaluate(run.engine, ranks, sets, prepare, tag, run.raise_if_stopping, prefix)
        run.metrics.scalars(results, progress.step)
        for name in sets:
            loss = f"{name}/{prefix}loss"
            logger.info("step %d: %s %.5f", progress.step, loss, results[loss])

    def draw_samples(progress: Progress, epoch_ended: bool) -> None:
        folder, metrics = run.folder, run.metrics
        with ema.swapped() if ema and ema.settings.sample else nullcontext():
            sample(
                run.engine,
                ranks,
                sampler,
                settings.sampling,
                folder,
                metrics,
                progress.step,
                run.raise_if_stopping,
            )

    def write_export(progress: Progress, epoch_ended: bool) -> None:
        name = export_name(run.folder, progress, epoch_ended)
        folder = run.folder / gather(ranks, f"export/{progress.step}", name)[0]
        instead = ema is not None and ema.settings.export == "instead"
        if not instead:
            export(folder, ranks, run.parameters, plan, progress.step)
        if ema:
            target = folder if instead else folder.with_name(folder.name + OF_AVERAGES)
            averaged = replace(plan, metadata={**plan.metadata, **AVERAGES})
            with ema.swapped():
                export(target, ranks, run.parameters, averaged, progress.step)

    sampling = settings.sampling
    evaluation = Duty(
        run_evaluation,
        Cadence(settings.eval_every_n_steps, settings.eval_every_n_epochs, settings.eval_every_n_examples),
        before_first_step=settings.eval_before_first_step,
        at_end=True,
    )
    drawing = Duty(
        draw_samples,
        Cadence(sampling.sample_every_n_steps, sampling.sample_every_n_epochs),
        before_first_step=sampling.sample_before_first_step,
        at_end=True,
    )
    saving = Duty(
        write_export,
        Cadence(settings.save_every_n_steps, settings.save_every_n_epochs, settings.save_every_n_examples),
        at_end=True,
        interruptible=False,
    )
    return [*([evaluation] if sets else []), *([drawing] if sampling.prompts else []), saving]
