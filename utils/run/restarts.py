"""Processes that torchrun has started again (`--max_restarts`), with the command line of the first time: they go on
with the run that those before them began."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from utils.machine import started_at
from utils.ranks import restarts
from utils.run.checkpoint import ResumeFlags, of_other_run
from utils.run.flags import NEWEST_RUN
from utils.run.folder import newest_checkpoint, newest_checkpoints, runs_in
from utils.settings.schema import Settings
from utils.turn import turn_in_list

logger = logging.getLogger(__name__)


def after_restart(flags: ResumeFlags, settings: Settings) -> ResumeFlags:
    """How a run goes on: as the command line says; after a restart with the newest checkpoint that the run of this
    launcher has, without what the command line resets, since that is done. Without a checkpoint it begins as the first
    time."""
    count = restarts()
    if not count:
        return _in_list(flags, settings)
    launched = started_at(os.getppid())
    for run in reversed(runs_in(settings.output_dir)):
        newest = newest_checkpoint(run)
        if newest and not of_other_run(newest, settings) and any(at >= launched for at in _begun_at(run)):
            logger.warning("started again by the launcher, number %d: goes on with %s", count, run)
            return ResumeFlags(str(run))
    logger.warning("started again by the launcher, number %d: no checkpoint yet, and so from the beginning", count)
    return flags


def _in_list(flags: ResumeFlags, settings: Settings) -> ResumeFlags:
    """A list of configs that goes on may have been stopped before all were begun."""
    if turn_in_list() is None or flags.source != NEWEST_RUN:
        return flags
    if any(not of_other_run(newest, settings) for newest in newest_checkpoints(settings.output_dir)):
        return flags
    logger.warning("--resume_from_checkpoint: no run of this config has a checkpoint yet, and so it begins")
    return ResumeFlags(None)


def _begun_at(run: Path) -> Iterator[float]:
    """When the run began, and when it went on."""
    return (
        record.stat().st_mtime for pattern in ("", "resumed_step*/") for record in run.glob(f"{pattern}config.toml")
    )
