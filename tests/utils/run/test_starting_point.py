"""At which samples a run goes on: on the same layout, with another global batch, at the end of an epoch, from the
beginning of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.utils.dataset.conftest import plain_sample
from utils.dataset.epochs import Epochs
from utils.ranks import Ranks
from utils.run import saving
from utils.run.checkpoint import Checkpoint
from utils.run.progress import Progress

SAMPLES = [plain_sample(f"s{number}") for number in range(12)]


def epochs_of(per_step: int, micro_batch: int = 1) -> Epochs:
    return Epochs(SAMPLES, lambda bucket: micro_batch, 1, per_step, seed=0)


def saved(folder: Path, progress: Progress, epochs: Epochs, **changes: Any) -> Checkpoint:
    """A checkpoint as the trainer writes it."""
    made_with = {
        "identity": {},
        "optimizer": {},
        "steps_in_epoch": epochs.steps_in(progress.epoch),
        "order": epochs.state(progress.epoch, progress.step_in_epoch),
        **changes,
    }
    parameters = {"weight": torch.nn.Parameter(torch.ones(2))}
    return Checkpoint(
        saving.save(folder, Ranks(), progress, parameters, torch.optim.SGD(parameters.values()), made_with)
    )


def shown(epochs: Epochs, epoch: int, steps: range) -> list[str]:
    return [
        sample.id
        for step in steps
        for one in epochs.step(epoch, step)
        for sample, _ in epochs.samples_of(one, epoch)[: len(one.samples) - one.fill]
    ]


def test_on_the_same_layout_it_goes_on_in_its_order(tmp_path: Path) -> None:
    epochs = epochs_of(3)
    progress = Progress(step=6, epoch=1, step_in_epoch=2, epoch_loss_sum=3.0)
    begin = saved(tmp_path, progress, epochs).starting_point(epochs_of(3), restart_data=False)
    assert begin.progress == progress and begin.remark is None
    assert begin.epochs.first_step(1) == 4 and begin.epochs.steps_in(1) == 4
    assert shown(begin.epochs, 1, range(2, 4)) == shown(epochs, 1, range(2, 4))


def test_with_another_global_batch_the_epoch_goes_on_with_the_rest(tmp_path: Path) -> None:
    epochs = epochs_of(3)
    progress = Progress(step=6, epoch=1, step_in_epoch=2, epoch_loss_sum=3.0)
    checkpoint = saved(tmp_path, progress, epochs)
    for per_step, micro_batch, steps, said in (
        (2, 1, 3, "a step had 3 micro-batches and has 2: "),
        (4, 1, 2, "a step had 3 micro-batches and has 4: "),
        (3, 2, 1, "micro-batches have other sizes than before: "),
    ):
        begin = checkpoint.starting_point(epochs_of(per_step, micro_batch), restart_data=False)
        assert begin.progress == progress
        assert begin.remark == f"{said}the epoch goes on with the 6 samples that it has not had"
        assert begin.epochs.steps_in(1) == 2 + steps
        assert sorted(shown(begin.epochs, 1, range(2, 2 + steps))) == sorted(shown(epochs, 1, range(2, 4)))


def test_after_the_last_step_of_an_epoch_the_next_one_begins(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, Progress(step=8, epoch=1, step_in_epoch=4, epoch_loss_sum=3.0), epochs_of(3))
    for per_step in (3, 5):
        progress, epochs, _ = checkpoint.starting_point(epochs_of(per_step), restart_data=False)
        assert progress == Progress(step=8, epoch=2)
        assert epochs.first_step(2) == 8


def test_data_that_begin_anew_count_from_the_step_that_was_reached(tmp_path: Path) -> None:
    progress = Progress(step=6, epoch=1, step_in_epoch=2, epoch_loss_sum=3.0)
    begun, epochs, remark = saved(tmp_path, progress, epochs_of(3)).starting_point(epochs_of(4), restart_data=True)
    assert begun == Progress(step=6, epoch=1) and remark is None
    assert epochs.first_step(1) == 6 and sorted(shown(epochs, 1, range(3))) == sorted(one.id for one in SAMPLES)


def test_a_checkpoint_of_an_earlier_version_says_that_the_order_is_new(tmp_path: Path) -> None:
    progress = Progress(step=6, epoch=1, step_in_epoch=2, epoch_loss_sum=3.0)
    checkpoint = saved(tmp_path, progress, epochs_of(3), order=None)
    begun, epochs, remark = checkpoint.starting_point(epochs_of(3), restart_data=False)
    assert begun == progress and "of an earlier version" in remark
    assert len(shown(epochs, 1, range(2, epochs.steps_in(1)))) == 6
