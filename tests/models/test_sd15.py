"""What is told of Stable Diffusion 1.5 alone; its training and its files are tested beside SDXL's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny_sd15
from utils.errors import UserError


def test_more_layers_are_not_skipped_than_there_are(tmp_path: Path) -> None:
    folder = tiny_sd15.write_folder(tmp_path)
    layers = tiny_sd15.pipeline(folder).encoders()[1].config().num_hidden_layers
    tiny_sd15.pipeline(folder, clip_skip=layers).check()
    with pytest.raises(UserError, match=f"clip_skip: {layers + 1} is more than the text encoder's {layers} layers"):
        tiny_sd15.pipeline(folder, clip_skip=layers + 1).check()
