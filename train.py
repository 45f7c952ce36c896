"""Trains a diffusion model: `deepspeed --num_gpus=N train.py --config run.toml`, or torchrun, or plain python."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.ranks import Ranks, any_rank, barrier, connect, disconnect, from_environment, share
from utils.parallel.backend import initialize_deepspeed
from utils.run.cadence import Cadence, Duty
from utils.run.metrics import Metrics
from utils.run.progress import Progress
from utils.run.reporting import StepReporter, report_user_error, start_logging, timed
from utils.run.signals import StopRequests
from utils.settings.errors import SettingsError
from utils.settings.reader import read_all
from utils.settings.schema import DatasetSettings, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.base import BasePipeline
    from models.foundation.placement import Blueprint
    from utils.dataset.batches import SampleReader, TrainingBatches
    from utils.dataset.collection import Collection, Source
    from utils.dataset.encoding import Encoder
    from utils.parallel.engine import Engine
    from utils.run.checkpoint import Checkpoint

logger = logging.getLogger("penstock")

NEWEST_RUN = ""
"""What --resume_from_checkpoint holds when it names no folder."""


def main(words: list[str] | None = None) -> int:
    """Runs the command line. Exit codes: 0; 1 after a mistake of the user's, told without a traceback; 128 + the signal
    after a stop that was asked for."""
    started = time.monotonic()
    arguments = parse_arguments(words)
    # Everything is read from paths that the user names; a hub that cannot be reached must cost no time.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ranks = from_environment()
    start_logging(ranks)
    try:
        code = run(arguments, ranks, started)
    except SettingsError as error:
        report_user_error(error, ranks)
        return 1
    disconnect()
    return code


def run(arguments: argparse.Namespace, ranks: Ranks, started: float) -> int:
    """Settings, data, cache, model, training: each is checked before the next is loaded."""
    settings, datasets = read_settings(arguments, ranks)
    ranks = ranks.with_stages(settings.pipeline_stages)
    pipeline = make_pipeline(settings)
    sources = sources_of(settings, datasets)
    if arguments.check:
        return check(settings, ranks, pipeline, sources, arguments)
    connect(ranks, arguments.master_port)
    resumed = open_checkpoint(settings, arguments)
    data = load_data(settings, ranks, pipeline, sources, arguments)
    if arguments.cache_only:
        return 0
    initialize_deepspeed()
    with StopRequests() as stop:
        trainer = build_trainer(settings, ranks, pipeline, data, resumed, arguments)
        logger.info("ready after %.1f s", time.monotonic() - started)
        finished = train(trainer, stop)
    trainer.metrics.close()
    return 0 if finished else stop.exit_code


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line. Every flag may be written with underscores or with hyphens."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    for name, options in FLAGS.items():
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*spellings, **options)
    return parser.parse_args(words)


FLAGS: dict[str, dict[str, Any]] = {
    "config": {"type": Path, "required": True, "help": "TOML file of the run"},
    "resume_from_checkpoint": {
        "nargs": "?", "const": NEWEST_RUN, "metavar": "FOLDER",
        "help": "go on from the newest checkpoint of this run folder, or of the newest run",
    },
    "cache_only": {"action": "store_true", "help": "encode the datasets and end"},
    "regenerate_cache": {"action": "store_true", "help": "encode everything again"},
    "trust_cache": {"action": "store_true", "help": "take files seen before as unchanged, without looking at them"},
    "reset_dataloader": {"action": "store_true", "help": "on resuming, begin the data from the start"},
    "reset_optimizer": {"action": "store_true", "help": "on resuming, begin with an optimizer that remembers nothing"},
    "reset_optimizer_params": {
        "action": "store_true",
        "help": "on resuming, take the learning rate and the other keys of [optimizer] from the config where they differ "
                "from the checkpoint's",
    },
    "check": {"action": "store_true", "help": "check config, datasets and folders, print the plan, and end"},
    "master_port": {"type": int, "help": "port at which the processes meet, where the launcher names none"},
    "local_rank": {"type": int, "help": "given by launchers; the environment's LOCAL_RANK is what counts"},
}  # fmt: skip


def read_settings(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Settings, dict[str, DatasetSettings]]:
    """The run's settings and its datasets, the training set under the name "train"."""

    def options_of(model_type: str) -> type:
        import models

        return models.find(model_type).Options

    settings, training, evaluation = read_all(arguments.config, options_of, ranks.world_size)
    return settings, {"train": training, **evaluation}


def make_pipeline(settings: Settings) -> BasePipeline:
    """The model's pipeline object, its files looked at and nothing loaded."""
    import models

    pipeline = models.find(settings.model.type)(settings.model, settings.seed)
    pipeline.check()
    return pipeline


