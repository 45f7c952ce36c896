"""The part of a denoiser that one stage holds, as a DeepSpeed `PipelineModule`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from utils.diffusion import seeds
from utils.parallel.offload import HostInputs
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
    """Layers `Stream -> Stream`, cut into stages at given bounds.

    Args:
        layers: all layers of the denoiser; only those of this process's stage must hold real weights. The first one
            may say what of a stream is not sent; see `Remaking`.
        bounds: the half-open range of layers of every stage.
        stream_type: the NamedTuple that travels from layer to layer.
        loss: (prediction, labels) -> loss per sample (B,).
        recompute: of every so many `recomputable` layers of a stage, the first keeps only its input; with 0 none.
        host: keeps these inputs in the host's memory.
        loss_terms: names of the losses that layers add; the last layer then returns an `Output`.
        seed: the run's seed; dropout draws from (seed, step, micro-batch, layer), so that it does not depend
            on the number of stages and is the same after a resume.
        swap: the blocks of this process's stage whose weights are in the host's memory.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        bounds: Sequence[tuple[int, int]],
        stream_type: Callable[..., tuple],
        loss: Callable[[Any, Any], torch.Tensor],
        *,
        recompute: int = 0,
        host: HostInputs | None = None,
        seed: int = 0,
        loss_terms: Sequence[str] = (),
        swap: BlockSwap | None = None,
    ):
        self.bounds = list(bounds)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds and partitions
            super().__init__(layers=layers, num_stages=len(bounds), loss_fn=loss)
        self.stream_type = stream_type
        # Not a module of this stage, unless it begins with it.
        self._entry = Remaking.of(layers[0])
        self._recomputed = frozenset(recomputed_positions(self.forward_funcs, recompute))
        self._trains = [
            any(parameter.requires_grad for parameter in layer.parameters()) for layer in self.forward_funcs
        ]
        self._host = host
        self.seed = seed
        self.loss_terms = tuple(loss_terms)
        self.swap = swap or BlockSwap()
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
        self.parts = [start for start, _ in self.bounds] + [self.bounds[-1][1]]
        self._set_bounds(*self.bounds[self.stage_id])

    def forward(self, fields: tuple) -> Any:
        """Runs this stage's layers on the output of the data loader or of the previous stage."""
        if self._host is not None:
            self._host.begin()
        with self.swap.forward_pass():
            stream = fields if self._local_start == 0 else arrived(self.stream_type(*fields), self._entry)
            for position, layer in enumerate(self.forward_funcs):
                recompute = position in self._recomputed and torch.is_grad_enabled()
                runner = partial(run_recomputed, trains=self._trains[position], host=self._host)
                run = partial(runner if recompute else run_layer, stream=stream, seed=self._seed_of(position))
                stream = self.swap.run(position, layer, run, recomputed=recompute)
            return stream if self.stage_id == self.num_stages - 1 else leaving(stream, self._entry)

    def _seed_of(self, position: int) -> int | None:
        """Of the random numbers that a layer of this stage draws; None if it draws none."""
        if not (self.draws_random_numbers and self.training and self.draw is not None):
            return None
        return seeds.derive(self.seed, "dropout", *self.draw, self._local_start + position)
