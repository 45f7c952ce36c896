"""Block swap against the same training without it, bit for bit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import optimizers
from models.assembly.stage import partition
from optimizers.adamw import AdamWSettings
from optimizers.ema import EMA
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.adapters.attach import switched_off
from utils.errors import UserError
from utils.parallel.homes import BlockHomes
from utils.parallel.partition import repeated_blocks
from utils.parallel.sharding import Shares
from utils.parallel.swap import BlockSwap
from utils.parallel.swap_plan import BUFFERS, SwapPlan, counts, spread
from utils.parallel.transfers import ALIGNMENT
from utils.ranks import Ranks
from utils.settings.run_tables import EMASettings

STEPS = 2
ACCUMULATION = {1: 2, 2: 3}
"""Micro-batches by the number of stages, so many that the first runs forward and backward in turn."""
OPTIMIZER = AdamWSettings(type="adamw", lr=1e-2)
REGULARISING = torch.tensor([True, False])
DOUBLE, SINGLE = 3, 5
BLOCKS = DOUBLE + SINGLE
FEWER = {"num_layers": 2, "num_single_layers": 3}
"""Of one stage, which has more than there is room for all the same."""
VARIANTS = {
    "kept": {},
    "recomputed": {"recompute": True},
    "offloaded": {"recompute": True, "offload": True},
    "recomputed dropout and a teacher": {"recompute": True, "dropout": 0.5, "teacher": True},
    "in full, kept": {"full": True},
    "in full, recomputed in bfloat16": {"full": True, "recompute": True, "bfloat16": True},
    "in full, stepped by the processor": {"full": True, "steps_on_host": True},
}
KEPT, RECOMPUTED, OFFLOADED, WITH_TEACHER, FULL, FULL_RECOMPUTED, FULL_ON_HOST = VARIANTS
IN_PIECES = {f"in pieces, {name}": name for name in (OFFLOADED, WITH_TEACHER, FULL)}
"""The same with two pieces of each stage."""
LAYOUTS = [
    (1, 1, (RECOMPUTED, WITH_TEACHER, FULL_RECOMPUTED)),
    (2, 1, (KEPT, OFFLOADED, WITH_TEACHER, FULL, FULL_ON_HOST, *IN_PIECES)),
    (1, 2, (KEPT, FULL_RECOMPUTED)),
]
"""Stages, data ranks, variants."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux.write_folder(tmp_path_factory.mktemp("flux"), num_layers=DOUBLE, num_single_layers=SINGLE)


@pytest.fixture(scope="module")
def folder_of_fewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux.write_folder(tmp_path_factory.mktemp("flux"), **FEWER)


def engine_of(
    ranks: Ranks,
    flux: Any,
    count: int,
    *,
    recompute: bool = False,
    offload: bool = False,
    dropout: float = 0.0,
    teacher: bool = False,
    full: bool = False,
    bfloat16: bool = False,
    steps_on_host: bool = False,
    pieces: int = 1,
) -> Any:
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.offload import HostInputs
    from utils.parallel.partition import of_stage, stage_bounds, within
    from utils.parallel.pipeline import DenoiserPipeline
    from utils.parallel.teacher import Teacher
    from utils.parallel.together import optimizer_for_frozen_stage

    initialize_deepspeed()
    denoiser, layers = toy_flux.denoiser_and_layers(flux, None if full else toy_flux.adapter(dropout))
    if bfloat16:
        denoiser.to(torch.bfloat16)
    bounds = stage_bounds("uniform", [1] * len(layers), ranks.stages * pieces)
    own = within(of_stage(bounds, ranks.stage, ranks.stages), layers)
    # In evaluation some have all blocks at once.
    homes = BlockHomes(
        own,
        min(count, len(repeated_blocks(own))),
        pinned=ranks.device.type == "cuda",
        trained=full,
        ranks=ranks if ranks.data_ranks > 1 and count else None,
    )
    swap = BlockSwap(homes.filled(), resident_in_evaluation=bfloat16 or offload)
    kept = {"stages": ranks.stages, "recompute": recompute, "host": HostInputs(smallest=1) if offload else None}
    module = DenoiserPipeline(layers, bounds, flux.stream_type, flux.maths.loss, swap=swap, **kept)
    trained = [p for p in module.parameters() if p.requires_grad]
    at_home = [parameter for block in swap._trained for parameter in block]
    shares = Shares(dict(module.named_parameters()), ranks, offload=True, at_home=at_home) if steps_on_host else None
    if shares and count:
        # What is swapped is stepped itself, and copies of the rest.
        own = set(map(id, trained)) & set(map(id, shares.stepped.values()))
        assert own == set(map(id, at_home)) and 0 < len(own) < len(trained)
    groups = [{"params": list(shares.stepped.values()) if shares else trained}]
    optimizer = optimizers.build(groups, OPTIMIZER) if trained else optimizer_for_frozen_stage()
    given = Teacher(partial(switched_off, denoiser), flux.maths.with_teacher_target) if teacher else None
    return Engine(
        module,
        optimizer,
        accumulation=ACCUMULATION[ranks.stages],
        clip_norm=0.05,
        teacher=given,
        float32_gradients=bfloat16,
        shares=shares,
    )


