"""Layers that are run again in the backward pass: what they keep, what they give, which gradients come."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from utils.diffusion.seeds import normal
from utils.parallel.offload import HostInputs
from utils.parallel.recompute import run_layer, run_recomputed


class Stream(NamedTuple):
    x_BD: torch.Tensor
    shared_BD: torch.Tensor
    counts_B: torch.Tensor
    skips: tuple[torch.Tensor, ...] = ()
    mask_BT: torch.Tensor | None = None


class Layer(nn.Module):
    """Makes a new x and new counts, passes on what is shared, and pushes a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, stream: Stream) -> Stream:
        self.runs += 1
        x_BD = torch.tanh(self.linear(stream.x_BD)) * stream.shared_BD
        return stream._replace(x_BD=x_BD, counts_B=stream.counts_B + 1, skips=(*stream.skips, x_BD.sin()))


def stream_of(*, wants: bool) -> Stream:
    x_BD, shared_BD = (normal((3, 4), 0, name).requires_grad_(wants) for name in ("x", "shared"))
    return Stream(x_BD, shared_BD, torch.zeros(3, dtype=torch.int64))


def gradients(layers: list[Layer], stream: Stream, run: object) -> list[torch.Tensor]:
    """Of the input and of all parameters, for a loss of all that comes out."""
    first = stream
    for layer in layers:
        stream = run(layer, stream)
    (stream.x_BD.sum() + sum(skip.square().sum() for skip in stream.skips)).backward()
    found = [field.grad for field in (first.x_BD, first.shared_BD)]
    found += [parameter.grad for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    return found


@pytest.mark.parametrize("host", [None, HostInputs(smallest=1)], ids=["on the device", "on the host"])
@pytest.mark.parametrize("wants", [False, True])
def test_gradients_are_the_same(host: HostInputs | None, wants: bool) -> None:
    torch.manual_seed(0)
    layers = [Layer() for _ in range(3)]
    expected = gradients(layers, stream_of(wants=wants), run_layer)
    if host:
        host.begin()

    def again(layer: Layer, stream: Stream) -> Stream:
        return run_recomputed(layer, stream, trains=True, host=host)

    found = gradients(layers, stream_of(wants=wants), again)
    assert [layer.runs for layer in layers] == [3, 3, 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None) == (ours is None and not wants)
        assert ours is None or torch.allclose(ours, theirs, atol=1e-6)


def test_what_is_passed_on_stays_and_integers_want_no_gradient() -> None:
    given = stream_of(wants=True)
    made = run_recomputed(Layer(), given, trains=True)
    assert isinstance(made, Stream) and made.shared_BD is given.shared_BD and made.mask_BT is None
    assert made.counts_B.tolist() == [1, 1, 1] and not made.counts_B.requires_grad
    assert made.x_BD.requires_grad and made.skips[0].requires_grad


def test_where_nothing_wants_a_gradient_nothing_is_kept() -> None:
    layer = Layer().requires_grad_(False)
    made = run_recomputed(layer, stream_of(wants=False), trains=False)
    assert layer.runs == 1 and made.x_BD.grad_fn is None


def test_random_numbers_are_the_same_in_both_runs() -> None:
    class Dropping(Layer):
        def forward(self, stream: Stream) -> Stream:
            return super().forward(stream._replace(x_BD=nn.functional.dropout(stream.x_BD, 0.5)))

    torch.manual_seed(0)
    layer, found = Dropping(), []
    for run in (run_layer, lambda *call, seed: run_recomputed(*call, trains=True, seed=seed)):
        found.append(
            gradients([layer], stream_of(wants=True), lambda layer, stream, run=run: run(layer, stream, seed=7))
        )
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert (found[0][0] == 0).any(), "some of the input is dropped"
