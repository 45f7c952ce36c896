"""Compiled blocks against plain ones; without code generation, which takes a compiler half a minute."""

from __future__ import annotations

import re
import threading
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from models.foundation.layers.chain import Middle
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.parallel import compiling
from utils.parallel.homes import BlockHomes
from utils.parallel.recompute import run_layer, run_recomputed
from utils.parallel.swap import BlockSwap
from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise

BLOCKS = 12


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


class Stream(NamedTuple):
    x_BTD: torch.Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def trained(
    layers: list[nn.Module],
    lengths: tuple[int, ...],
    *,
    recompute: bool,
    swap: BlockSwap | None = None,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """Outputs, and the gradients of all parameters."""
    found, swap = [], swap or BlockSwap()
    for length in lengths:
        stream = Stream(normal((2, length, 4), 0, "x").to(device))
        with swap.forward_pass():
            for position, layer in enumerate(layers):
                run = partial(run_recomputed, trains=True) if recompute else run_layer
                stream = swap.run(position, layer, partial(run, stream=stream), recomputed=recompute)
        stream.x_BTD.square().sum().backward()
        found.append(stream.x_BTD.detach())
    swap.settle()
    gradients = [p.grad.clone() for layer in layers for p in layer.parameters() if p.requires_grad]
    for layer in layers:
        layer.zero_grad()
    return [*found, *gradients]


def test_compiled_blocks_do_the_same_and_share_what_is_compiled() -> None:
    torch.manual_seed(0)
    layers = [Middle(Block(), {"x": "x_BTD"}, ("x_BTD",)) for _ in range(BLOCKS)]
    cases = [(recompute, (3, 5, 7)) for recompute in (False, True)]
    plain = [trained(layers, lengths, recompute=recompute) for recompute, lengths in cases]
    compiling.compile_blocks([nn.Identity(), *layers])
    compiled = [trained(layers, lengths, recompute=recompute) for recompute, lengths in cases]
    assert all(
        torch.equal(a, b) for one, other in zip(plain, compiled, strict=True) for a, b in zip(one, other, strict=True)
    )
    # The first block gets an input without a gradient; what is recomputed runs at first without a graph. Each of the
    # four forms is compiled for the first length, and then for every length.
    assert counters["frames"]["ok"] == counters["frames"]["total"] <= 4 * 2


@pytest.mark.parametrize(("kept", "recompute"), [("trained", False), ("float8", True), ("nf4", False), ("int4", False)])
def test_compiled_blocks_may_be_swapped_and_quantised(kept: str, recompute: bool) -> None:
    torch.manual_seed(0)
    layers = [Middle(Block(), {"x": "x_BTD"}, ("x_BTD",)) for _ in range(4)]
    for layer in layers if kept != "trained" else ():
        weight = layer.block.up.weight
        quantise(layer, ["block.up"], FORMATS[kept])
        layer.block.up.fill(weight)
        layer.block.up.bias.requires_grad_(False)
    lengths = (3, 5)
    plain = trained(layers, lengths, recompute=recompute)
    compiling.compile_blocks(layers)
    swap = BlockSwap(BlockHomes(layers, 3, trained=kept == "trained").filled())
    swap.start(torch.device("cpu"))
    compiled = trained(layers, lengths, recompute=recompute, swap=swap)
    assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0 and not counters["graph_break"]


def test_a_thread_compiles_as_many_forms() -> None:
    """The backward pass of a GPU runs in one of its own, with what is recomputed in it."""
    block = Block()
    compiling.compile_blocks([Middle(block, {"x": "x_BTD"}, ("x_BTD",))])

    def run() -> None:
        for number in range(12):
            # What a module says beside its tensors is part of a form.
            block.number = number
            block(torch.ones(1, 2, 4))

    block.forward = lambda x: x + block.number
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert counters["frames"]["ok"] == counters["frames"]["total"] == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own code, and blocks that are recomputed and swapped."""
    monkeypatch.setattr(compiling, "COMPILER", "inductor")
    torch.manual_seed(0)
    layers = [Middle(Block(), {"x": "x_BTD"}, ("x_BTD",)) for _ in range(4)]
    how = {"recompute": True, "device": "cuda"}
    for layer in layers:
        layer.block.up.requires_grad_(False)
    plain = trained([layer.cuda() for layer in layers], (3, 5), **how)
    compiling.compile_blocks(layers)
    swap = BlockSwap([layer.cpu() for layer in layers], 3, pinned=True)
    for layer in layers:
        layer.cuda()
    swap.start(torch.device("cuda", 0))
    compiled = trained(layers, (3, 5), **how, swap=swap)
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other)
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0 and not counters["graph_break"]


def test_only_blocks_are_compiled() -> None:
    entry, block = nn.Linear(2, 2), Middle(Block(), {"x": "x_BTD"}, ("x_BTD",))
    compiling.compile_blocks([entry, block])
    assert entry._compiled_call_impl is None and block.block._compiled_call_impl is not None


@pytest.mark.parametrize(("device", "variable", "usual"), [("cpu", "CXX", "g++"), ("cuda", "CC", "clang or gcc")])
def test_a_compiler_that_is_not_there_is_told_before_anything_is_loaded(
    device: str, variable: str, usual: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"key `compile`: needs a .* compiler, and there is no {re.escape(usual)}:"):
        compiling.check_compiler(device)
    own = tmp_path / "own"
    monkeypatch.setenv(variable, str(own))
    with pytest.raises(UserError, match=f"there is no {own}: .* variable {variable}"):
        compiling.check_compiler(device)
    own.write_text("")
    own.chmod(0o755)
    compiling.check_compiler(device)
