"""Trains a diffusion model: `deepspeed --num_gpus=N train.py --config run.toml`, or torchrun, or plain python."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from utils.ranks import Ranks, connect, disconnect, from_environment
from utils.run.reporting import report_user_error, start_logging
from utils.settings.errors import SettingsError

logger = logging.getLogger("penstock")

ANY_RUN = ""
"""What --resume_from_checkpoint holds when it names no folder: the newest run."""


def main(words: list[str] | None = None) -> int:
    """Runs the command line; the exit code is 0, or 1 after a mistake of the user's, which is told without a traceback."""
    arguments = parse_arguments(words)
    ranks = from_environment()
    start_logging(ranks)
    try:
        run(arguments, ranks)
        disconnect()
    except SettingsError as error:
        report_user_error(error, ranks)
        return 1
    return 0


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Settings, data, cache, model, training: each is checked before the next is loaded."""
    from utils.run import assembly

    plan = assembly.read(arguments, ranks)
    if arguments.check:
        assembly.show_plan(plan)
        return
    connect(ranks, arguments.master_port)
    data = assembly.prepare_data(plan, arguments)
    if arguments.cache_only:
        return
    trainer = assembly.build(plan, data, arguments)
    trainer.train()


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line. Every flag may be written with underscores or hyphens."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="TOML file of the run")
