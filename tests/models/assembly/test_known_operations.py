"""Operations on the meta device make the same where they are known already, and torch is not asked again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import group_norm
from torch.utils._python_dispatch import TorchDispatchMode

from models.assembly.known_operations import Form, KnownOperations
from models.assembly.live_bytes import LiveBytes


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


COMPUTED: dict[str, Callable[[], Any]] = {
    "normalised": lambda: group_norm(meta(2, 8, 4, 4), 4),
    "last channels first": lambda: torch.conv2d(
        meta(2, 8, 4, 4).to(memory_format=torch.channels_last), meta(3, 8, 1, 1)
    ),
    "transposed": lambda: meta(4, 6).t() + meta(6, 4),
    "a whole number": lambda: meta(2, dtype=torch.int64) * 2,
    "a fraction": lambda: meta(2, dtype=torch.int64) * 2.0,
    "yes": lambda: meta(2, dtype=torch.bool) + True,
    "one": lambda: meta(2, dtype=torch.bool) + 1,
    "other types": lambda: meta(2, dtype=torch.bfloat16) + meta(2),
    "of the host": lambda: meta(2, dtype=torch.bfloat16) + torch.ones(()),
    "several": lambda: meta(4, 6).sort(),
    "parts": lambda: meta(4, 6).split(2),
    "joined": lambda: torch.cat([meta(4, 6), meta(2, 6)]),
    "complex": lambda: torch.view_as_complex(meta(4, 2)).conj() * meta(4),
    "unchanged": lambda: meta(3).to(torch.float32),
    "without arguments": lambda: torch.ones(3, device="meta"),
}


class Asked(TorchDispatchMode):
    """Notes what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.operations.append(operation)
        return operation(*args, **(kwargs or {}))


def forms(made: Any) -> list[tuple[Form, int]]:
    made = [made] if isinstance(made, torch.Tensor) else made
    return [(Form.of(tensor), tensor.untyped_storage().nbytes()) for tensor in made]


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_known_has_the_form_of_what_is_computed(name: str) -> None:
    expected = forms(COMPUTED[name]())
    for _ in range(2):
        with KnownOperations():
            made = COMPUTED[name]()
        assert forms(made) == expected


def test_views_and_changes_in_place_stay_those_of_their_tensor() -> None:
    for _ in range(2):
        with KnownOperations():
            whole = meta(4, 6)
            assert whole[1:].untyped_storage()._cdata == whole.untyped_storage()._cdata
            assert whole.add_(1.0) is whole and whole.mul_(meta(6)) is whole
            with pytest.raises(RuntimeError, match="shape"):
                whole.add_(meta(5, 4, 6))
            with pytest.raises(RuntimeError):
                whole @ meta(5, 4)
            assert torch.add(whole, 1, out=meta(4, 6)).shape == whole.shape
            whole.resize_(2, 3)
            assert whole.shape == (2, 3) and whole.untyped_storage().nbytes() == 4 * 4 * 6


def test_a_known_operation_takes_its_bytes_and_asks_torch_for_nothing() -> None:
    pixels = meta(2, 16, 8, 8)
    for _ in range(2):
        with KnownOperations(), LiveBytes() as counted:
            normalised = group_norm(pixels, 16)
            assert counted.live >= normalised.nbytes == pixels.nbytes
    with Asked() as asked:
        group_norm(pixels, 16)
        with KnownOperations():
            group_norm(pixels, 16)
    assert asked.operations.count(torch.ops.aten.native_group_norm.default) == 1


def test_gradients_pass_through() -> None:
    left, right = meta(4, 6).requires_grad_(), meta(6, 4)
    for _ in range(2):
        with KnownOperations():
            (gradient,) = torch.autograd.grad((left @ right).square().sum(), left)
        assert gradient.shape == left.shape


def test_gradients_that_nobody_asks_for_stay_out() -> None:
    """The backward pass of a normalisation makes three of them, or fewer."""
    pixels, weight = meta(2, 16, 8, 8).requires_grad_(), meta(16).requires_grad_()
    for wanted in ([pixels], [weight], [pixels, weight]):
        for _ in range(2):
            with KnownOperations():
                made = torch.autograd.grad(group_norm(pixels, 16, weight).sum(), wanted)
            assert [one.shape for one in made] == [one.shape for one in wanted]
