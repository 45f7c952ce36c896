"""The memory of a device: amounts of it as text, and which errors say that there is none left."""

import re

import torch

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
LEAST = 0.1
"""Of a unit, what is told in it: two digits of it are shown."""
SAYS_SO = re.compile(r"CUDA.*out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE)
"""What CUDA and its libraries say that ask for memory beside torch's allocator."""


def size_text(count: float) -> str:
    """So many bytes, in the largest unit of which they are a tenth: "1.50 GiB", "4.00 MiB", "12 bytes"."""
    for name, unit in UNITS.items():
        if count >= LEAST * unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(SAYS_SO.search(str(error)))
