"""One switch for all threads: text encoders that are used meanwhile never see what layers of the denoiser turn on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.utils.dataset.conftest import LengthEncoder, plain_sample
from utils import attention_switch
from utils.dataset.batches import SampleReader
from utils.dataset.samples import Bucket, evaluation_version


class Noting(LengthEncoder):
    """Notes whether cuDNN's attention is allowed while it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def encode(self, *, caption: list[str]) -> Any:
        for _ in range(4):
            self.allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
            time.sleep(0.001)
        return super().encode(caption=caption)


def test_live_encoders_and_layers_take_turns(tmp_path: Path) -> None:
    attention_switch.turn_off()
    noting, in_layers = Noting(), []
    version = evaluation_version(plain_sample("a", Bucket(64, 64, 1)))
    with SampleReader([noting], tmp_path, [noting]) as live, ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(live.batch, [version]) for _ in range(8)]
        while not all(one.done() for one in reading):
            with attention_switch.turned_on():
                in_layers.append(torch.backends.cuda.cudnn_sdp_enabled())
                time.sleep(0.001)
                in_layers.append(torch.backends.cuda.cudnn_sdp_enabled())
        assert all(len(one.result().features["length_B"]) == 1 for one in reading)
    assert len(noting.allowed) == 32 and not any(noting.allowed)
    assert in_layers and all(in_layers) and not torch.backends.cuda.cudnn_sdp_enabled()
