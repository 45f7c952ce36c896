"""Every model in bfloat16 on a pretended device, forward and backward: nothing is on another device or wider than it
should be, the host never waits, and another stage makes what is not sent to it as the first one has it.

An adapter, a quantised base, recomputing and swapping treat all models alike, so that not each model is tried with all
of them: each is trained in one of six ways that take turns.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

import models
from models.assembly.activations import tensors_of
from models.assembly.stage import StagedModel, load_stage
from models.base import BasePipeline
from tests.models.batches import SIZES, features_of
from tests.models.tiny_folder import VARIANTS, settings_of, tiny
from tests.pretended_device import DEVICE, PretendedDevice, PretendedTransfers
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings
from utils.diffusion.auxiliary import Output
from utils.diffusion.losses import Labels
from utils.diffusion.seeds import normal
from utils.parallel import wire
from utils.parallel.homes import BlockHomes
from utils.parallel.partition import repeated_blocks
from utils.parallel.recompute import run_layer, run_recomputed
from utils.parallel.remaking import Remaking, arrived, leaving
from utils.parallel.swap import BlockSwap
from utils.settings.schema import AdapterSettings

LORA, LOKR = LoraSettings(type="lora", rank=4), LokrSettings(type="lokr", rank=4)
SAMPLES = 2
EXPERTS = {"hidream": "grouped_experts"}
"""Types of which the blocks ask for the number of tokens of each expert, once in every run of a block's experts."""
IN_FLOAT32 = {
    **dict.fromkeys(
        ("kandinsky5", "kandinsky5_i2v", "kandinsky5_t2i"),
        ("mm: float32 [4, 16]", "mm: float32 [4, 18]", "mm: float32 [32, 12]", "mm: float32 [36, 16]"),
    ),
    "minimax_h3": ("addmm: float32 [240, 24]", "addmm: float32 [256, 16]"),
    "minimax_h3_fl": (
        "addmm: float32 [336, 24]",
        "addmm: float32 [352, 16]",
        "addmm: float32 [4, ",
    ),
    "minimax_h3_ref": ("addmm: float32 [574, 24]", "addmm: float32 [590, 16]", "addmm: float32 [4, "),
    "sana": ("float32 [8, 9, ",),
}
"""Types whose stock modules multiply in float32 on purpose, and what. Sana's attention is linear, it sums over all
tokens what keys and values of a head (of 8 channels, and one that counts) make together, which costs little. What takes
MiniMax-H3's latents (24 wide here) and what makes them (16) is published in float32 and stays so in the stock class, as
does the time, of which there are four with key frames or references. So do Kandinsky 5's modulations, of which each
sample has a row; with them their LoKr, of factors of these sizes."""


class Case(NamedTuple):
    """A way to train.

    Attributes:
        base: the format of a quantised base.
    """

    adapter: AdapterSettings | None
    base: str | None = None
    recomputed: bool = False
    swapped: bool = False


IN_TURN = (
    Case(None, recomputed=True, swapped=True),
    Case(LORA),
    Case(LORA, "nf4", recomputed=True),
    Case(LOKR, swapped=True),
    Case(LORA, "float8", swapped=True),
    Case(LOKR, recomputed=True),
)
TURNS = dict(zip([*models.available(), *VARIANTS], cycle(IN_TURN), strict=False))


def inputs_of(name: str, pipeline: BasePipeline) -> tuple[Any, Labels]:
    module = tiny(name)
    shape = (SAMPLES, *pipeline.latent_shape(*getattr(module, "SIZES", SIZES)[0]))
    cached = features_of(module, shape).items()
    features = {key: one.bfloat16() if one.is_floating_point() else one for key, one in cached}
    x_t = normal(shape, 0, "x")
    labels = Labels(normal(shape, 1, "x"), torch.ones(SAMPLES, *[1] * (len(shape) - 1)))
    return pipeline.prepare_inputs({**features, "latents": x_t}, x_t, torch.tensor([0.25, 0.9])), labels


def staged_in_bfloat16(name: str, folder: Path, case: Case) -> tuple[BasePipeline, StagedModel]:
    keys = {"transformer_dtype": case.base} if case.base else {}
    options = tiny(name).pipeline(folder, **keys).options
    pipeline = models.find(options.type)(options.model_copy(update={"dtype": "bfloat16"}), 0)
    return pipeline, load_stage(pipeline, settings_of(pipeline, case.adapter), stage=0)


def run_on(device: PretendedDevice, layers: list[nn.Module], stream: Any, swap: BlockSwap, *, recomputed: bool) -> Any:
    """What the layers make of a stream. All that they hand on for the picture is in bfloat16."""
    blocks = repeated_blocks(layers) if recomputed else []
    with swap.forward_pass():
        for position, layer in enumerate(layers):
            runner = partial(run_recomputed, trains=True) if position in blocks else run_layer
            run = partial(runner, stream=stream)
            stream = swap.run(position, device.watched(layer), run, recomputed=position in blocks)
            types = {field.dtype for name, field in fields_of(stream).items() if name.startswith("x_")}
            assert types <= {torch.bfloat16}, (position, types)
    return stream


def fields_of(stream: Any) -> dict[str, Any]:
    return stream._asdict() if hasattr(stream, "_asdict") else {"x_": stream}


