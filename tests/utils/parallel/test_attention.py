"""When cuDNN's attention may be taken, and the layout in which gradients arrive. What its kernels do wrong needs a GPU;
`make gpu` shows it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.autograd.graph import Node

from tests.utils.parallel import toy_flux
from utils.errors import UserError
from utils.parallel import attention
from utils.parallel.attention import Library, check_kernels, check_library, give_gradients_one_layout, set_kernels
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


def test_a_librarys_kernels_see_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's slow kernels in the place of a library's."""
    library = Library("_native_math", "torch", "")
    monkeypatch.setitem(attention.LIBRARIES, "flash", library)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    set_kernels("flash")
    seen = []

    def layer(stream: Stream) -> Stream:
        seen.append(AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0]).value)
        return stream._replace(x_BTD=stream.x_BTD.sin())

    x_BTD = torch.ones(1, 2, 3, requires_grad=True)
    for mask_BT in (None, torch.ones(1, 2, dtype=torch.bool)):
        run_recomputed(layer, Stream(x_BTD, mask_BT), trains=False).x_BTD.sum().backward()
    assert seen == ["_native_math"] * 2 + ["native"] * 2


def test_kernels_that_cannot_be_had_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    flux, plain, dtype = toy_flux_denoiser(), nn.Linear(2, 2), torch.bfloat16
    for choice in ("auto", "sdpa"):
        check_kernels(choice, plain, "cpu", dtype)
    with pytest.raises(UserError, match="key `attention`.*torch's own"):
        check_kernels("flash", plain, "cuda", dtype)
    with pytest.raises(UserError, match="xformers. needs a GPU"):
        check_kernels("xformers", flux, "cpu", dtype)
    check_library("auto")
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs flash_attn, which is not installed: pip install flash-attn"):
        check_library("flash")
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    check_library("flash")
    with pytest.raises(UserError, match="flash3. computes in 16 bits alone"):
        check_kernels("flash3", flux, "cuda", torch.float32)
    check_kernels("xformers", flux, "cuda", torch.float32)
    check_kernels("flash", flux, "cuda", dtype)


def toy_flux_denoiser() -> nn.Module:
    with torch.device("meta"):
        return FluxTransformer2DModel(**toy_flux.CONFIG)


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
