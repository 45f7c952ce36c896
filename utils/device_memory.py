"""The memory of a device: amounts of it as text, and which errors say that there is none left."""

import re

import torch

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
LEAST = 0.1
"""Of a unit, what is told in it: two digits of it are shown."""
OF_LIBRARIES = re.compile("(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")
"""What libraries say that ask for memory beside torch's allocator."""
OF_CUDA = re.compile("CUDA.*out of memory", re.IGNORECASE)
"""What CUDA says, also of the machine's memory, which it locks for copies."""


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
    return isinstance(error, RuntimeError) and any(one.search(str(error)) for one in (OF_LIBRARIES, OF_CUDA))


def lacking(error: BaseException) -> str:
    """Which memory an error means, as far as it says."""
    if isinstance(error, torch.OutOfMemoryError) or OF_LIBRARIES.search(str(error)):
        return "the GPU's memory"
    return "the GPU's memory, or what of the machine's can be locked for copies,"
