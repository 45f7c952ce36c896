"""What a checkpoint costs: at once and in the background, against the plain write of its bytes; and what a step costs
meanwhile. One rank, AdamW's state of 60 million float32 parameters, products of matrices as the step.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from utils.ranks import Ranks
from utils.run.progress import Progress
from utils.run.saving import Saving

PARAMETERS, SIDE, PRODUCTS, TRIES = 60_000_000, 1024, 8, 3
MADE_WITH = {"identity": {}, "optimizer": {}, "steps_in_epoch": 1}


def measure() -> Iterator[str]:
    parameter = torch.nn.Parameter(torch.randn(PARAMETERS))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn(PARAMETERS)
    optimizer.step()
    state = {"weight": parameter}, optimizer
    content = [parameter.detach(), *(value for value in optimizer.state[parameter].values() if value.ndim)]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        place = Path(folder)
        plain = min(_seconds(lambda: _write(place / "plain", content)) for _ in range(TRIES))
        size = sum(tensor.nbytes for tensor in content) / 2**30
        yield f"{size:.2f} GiB, plain write with fsync: {plain:.2f} s"
        at_once = min(_seconds(lambda: _saving(place, state, False).complete()) for _ in range(TRIES))
        yield f"checkpoint at once: {at_once:.2f} s, {at_once / plain:.2f} times the plain write"
        _step()
        alone = min(_seconds(_step) for _ in range(5))
        blocked, steps = [], []
        for _ in range(TRIES):
            began = time.monotonic()
            saving = _saving(place, state, True)
            seconds = time.monotonic() - began
            while saving.is_writing:
                steps.append(_seconds(_step))
            blocked.append(seconds + _seconds(saving.complete))
        yield f"in the background a step waits {min(blocked):.2f} s, {min(blocked) / plain:.2f} times the plain write"
        yield f"a step meanwhile: {sum(steps) / len(steps) / alone:.2f} times one alone ({alone:.3f} s)"


def _saving(folder: Path, state: tuple, background: bool) -> Saving:
    return Saving(folder, Ranks(), Progress(step=1), *state, MADE_WITH, background=background)


def _write(path: Path, content: list[torch.Tensor]) -> None:
    with path.open("wb") as file:
        for tensor in content:
            file.write(tensor.numpy())
        file.flush()
        os.fsync(file.fileno())


def _step() -> None:
    matrix = torch.ones(SIDE, SIDE)
    for _ in range(PRODUCTS):
        matrix = matrix @ matrix / SIDE


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
