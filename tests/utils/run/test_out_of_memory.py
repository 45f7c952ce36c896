"""What is told when the GPU's memory does not suffice."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train as train_py
from models.assembly import trainer
from models.assembly.stage import StagedModel
from models.base import BasePipeline
from tests.runs import launch, metrics, only_run
from utils.errors import UserError
from utils.ranks import Ranks, disconnect
from utils.run.attempts import Attempt, Failed
from utils.run.checkpoint import Checkpoint
from utils.run.signals import StopRequests
from utils.settings.schema import Settings

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB of which 1 GiB is free."


class Memory:
    """Of which there is none any more after so many passes through a layer.

    Args:
        training: which passes count: those of training, or those of evaluation and sampling.

    Attributes:
        held: the trained weights at that time.
    """

    def __init__(self, passes: int, *, training: bool = True):
        self.passes, self.training, self.held = passes, training, {}

    def put_on(self, staged: StagedModel, stage: int = 0) -> StagedModel:
        self._trained = staged.trained(staged.layers)
        staged.stage_layers(stage)[-1].register_forward_pre_hook(self.ask)
        return staged

    def ask(self, *_: object) -> None:
        if torch.is_grad_enabled() != self.training:
            return
        self.passes -= 1
        if self.passes < 0:
            self.held = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
            raise torch.OutOfMemoryError(SAID)


def told_without_memory(config: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> str:
    load_stage = trainer.load_stage
    monkeypatch.setattr(trainer, "load_stage", lambda *arguments, **keys: memory.put_on(load_stage(*arguments, **keys)))
    return told_of(config)


def told_of(config: Path) -> str:
    """The mistake of the user's with which a run ends."""
    try:
        with pytest.raises(UserError) as error:
            train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()
    return str(error.value)


