"""Models of transformers with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from models.foundation.checkpoints.configs import explained
from models.foundation.checkpoints.weights import check_shape


def loaded(stock_class: Any, folder: Path | None, source: Path, *, unused: Sequence[str] = (), **how: Any) -> nn.Module:
    """A model with its weights. transformers knows the names of older files, which tensors are tied, and what must stay
    in float32. It fills missing tensors with random numbers, so its report is checked.

    Args:
        folder: in which it finds its own files; None if `how` has the tensors.
        source: where the weights are from, for messages.
        unused: parts of the names of tensors that nothing is asked of, so that they may be missing.
        how: arguments of `from_pretrained`.

    Raises:
        UserError: a tensor is missing or has another shape, or no model can be made of them.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    how |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    with explained(source, stock_class.__name__):
        model, report = stock_class.from_pretrained(folder, **how)
    for name in sorted(report["missing_keys"]):
        if not any(part in name for part in unused):
            check_shape(name, None, (), source)
    for name, stored, asked in report["mismatched_keys"]:
        check_shape(name, stored, asked, source)
    return model
