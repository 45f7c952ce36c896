"""The names of exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.run.export import export_name
from utils.run.progress import Progress
from utils.run.tensor_file import write_tensors


@pytest.mark.parametrize(
    ("there", "epoch_ended", "expected"),
    [
        ({}, False, "step40"),
        ({}, True, "epoch3"),
        # The same step, done again after a resume.
        ({"epoch3": 40, "epoch3_ema": 40}, True, "epoch3"),
        ({"epoch3/transformer": 20}, True, "epoch3_step40"),
        ({"epoch3": 40, "epoch3_ema": 20}, True, "epoch3_step40"),
        ({"epoch3": 20, "epoch3_step40": 40}, True, "epoch3_step40"),
        ({"epoch3": None}, True, "epoch3_step40"),
        ({"epoch30": 20, "step40": 20}, True, "epoch3"),
    ],
)
def test_an_export_takes_the_name_of_no_other(
    tmp_path: Path, there: dict[str, int | None], epoch_ended: bool, expected: str
) -> None:
    for name, step in there.items():
        (tmp_path / name).mkdir(parents=True)
        file = tmp_path / name / "adapter_model.safetensors"
        if step is None:
            file.write_bytes(b"damaged")
        else:
            write_tensors(file, {"weight": torch.zeros(1)}, {"step": str(step)})
    assert export_name(tmp_path, Progress(step=40, epoch=2), epoch_ended) == expected
