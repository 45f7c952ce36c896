"""Trains a diffusion model: `deepspeed --num_gpus=N train.py --config run.toml`, or torchrun, or plain python."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import models
from utils.collector import without_collector
from utils.run.display import guarded_streams
from utils.run.flags import FLAGS, check_flags, words_of
from utils.run.signals import StopRequested, StopRequests
from utils.run.time_limit import TimeLimit
from utils.settings import diffusion_pipe
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.reader import read_all
from utils.settings.schema import Settings

if TYPE_CHECKING:
    from utils.ranks import Ranks
    from utils.run.beginning import Beginning
    from utils.run.checkpoint import ResumeFlags
    from utils.run.trainer import Trainer

logger = logging.getLogger("penstock")

SECONDS_TO_LEAVE = 10.0
"""How long a process that was asked to stop waits for the others of the run."""


@guarded_streams()
def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Exit codes: 0; 1 after a mistake of the user's, told without a traceback; 128 + the signal
    after a stop that was asked for."""
    started = time.monotonic()
    arguments = parse_arguments(argv)
    with without_collector():
        # torch takes a second or two, and the command line needs none of it.
        from utils.ranks import disconnect, from_environment, leave_together
        from utils.run.reporting import is_user_error, report_user_error, start_logging

    # Everything is read from paths that the user names; a hub that cannot be reached must cost no time.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Samples differ in size; segments of the GPU's memory that can grow leave fewer holes between them.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    ranks = from_environment()
    if ranks.device.type == "cpu":
        # DeepSpeed looks for an accelerator when it is imported, and warns that it finds none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    start_logging(ranks)
    for name in arguments.foreign:
        logger.warning("--%s: %s", name, diffusion_pipe.FLAGS[name].warning)
    with StopRequests() as stop:
        try:
            if len(arguments.configs) > 1:
                return run_list(arguments, ranks, stop)
            finished = run(arguments, ranks, stop, started)
            disconnect()
        except StopRequested:
            leave_together(ranks, SECONDS_TO_LEAVE)
            finished = False
        except RuntimeError as error:
            if not stop.watch.explains(error):
                raise
            return 1
        except (ValueError, OSError) as error:
            stop.watch.failed(error)
            if not is_user_error(error):
                raise
            with stop.ending_at_once():
                report_user_error(error, ranks, stopping=stop.pending())
            if ranks.world_size == 1:
                disconnect()
            return 1
    return 0 if finished else stop.exit_code


def run_list(arguments: argparse.Namespace, ranks: Ranks, stop: StopRequests) -> int:
    """One run after the other, each in processes of its own, once the settings of all are sound. Returns the exit
    code."""
    from utils.run.listed import check_all, check_launch, walk

    check_launch()
    world_size = None if arguments.check and ranks.world_size == 1 else ranks.world_size
    check_all(lambda config: read_settings(config, world_size, bool(arguments.foreign)), arguments.configs)
    command = [sys.executable, __file__, *words_of(arguments)]
    return walk(command, arguments.configs, ranks, stop, arguments.master_port)


def run(arguments: argparse.Namespace, ranks: Ranks, stop: StopRequests, started: float) -> bool:
    """Settings, data, cache, model, training: each is checked before the next is loaded. Returns whether the run came
    to its end. What ends it before the first step is told to its webhook too."""
    # A plan without a launcher is that of one pipeline, whatever its number of stages; an export is one process's work.
    world_size = None if (arguments.check or arguments.export) and ranks.world_size == 1 else ranks.world_size
    with without_collector():
        settings, datasets = read_settings(arguments.config, world_size, bool(arguments.foreign))
        ranks = replace(ranks, world_size=world_size or settings.pipeline_stages).with_stages(settings.pipeline_stages)
        from utils.run.beginning import Beginning

    stop.time = TimeLimit(60 * settings.time_limit, started) if settings.time_limit else None
    # Who asks for a plan is there to read it.
    told = None if arguments.check else settings.monitoring.webhook
    with Beginning(told, arguments.config, ranks, stop, started) as beginning:
        return work(arguments, settings, datasets, ranks, stop, beginning)


