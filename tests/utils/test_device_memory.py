"""Amounts of memory as text, and errors of a device that has none left."""

from __future__ import annotations

import pytest
import torch

from utils.device_memory import lacking, lacks_memory, size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1.5 * 2**30, "1.50 GiB"),
        (2**30 / 8, "0.12 GiB"),
        (2**30 / 16, "64.00 MiB"),
        (3000, "2.93 KiB"),
        (12, "12 bytes"),
        (0, "0 bytes"),
    ],
)
def test_an_amount_has_the_unit_that_shows_it(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("error", "lacks", "certain"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, False),
        # Of the machine's memory, for which nothing here helps.
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False, False),
        (MemoryError(), False, False),
        (ValueError("CUDA out of memory"), False, False),
    ],
)
def test_what_finds_no_memory_is_told_from_other_errors(error: Exception, lacks: bool, certain: bool) -> None:
    assert lacks_memory(error) is lacks
    assert (lacking(error) == "the GPU's memory") is certain
