"""Losses, gradient norms and weights after three steps, at every layout, against one process that knows no pipeline.

A full fine-tune of a tiny Flux with AdamW and clipping; micro-batches of two shapes. Largest relative differences of
losses and norms, largest absolute difference of a weight.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.processes import run_ranks
from tests.utils.parallel import test_engine, toy_flux


def measure() -> Iterator[str]:
    torch.set_num_threads(1)
    yield "stages  data ranks  accumulation     loss     norm   weight"
    with tempfile.TemporaryDirectory() as name:
        folder = toy_flux.write_folder(Path(name))
        for stages, data_ranks in test_engine.LAYOUTS:
            returned = run_ranks(test_engine.train, stages * data_ranks, folder, stages, None, False)
            for accumulation in test_engine.ACCUMULATIONS:
                expected = toy_flux.train_plainly(
                    folder, None, data_ranks, accumulation, test_engine.STEPS, test_engine.CLIP
                )
                ours = [result[accumulation] for result in returned]
                loss = max(_relative(result["losses"], expected["losses"]) for result in ours)
                norm = max(_relative(result["norms"], expected["norms"]) for result in ours)
                weight = max(
                    (torch.from_numpy(values) - expected["weights"][parameter]).abs().max().item()
                    for result in ours
                    for parameter, values in result["weights"].items()
                )
                yield f"{stages:6}{data_ranks:12}{accumulation:14}{loss:9.1e}{norm:9.1e}{weight:9.1e}"


def _relative(ours: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True))