def batches_of(ranks: Ranks, flux: Any, step: int) -> list:
    made = [toy_flux.micro_batch(flux, step, ranks.data_rank, index) for index in range(ACCUMULATION[ranks.stages])]
    return [(inputs, labels._replace(regularising=REGULARISING)) for inputs, labels in made]


def check_residency(engine: Any) -> None:
    """From now on a swapped block asserts that its weights, all but an adapter's, are in the ring when it runs."""
    swap = engine.module.swap

    def check(_: nn.Module, __: tuple, swapped: list[nn.Parameter]) -> None:
        assert swapped and all(swap._ring.slot_of(p) is not None for p in swapped)

    for position in swap._numbers:
        for module in engine.module.forward_funcs[position].modules():
            # A Linear with a hook is left to itself by its LoRA, with another order of sums.
            if next(module.children(), None) is not None:
                # Listed once: swapped weights change their memory, and stay the same objects.
                swapped = [p for p in module.parameters() if swap._gradients is not None or not p.requires_grad]
                module.register_forward_pre_hook(partial(check, swapped=swapped))


def results_of(ranks: Ranks, flux: Any, engine: Any) -> dict[str, Any]:
    """Losses, norms, gradients, weights, evaluation and predictions of some steps."""
    gradients: list[Any] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append([None if p.grad is None else p.grad.float().cpu().numpy().copy() for p in held])
        assert all(p.grad is None or p.grad.device == p.device for p in held)

    engine.optimizer.register_step_pre_hook(keep)
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    ema = EMA(trained.items(), EMASettings(decay=0.5), engine.basic_optimizer)
    evaluated = [engine.evaluate(batches_of(ranks, flux, 7), ACCUMULATION[ranks.stages])]
    steps = [engine.train_step(batches_of(ranks, flux, step), step) for step in range(STEPS)]
    evaluated.append(engine.evaluate(batches_of(ranks, flux, 7), ACCUMULATION[ranks.stages]))
    ema.update(1)
    with ema.swapped():
        evaluated.append(engine.evaluate(batches_of(ranks, flux, 7), ACCUMULATION[ranks.stages]))
    predicted = engine.predict(batches_of(ranks, flux, 8), ACCUMULATION[ranks.stages])
    steps.append(engine.train_step(batches_of(ranks, flux, STEPS), STEPS))
    return {
        "losses": [(step.loss, step.grad_norm) for step in steps],
        "gradients": gradients,
        "weights": [p.detach().float().cpu().numpy() for p in trained.values()],
        "evaluated": [[t.cpu().numpy() for t in losses] for losses in evaluated],
        "predicted": [t.float().cpu().numpy() for t in predicted],
    }


