"""Files of tensors: read by the stock library, and the same bytes for the same content."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.run.checksums import damage_of
from utils.run.tensor_file import NAMES, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    made = {
        f"of {name}": torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
        for dtype, name in NAMES.items()
    }
    shared = torch.arange(6.0)
    return {
        **made,
        "number": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "shared": shared,
        "shared too": shared[2:],
        "größe": torch.ones(1),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sums = write_tensors(path, tensors(), {"text": 'a "word"\n', "format": "pt"})
    assert damage_of(path, sums) is None
    read = load_file(path)
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert (
            torch.equal(read[name].contiguous().view(torch.uint8), tensor.detach().contiguous().view(torch.uint8))
            if (tensor.ndim)
            else torch.equal(read[name], tensor)
        )
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"text": 'a "word"\n', "format": "pt"}


def test_equal_content_is_equal_bytes_in_any_order(tmp_path: Path) -> None:
    metadata = {f"key {number}": str(number) for number in range(20)}
    files = [tmp_path / "a", tmp_path / "b"]
    write_tensors(files[0], tensors(), metadata)
    write_tensors(files[1], dict(reversed(tensors().items())), dict(reversed(metadata.items())))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_numbers_lie_where_processors_want_them(tmp_path: Path) -> None:
    """At multiples of their size, as in the library's own files."""
    path = tmp_path / "a.safetensors"
    given = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(1, dtype=torch.int64)}
    write_tensors(path, given)
    for name, tensor in load_file(path).items():
        assert tensor.data_ptr() % tensor.element_size() == 0, name
    same = {"x": torch.ones(3), "y": torch.ones(2)}
    write_tensors(path, same, {"format": "pt"})
    save_file(same, tmp_path / "stock.safetensors", {"format": "pt"})
    assert path.read_bytes() == (tmp_path / "stock.safetensors").read_bytes()


def test_an_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere") as raised:
        write_tensors(tmp_path / "nowhere" / "a", {"x": torch.ones(1)})
    assert str(raised.value.filename) == str(tmp_path / "nowhere" / "a")
