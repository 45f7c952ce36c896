"""Activations counted on the meta device against what autograd keeps of tensors with values."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.assembly.activations import (
    LayerActivations,
    activations_of,
    in_pipeline,
    peak,
    run_layers,
    storages,
    tensors_of,
)
from models.assembly.stage import partition
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.parallel.interleaved import Layout, backward_passes
from utils.parallel.partition import Bounds, repeated_blocks, stage_bounds
from utils.parallel.wire import map_tensors
from utils.ranks import Ranks

TEXT_TOKENS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def staged_flux(folder: Path, stages: int = 1) -> tuple[Any, Any]:
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, LoraSettings(type="lora", rank=2), pipeline_stages=stages)
    return flux, partition(flux, settings, flux.weights.build_empty())


def inputs_of(flux: Any, size: int = 64) -> Any:
    latent = normal((2, *flux.latent_shape(size, size, 1)), 0, "x")
    return flux.prepare_inputs(tiny_flux.features((TEXT_TOKENS, TEXT_TOKENS)), latent, torch.tensor([0.2, 0.7]))


def on_meta(stream: Any) -> Any:
    return type(stream)(*(field if field is None else field.to("meta") for field in stream))


def held_by(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def counted(
    flux: Any, staged: Any, stream: Any, *, recompute: bool = False, offload: bool = False
) -> list[LayerActivations]:
    runs, held = run_layers(staged.layers, on_meta(stream)), storages(held_by(staged.denoiser))
    return [
        layer
        for start, stop in staged.bounds
        for layer in activations_of(
            runs[start:stop],
            held,
            recomputed=repeated_blocks(staged.layers[start:stop]) if recompute else (),
            offload=offload,
        )
    ]


def really_kept(layers: list[nn.Module], stream: Any, held: list[torch.Tensor]) -> int:
    """The bytes of all storages that autograd keeps on the CPU, whose attention needs no matrix either."""
    known, kept = {tensor.untyped_storage()._cdata for tensor in held}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for layer in layers:
            stream = layer(stream)
    return sum(storage.nbytes() for number, storage in kept.items() if number not in known)


def test_what_is_kept_is_what_autograd_keeps(folder: Path) -> None:
    flux, staged = staged_flux(folder)
    stream = inputs_of(flux)
    planned = sum(layer.kept for layer in counted(flux, staged, stream))
    for name, parameter in staged.denoiser.named_parameters():
        owner, _, own = name.rpartition(".")
        real = nn.Parameter(torch.randn(parameter.shape), requires_grad=parameter.requires_grad)
        setattr(staged.denoiser.get_submodule(owner), own, real)
    layers = flux.to_layers(staged.denoiser)
    assert planned == pytest.approx(really_kept(layers, stream, held_by(staged.denoiser)), rel=0.02)


def test_attention_grows_with_its_tokens_and_not_with_their_square(folder: Path) -> None:
    flux, staged = staged_flux(folder)
    small, large = (sum(layer.kept for layer in counted(flux, staged, inputs_of(flux, size))) for size in (512, 1024))
    assert 3.5 < large / small < 4.1


def test_a_recomputed_block_keeps_its_input_and_for_a_moment_the_rest(folder: Path) -> None:
    flux, staged = staged_flux(folder)
    stream = inputs_of(flux)
    plain, recomputed = (counted(flux, staged, stream, recompute=recompute) for recompute in (False, True))
    for before, after, layer in zip(plain, recomputed, staged.layers, strict=True):
        if getattr(layer, "recomputable", False):
            assert after.kept < 0.2 * before.kept
            assert after.passing > 0.8 * before.kept
        else:
            assert after == before


def test_what_layers_share_is_counted_once_in_a_stage(folder: Path) -> None:
    """The text's and the rotary tables' tensors pass through all blocks."""
    flux, staged = staged_flux(folder)
    stream = inputs_of(flux)
    one = counted(flux, staged, stream, recompute=True)
    flux, two_stages = staged_flux(folder, stages=2)
    two = counted(flux, two_stages, stream, recompute=True)
    begin = two_stages.bounds[1][0]
    rope = 2 * (TEXT_TOKENS + 16) * tiny_flux.CONFIG["attention_head_dim"] * 4
    assert [layer.kept for layer in two[:begin]] == [layer.kept for layer in one[:begin]]
    assert two[begin].kept >= one[begin].kept + rope
    assert [layer.kept for layer in two[begin + 1 :]] == [layer.kept for layer in one[begin + 1 :]]


def test_the_peak_lies_where_kept_and_passing_bytes_meet() -> None:
    layers = [LayerActivations(1, 0), LayerActivations(2, 30), LayerActivations(4, 5)]
    assert peak([layers], [(0, (1,), 0)]) == 33
    assert peak([layers], [(0, (3,), 0)]) == 2 * 7 + 33
    assert peak([[LayerActivations()]], [(0, (1,), 0)]) == 0
    # The second piece's peak is less, and is met while more is kept.
    pieces = [layers, [LayerActivations(10, 20)]]
    assert peak(pieces, [(0, (1, 0), 0), (1, (3, 2), 0)]) == 3 * 7 + 10 + 30
    assert peak(pieces, [(0, (1, 0), 2), (1, (3, 2), 0)], 100) == 200 + 33


class LiveBytes(TorchDispatchMode):
    """The bytes of storages that operations have made within this context, and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[int, Any]] = {}

    @property
    def count(self) -> int:
        return sum(size for size, _ in self._seen.values())

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        given = storages([*tensors_of(args), *tensors_of(tuple((kwargs or {}).values()))])
        for storage in (tensor.untyped_storage() for tensor in tensors_of(made)):
            number = storage._cdata
            if number not in given and number not in self._seen:
                gone = partial(self._forget, number)
                self._seen[number] = storage.nbytes(), weakref.ref(storage, gone)
        return made

    def _forget(self, number: int, _: Any) -> None:
        self._seen.pop(number, None)


