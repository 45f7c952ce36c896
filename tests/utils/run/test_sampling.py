"""Samples on disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.run.sampling import _write


def test_a_clip_is_written_with_its_middle_frame(tmp_path: Path) -> None:
    pixels_CFHW = torch.stack([torch.full((3, 16, 16), level) for level in (-1.0, 1.0, -1.0)], dim=1)
    _write(pixels_CFHW, 8.0, tmp_path / "a.png")
    assert (tmp_path / "a.mp4").exists()
    assert Image.open(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)


def test_without_pyav_the_middle_frame_is_written_and_the_clip_is_missed_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    _write(torch.zeros(3, 3, 16, 16), 8.0, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert "PyAV" in caplog.text