def train(ranks: Ranks, folder: Path, stages: int, variants: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Job of a rank: every variant without swap and with it, of all blocks and of one fewer in turn."""
    ranks = ranks.with_stages(stages)
    flux = toy_flux.pipeline(folder)
    found: dict[str, list[dict[str, Any]]] = {}
    blocks = sum(FEWER.values()) if stages == 1 else BLOCKS
    for number, name in enumerate(variants):
        for count in (0, blocks // stages - number % 2):
            pieces = 2 if name in IN_PIECES else 1
            engine = engine_of(ranks, flux, count, pieces=pieces, **VARIANTS[IN_PIECES.get(name, name)])
            if count:
                check_residency(engine)
            found.setdefault(name, []).append(results_of(ranks, flux, engine))
    return found


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    else:
        yield value


def assert_equal(first: Any, second: Any) -> None:
    pairs = list(zip(flat(first), flat(second), strict=True))
    assert pairs
    for one, other in pairs:
        assert (one == other).all() if hasattr(one, "all") else one == other


def assert_near(first: Any, second: Any, tolerance: float) -> None:
    """Each by its own norm."""
    for one, other in zip(flat(first), flat(second), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
            assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(("stages", "data_ranks", "variants"), LAYOUTS)
def test_swapping_changes_no_bit(
    folder: Path, folder_of_fewer: Path, stages: int, data_ranks: int, variants: tuple[str, ...]
) -> None:
    given = folder_of_fewer if stages == 1 else folder
    for rank in run_ranks(train, stages * data_ranks, given, stages, variants):
        for without, swapped in rank.values():
            assert len({loss for loss, _ in without["losses"]}) == STEPS + 1, "training changes the loss"
            assert_equal(swapped, without)
        for same in IN_PIECES.keys() & rank.keys():
            for in_pieces, plain in zip(rank.pop(same), rank[IN_PIECES[same]], strict=True):
                # A stage has other weights then, and the norm is summed in another order.
                for kind in ("losses", "evaluated", "predicted"):
                    assert_near(in_pieces[kind], plain[kind], 1e-5)
        for same, plain in ((OFFLOADED, KEPT), (FULL_ON_HOST, FULL)):
            if same in rank:
                assert_equal(rank.pop(same), rank[plain])
        losses = {str(without["losses"]) for without, _ in rank.values()}
        assert len(losses) == len(rank), "each variant trains otherwise"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_swapping_changes_no_bit_on_a_gpu(folder: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, since those of `run_ranks` may be kept off the GPU. In a full fine-tune the processor measures
    and steps what is swapped, and rounds otherwise than a GPU: there the first step has the same bits, and what follows
    is near."""
    from utils import ranks as together

    # So that these are taken away again, which connecting puts there.
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    ranks = together.from_environment()
    together.connect(ranks)
    try:
        flux = toy_flux.pipeline(folder)
        # Other kinds of attention may add up gradients in any order.
        with sdpa_kernel(SDPBackend.MATH):
            runs = [results_of(ranks, flux, engine_of(ranks, flux, count, **VARIANTS[variant])) for count in (0, 8, 5)]
    finally:
        together.disconnect()
    plain, *others = runs
    for other in others:
        if not VARIANTS[variant].get("full"):
            assert_equal(other, plain)
            continue
        assert_equal([other["evaluated"][0], other["losses"][0][0]], [plain["evaluated"][0], plain["losses"][0][0]])
        # These are limited by their norm.
        assert_near(other["gradients"][0], plain["gradients"][0], 1e-5)
        assert_near(other, plain, 0.1 if VARIANTS[variant].get("bfloat16") else 1e-4)


def blocks_and_ends(folder: Path, meta: bool = False) -> tuple[Any, list[nn.Module]]:
    flux = toy_flux.pipeline(folder)
    if meta:
        staged = partition(flux, settings_of(flux, toy_flux.adapter()), flux.weights.build_empty())
        return staged.denoiser, staged.layers
    return toy_flux.denoiser_and_layers(flux, toy_flux.adapter())


def test_swapped_weights_take_no_memory_until_they_are_needed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, layers = blocks_and_ends(folder)
    before = {name: p.clone() for name, p in layers[1].named_parameters()}
    plan = SwapPlan.of(layers, BLOCKS)
    largest = max(sum(-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in frozen(layer)) for layer in layers[1:-1])
    assert (plan.ring_bytes, len(plan.sizes)) == (BUFFERS * largest, BLOCKS)
    swap = BlockSwap(BlockHomes(layers, BLOCKS).filled())
    assert all(p.numel() == 0 for layer in layers[1:-1] for p in frozen(layer))
    trained = [p for p in layers[1].parameters() if p.requires_grad]
    assert trained and all(p.numel() for p in trained)
    with caplog.at_level(logging.INFO, "utils.parallel.swap"):
        swap.start(torch.device("cpu"))
    assert f"{BLOCKS} of the stage's {BLOCKS} blocks" in caplog.text
    # At home they can be read as ever.
    assert all(torch.equal(p, before[name]) for name, p in layers[1].named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in frozen(layers[1])}) == 1


