"""Activations counted on the meta device against what autograd keeps of tensors with values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.assembly.activations import LayerActivations, activations_of, peak, run_layers, storages
from models.assembly.stage import partition
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.parallel.partition import repeated_blocks

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
    assert peak([layers], [(0, (1,))]) == 33
    assert peak([layers], [(0, (3,))]) == 2 * 7 + 33
    assert peak([[LayerActivations()]], [(0, (1,))]) == 0
    # The second piece's peak is less, and is met while more is kept.
    pieces = [layers, [LayerActivations(10, 20)]]
    assert peak(pieces, [(0, (1, 0)), (1, (3, 2))]) == 3 * 7 + 10 + 30
