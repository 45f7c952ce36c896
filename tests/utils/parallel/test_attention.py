"""When cuDNN's attention may be taken, and the layout in which gradients arrive. What its kernels do wrong needs a GPU;
`make gpu` shows it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import Node

from utils.parallel.attention import give_gradients_one_layout, set_kernels
from utils.parallel.recompute import run_layer, run_recomputed


class Stream(NamedTuple):
    x_BTD: torch.Tensor
    mask_BT: torch.Tensor | None


class Watching(nn.Module):
    """A layer that notes whether cuDNN's kernels are allowed while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def forward(self, stream: Stream) -> Stream:
        self.allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return stream._replace(x_BTD=stream.x_BTD.sin())


def test_cudnn_is_allowed_in_layers_that_see_no_mask_and_nowhere_else() -> None:
    set_kernels()
    layer, x_BTD = Watching(), torch.ones(1, 2, 3, requires_grad=True)
    for run in (run_layer, partial(run_recomputed, trains=False)):
        for mask_BT in (None, torch.ones(1, 2, dtype=torch.bool)):
            layer.allowed.clear()
            stream = run(layer, Stream(x_BTD, mask_BT))
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            stream.x_BTD.sum().backward()
            assert layer.allowed == [mask_BT is None] * (1 if run is run_layer else 2)
            assert not torch.backends.cuda.cudnn_sdp_enabled()


class Attention(nn.Module):
    """An attention module whose output comes in another layout than its gradient."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.processor, self.outputs = None, outputs
        self.seen: list[bool] = []

    def forward(self, x_BTD: torch.Tensor) -> Any:
        parts = tuple(x_BTD * (1 + index) for index in range(self.outputs))
        for part in parts:
            part.register_hook(lambda gradient: self.seen.append(gradient.is_contiguous()))
        return parts if self.outputs > 1 else parts[0]


def test_gradients_arrive_contiguous_at_attention_modules() -> None:
    for outputs in (1, 2):
        gradients = []
        for corrected in (False, True):
            attention = Attention(outputs)
            if corrected:
                give_gradients_one_layout(nn.Sequential(attention))
            x_BTD = torch.ones(2, 3, 4, requires_grad=True)
            output = attention(x_BTD)
            parts = output if isinstance(output, tuple) else (output,)
            # As in Flux's single blocks: the gradient of a concatenation's part is a slice.
            torch.cat([*parts, torch.ones(2, 3, 5)], dim=2).square().sum().backward()
            assert attention.seen == [corrected] * outputs
            gradients.append(x_BTD.grad)
        assert torch.equal(*gradients)


def test_nothing_is_added_to_a_graph_without_attention() -> None:
    linear = nn.Linear(2, 2)
    give_gradients_one_layout(linear)
    output = linear(torch.ones(1, 2))
    assert isinstance(output.grad_fn, Node) and output.grad_fn.name() == "AddmmBackward0"