def frozen(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if not p.requires_grad]


class Odd(nn.Module):
    """A block with tensors of all sorts."""

    recomputable = True

    def __init__(self, shared: nn.Parameter):
        super().__init__()
        self.shared = shared
        self.turned = nn.Parameter(torch.randn(5, 3).t(), requires_grad=False)
        self.register_buffer("small", torch.randn(7).to(torch.float8_e4m3fn))
        self.register_buffer("packed", torch.randint(0, 256, (11, 3), dtype=torch.uint8), persistent=False)
        self.register_buffer("scale", torch.randn(()).to(torch.bfloat16))
        self.twice = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("empty", torch.zeros(0))
        self.inner = nn.Module()
        self.inner.twice = self.twice
        self.trained = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.exp()  # an output that autograd keeps for itself
        scaled = kept * self.small[:3].float() * self.scale.float() + self.packed[0] / 255
        return (scaled @ self.turned).tanh() @ self.turned.t() * self.twice * self.trained + self.shared


def call(stream: torch.Tensor, layer: Any) -> torch.Tensor:
    return layer(stream)


def test_all_types_and_orders_come_through() -> None:
    torch.manual_seed(0)
    shared = nn.Parameter(torch.randn(3), requires_grad=False)
    layers = [Odd(shared) for _ in range(4)]
    before = copy.deepcopy(layers)
    swap = BlockSwap(BlockHomes(layers, 4).filled())
    assert all(layer.shared.numel() for layer in layers), "a shared tensor stays"
    assert all(b.numel() == 0 for layer in layers for b in layer.buffers()), "buffers leave the device as well"
    # As a move to a device does with buffers.
    for layer in layers:
        layer._buffers.update({name: buffer.clone() for name, buffer in layer._buffers.items()})
    swap.start(torch.device("cpu"))
    x = torch.randn(2, 3)

    found = x
    with swap.forward_pass():
        for position, layer in enumerate(layers):
            found = swap.run(position, layer, partial(call, found), recomputed=False)
    expected = nn.Sequential(*before)(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for layer, other in zip(layers, before, strict=True):
        assert torch.equal(layer.trained.grad, other.trained.grad) and layer.trained.grad.any()
        assert layer.turned.stride() == other.turned.stride()
        for name, buffer in other.named_buffers():
            assert torch.equal(layer.get_buffer(name).float(), buffer.float()), name


def test_swapped_blocks_are_spread_from_the_first_to_the_last() -> None:
    assert spread(1, 9) == (0,)
    assert spread(3, 9) == (0, 4, 8)
    assert spread(4, 9) == (0, 2, 5, 8)
    for blocks in range(1, 20):
        for count in range(1, blocks + 1):
            chosen = spread(count, blocks)
            assert len(set(chosen)) == count and set(chosen) <= set(range(blocks))
            gaps = {late - early for early, late in zip(chosen, chosen[1:], strict=False)}
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_more_blocks_than_there_are_is_refused(folder: Path) -> None:
    _, layers = blocks_and_ends(folder, meta=True)
    assert repeated_blocks(layers) == list(range(1, 1 + BLOCKS))
    assert counts(BLOCKS, [layers]) == [BLOCKS]
    assert counts([1, 2], [layers[:4], layers[4:]]) == [1, 2]
    with pytest.raises(ValueError, match="9 blocks cannot be swapped, since the model has 8; swap at most 8"):
        counts(9, [layers])
    with pytest.raises(ValueError, match=r"since stage 0 has 3; swap at most 3, or write .*at most \[3, 5\]"):
        counts(4, [layers[:4], layers[4:]])
    flux = toy_flux.pipeline(folder)
    settings = settings_of(flux, toy_flux.adapter(), pipeline_stages=2, blocks_to_swap=[1, 7])
    with pytest.raises(UserError, match=r"blocks_to_swap.*7 blocks cannot be swapped"):
        partition(flux, settings, flux.weights.build_empty())
