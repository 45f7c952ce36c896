"""The card, the libraries, and the rates that other figures are compared with."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from tests.benchmarks.gpu.timing import GIB, median_seconds

LIBRARIES = ("deepspeed", "diffusers", "transformers", "peft", "bitsandbytes")
MATRIX = 8192


def measure() -> Iterator[tuple[str, str]]:
    card = torch.cuda.get_device_properties(0)
    yield "card", f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
    cudnn = torch.backends.cudnn.version()
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, Python {platform.python_version()}"
    yield "libraries", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    yield "bfloat16 matrix product of 8192", f"{matrix_rate() / 1e12:.0f} TFLOP/s"
    yield "copy on the card", f"{2 * GIB / _copy_seconds('cuda', 'cuda') / 1e9:.0f} GB/s read and written"
    yield "copy from pinned memory", f"{GIB / _copy_seconds('cpu', 'cuda') / 1e9:.1f} GB/s"
    yield "copy to pinned memory", f"{GIB / _copy_seconds('cuda', 'cpu') / 1e9:.1f} GB/s"


def matrix_rate() -> float:
    """Floating-point operations per second of a large bfloat16 product of random matrices."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / median_seconds(lambda: a @ b, runs=10)


def _copy_seconds(source: str, target: str) -> float:
    def place(device: str) -> torch.Tensor:
        return torch.empty(GIB, dtype=torch.uint8, device=device, pin_memory=device == "cpu")

    one, other = place(source), place(target)
    return median_seconds(lambda: other.copy_(one, non_blocking=True), runs=5)
