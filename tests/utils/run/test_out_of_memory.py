"""What is told when the GPU's memory does not suffice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_py
from models.assembly import trainer
from models.assembly.room import ways_to_train
from models.assembly.stage import StagedModel
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.runs import only_run
from utils.adapters.lora import LoraSettings
from utils.errors import UserError
from utils.ranks import Ranks, disconnect
from utils.run.attempts import Attempt, Failed
from utils.run.checkpoint import Checkpoint
from utils.run.out_of_memory import explaining, savings
from utils.run.signals import StopRequests
from utils.settings.advice import allows
from utils.settings.schema import Settings

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB of which 1 GiB is free."
POSSIBLE = {
    "offload_optimizer": True,
    "blocks_to_swap": 1,
    "pipeline_stages": 2,
    "gradient_accumulation_steps": 2,
    "micro_batch_size_per_gpu": 1,
}
"""Key that may be advised -> what it is set to then."""


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


def test_fewer_micro_batches_at_once_are_advised() -> None:
    flux = tiny_flux.pipeline(tiny_flux.MINI_FLUX)
    keys = {"pipeline_stages": 2, "pieces_per_stage": 3}
    split = {"partition_method": "manual", "partition_split": [1, 2, 3, 4, 5]}
    for changes, advised in (({}, True), ({"schedule": "1f1b", "pieces_per_stage": 2}, False), (split, False)):
        settings = settings_of(flux, **{"schedule": "interleaved", **keys, **changes})
        for ways in (list(savings(settings)), ways_to_train(settings, data_ranks=1)):
            assert any('schedule = "1f1b"' in way for way in ways) == advised, (changes, ways)


@pytest.mark.parametrize(
    ("adapted", "keys"),
    [
        (False, {"optimizer__gradient_release": True, "gradient_clipping": 0.0}),
        (False, {"zero_stage": 2}),
        (False, {"offload_optimizer": True}),
        (True, {"zero_stage": 3}),
        (True, {"disable_block_swap_for_eval": True, "blocks_to_swap": 2}),
    ],
)
def test_what_is_advised_may_be_set(adapted: bool, keys: dict[str, Any]) -> None:
    """A rule that refused it would send the user in a circle."""
    flux = tiny_flux.pipeline(tiny_flux.MINI_FLUX)
    settings = settings_of(flux, LoraSettings(type="lora", rank=1) if adapted else None, micro_batch_size_per_gpu=2)
    own = {name: value for name, value in keys.items() if "__" not in name}
    optimizer = {name.removeprefix("optimizer__"): value for name, value in keys.items() if "__" in name}
    settings = settings.model_copy(update={**own, "optimizer": settings.optimizer.model_copy(update=optimizer)})
    assert allows(settings, seed=1)
    advised = "\n".join([*savings(settings), *ways_to_train(settings, data_ranks=2)])
    for key, value in {**POSSIBLE, "zero_stage": 3 if "zero_stage = 3" in advised else 1}.items():
        if key in advised:
            assert allows(settings, **{key: value}), f"{key} in {advised}"
    if settings.offload_optimizer:
        assert "adamw8bit" not in advised


class Memory:
    """Of which there is none any more after so many passes through a layer.

    Attributes:
        held: the trained weights at that time.
    """

    def __init__(self, passes: int):
        self.passes, self.held = passes, {}

    def put_on(self, staged: StagedModel) -> StagedModel:
        self._trained = staged.trained(staged.layers)
        staged.layers[1].register_forward_pre_hook(self.ask)
        return staged

    def ask(self, *_: object) -> None:
        self.passes -= 1
        if self.passes < 0:
            self.held = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
            raise torch.OutOfMemoryError(SAID)


def told_without_memory(config: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> str:
    load_stage = trainer.load_stage
    monkeypatch.setattr(trainer, "load_stage", lambda *arguments, **keys: memory.put_on(load_stage(*arguments, **keys)))
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


def test_what_is_built_before_the_first_step_is_told_too(tmp_path: Path) -> None:
    """As where the weights of a stage come to the GPU."""

    @explaining
    def build(_: Settings, what: int, *, more: int) -> int:
        raise torch.OutOfMemoryError(SAID)

    settings = settings_of(tiny_flux.pipeline(tiny_flux.MINI_FLUX), cache_text_embeddings=False)
    settings = settings.model_copy(update={"output_dir": tmp_path})
    with pytest.raises(UserError, match="before the first step: the GPU's memory does not suffice") as error:
        build(settings, 1, more=2)
    assert str(tmp_path) in str(error.value) and "- cache_text_embeddings = true" in str(error.value)


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
