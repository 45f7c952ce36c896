"""Writes safetensors files that are on disk when the call returns and that have the permissions of the umask."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file. After `save_file` alone, only the owner could read it; and it refuses tensors that share memory,
    as those of bitsandbytes do on a CPU."""
    addresses = Counter(tensor.data_ptr() for tensor in tensors.values())
    alone = {name: t.clone() if addresses[t.data_ptr()] > 1 else t for name, t in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(alone, path, metadata and dict(metadata))
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
