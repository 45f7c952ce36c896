"""Trains a diffusion model: `deepspeed --num_gpus=N train.py --config run.toml`, or torchrun, or plain python."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.parallel.backend import initialize_deepspeed
from utils.ranks import Ranks, connect, disconnect, from_environment, leave_together
from utils.run.cadence import Duty
from utils.run.metrics import Metrics
from utils.run.progress import Progress
from utils.run.reporting import StepReporter, is_user_error, report_user_error, start_logging
from utils.run.signals import StopRequested, StopRequests
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.reader import read_all, resolved
from utils.settings.schema import Settings

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from models.assembly.data import Data
    from models.assembly.noising import Noising
    from models.assembly.stage import StagedModel
    from models.base import BasePipeline
    from optimizers.ema import EMA
    from utils.dataset.batches import SampleReader
    from utils.dataset.collection import Source
    from utils.dataset.epochs import Epochs
    from utils.dataset.manifest import Scan
    from utils.run.checkpoint import Checkpoint
    from utils.run.trainer import Trainer

logger = logging.getLogger("penstock")

NEWEST_RUN = ""
"""What --resume_from_checkpoint holds when it names no folder."""
SECONDS_TO_LEAVE = 10.0
"""How long a process that was asked to stop waits for the others of the run."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Exit codes: 0; 1 after a mistake of the user's, told without a traceback; 128 + the signal
    after a stop that was asked for."""
    started = time.monotonic()
    arguments = parse_arguments(argv)
    # Everything is read from paths that the user names; a hub that cannot be reached must cost no time.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ranks = from_environment()
    if ranks.device.type == "cpu":
        # DeepSpeed looks for an accelerator when it is imported, and warns that it finds none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    start_logging(ranks)
    with StopRequests() as stop:
        try:
            finished = run(arguments, ranks, stop, started)
            disconnect()
        except StopRequested:
            leave_together(ranks, SECONDS_TO_LEAVE)
            finished = False
        except (ValueError, OSError) as error:
            if not is_user_error(error):
                raise
            report_user_error(error, ranks)
            return 1
    return 0 if finished else stop.exit_code


def run(arguments: argparse.Namespace, ranks: Ranks, stop: StopRequests, started: float) -> bool:
    """Settings, data, cache, model, training: each is checked before the next is loaded. Returns whether the run came
    to its end."""
    import models
    from models.assembly.dump import dump, prepare_folder
    from models.assembly.preflight import check_run, plan_of

    if arguments.check and ranks.world_size == 1:
        # Without a launcher the plan is that of one pipeline, whatever its number of stages.
        ranks = replace(ranks, world_size=0)
    settings, datasets = read_settings(arguments, ranks)
    ranks = replace(ranks, world_size=ranks.world_size or settings.pipeline_stages)
    ranks = ranks.with_stages(settings.pipeline_stages)
    pipeline = models.find(settings.model.type)(settings.model, settings.seed)
    pipeline.check_training(str(arguments.config))
    sources = sources_of(settings, datasets)
    scan = scan_of(settings, sources, arguments, stop)
    if arguments.check:
        if ranks.is_main:
            sys.stdout.write(plan_of(settings, ranks, pipeline, sources, scan) + "\n")
        return True
    staged = check_run(settings, ranks, pipeline)
    if arguments.dump_dataset and ranks.is_main:
        prepare_folder(arguments.dump_dataset)
    connect(ranks, arguments.master_port)
    resumed = open_checkpoint(settings, arguments, staged)
    data = cached_data(settings, ranks, pipeline, sources, scan, arguments)
    if arguments.dump_dataset and ranks.is_main:
        dump(settings, pipeline, data, ranks, arguments.dump_dataset, stop.raise_if_stopping)
    if arguments.cache_only or arguments.dump_dataset:
        return True
    initialize_deepspeed()
    trainer = build_trainer(settings, ranks, pipeline, data, resumed, arguments, stop)
    logger.info("ready after %.1f s", time.monotonic() - started)
    return train(trainer)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Every flag may be written with underscores or with hyphens."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    for name, options in FLAGS.items():
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*spellings, **options)
    arguments = parser.parse_args(argv)
    resets = [name for name in FLAGS if name.startswith("reset_") and getattr(arguments, name)]
    if resets and arguments.resume_from_checkpoint is None:
        parser.error(f"--{resets[0]} says how to resume; give --resume_from_checkpoint with it")
    return arguments


FLAGS: dict[str, dict[str, Any]] = {
    "config": {"type": Path, "required": True, "help": "TOML file of the run"},
    "resume_from_checkpoint": {
        "nargs": "?",
        "const": NEWEST_RUN,
        "metavar": "FOLDER",
        "help": "go on from this checkpoint, or the newest of this run folder, or of the newest run",
    },
    "cache_only": {"action": "store_true", "help": "encode the datasets and end"},
    "regenerate_cache": {"action": "store_true", "help": "encode everything again"},
    "trust_cache": {"action": "store_true", "help": "take files seen before as unchanged, without looking at them"},
    "reset_dataloader": {"action": "store_true", "help": "on resuming, begin the data from the start"},
    "reset_optimizer": {"action": "store_true", "help": "on resuming, begin with an optimizer that remembers nothing"},
    "reset_optimizer_params": {
        "action": "store_true",
        "help": "on resuming, take the keys of [optimizer] from the config where they differ from the checkpoint's",
    },
    "dump_dataset": {
        "type": Path,
        "metavar": "FOLDER",
        "help": "write what the trainer sees of the data, decoded, with a page to look through, and end",
    },
    "check": {"action": "store_true", "help": "check config, datasets and folders, print the plan, and end"},
    "master_port": {"type": int, "help": "port at which the processes meet, where the launcher names none"},
    "local_rank": {"type": int, "help": "given by launchers; the environment's LOCAL_RANK is what counts"},
}


def read_settings(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Settings, dict[str, DatasetSettings]]:
    """The run's settings and its datasets, the training set under the name "train"."""

    def options_of(model_type: str) -> type:
        import models

        return models.find(model_type).Options

    settings, training, evaluation = read_all(arguments.config, options_of, ranks.world_size)
    return settings, {"train": training, **evaluation}


