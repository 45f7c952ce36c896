"""Plots the noise levels that a config trains, and the weights of their losses.

python -m utils.diffusion.timesteps --plot FILE --config x.toml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import models
from models.assembly.preflight import check_training
from models.base import BasePipeline
from utils.diffusion.plot import plot, timestep_panels
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import UserError
from utils.settings.reader import read_settings
from utils.settings.rules import check_rules

# Sizes for which a shift by size is plotted: squares of 512 and 1024 pixels in most models.
TOKENS = (1024, 4096)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with code 1 and a message if the config or the file name is wrong."""
    parser = argparse.ArgumentParser(prog="python -m utils.diffusion.timesteps", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--plot", type=Path, required=True, help="the picture to write, as in timesteps.png")
    arguments = parser.parse_args(argv)
    try:
        draw(checked_pipeline(arguments.config), arguments.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def checked_pipeline(config: Path) -> BasePipeline:
    """The model of a config, whose keys for timesteps and losses are checked; whether files exist is left to the run.

    Raises:
        UserError: these keys are wrong.
    """
    settings = read_settings(config, models.choices())
    problems = [
        problem
        for problem in check_rules(settings, settings.pipeline_stages, str(config))
        if problem.where.startswith("[model]") and "path" not in problem.where
    ]
    if problems:
        raise UserError(problems)
    pipeline = models.build(settings.model, settings.seed)
    check_training(pipeline, str(config))
    return pipeline


def draw(pipeline: BasePipeline, path: Path) -> None:
    """Writes the picture: the density of the timesteps, and their weights."""
    maths = pipeline.maths
    sampler, weighting, objective = maths.timesteps, maths.weighting, maths.objective
    by_size = isinstance(sampler.shift, ResolutionShift)
    densities = {
        f"{sampler.method}, {tokens} tokens" if by_size else sampler.method: partial(sampler.density, tokens=tokens)
        for tokens in (TOKENS if by_size else TOKENS[:1])
    }

    def weight(t: float) -> float:
        return weighting.weight(objective, torch.tensor([t])).item()

    plot(timestep_panels(densities, {"weight": weight}), path)


if __name__ == "__main__":
    main()
