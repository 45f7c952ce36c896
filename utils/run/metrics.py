"""Where numbers and pictures go: metrics.jsonl, TensorBoard and Weights & Biases, from the main rank."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from utils.settings.schema import MonitoringSettings

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One place that numbers and pictures are sent to."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...
    def picture(self, name: str, picture: Image.Image, step: int) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line: {"name", "value", "step", "time"}. Pictures lie in the run folder anyway."""

    def __init__(self, folder: Path):
        self.file = (folder / "metrics.jsonl").open("a", buffering=1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        now = time.time()
        for name, value in values.items():
            self.file.write(json.dumps({"name": name, "value": value, "step": step, "time": now}) + "\n")

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard_logs"))

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, folder: Path, settings: MonitoringSettings, resolved: dict[str, Any]):
        import wandb

        if settings.wandb_api_key:
            os.environ["WANDB_API_KEY"] = settings.wandb_api_key
        self.wandb = wandb
        self.run = wandb.init(
            project=settings.wandb_tracker_name or "penstock",
            name=settings.wandb_run_name or folder.name,
            dir=str(folder),
            config=resolved,
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Metrics:
    """All sinks of a run at once; none on ranks other than the main one."""

    def __init__(self, sinks: list[Sink]):
        self.sinks = sinks

    @classmethod
    def of_run(cls, folder: Path, settings: MonitoringSettings, resolved: dict[str, Any], is_main: bool) -> Metrics:
        if not is_main:
            return cls([])
        sinks: list[Sink] = [JsonLines(folder)]
        if settings.enable_tensorboard:
            sinks.append(TensorBoard(folder))
        if settings.enable_wandb:
            sinks.append(WeightsAndBiases(folder, settings, resolved))
        return cls(sinks)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for sink in self.sinks:
            sink.scalars(values, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        for sink in self.sinks:
            sink.picture(name, picture, step)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