def sources_of(settings: Settings, datasets: Mapping[str, DatasetSettings]) -> list[Source]:
    from utils.dataset.collection import Source

    files = {"train": settings.dataset, **{entry.name: entry.config for entry in settings.eval_datasets}}
    return [Source(name, file, datasets[name]) for name, file in files.items()]


def cache_folder(settings: Settings, sources: list[Source]) -> Path:
    """Where all of the run's datasets are cached: the training set's `cache_dir`, or beside the runs."""
    return sources[0].settings.cache_dir or settings.output_dir / "cache"


def scan_of(settings: Settings, sources: list[Source], arguments: argparse.Namespace, stop: StopRequests) -> Scan:
    """How the files of the datasets are looked at."""
    from utils.dataset.manifest import Scan

    return Scan(
        cache_folder(settings, sources) / "files.sqlite",
        trust=arguments.trust_cache,
        verify=settings.verify == "content",
        raise_if_stopping=stop.raise_if_stopping,
    )


def cached_data(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    sources: list[Source],
    scan: Scan,
    arguments: argparse.Namespace,
) -> Data:
    """The datasets, once all of them are in the cache."""
    from models.assembly.data import load_data
    from utils.dataset.encoding import CacheJob

    job = CacheJob(
        cache_folder(settings, sources),
        arguments.config,
        ranks,
        settings.caching_batch_size,
        regenerate=arguments.regenerate_cache,
        verify=scan.verify,
        raise_if_stopping=scan.raise_if_stopping,
    )
    return load_data(settings, pipeline, sources, scan, job)


def open_checkpoint(settings: Settings, arguments: argparse.Namespace, staged: StagedModel) -> Checkpoint | None:
    """The checkpoint to go on from, if one is asked for, checked against the settings and what they train."""
    if arguments.resume_from_checkpoint is None:
        return None
    from utils.run.checkpoint import Checkpoint, identity_of
    from utils.run.folder import find_checkpoint

    checkpoint = Checkpoint(find_checkpoint(settings.output_dir, arguments.resume_from_checkpoint))
    checkpoint.check_identity(identity_of(settings))
    checkpoint.check_weights(staged.trained(staged.layers))
    checkpoint.check_optimizer(
        settings.optimizer.model_dump(mode="json"),
        new_parameters=arguments.reset_optimizer_params,
        new_state=arguments.reset_optimizer,
    )
    return checkpoint


