"""What is flattened, described and sent comes back as it was."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from utils.parallel import wire


class Stream(NamedTuple):
    hidden: torch.Tensor
    nothing: None
    tables: tuple[torch.Tensor, ...]
    empty: tuple
    length: torch.Tensor


def stream() -> Stream:
    return Stream(
        hidden=torch.ones(2, 3, requires_grad=True),
        nothing=None,
        tables=(torch.zeros(4, dtype=torch.complex64), torch.ones((), dtype=torch.bool)),
        empty=(),
        length=torch.empty(5, 7, 0),
    )


def test_a_stream_is_put_together_again() -> None:
    sent = stream()
    tensors, description = wire.flatten(sent)
    received = Stream(*wire.unflatten(tensors, wire.decode(wire.encode(description))))
    assert received.nothing is None and received.empty == ()
    assert received.hidden is sent.hidden and received.tables[1] is sent.tables[1]
    assert received.length.shape == (5, 7, 0)


def test_what_is_in_several_places_crosses_once() -> None:
    pushed, other = torch.ones(2, requires_grad=True), torch.zeros(3)
    tensors, description = wire.flatten((pushed, (other, pushed), other))
    assert [id(one) for one in tensors] == [id(pushed), id(other)]
    received = wire.unflatten(
        [torch.ones(2, requires_grad=True), torch.zeros(3)], wire.decode(wire.encode(description))
    )
    assert received[0] is received[1][1] and received[1][0] is received[2]
    # So do gradients: what comes back is that of all places.
    (received[0] * 2 + received[1][1] * 3).sum().backward()
    again, _ = wire.flatten(received)
    assert torch.equal(again[0].grad, torch.full((2,), 5.0)) and len(again) == len(tensors)


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_the_description_keeps_type_shape_and_need_of_a_gradient(dtype: torch.dtype) -> None:
    plain = torch.zeros(3, 1, dtype=dtype)
    tensors = (plain, torch.zeros(2, requires_grad=True))
    _, description = wire.flatten(tensors)
    first, second = wire.decode(wire.encode(description)).tensors
    assert first == wire.TensorDescription(dtype, (3, 1), False)
    assert second.requires_grad


def test_what_cannot_cross_is_refused() -> None:
    with pytest.raises(TypeError, match="field 1 .* int"):
        wire.flatten((torch.zeros(1), 3))