def sources_of(settings: Settings, datasets: Mapping[str, DatasetSettings]) -> list[Source]:
    from utils.dataset.collection import Source

    files = {"train": settings.dataset, **{entry.name: entry.config for entry in settings.eval_datasets}}
    return [Source(name, file, datasets[name]) for name, file in files.items()]


def cache_folder(settings: Settings, sources: list[Source]) -> Path:
    """Where all of the run's datasets are cached: the training set's `cache_dir`, or beside the runs."""
    return sources[0].settings.cache_dir or settings.output_dir / "cache"


def check(
    settings: Settings, ranks: Ranks, pipeline: BasePipeline, sources: list[Source], arguments: argparse.Namespace
) -> int:
    """Prints the plan of the run; raises with every problem of the data."""
    from models.foundation.plan import describe
    from utils.dataset.collection import collect

    if ranks.is_main:
        index = cache_folder(settings, sources) / "files.sqlite"
        collections = collect(sources, pipeline.media, index, trust=arguments.trust_cache)
        sys.stdout.write(describe(settings, ranks, pipeline, collections) + "\n")
    return 0


@dataclass(frozen=True)
class Data:
    """The cached datasets, and the encoders that made them."""

    training: Collection
    evaluation: list[Collection]
    encoders: list[Encoder]
    cache_dir: Path


def load_data(
    settings: Settings, ranks: Ranks, pipeline: BasePipeline, sources: list[Source], arguments: argparse.Namespace
) -> Data:
    """Scans the datasets and encodes what the cache lacks."""
    from utils.dataset.collection import collect_together, encoders_for, refuse_failures
    from utils.dataset.encoding import fill

    cache_dir = cache_folder(settings, sources)
    collections = collect_together(
        ranks, sources, pipeline.media, cache_dir / "files.sqlite", trust=arguments.trust_cache
    )
    encoders = encoders_for(collections, pipeline.encoders, pipeline.control_encoders)
    samples = [sample for collection in collections for sample in collection.samples]
    with timed("cache"):
        reports = fill(encoders, samples, cache_dir, ranks, settings.caching_batch_size, ranks.device,
                       regenerate=arguments.regenerate_cache)  # fmt: skip
    refuse_failures(reports)
    return Data(collections[0], collections[1:], encoders, cache_dir)