def build_trainer(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    data: Data,
    resumed: Checkpoint | None,
    arguments: argparse.Namespace,
    stop: StopRequests,
) -> Trainer:
    """Loads this stage's weights and puts the engine, the batches and the run's folder together."""
    import optimizers
    from models.assembly.data import reader_of
    from models.assembly.noising import Noising
    from models.assembly.stage import load_stage, teacher_of
    from optimizers.parameter_groups import groups_of
    from utils.dataset.batches import TrainingBatches
    from utils.dataset.encoders import reads_text
    from utils.dataset.epochs import Epochs, format_table, micro_batch_of
    from utils.dataset.samples import VersionPicker
    from utils.parallel.engine import Engine, optimizer_for_frozen_stage
    from utils.parallel.pipeline import DenoiserPipeline
    from utils.run import folder as run_folder
    from utils.run.trainer import Trainer

    accumulation = settings.gradient_accumulation_steps
    epochs = Epochs(
        data.training.samples, partial(micro_batch_of, settings), ranks.data_ranks, accumulation, settings.seed
    )
    logger.info("training data:\n%s", format_table(epochs.table()))
    staged = load_stage(pipeline, settings, ranks.stage)
    parameters = staged.trained(staged.stage_layers(ranks.stage))
    chosen = settings.optimizer
    groups = groups_of(
        parameters.items(), lr=chosen.lr, weight_decay=chosen.weight_decay, own_rate=pipeline.learning_rate
    )
    optimizer = optimizers.build(groups, chosen) if groups else optimizer_for_frozen_stage()
    module = DenoiserPipeline(
        staged.layers,
        staged.bounds,
        pipeline.stream_type,
        pipeline.loss,
        recompute=settings.activation_checkpointing,
        seed=settings.seed,
        loss_terms=pipeline.loss_terms,
    )
    teacher = teacher_of(pipeline, settings, staged)
    engine = Engine(module, optimizer, accumulation=accumulation, clip_norm=settings.gradient_clipping, teacher=teacher)
    reader = reader_of(data, ranks)
    noising = Noising(pipeline, ranks.is_first_stage, ranks.is_last_stage)
    picker = VersionPicker(
        settings.seed, [encoder.name for encoder in data.encoders if reads_text(encoder)], bool(data.live)
    )
    folded = settings.model.folded_guidance is not None
    batches = TrainingBatches(epochs, reader, picker, noising.training, ranks.data_rank, with_empty=folded)
    progress, ema = restore_or_start(settings, arguments, resumed, epochs, parameters, optimizer)
    folder = resumed.folder.parent if resumed else run_folder.create(settings, ranks, arguments.config)
    metrics = Metrics.of_run(
        folder,
        settings.monitoring,
        resolved(settings),
        ranks.is_main,
        resumed_at=progress.step if resumed else None,
    )
    trainer = Trainer(
        settings,
        ranks,
        engine,
        optimizer,
        parameters,
        batches,
        progress,
        folder,
        metrics,
        stop,
        ema,
        resumed and resumed.folder,
    )
    trainer.duties = duties_of(trainer, pipeline, data, reader, noising, staged)
    return trainer


def restore_or_start(
    settings: Settings,
    arguments: argparse.Namespace,
    resumed: Checkpoint | None,
    epochs: Epochs,
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
) -> tuple[Progress, EMA | None]:
    """Where the run begins, and the averages if it has any; parameters and optimizer take the checkpoint's values."""
    from optimizers.ema import EMA

    progress = Progress()
    if resumed:
        resumed.load_weights(parameters)
        if not arguments.reset_optimizer:
            resumed.load_optimizer(parameters, optimizer)
        progress = resumed.starting_point(epochs.steps_in, restart_data=arguments.reset_dataloader)
    ema = EMA(parameters.items(), settings.ema, optimizer, since=progress.step) if settings.ema else None
    if resumed:
        resumed.load_ema(ema)
    return progress, ema


def duties_of(
    trainer: Trainer,
    pipeline: BasePipeline,
    data: Data,
    reader: SampleReader,
    noising: Noising,
    staged: StagedModel,
) -> list[Duty]:
    """Evaluation, sampling and export, as the settings ask for them."""
    from models.assembly.exports import export_plan
    from models.assembly.prompts import sample_model
    from utils.dataset.batches import EvaluationBatches
    from utils.dataset.epochs import micro_batch_of
    from utils.run import duties

    settings, ranks = trainer.settings, trainer.ranks
    micro_batch = partial(micro_batch_of, settings, evaluating=True)
    sets = {
        collection.source.name: EvaluationBatches(
            collection.samples, reader, micro_batch, ranks.data_ranks, ranks.data_rank
        )
        for collection in data.evaluation
    }
    sampler = sample_model(pipeline, data.encoders, settings, ranks, data.cache_dir)
    return duties.of_run(trainer, sets, noising.evaluation, sampler, export_plan(pipeline, settings, staged))


def train(trainer: Trainer) -> bool:
    """The loop: a step, its numbers, what is due after it. Returns whether it came to its end."""
    stopped = trainer.begin()
    first, last = trainer.progress.step, trainer.last_step
    report = StepReporter(first, last, trainer.settings.steps_per_print, trainer.ranks.is_main)
    batches = trainer.prefetched()
    while trainer.progress.step < last and not stopped:
        done, values = trainer.step(batches)
        trainer.metrics.scalars(values, done.step)
        report.step(done.step, done.epoch, values)
        stopped = trainer.advance(done)
    report.close()
    trainer.close(batches)
    if stopped and trainer.progress.step == first:
        logger.warning("stopped before a step was made; what is cached stays cached")
    elif stopped:
        logger.warning("stopped; --resume_from_checkpoint %s goes on from here", trainer.folder)
    elif first == last:
        logger.warning(
            "nothing is left to train: %d epochs are done; set epochs or max_steps higher", trainer.progress.epoch
        )
    return not stopped


if __name__ == "__main__":
    sys.exit(main())
