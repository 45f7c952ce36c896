"""What is told when the GPU's memory does not suffice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train as train_py
from models.assembly import trainer
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.errors import UserError
from utils.ranks import Ranks, disconnect
from utils.run.attempts import Attempt, Failed
from utils.run.out_of_memory import savings
from utils.run.out_of_memory import told as told_of
from utils.run.signals import StopRequests

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB of which 1 GiB is free."


def names(text: list[str]) -> str:
    return " ".join(line.split(" =")[0].split(":")[0] for line in text)


def test_what_is_set_already_is_not_advised() -> None:
    flux = tiny_flux.pipeline(tiny_flux.MINI_FLUX)
    lora = LoraSettings(type="lora", rank=1)
    assert "activation_checkpointing" in names(list(savings(settings_of(flux))))
    in_full = names(list(savings(settings_of(flux))))
    assert "blocks_to_swap" in in_full and "[optimizer] type" in in_full
    assert "[optimizer] type" not in names(list(savings(settings_of(flux, blocks_to_swap=2))))
    assert "blocks_to_swap" in names(list(savings(settings_of(flux, lora))))
    small = tiny_flux.pipeline(tiny_flux.MINI_FLUX, transformer_dtype="nf4")
    spent = list(savings(settings_of(small, lora, activation_checkpointing="offload", blocks_to_swap=3)))
    assert spent[0].startswith("more blocks_to_swap")
    assert "zero_stage" in names(spent) and "offload_optimizer" in names(spent)
    spent = list(savings(settings_of(small, lora, zero_stage=1, offload_optimizer=True)))
    assert "zero_stage" not in names(spent) and "offload_optimizer" not in names(spent)
    spent = list(savings(settings_of(small, lora, activation_checkpointing="offload", blocks_to_swap=3)))
    assert "transformer_dtype" not in names(spent) and "activation_checkpointing" not in names(spent)


def test_a_step_that_finds_no_memory_ends_with_advice(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers ask for memory that is not there, as CUDA's allocator says it."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(SAID)

    with pytest.raises(UserError, match=r"weights: the GPU's memory does not suffice"):
        with told_of(settings_of(tiny_flux.pipeline(tiny_flux.MINI_FLUX)), tiny_flux.MINI_FLUX, "weights"):
            full()

    def filled(*arguments: object) -> object:
        staged = load_stage(*arguments)
        staged.layers[1].register_forward_pre_hook(full)
        return staged

    load_stage = trainer.load_stage
    monkeypatch.setattr(trainer, "load_stage", filled)
    config = write_config(sampling=None)
    try:
        with pytest.raises(UserError) as error:
            train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()
    told = str(error.value)
    assert "step 1: the GPU's memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB)" in told
    assert "activation_checkpointing = true" in told and "blocks_to_swap" in told and "Traceback" not in told


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
