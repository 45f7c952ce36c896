"""First values: real tensors get them as ever, those without memory cost nothing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode

from utils.first_values import DRAWN, none_without_memory


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_values_are_drawn_where_there_is_memory_alone() -> None:
    before = {name: getattr(init, name) for name in DRAWN}
    assert {"kaiming_uniform_", "zeros_", "ones_", "normal_"} <= before.keys()
    torch.manual_seed(0)
    expected = nn.Linear(3, 4)
    with none_without_memory(), Operations() as operations:
        torch.manual_seed(0)
        made = nn.Linear(3, 4)
        drawn = len(operations.names)
        empty = nn.Linear(3, 4, device="meta")
        assert init.normal_(tensor=empty.weight, std=0.1) is empty.weight
    assert torch.equal(made.weight, expected.weight) and torch.equal(made.bias, expected.bias)
    assert any("uniform" in name for name in operations.names[:drawn])
    assert all("empty" in name or "detach" in name for name in operations.names[drawn:]), operations.names[drawn:]
    assert empty.weight.is_meta
    assert {name: getattr(init, name) for name in DRAWN} == before