def test_a_step_that_finds_no_memory_ends_with_advice(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers ask for memory that is not there, as CUDA's allocator says it."""
    config = write_config(sampling=None)
    told = told_without_memory(config, Memory(0), monkeypatch)
    assert "step 1: the GPU's memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB)" in told
    assert "activation_checkpointing = true" in told and "blocks_to_swap" in told and "Traceback" not in told
    assert "What was saved before stays" in told and not list(only_run(config).glob("global_step*"))


def test_the_pass_of_a_teacher_is_part_of_a_step(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(sampling=None, checkpoint_every_n_steps=None, model__folded_guidance=2.0)
    told = told_without_memory(config, Memory(2, training=False), monkeypatch)
    assert "step 2: the GPU's memory does not suffice" in told and "What the steps before it made is saved" in told


def test_what_fails_leaves_nothing_in_memory() -> None:
    """Training goes on at once, and needs the memory: it cannot wait for Python's collector."""
    made: list[weakref.ref] = []

    def full(attempted: int) -> None:
        try:
            activations = torch.zeros(2)
            made.append(weakref.ref(activations))
            raise torch.OutOfMemoryError(SAID)
        except torch.OutOfMemoryError as error:
            other = torch.zeros(attempted)
            made.append(weakref.ref(other))
            raise ValueError("no room") from error

    def evaluate() -> None:
        attempt = Attempt("evaluation 1", Ranks())
        attempt.in_pipeline(full, 3)
        attempt.meet()

    gc.disable()
    try:
        with pytest.raises(Failed, match="no room"):
            evaluate()
        assert [one() for one in made] == [None, None]
    finally:
        gc.enable()


def test_what_is_built_before_the_first_step_is_told_too(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the weights of a stage come to the GPU, of which a library says so."""

    def load_stage(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(trainer, "load_stage", load_stage)
    config = write_config(cache_text_embeddings=False)
    told = told_of(config)
    assert "before the first step: the GPU's memory does not suffice (CUDA error: CUBLAS_STATUS" in told
    # Of the blocks, of which there are no weights yet.
    assert "- cache_text_embeddings = true" in told and "- blocks_to_swap = 3" in told


def test_the_steps_before_are_saved(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of two micro-batches: gradients of the first are there, and go. The blocks are swapped."""
    keys = {"adapter": None, "optimizer": {"type": "adamw", "lr": 1e-3}, "blocks_to_swap": 3}
    config = write_config(sampling=None, checkpoint_every_n_steps=None, **keys)
    memory = Memory(2 * 2 + 1)
    told = told_without_memory(config, memory, monkeypatch)
    assert "step 3:" in told and "What the steps before it made is saved" in told
    saved = Checkpoint(only_run(config) / "global_step2")
    kept = {name: torch.zeros_like(parameter) for name, parameter in memory.held.items()}
    saved.load_weights(kept)
    assert kept and all(torch.equal(kept[name], value) for name, value in memory.held.items())


def without_memory(rank: int, *, lacking: Collection[int], passes: int, training: bool) -> None:
    """Prepares a process of a run, of which the ranks `lacking` find no memory; see `Memory`."""
    load_stage, memory = trainer.load_stage, Memory(passes, training=training)

    def loaded(pipeline: BasePipeline, settings: Settings, stage: int, *further: Any, **keys: Any) -> StagedModel:
        return memory.put_on(load_stage(pipeline, settings, stage, *further, **keys), stage)

    if rank in lacking:
        trainer.load_stage = loaded


@pytest.mark.parametrize(("what", "stages"), [("step 3", 1), ("evaluation 2", 2)])
def test_of_several_processes_one_tells_what_to_set_and_all_end(
    write_config: Callable[..., Path], what: str, stages: int
) -> None:
    """In a step, for which data ranks wait that have a part each of the optimizer's state, and in an evaluation, in
    which stages work hand in hand, and before which they save."""
    trains = what == "step 3"
    keys = {"eval_before_first_step": False, "eval_every_n_steps": 2, "checkpoint_every_n_steps": None if trains else 2}
    keys |= {"zero_stage": 1} if trains else {}
    config = write_config(pipeline_stages=stages, eval_datasets=[{"name": "held", "fraction": 0.5}], **keys)
    lacking = partial(without_memory, lacking=[1], passes=4 if trains else 0, training=trains)
    started = time.monotonic()
    codes, log = launch(config, processes=2, prepare=lacking)
    assert codes == [1, 1] and time.monotonic() - started < 60, log
    assert "Traceback" not in log
    told, advice = log.split("\n  To need less, in this order:\n")
    assert told.splitlines()[-1].startswith(f"  {what}: ") and "Tried to allocate 2.00 GiB" in told.splitlines()[-1]
    assert ("eval_micro_batch_size_per_gpu = 1" in advice) != trains
    assert ("activation_checkpointing" in advice) == trains
    # Who is lost is told by the main rank too, in one line.
    (verdict,) = (line for line in log.splitlines() if line.startswith("error: rank 1 "))
    assert f"{what}: " in verdict and "Tried to allocate 2.00 GiB" in verdict and "blocks_to_swap" not in verdict
    assert "What was saved before stays" in told
    assert [path.name for path in only_run(config).glob("global_step*")] == ([] if trains else ["global_step2"])


def test_of_data_ranks_that_find_no_memory_one_saves_what_all_have(write_config: Callable[..., Path]) -> None:
    """The run goes on from there as if nothing had been."""
    config = write_config(max_steps=4, checkpoint_every_n_steps=None, ema={"warmup": "none"})
    lacking = partial(without_memory, lacking=[0, 1], passes=2 * 2 + 1, training=True)
    codes, log = launch(config, processes=2, prepare=lacking)
    assert codes == [1, 1] and "step 3: the GPU's memory does not suffice" in log, log
    assert log.count("To need less, in this order:") == 1
    assert "What the steps before it made is saved, and --resume_from_checkpoint goes on from there" in log
    run = only_run(config)
    assert [path.name for path in run.glob("global_step*")] == ["global_step2"]
    codes, log = launch(config, "--resume_from_checkpoint", processes=2)
    assert codes == [0, 0] and "at step 2" in log, log
    found = {name: load_file(run / name / "adapter_model.safetensors") for name in ("epoch4", "epoch4_ema")}
    losses = metrics(run, "train/loss")
    shutil.rmtree(run)
    codes, log = launch(config, processes=2)
    assert codes == [0, 0], log
    assert metrics(only_run(config), "train/loss") == losses and sorted(losses) == [1, 2, 3, 4]
    for name, weights in found.items():
        expected = load_file(only_run(config) / name / "adapter_model.safetensors")
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