def work(
    arguments: argparse.Namespace,
    settings: Settings,
    datasets: dict[str, DatasetSettings],
    ranks: Ranks,
    stop: StopRequests,
    beginning: Beginning,
) -> bool:
    """What the command line asks for. Returns whether it came to its end."""
    with without_collector():
        # The settings are sound: diffusers and the rest are imported from here on.
        from models.assembly import checkpoint_export, data, dump, plan, preflight, sample_only, trainer
        from utils.parallel.backend import initialize_deepspeed
        from utils.run.in_use import RunLock
        from utils.run.restarts import after_restart

    settings = sample_only.with_export(arguments.sample_only, settings)
    pipeline = models.build(settings.model, settings.seed)
    # What the model's own files settle is recorded with the rest.
    settings = settings.model_copy(update={"model": pipeline.options.as_given()})
    preflight.check_training(pipeline, str(arguments.config))
    if arguments.sample_only:
        meet(ranks, stop, settings, arguments.master_port)
        sample_only.draw_samples(arguments.sample_only, settings, ranks, pipeline, stop)
        return True
    sources = data.sources_of(settings, datasets)
    scan = data.scan_of(settings, sources, stop.raise_if_stopping, trust=arguments.trust_cache)
    if arguments.check:
        preflight.show_plan(settings, ranks, pipeline, sources, scan)
        return True
    if arguments.export:
        if ranks.is_main:
            checkpoint_export.export_checkpoint(arguments.export, settings, pipeline)
        return True
    looks = arguments.cache_only or arguments.dump_dataset
    staged = preflight.check_run(settings, ranks, pipeline, trains=not looks)
    if arguments.dump_dataset and ranks.is_main:
        dump.prepare_folder(arguments.dump_dataset)

    meet(ranks, stop, settings, arguments.master_port)
    preflight.verify(settings, pipeline, scan.index.parent, ranks, stop.raise_if_stopping)
    flags = after_restart(resume_flags(arguments), settings, arguments.config)
    with RunLock() as in_use:
        checkpoint = trainer.open_checkpoint(settings, flags, staged, ranks, None if looks else in_use)
        # Whoever only fills a cache may train elsewhere.
        room = None if looks else partial(plan.check_room, settings, ranks, pipeline, staged)
        choices = {"owner": arguments.config, "regenerate": arguments.regenerate_cache, "check_room": room}
        cached = data.cached_data(settings, ranks, pipeline, sources, scan, **choices)
        if arguments.dump_dataset and ranks.is_main:
            dump.dump(settings, pipeline, cached, ranks, arguments.dump_dataset, stop.raise_if_stopping)
        if looks:
            return True

        settings = plan.settled(settings, ranks, pipeline, staged, cached, checkpoint, flags.reset_dataloader)
        initialize_deepspeed()
        built = trainer.build_trainer(
            settings, ranks, pipeline, cached, stop, arguments.config, flags, in_use, checkpoint=checkpoint
        )
        beginning.over()
        return built.parts.telling(lambda: train(built))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Every flag may be written with underscores or with hyphens; those of another trainer are
    listed in `foreign`, if they do no harm."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    hidden = {"nargs": "?", "const": True, "help": argparse.SUPPRESS}
    foreign = {name: hidden | {"dest": f"foreign_{name}"} for name in diffusion_pipe.FLAGS}
    for name, options in {**FLAGS, **foreign}.items():
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*spellings, **options)
    arguments = parser.parse_args(argv)
    arguments.foreign = [name for name in diffusion_pipe.FLAGS if getattr(arguments, f"foreign_{name}") is not None]
    arguments.configs, arguments.config = arguments.config, arguments.config[0]
    check_flags(parser, arguments)
    return arguments


def read_settings(
    config: Path, world_size: int | None, from_diffusion_pipe: bool = False
) -> tuple[Settings, dict[str, DatasetSettings]]:
    """The run's settings and its datasets, the training set under the name "train"; `world_size` is None where any
    number of processes is meant. See `read_all`."""
    settings, training, evaluation = read_all(config, models.choices(), world_size, from_diffusion_pipe)
    return settings, {"train": training, **evaluation}


def resume_flags(arguments: argparse.Namespace) -> ResumeFlags:
    """How the command line asks to go on."""
    from utils.run.checkpoint import ResumeFlags

    resets = (arguments.reset_dataloader, arguments.reset_optimizer, arguments.reset_optimizer_params)
    return ResumeFlags(arguments.resume_from_checkpoint, *resets)


def meet(ranks: Ranks, stop: StopRequests, settings: Settings, port: int | None) -> None:
    """Connects the processes of the run."""
    from utils.parallel.attention import set_kernels
    from utils.ranks import connect

    with stop.ending_at_once():
        stop.raise_if_stopping()
        connect(ranks, port)
    stop.watch.begin(ranks, settings.hang_timeout)
    set_kernels(settings.attention)


def train(trainer: Trainer) -> bool:
    """The loop: a step, its numbers, what is due after it. Returns whether it came to its end."""
    from utils.run.reporting import StepReporter

    stopped = trainer.begin()
    first, last = trainer.progress.step, trainer.last_step
    run = trainer.parts
    report = StepReporter(first, last, run.settings.steps_per_print, run.ranks.is_main)
    with trainer.prefetched() as batches:
        while trainer.progress.step < last and not stopped:
            done, values = trainer.step(batches)
            run.metrics.scalars(values, done.step)
            report.step(done.step, done.epoch, values)
            stopped = trainer.advance(done)
    report.close()
    trainer.end(stopped)
    return not stopped


if __name__ == "__main__":
    sys.exit(main())
