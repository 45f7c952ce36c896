"""What `deepspeed_config` lets in has the effect that it promises."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import pytest
import torch

from tests.benchmarks import backward_calls
from tests.processes import run_ranks
from utils.parallel.sharding import Shares
from utils.ranks import Ranks
from utils.settings.deepspeed_keys import DeepSpeedSettings

TOLD = {"wall_clock_breakdown": True, "dump_state": True}


class Kept(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def weights_after(ranks: Ranks, keys: dict[str, Any], zero_stage: int = 0) -> Any:
    """What two steps leave of the weights, with an engine that was told `keys`."""
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    torch.manual_seed(0)
    layers = [backward_calls.Dual(), backward_calls.Head()]
    module = DenoiserPipeline(layers, [(0, 2)], lambda *fields: fields, lambda y, _: y.square().mean(1))
    shares = Shares(dict(module.named_parameters()), ranks, zero_stage)
    optimizer = torch.optim.SGD(shares.stepped.values(), lr=0.1)
    settings = DeepSpeedSettings.model_validate(keys)
    engine = Engine(module, optimizer, accumulation=1, clip_norm=0.0, shares=shares, deepspeed=settings)
    batch = (torch.full((2, backward_calls.WIDTH), 1.1 + ranks.data_rank / 3),), (torch.zeros(2),)
    for step in range(2):
        engine.train_step([batch], step)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).numpy().copy()


def with_and_without(ranks: Ranks) -> dict[str, Any]:
    """Job of a data rank: what is logged and printed, and the weights by how gradients travel."""
    from deepspeed.utils.logging import logger as of_deepspeed

    from utils.parallel.backend import initialize_deepspeed

    initialize_deepspeed()
    kept, ours, printed = Kept(), logging.getLogger("utils.parallel.breakdown"), io.StringIO()
    for handler in of_deepspeed.handlers:
        handler.setStream(printed)
    ours.addHandler(kept)
    ours.setLevel(logging.INFO)
    weights = {"plain": weights_after(ranks, {})}
    for zero_stage in (0, 2):
        weights[f"bf16, {zero_stage}"] = weights_after(ranks, {"communication_data_type": "bf16"}, zero_stage)
    silent = not kept.lines and not printed.getvalue()
    weights["told"] = weights_after(ranks, TOLD, 2)
    return {"weights": weights, "silent": silent, "lines": kept.lines, "printed": printed.getvalue()}


@pytest.fixture(scope="module")
def returned() -> list[dict[str, Any]]:
    return run_ranks(with_and_without, 2)


def test_gradients_travel_in_the_type_that_is_asked_for(returned: list[dict[str, Any]]) -> None:
    first, second = (rank["weights"] for rank in returned)
    for name in first:
        assert (first[name] == second[name]).all(), name
    assert (first["bf16, 0"] == first["bf16, 2"]).all()
    difference = abs(first["bf16, 0"] - first["plain"]).max()
    assert 0 < difference < 1e-2
    assert (first["told"] == first["plain"]).all()


def test_what_is_asked_for_is_told_and_nothing_else(returned: list[dict[str, Any]]) -> None:
    main = returned[0]
    assert main["silent"]
    # Of the state, and of its configuration.
    assert "DeepSpeedEngine:\n" in main["printed"] and "gradient_accumulation_steps" in main["printed"]
    parts = r"ForwardPass 0\.\d+, .*BackwardPass 0\.\d+, .*OptimizerStep 0\."
    assert re.findall(rf"step (\d), seconds of stage 0: .*{parts}", "\n".join(main["lines"])) == ["1", "2"]