def held_at_backward_passes(ranks: Ranks, folder: Path, bounds: Bounds, micro_batches: int) -> list[int]:
    """Job of a stage whose blocks are recomputed: the bytes at the beginning of each backward pass of a step, without
    gradients of weights and what has come back for the pass itself."""
    from deepspeed.runtime.pipe import schedule

    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    flux = toy_flux.pipeline(folder)
    _, layers = toy_flux.denoiser_and_layers(flux, None)
    kept = {"stages": ranks.world_size, "recompute": 1}
    module = DenoiserPipeline(layers, bounds, flux.stream_type, flux.maths.loss, **kept)
    engine = Engine(module, torch.optim.SGD(module.parameters()), accumulation=micro_batches, clip_norm=0.0)
    found, live, backward = [], LiveBytes(), engine._INSTRUCTION_MAP[schedule.BackwardPass]

    def measured(engine: Any, **keys: Any) -> None:
        come_back = engine._gradients.get(keys["buffer_id"], ())
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        found.append(live.count - sum(tensor.nbytes for tensor in (*come_back, *gradients)))
        backward(engine, **keys)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.BackwardPass: measured}
    with live:
        engine.train_step((toy_flux.micro_batch(flux, 0, 0, index=0) for _ in range(micro_batches)), 0)
    return found


def test_what_a_stage_holds_is_counted(tmp_path: Path) -> None:
    """At each backward pass, with what stages send one another. Two messages more may be there, which are sent and not
    known to have arrived."""
    folder, layout = toy_flux.write_folder(tmp_path), Layout(2, pieces=2, micro_batches=4)
    flux = toy_flux.pipeline(folder)
    denoiser, layers = toy_flux.denoiser_and_layers(flux, None)
    stream, _ = toy_flux.micro_batch(flux, 0, 0, 0)
    denoiser.to("meta")
    bounds = stage_bounds("uniform", [1] * len(layers), 4)
    runs, held = run_layers(layers, map_tensors(lambda tensor: tensor.to("meta"), stream)), storages(held_by(denoiser))
    kept = []
    for start, stop in bounds:
        how = {"recomputed": repeated_blocks(layers[start:stop])}
        own = activations_of(runs[start:stop], held, **how)
        ends = {"received": start > 0, "sent": stop < len(layers)}
        kept.append(sum(layer.kept for layer in in_pipeline(own, runs[start:stop], held, **how, **ends)))
    message = max(sum(tensor.nbytes for tensor in run.leaving) for run in runs)
    for stage, measured in enumerate(run_ranks(held_at_backward_passes, 2, folder, bounds, 4)):
        planned = [
            sum(count * size for count, size in zip(counts, kept[stage::2], strict=True)) + waiting * message
            for _, counts, waiting in backward_passes(layout, stage)
        ]
        assert len(planned) == len(measured) == 2 * 4
        for plan, real in zip(planned, measured, strict=True):
            assert 0.95 * plan < real < plan + 2 * message
