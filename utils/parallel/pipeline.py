"""The part of a denoiser that one stage holds, as a DeepSpeed `PipelineModule`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from utils.diffusion import seeds
from utils.parallel.offload import HostInputs
from utils.parallel.partition import of_stage, within
from utils.parallel.recompute import recomputed_positions, run_layer, run_recomputed
from utils.parallel.remaking import Remaking, arrived, leaving
from utils.parallel.swap import BlockSwap


def draws_random_numbers(layers: nn.Module) -> bool:
    """Whether a training step draws random numbers in some layer: by dropout of torch's, or in a module that says so
    (`draws_random_numbers`)."""
    return any(
        (isinstance(module, _DropoutNd) and module.p > 0) or getattr(module, "draws_random_numbers", False)
        for module in layers.modules()
    )


class DenoiserPipeline(PipelineModule):
    """Layers `Stream -> Stream`, cut into stages at given bounds. If there are more bounds than stages, each stage has
    several pieces of the model, which follow one another as `interleaved.py` says.

    Args:
        layers: all layers of the denoiser; only those of this process's stage must hold real weights. The first one
            may say what of a stream is not sent; see `Remaking`.
        bounds: the half-open range of layers of every piece.
        stream_type: the NamedTuple that travels from layer to layer.
        loss: (prediction, labels) -> loss per sample (B,).
        stages: default: one for each piece.
        recompute: of every so many `recomputable` layers of a piece, the first keeps only its input; with 0 none.
        host: keeps these inputs in the host's memory.
        loss_terms: names of the losses that layers add; the last layer then returns an `Output`.
        seed: the run's seed; dropout draws from (seed, step, micro-batch, layer), so that it does not depend
            on the number of stages and is the same after a resume.
        swap: the blocks of this process's stage whose weights are in the host's memory.

    Attributes:
        pieces: how many each stage has.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        bounds: Sequence[tuple[int, int]],
        stream_type: Callable[..., tuple],
        loss: Callable[[Any, Any], torch.Tensor],
        *,
        stages: int | None = None,
        recompute: int = 0,
        host: HostInputs | None = None,
        seed: int = 0,
        loss_terms: Sequence[str] = (),
        swap: BlockSwap | None = None,
    ):
        stages = stages or len(bounds)
        self.pieces = len(bounds) // stages
        self._bounds_of_stages = [of_stage(bounds, stage, stages) for stage in range(stages)]
        stage_by_stage = [layer for own in self._bounds_of_stages for layer in within(own, layers)]
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds and partitions
            super().__init__(layers=stage_by_stage, num_stages=stages, loss_fn=loss)
        self._numbers = within(self._bounds_of_stages[self.stage_id], range(len(layers)))
        """Of this stage's layers, among all."""
        sizes = [stop - start for start, stop in self._bounds_of_stages[self.stage_id]]
        self._positions = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        """Of the layers of each piece, among the stage's."""
        self.stream_type = stream_type
        # Not a module of this stage, unless it begins with it.
        self._entry = Remaking.of(layers[0])
        self._recomputed = {
            positions[position]
            for positions in self._positions
            for position in recomputed_positions([self.forward_funcs[position] for position in positions], recompute)
        }
        self._trains = [
            any(parameter.requires_grad for parameter in layer.parameters()) for layer in self.forward_funcs
        ]
        self._host = host
        self.seed = seed
        self.loss_terms = tuple(loss_terms)
        self.swap = swap or BlockSwap()
        self.swap.divide(self._positions)
        self.draws_random_numbers = draws_random_numbers(self)
        self.draw: tuple[object, ...] | None = None
        self._mode: bool | None = None

    def train(self, mode: bool = True) -> DenoiserPipeline:
        """Sets the mode of all modules, through which the engine would walk before every step; only this does so."""
        if mode != self._mode:
            self._mode = mode
            super().train(mode)
        return self

    def _partition_layers(self, method: str) -> None:
        """DeepSpeed balances trainable parameters only; the bounds are computed before the weights are loaded."""
        sizes = [sum(stop - start for start, stop in own) for own in self._bounds_of_stages]
        self.parts = [0, *accumulate(sizes)]
        self._set_bounds(*self.parts[self.stage_id : self.stage_id + 2])

    def trained_of_pieces(self) -> list[list[nn.Parameter]]:
        """What each piece of this stage trains; what several of them have is the first one's."""
        found, seen = [], set[nn.Parameter]()
        for positions in self._positions:
            layers = nn.ModuleList(self.forward_funcs[position] for position in positions)
            found.append([p for p in layers.parameters() if p.requires_grad and p not in seen])
            seen.update(found[-1])
        return found

    def forward(self, fields: tuple, piece: int = 0) -> Any:
        """Runs the layers of a piece on the output of the data loader or of the piece before it."""
        positions = self._positions[piece]
        if self._host is not None:
            self._host.begin()
        with self.swap.forward_pass():
            is_first = self._numbers[positions.start] == 0
            stream = fields if is_first else arrived(self.stream_type(*fields), self._entry)
            for position in positions:
                layer = self.forward_funcs[position]
                recompute = position in self._recomputed and torch.is_grad_enabled()
                runner = partial(run_recomputed, trains=self._trains[position], host=self._host)
                run = partial(runner if recompute else run_layer, stream=stream, seed=self._seed_of(position))
                stream = self.swap.run(position, layer, run, recomputed=recompute)
            is_last = self.stage_id == self.num_stages - 1 and piece == self.pieces - 1
            return stream if is_last else leaving(stream, self._entry)

    def _seed_of(self, position: int) -> int | None:
        """Of the random numbers that a layer of this stage draws; None if it draws none."""
        if not (self.draws_random_numbers and self.training and self.draw is not None):
            return None
        return seeds.derive(self.seed, "dropout", *self.draw, self._numbers[position])
