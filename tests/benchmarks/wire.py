"""Bytes between two stages for one micro-batch, counted at full size for LoRA of rank 32, against the least possible.

The least is what blocks have changed before the cut (by parameters), and the gradient of that. What is beyond it comes
through from the entry as it was: it is listed by its field.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.assembly.activations import LightAttention, tensors_of
from tests.benchmarks.cut import planner_of
from tests.models.full_size import ALL
from utils.parallel import wire
from utils.parallel.remaking import Remaking, leaving

MB = 1e6
LISTED = 0.001
"""Fields with a smaller share are not listed."""


def measure() -> Iterator[str]:
    for model in ALL:
        with tempfile.TemporaryDirectory() as folder:
            planner = planner_of(model, Path(folder))
            layers, two = planner.staged.layers, planner.settings.model_copy(update={"pipeline_stages": 2})
            stream, streams = planner.first_stream(planner.bucket), []
            with LightAttention():
                for layer in layers[: planner.bounds(two)[0][1]]:
                    stream = layer.to("meta")(stream)
                    streams.append(stream)
        sent, returned, least, constant = _counted(streams[0], leaving(streams[-1], Remaking.of(layers[0])))
        described = wire.DESCRIPTION_NUMBERS * 8
        total = sent + returned + described
        listed = [f"{name} {size / MB:.2f}" for name, size in constant.items() if size > LISTED * least]
        yield (
            f"{model.name:26} {sent / MB:7.2f} MB, back {returned / MB:7.2f}, {total / least:.4f} of the least; "
            f"unchanged: {', '.join(listed) or 'nothing of size'}"
        )


def _counted(entry: Any, cut: Any) -> tuple[int, int, int, dict[str, int]]:
    """The bytes that are sent, come back, and are the least of both; and those of each field that is as the entry made
    it."""
    before = {id(tensor) for tensor in tensors_of(entry)}
    seen: set[int] = set()
    sent = returned = least = 0
    constant: dict[str, int] = {}
    for name, field in zip(cut._fields, cut, strict=True):
        for tensor in tensors_of(field):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            back = tensor.nbytes if tensor.requires_grad else 0
            sent, returned = sent + tensor.nbytes, returned + back
            if id(tensor) in before:
                constant[name] = constant.get(name, 0) + tensor.nbytes + back
            else:
                least += tensor.nbytes + back
    return sent, returned, least, constant
