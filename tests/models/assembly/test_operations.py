"""Operations counted on the meta device against those of tensors with values."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from models.assembly.operations import LayerOperations, count_operations, counter
from models.assembly.stage import load_stage
from tests.models.batches import batch_of
from tests.models.tiny_folder import settings_of, tiny
from tests.test_models import Model
from utils.adapters.lora import LoraSettings
from utils.diffusion.auxiliary import Output
from utils.parallel.wire import map_tensors

BATCH, INPUTS, OUTPUTS = 3, 8, 16
PRODUCT = 2 * BATCH * INPUTS * OUTPUTS
LORA = LoraSettings(type="lora", rank=2)
SIZE = (64, 64, 1)


class Stream(NamedTuple):
    x: torch.Tensor


class Layer(nn.Module):
    """A product, frozen or not."""

    def __init__(self, inputs: int, outputs: int, *, trained: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs).requires_grad_(trained)

    def forward(self, stream: Stream) -> Stream:
        return Stream(self.linear(stream.x))


def test_a_backward_pass_ends_at_the_first_layer_that_is_trained() -> None:
    """One product forward, one for the gradient of the input, one for that of the weight."""
    layers = [
        Layer(INPUTS, OUTPUTS, trained=False),
        Layer(OUTPUTS, INPUTS, trained=True),
        Layer(INPUTS, OUTPUTS, trained=False),
        Layer(OUTPUTS, INPUTS, trained=True),
    ]
    counted = count_operations(layers, Stream(torch.empty(BATCH, INPUTS, device="meta")))
    assert [one.forward for one in counted] == [PRODUCT] * 4
    assert [one.backward for one in counted] == [0, PRODUCT, PRODUCT, 2 * PRODUCT]


def test_a_step_runs_a_recomputed_layer_again_if_it_comes_back_to_it() -> None:
    goes_back, does_not = LayerOperations(10, 20), LayerOperations(10, 0)
    assert [goes_back.of_step(recomputed=again) for again in (False, True)] == [30, 40]
    assert [does_not.of_step(recomputed=again) for again in (False, True)] == [10, 10]
    assert goes_back.of_step(recomputed=True, passes=2) == 50


class Attention(TorchFunctionMode):
    """Counts the operations of one product of all queries with all keys, for every attention that goes back."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if function is scaled_dot_product_attention and made.requires_grad:
            query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
            # Not that of a text encoder's last layer, if the states before it are taken.
            made.register_hook(partial(self._goes_back, 2 * query.numel() * key.shape[-2]))
        return made

    def _goes_back(self, operations: int, gradient: torch.Tensor) -> None:
        self.products += operations


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("flux", None), ("flux", LORA), ("sdxl", LORA), ("sdxl_texts", LORA), ("hidream", None), ("wan", LORA)],
)
def test_they_are_those_that_are_made(tmp_path: Path, name: str, adapter: Any) -> None:
    """But for attention's matrix, which kernels of GPUs make again on the way back, as one product."""
    model = Model(name, tiny(name).write_folder(tmp_path), tiny(name))
    pipeline = model.pipeline()
    staged, batch = load_stage(pipeline, settings_of(pipeline, adapter), stage=0), batch_of(model, pipeline, SIZE)
    inputs = pipeline.prepare_inputs(batch.features, batch.x_t, batch.t_B)
    stream = inputs
    with sdpa_kernel(SDPBackend.MATH), Attention() as attention, counter() as real:
        for layer in staged.layers:
            stream = layer(stream)
        prediction, *terms = stream if isinstance(stream, Output) else (stream,)
        sum(part.sum() for part in (prediction, *terms)).backward()
    counted = count_operations(staged.layers, map_tensors(lambda tensor: tensor.to("meta"), inputs))
    total = sum(one.forward + one.backward for one in counted)
    assert total == pytest.approx(real.get_total_flops() + attention.products, rel=1e-6)
