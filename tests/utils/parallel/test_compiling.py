"""Compiled blocks against plain ones; without code generation, which takes a compiler half a minute."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from models.foundation.layers.chain import Middle
from utils.diffusion.seeds import normal
from utils.parallel import compiling
from utils.parallel.recompute import run_layer, run_recomputed

BLOCKS = 12


class Stream(NamedTuple):
    x_BTD: torch.Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def trained(layers: list[nn.Module], lengths: tuple[int, ...], *, recompute: bool) -> list[torch.Tensor]:
    """Outputs, and the gradients of all parameters."""
    found = []
    for length in lengths:
        stream = Stream(normal((2, length, 4), 0, "x"))
        for layer in layers:
            stream = run_recomputed(layer, stream, trains=True) if recompute else run_layer(layer, stream)
        stream.x_BTD.square().sum().backward()
        found.append(stream.x_BTD.detach())
    gradients = [parameter.grad for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    return [*found, *gradients]


def test_compiled_blocks_do_the_same_and_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILER", "aot_eager")
    torch.manual_seed(0)
    layers = [Middle(Block(), {"x": "x_BTD"}, ("x_BTD",)) for _ in range(BLOCKS)]
    cases = [(recompute, (3, 5, 7)) for recompute in (False, True)]
    plain = [trained(layers, lengths, recompute=recompute) for recompute, lengths in cases]
    counters.clear()
    compiling.compile_blocks([nn.Identity(), *layers])
    compiled = [trained(layers, lengths, recompute=recompute) for recompute, lengths in cases]
    assert all(
        torch.equal(a, b) for one, other in zip(plain, compiled, strict=True) for a, b in zip(one, other, strict=True)
    )
    # The first block gets an input without a gradient; what is recomputed runs at first without a graph. Each of the
    # four forms is compiled for the first length, and then for every length.
    assert counters["frames"]["ok"] == counters["frames"]["total"] <= 4 * 2


def test_only_blocks_are_compiled() -> None:
    entry, block = nn.Linear(2, 2), Middle(Block(), {"x": "x_BTD"}, ("x_BTD",))
    compiling.compile_blocks([entry, block])
    assert entry._compiled_call_impl is None and block.block._compiled_call_impl is not None
