"""Prompts that a run has not seen before are encoded beside what is trained, where there is room."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from models.assembly.drawings import PromptFeatures
from tests.utils.dataset.conftest import LengthEncoder
from utils.dataset.samples import Bucket, version_of_prompt

HERE = torch.device("meta")


class LargeEncoder(LengthEncoder):
    """One that has room on the processor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[torch.device] = []

    def load(self, device: torch.device) -> None:
        self.devices.append(device)
        super().load(device)

    def encode(self, *, caption: list[str]) -> dict[str, torch.Tensor]:
        if self.devices[-1] == HERE:
            raise torch.OutOfMemoryError("20 GiB are wanted")
        return super().encode(caption=caption)


def test_what_has_no_room_reads_on_the_processor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = LargeEncoder()
    features = PromptFeatures([encoder], tmp_path, HERE)
    star, circle = (version_of_prompt(text, Bucket(64, 64, 1)) for text in ("a star", "a circle"))
    with caplog.at_level(logging.INFO):
        features.encode([star, circle])
    assert encoder.devices == [HERE, torch.device("cpu")] and encoder.loads == encoder.unloads == 2
    assert [features.of(version)["length_B"].tolist() for version in (star, circle)] == [[6], [8]]
    assert "text has no room on the device, and reads prompts on the processor" in caplog.text
    features.encode([circle])
    assert encoder.loads == 2
