"""The numbers of a run, read from its metrics.jsonl."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from pathlib import Path

from utils.json_files import is_of, parsed_json
from utils.run.evaluated import ERROR
from utils.run.folder import METRICS

TRAIN = "train"
DECILES = "train_deciles/loss_"
"""The losses of a step's samples by their noise level; see `utils/parallel/deciles.py`."""
BLOCK_GRADIENT, BLOCK_WEIGHT = "block_grad_norm/", "block_weight_norm/"
"""What the names of norms by block begin with; a block follows."""
LOSS = re.compile(r"(?P<set>.+)/(?P<prefix>ema_)?loss")
QUANTILE = "_quantile_"
SURE = 1.96
"""So many standard errors to both sides hold the true value in 95 of 100 cases."""


class Numbers:
    """All numbers of a run by name. Reading again reads what has come since.

    Attributes:
        unreadable: lines that are no numbers, such as one that a kill has cut.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS
        self._forget(None)

    def _forget(self, identity: int | None) -> None:
        self._identity, self._offset, self.unreadable = identity, 0, 0
        # Arrays, since a long run has millions.
        self._series: dict[str, tuple[array, array]] = {}
        self.began = self.ended = 0.0

    def read(self) -> None:
        """Reads what is new; all, if the file is another one.

        Raises:
            OSError: the file cannot be read.
        """
        if not self.path.exists():
            self._forget(None)
            return
        with self.path.open("rb") as file:
            file.seek(0, 2)
            found = self.path.stat().st_ino
            if found != self._identity or file.tell() < self._offset:
                self._forget(found)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            found = parsed_json(line)
            name, value, step, when = found["name"], float(found["value"]), float(found["step"]), float(found["time"])
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1
            return
        if not is_of(name, str):
            self.unreadable += 1
            return
        steps, values = self._series.setdefault(name, (array("d"), array("d")))
        steps.append(step)
        values.append(value)
        self.began, self.ended = self.began or when, when

    @property
    def names(self) -> list[str]:
        return list(self._series)

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) by step. Of a step that was measured twice the later one counts."""
        steps, values = self._series.get(name, ((), ()))
        return sorted(dict(zip(steps, values, strict=True)).items())

    def last(self, name: str) -> float | None:
        points = self.points(name)
        return points[-1][1] if points else None

    def evaluations(self) -> list[str]:
        """The names of the losses that evaluations have measured, of weights and of averages."""
        return [name for name in self._series if (found := LOSS.fullmatch(name)) and found["set"] != TRAIN]

    def quantiles(self, loss: str) -> list[tuple[str, dict[float, float]]]:
        """("0.10", step -> loss there) of an evaluation's loss, by quantile."""
        begin = f"{loss}{QUANTILE}"
        return [
            (name.removeprefix(begin), dict(self.points(name)))
            for name in sorted(self._series)
            if name.startswith(begin)
        ]

    def deciles(self) -> list[tuple[str, list[tuple[float, float]]]]:
        """("0.05", (step, loss)) of training, by noise level."""
        return [
            (name.removeprefix(DECILES), self.points(name)) for name in sorted(self._series) if name.startswith(DECILES)
        ]

    def band(self, loss: str) -> Sequence[tuple[float, float, float]]:
        """(step, low, high) between which an evaluation's loss is in 95 of 100 cases; nothing if that is unknown."""
        errors = dict(self.points(f"{loss}{ERROR}"))
        return [
            (step, value - SURE * errors[step], value + SURE * errors[step])
            for step, value in self.points(loss)
            if step in errors
        ]
