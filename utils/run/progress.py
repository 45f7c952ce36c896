"""The progress of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

COUNT = Annotated[int, 0]
KINDS = {"step": COUNT, "epoch": COUNT, "step_in_epoch": COUNT, "examples": COUNT, "epoch_loss_sum": float}
"""The types of its values in a file; a count is at least 0."""
LOSSES = "epoch_losses"
"""The count that files of earlier versions lack: there every step of the epoch has a loss."""


@dataclass(frozen=True)
class Progress:
    """How far training has come. The next step is step `step_in_epoch` of epoch `epoch`, both counted from 0.

    Attributes:
        step: optimizer steps taken.
        examples: samples seen, over all data ranks.
        epoch_loss_sum: sum of the losses of this epoch's steps, for their mean.
        epoch_losses: how many these are; a step that is left out has none.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    examples: int = 0
    epoch_loss_sum: float = 0.0
    epoch_losses: int = 0

    @classmethod
    def of_file(cls, values: Mapping[str, Any]) -> Progress:
        """That which `as_dict` gave, also of an earlier version."""
        known = {LOSSES: values["step_in_epoch"], **values}
        return cls(**{field.name: known[field.name] for field in fields(cls)})

    def after_step(self, loss: float | None, examples: int) -> Progress:
        """One step further in the same epoch; without a loss, if the step was left out."""
        return replace(
            self,
            step=self.step + 1,
            step_in_epoch=self.step_in_epoch + 1,
            examples=self.examples + examples,
            epoch_loss_sum=self.epoch_loss_sum + (loss or 0.0),
            epoch_losses=self.epoch_losses + (loss is not None),
        )

    def next_epoch(self) -> Progress:
        """The beginning of the following epoch."""
        return replace(self, epoch=self.epoch + 1, step_in_epoch=0, epoch_loss_sum=0.0, epoch_losses=0)

    @property
    def epoch_loss(self) -> float:
        """Mean loss of this epoch's steps so far; 0 if none has one."""
        return self.epoch_loss_sum / max(self.epoch_losses, 1)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
