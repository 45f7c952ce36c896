"""Which kernels of attention are allowed where a mask is given."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Masks(TorchFunctionMode):
    """Notes whether cuDNN's kernels are allowed whenever attention is computed with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: set[bool] = set()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None:
                self.allowed.add(torch.backends.cuda.cudnn_sdp_enabled())
        return function(*args, **kwargs)