def train_on(device: PretendedDevice, name: str, folder: Path, case: Case) -> StagedModel:
    """A step without its optimizer; the waits are those of a step that is not the first."""
    pipeline, staged = staged_in_bfloat16(name, folder, case)
    of_others = Remaking.of(pipeline.to_layers(pipeline.weights.build_empty())[0])
    inputs, labels = inputs_of(name, pipeline)
    count = len(repeated_blocks(staged.layers)) if case.swapped else 0
    swap = BlockSwap(BlockHomes(staged.layers, count, trained=case.adapter is None).filled())
    with device:
        for layer in staged.layers:
            layer.to(DEVICE).train()
        swap.start(DEVICE)
        stream, labels = wire.map_tensors(lambda tensor: tensor.to(DEVICE, non_blocking=True), (inputs, labels))
        wire.map_tensors(device.follow, stream)
        with torch.no_grad():
            # Some entries bring a table to the device, once, and so do other stages, which have no weights of it.
            entered = staged.layers[0](stream)
            arrived(leaving(entered, of_others), of_others)
        device.waits.clear()
        again = arrived(leaving(entered, of_others), of_others)
        stream = run_on(device, staged.layers, stream, swap, recomputed=case.recomputed)
        prediction, terms = stream if isinstance(stream, Output) else (stream, torch.zeros(()))
        assert device.has(prediction)
        (pipeline.maths.loss(prediction, labels).mean() + terms.sum()).backward()
        swap.settle()
    for field in of_others.fields:
        made, had = (list(tensors_of(getattr(one, field))) for one in (again, entered))
        assert all(map(device.has, made)) and len(made) == len(had) and all(map(torch.equal, made, had)), field
    return staged


@pytest.fixture(autouse=True)
def asynchronous_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.parallel.swap.transfers_to", PretendedTransfers)


@pytest.mark.parametrize("name", TURNS)
def test_nothing_is_on_another_device_or_wider_than_it_should_be(name: str, tmp_path: Path) -> None:
    device, case = PretendedDevice(SAMPLES), TURNS[name]
    staged = train_on(device, name, tiny(name).write_folder(tmp_path), case)
    meant = IN_FLOAT32.get(name, ())
    faults = [line for line in device.faults if not any(part in line for part in meant)]
    assert not faults, (case, faults)
    own = [line for line in device.waits if EXPERTS.get(name, "nothing") not in line]
    assert not own, (case, own)
    if name in EXPERTS:
        runs = 1 + case.recomputed
        assert len(device.waits) == runs * len(experts_of(staged.denoiser)), device.waits
    trained = staged.trained(staged.layers)
    without = {key for key, one in trained.items() if one.grad is None}
    assert len(without) < len(trained) / 3, without
    wrong = [key for key, one in trained.items() if one.grad is not None and one.grad.dtype != one.dtype]
    assert not wrong, (case, wrong)


def experts_of(denoiser: nn.Module) -> list[nn.Module]:
    return [module for module in denoiser.modules() if type(module).__name__ == "GroupedExperts"]


WIDTH, TOKENS = 8, 6
PLANTED = {
    "a table on the CPU": ("faults", lambda x, weight: x + torch.arange(WIDTH)),
    "an index on the CPU": ("faults", lambda x, weight: x[:, torch.tensor([0, 2])]),
    "a mask on the CPU": ("faults", lambda x, weight: x.masked_fill(torch.ones(1, TOKENS, 1, dtype=torch.bool), 0)),
    "float32": ("faults", lambda x, weight: x + functional.linear(x.float(), weight.float()).to(x.dtype)),
    "a table that is moved": ("waits", lambda x, weight: x + torch.arange(WIDTH).to(x.device)),
    "values as a tensor": ("waits", lambda x, weight: x * torch.tensor([2] * WIDTH, device=x.device)),
    "a number that is read": ("waits", lambda x, weight: x * x.amax().item()),
    "a condition": ("waits", lambda x, weight: x if x.any() else -x),
    "values that are read": ("waits", lambda x, weight: x * len(x.tolist())),
    "on the way over the CPU": ("waits", lambda x, weight: x + x.detach().cpu().to(x.device, non_blocking=True)),
    "equations that are looked at": (
        "waits",
        lambda x, weight: x + torch.linalg.solve(*[weight.detach().float()] * 2).to(x.dtype)[0],
    ),
    "places of what is not zero": ("waits", lambda x, weight: x + len(x.nonzero())),
    "a mask as an index": ("waits", lambda x, weight: x + x[x > 0].sum()),
}


class Stream(NamedTuple):
    """What the layer with a fault takes and gives."""

    x_BTD: torch.Tensor


class Planted(nn.Module):
    """A layer with a fault."""

    recomputable = True

    def __init__(self, fault: Any):
        super().__init__()
        self.fault = fault
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16))

    def forward(self, stream: Stream) -> Stream:
        return Stream(self.fault(functional.linear(stream.x_BTD, self.weight), self.weight))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(planted: str, recomputed: bool) -> None:
    kind, fault = PLANTED[planted]
    device = planted_on_device(fault, recomputed=recomputed)
    found = {"faults": device.faults, "waits": device.waits}
    # The first run of a block that is recomputed has no graph, and types are looked at where there is one.
    assert len(found.pop(kind)) >= (2 if recomputed and planted != "float32" else 1)
    assert not any(found.values()), found


def test_where_nothing_is_planted_nothing_is_found() -> None:
    device = planted_on_device(lambda x, weight: x @ weight.T + torch.arange(WIDTH, device=x.device), recomputed=True)
    assert not device.faults + device.waits


def planted_on_device(fault: Any, *, recomputed: bool) -> PretendedDevice:
    """After a layer with this fault ran forward and backward."""
    layer, device = Planted(fault), PretendedDevice(SAMPLES)
    with device:
        layer.to(DEVICE)
        device.waits.clear()
        x = torch.randn(SAMPLES, TOKENS, WIDTH, dtype=torch.bfloat16).to(DEVICE, non_blocking=True)
        stream = Stream(device.follow(x).requires_grad_())
        run_on(device, [layer], stream, BlockSwap(), recomputed=recomputed).x_BTD.sum().backward()
    return device