def open_checkpoint(settings: Settings, arguments: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint to go on from, if one is asked for, checked against the settings."""
    if arguments.resume_from_checkpoint is None:
        return None
    from utils.run.checkpoint import Checkpoint
    from utils.run.folder import find_run

    checkpoint = Checkpoint(find_run(settings.output_dir, arguments.resume_from_checkpoint))
    checkpoint.check_optimizer(
        settings.optimizer.model_dump(mode="json"),
        new_parameters=arguments.reset_optimizer_params, new_state=arguments.reset_optimizer,
    )  # fmt: skip
    return checkpoint


@dataclass
class Trainer:
    """Everything that the loop turns."""

    settings: Settings
    ranks: Ranks
    engine: Engine
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    batches: TrainingBatches
    progress: Progress
    folder: Path
    metrics: Metrics
    duties: list[Duty]
    checkpoints: Cadence

    @property
    def steps_left(self) -> int:
        """Steps to the end of the last epoch, or to `max_steps` if that comes first."""
        left = (self.settings.epochs - self.progress.epoch) * self.batches.steps_per_epoch
        left -= self.progress.step_in_epoch
        limit = self.settings.max_steps
        return max(0, left if limit is None else min(left, limit - self.progress.step))

    @property
    def global_batch(self) -> int:
        return global_batch(self.settings, self.ranks)

    def prefetched(self) -> Iterator[Any]:
        """This data rank's micro-batches, step after step; None for a stage in the middle, which reads no data."""
        if self.ranks.is_first_stage or self.ranks.is_last_stage:
            return self.batches.iterate(self.progress.epoch, self.progress.step_in_epoch)
        return itertools.repeat(None)


def build_trainer(
    settings: Settings, ranks: Ranks, pipeline: BasePipeline, data: Data, resumed: Checkpoint | None,
    arguments: argparse.Namespace,
) -> Trainer:  # fmt: skip
    """Loads this stage's weights and puts the engine, the batches and the run's folder together."""
    import optimizers
    from models.foundation.noising import training_micro_batch
    from models.foundation.placement import load_stage
    from optimizers.parameter_groups import groups_of
    from utils.dataset.batches import SampleReader, TrainingBatches
    from utils.parallel.engine import Engine, optimizer_for_frozen_stage
    from utils.parallel.pipeline import DenoiserPipeline

    blueprint = load_stage(pipeline, settings, ranks.stage)
    parameters = blueprint.trained(blueprint.stage_layers(ranks.stage))
    if resumed:
        resumed.load_weights(parameters)
    module = DenoiserPipeline(
        blueprint.layers, blueprint.bounds, pipeline.stream_type, pipeline.loss,
        recompute=settings.activation_checkpointing, seed=settings.seed,
    )  # fmt: skip
    chosen = settings.optimizer
    groups = groups_of(parameters.items(), lr=chosen.lr, weight_decay=chosen.weight_decay)
    optimizer = optimizers.build(groups, chosen) if groups else optimizer_for_frozen_stage()
    if resumed and not arguments.reset_optimizer:
        resumed.load_optimizer(parameters, optimizer)
    reader = SampleReader(data.encoders, data.cache_dir)
    batches = TrainingBatches(
        data.training.samples, reader, lambda batch, epoch, *_: training_micro_batch(pipeline, batch, epoch),
        micro_batch=settings.micro_batch_size_per_gpu, data_ranks=ranks.data_ranks, data_rank=ranks.data_rank,
        accumulation=settings.gradient_accumulation_steps, seed=settings.seed,
    )  # fmt: skip
    folder = resumed.folder.parent if resumed else new_run_folder(settings, ranks, arguments)
    trainer = Trainer(
        settings=settings, ranks=ranks, parameters=parameters, batches=batches, folder=folder, optimizer=optimizer,
        engine=Engine(
            module, optimizer, micro_batch=settings.micro_batch_size_per_gpu,
            accumulation=settings.gradient_accumulation_steps, clip_norm=settings.gradient_clipping,
        ),
        progress=starting_point(resumed, batches, settings, ranks, arguments),
        metrics=Metrics.of_run(folder, settings.monitoring, settings.model_dump(mode="json"), ranks.is_main),
        duties=[],
        checkpoints=Cadence(settings.checkpoint_every_n_steps, settings.checkpoint_every_n_epochs,
                            minutes=settings.checkpoint_every_n_minutes),
    )  # fmt: skip
    trainer.duties = duties_of(trainer, pipeline, data, reader, blueprint)
    return trainer


def new_run_folder(settings: Settings, ranks: Ranks, arguments: argparse.Namespace) -> Path:
    """A folder for this run, the same on every rank, with the user's files in it."""
    from utils.run import folder

    name = share(ranks, "run folder", folder.new_name(settings.output_dir))[0]
    path = settings.output_dir / name
    if ranks.is_main:
        datasets = [settings.dataset, *(entry.config for entry in settings.eval_datasets)]
        folder.create(path, settings, arguments.config, datasets)
        logger.info("run folder: %s", path)
    barrier()
    return path


def starting_point(
    resumed: Checkpoint | None, batches: TrainingBatches, settings: Settings, ranks: Ranks,
    arguments: argparse.Namespace,
) -> Progress:  # fmt: skip
    """Where training begins: at the start, or where the checkpoint stands."""
    if resumed is None:
        return Progress()
    progress = resumed.progress
    if arguments.reset_dataloader:
        progress = replace(progress, epoch=0, step_in_epoch=0, epoch_loss_sum=0.0)
    progress = progress.with_global_batch(resumed.made_with["global_batch"], global_batch(settings, ranks))
    if progress.step_in_epoch >= batches.steps_per_epoch:
        progress = progress.next_epoch()
    logger.info("resuming %s at step %d, epoch %d", resumed.folder, progress.step, progress.epoch + 1)
    return progress


def global_batch(settings: Settings, ranks: Ranks) -> int:
    """Samples of one optimizer step."""
    return settings.micro_batch_size_per_gpu * settings.gradient_accumulation_steps * ranks.data_ranks


def duties_of(
    trainer: Trainer, pipeline: BasePipeline, data: Data, reader: SampleReader, blueprint: Blueprint
) -> list[Duty]:
    """Evaluation, sampling and export, as the settings ask for them."""
    from models.foundation.noising import evaluation_micro_batch
    from models.foundation.outputs import export_plan, sample_model
    from utils.dataset.batches import EvaluationBatches
    from utils.run.evaluation import evaluate
    from utils.run.export import export
    from utils.run.sampling import sample

    settings, ranks = trainer.settings, trainer.ranks
    micro_batch = settings.eval_micro_batch_size_per_gpu or settings.micro_batch_size_per_gpu
    sets = {
        collection.source.name: EvaluationBatches(
            collection.samples, reader, micro_batch, ranks.data_ranks, ranks.data_rank
        )
        for collection in data.evaluation
    }
    plan = export_plan(pipeline, settings, blueprint)
    painter = sample_model(pipeline, data.encoders, settings, ranks, data.cache_dir)

    def run_evaluation(progress: Progress, epoch_ended: bool) -> None:
        prepare = partial(evaluation_micro_batch, pipeline)
        results = evaluate(trainer.engine, ranks, sets, prepare, tag=str(progress.step))
        trainer.metrics.scalars(results, progress.step)
        for name in sets:
            logger.info("step %d: %s/loss %.5f", progress.step, name, results[f"{name}/loss"])

    def draw_samples(progress: Progress, epoch_ended: bool) -> None:
        sample(trainer.engine, ranks, painter, settings.sampling, trainer.folder, trainer.metrics, progress.step)

    def write_export(progress: Progress, epoch_ended: bool) -> None:
        name = f"epoch{progress.epoch + 1}" if epoch_ended else f"step{progress.step}"
        export(trainer.folder / name, ranks, trainer.parameters, plan, progress.step)

    sampling = settings.sampling
    evaluation = Duty(
        run_evaluation,
        Cadence(settings.eval_every_n_steps, settings.eval_every_n_epochs, settings.eval_every_n_examples),
        before_first_step=settings.eval_before_first_step, at_end=True,
    )  # fmt: skip
    drawing = Duty(
        draw_samples, Cadence(sampling.sample_every_n_steps, sampling.sample_every_n_epochs),
        before_first_step=sampling.sample_before_first_step, at_end=True,
    )  # fmt: skip
    saving = Duty(
        write_export,
        Cadence(settings.save_every_n_steps, settings.save_every_n_epochs, settings.save_every_n_examples), at_end=True,
    )  # fmt: skip
    return [*([evaluation] if sets else []), *([drawing] if sampling.prompts else []), saving]


def train(trainer: Trainer, stop: StopRequests) -> bool:
    """The loop: a step, its numbers, what is due after it. Returns whether it came to its end."""
    t = trainer
    total = t.progress.step + t.steps_left
    if t.progress.step == 0:
        for duty in t.duties:
            if duty.before_first_step:
                duty.perform(t.progress, False)
    report = StepReporter(t.progress.step, total, t.settings.steps_per_print, t.ranks.is_main)
    batches = t.prefetched()
    while t.progress.step < total:
        before = t.progress
        done, values = take_step(t, next(batches), total)
        epoch_ended = done.step_in_epoch == t.batches.steps_per_epoch
        if epoch_ended:
            values["train/epoch_loss"] = done.epoch_loss
        t.metrics.scalars(values, done.step)
        report.step(done.step, done.epoch, values)
        for duty in t.duties:
            if duty.cadence.due(before, done, epoch_ended) or (duty.at_end and done.step == total):
                duty.perform(done, epoch_ended)
        t.progress = done.next_epoch() if epoch_ended else done
        stopping, overdue = any_rank([stop.pending(), t.ranks.is_main and t.checkpoints.overdue()])
        last = t.checkpoints.ever and done.step == total
        if stopping or overdue or last or t.checkpoints.due(before, done, epoch_ended):
            save_checkpoint(t)
        if stopping and done.step < total:
            logger.warning("stopped at step %d; --resume_from_checkpoint %s goes on from here", done.step, t.folder)
            break
    report.close()
    if hasattr(batches, "close"):
        batches.close()
    return t.progress.step >= total


def take_step(t: Trainer, batches: list | None, total: int) -> tuple[Progress, dict[str, float]]:
    """One optimizer step; the progress after it, and its numbers."""
    from optimizers.schedules import learning_rates

    started = time.monotonic()
    step = t.progress.step
    rates = learning_rates(step, [t.settings.optimizer.lr] * len(t.optimizer.param_groups), t.settings, total)
    for group, rate in zip(t.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    result = t.engine.train_step(batches, step)
    seconds = time.monotonic() - started
    values = {
        "train/loss": result.loss, "train/grad_norm": result.grad_norm, "train/lr": rates[0],
        "train/step_time_sec": seconds, "train/samples_per_sec": t.global_batch / seconds,
    }  # fmt: skip
    return t.progress.after_step(result.loss, t.global_batch), values


def save_checkpoint(t: Trainer) -> None:
    """Writes the state to resume from."""
    from utils.run import checkpoint

    made_with = {
        "optimizer": t.settings.optimizer.model_dump(mode="json"), "global_batch": t.global_batch,
        "seed": t.settings.seed,
    }  # fmt: skip
    path = checkpoint.save(t.folder, t.ranks, t.progress, t.parameters, t.optimizer, made_with)
    t.checkpoints.restart()
    logger.info("checkpoint: %s", path)


if __name__ == "__main__":
    sys.exit(main())
