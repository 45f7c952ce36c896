"""What processors of attention that call the stock one have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch


class AroundStock:
    """A processor of attention around the stock one, with the attributes that diffusers asks every processor for.

    Args:
        stock: the stock processor.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, stock: Callable[..., torch.Tensor]):
        self.stock = stock
