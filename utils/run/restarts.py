"""Processes that torchrun has started again (`--max_restarts`), with the command line of the first time: they go on
with the run that those before them began."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from utils.machine import started_at
from utils.ranks import restarts
from utils.run.checkpoint import ResumeFlags, of_other_run
from utils.run.flags import NEWEST_RUN
from utils.run.folder import is_run_of, newest_checkpoint, newest_checkpoints, runs_in
from utils.settings.schema import Settings
from utils.turn import turn_in_list

logger = logging.getLogger(__name__)


def after_restart(flags: ResumeFlags, settings: Settings, config: Path) -> ResumeFlags:
    """How the run of a `config` goes on: as the command line says; after a restart with the newest checkpoint that the
    run of this launcher has, without what the command line resets, since that is done. Without a checkpoint it begins
    as the first time."""
    count = restarts()
    if not count:
        return _in_list(flags, settings, config)
    launched = started_at(os.getppid())
    for run in reversed(runs_in(settings.output_dir)):
        newest = newest_checkpoint(run)
        if newest and not of_other_run(newest, settings) and any(at >= launched for at in _begun_at(run)):
            logger.warning("started again by the launcher, number %d: goes on with %s", count, run)
            return ResumeFlags(str(run))
    logger.warning("started again by the launcher, number %d: no checkpoint yet, and so from the beginning", count)
    return flags


def _in_list(flags: ResumeFlags, settings: Settings, config: Path) -> ResumeFlags:
    """What a config of a list goes on with: the newest of its own runs, since those of others may differ from it in
    less than tells runs apart. The list may have been stopped before this one was begun."""
    if turn_in_list() is None or flags.source != NEWEST_RUN:
        return flags
    for newest in reversed(newest_checkpoints(settings.output_dir)):
        if is_run_of(newest.parent, config) and not of_other_run(newest, settings):
            return replace(flags, source=str(newest.parent))
    logger.warning("--resume_from_checkpoint: no run of this config has a checkpoint yet, and so it begins")
    return ResumeFlags(None)


def _begun_at(run: Path) -> Iterator[float]:
    """When the run began, and when it went on."""
    return (
        record.stat().st_mtime for pattern in ("", "resumed_step*/") for record in run.glob(f"{pattern}config.toml")
    )
