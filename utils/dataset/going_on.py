"""Where the data of a run go on after a stop, when the layout or the data may be others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from utils.dataset.epochs import Continued, Epochs

COUNT = Annotated[int, 0]
TAKEN = dict[str, COUNT]
ORDER_KINDS = {
    "micro_batches_per_step": Annotated[int, 1],
    "shapes": dict[str, tuple[COUNT, Annotated[int, 1]]],
    "taken": TAKEN,
    "continued": dict | None,
}
CONTINUED_KINDS = {"epoch": COUNT, "begins": COUNT, "steps": COUNT, "taken": TAKEN}
"""The types of the values of `Epochs.state` and of its `continued`."""
OF_AN_EARLIER_VERSION = (
    "the checkpoint is of an earlier version, whose steps were made otherwise where there are several data ranks or "
    "micro-batches: the epoch goes on at its share, and some of its samples may come twice and others not at all"
)


def going_on(
    epochs: Epochs, epoch: int, step: int, *, step_in_epoch: int, share: float, order: Mapping[str, Any] | None
) -> tuple[Epochs, str | None]:
    """The epochs of a run that goes on in the midst of one, and what is to be told of it.

    With the order that the run had it goes on in it. With another global batch, or other micro-batches, the epoch goes
    on with the samples that it has not had. With other data, the same share of each size counts as done.

    Args:
        step: of the run, of which `step_in_epoch` are of this epoch.
        share: of the epoch that is done.
        order: `Epochs.state` at that step; None if an earlier version did not note it.
    """
    here = epochs.layout(epoch)
    if order is not None and all(order[key] == value for key, value in here.items()):
        continued = order["continued"]
        return epochs.continuing(continued and Continued(**continued)), None
    sizes = {name: size for name, (size, _) in here["shapes"].items()}
    remark = OF_AN_EARLIER_VERSION if order is None and step_in_epoch else None
    taken = {name: round(share * size) for name, size in sizes.items()}
    if order is not None and sizes == {name: size for name, (size, _) in order["shapes"].items()}:
        taken = order["taken"]
        remark = _of_another_batch(here, order, sum(sizes.values()) - sum(taken.values()))
    return epochs.continuing(Continued(epoch, step - step_in_epoch, step_in_epoch, taken)), remark


def _of_another_batch(here: Mapping[str, Any], order: Mapping[str, Any], left: int) -> str:
    key = "micro_batches_per_step"
    change = f"a step had {order[key]} micro-batches and has {here[key]}"
    if here[key] == order[key]:
        change = "micro-batches have other sizes than before"
    return f"{change}: the epoch goes on with the {left} samples that it has not had"
