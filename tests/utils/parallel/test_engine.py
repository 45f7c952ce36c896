"""The engine at any number of stages, micro-batches and data ranks against one plain process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import backward_calls
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.adapters.attach import base_name
from utils.adapters.lora import LoraSettings
from utils.ranks import Ranks

STEPS = 2
CLIP = 0.05
LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
INTERLEAVED = [(2, 1), (2, 2), (3, 1)]
WAYS = [
    *((False, 1, *layout) for layout in LAYOUTS),
    *((True, 1, *layout) for layout in LAYOUTS[1:5:3]),
    *((False, 2, *layout) for layout in INTERLEAVED),
    (True, 2, 2, 1),
]
"""In full on every layout of stages and data ranks; as a LoRA on two stages, and on two of two data ranks each. Also
with two pieces of the model for each stage."""
ACCUMULATIONS = (1, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux.write_folder(tmp_path_factory.mktemp("flux"))


def engine_of(
    ranks: Ranks,
    flux: Any,
    settings: Any,
    accumulation: int,
    clip: float,
    recompute: bool = False,
    *,
    clip_by: str = "norm",
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    pieces: int = 1,
) -> tuple:
    """An engine on this rank's stage, and its trainable parameters by name."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.partition import stage_bounds
    from utils.parallel.pipeline import DenoiserPipeline
    from utils.parallel.together import optimizer_for_frozen_stage

    initialize_deepspeed()
    denoiser, layers = toy_flux.denoiser_and_layers(flux, settings)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    bounds = stage_bounds("parameters", sizes, ranks.stages * pieces)
    kept = {"stages": ranks.stages, "recompute": recompute}
    module = DenoiserPipeline(layers, bounds, flux.stream_type, flux.maths.loss, **kept)
    held = {id(p) for p in module.parameters()}
    trained = {base_name(name): p for name, p in denoiser.named_parameters() if p.requires_grad and id(p) in held}
    steps = optimizer(trained.values(), lr=toy_flux.LEARNING_RATE) if trained else optimizer_for_frozen_stage()
    return Engine(module, steps, accumulation=accumulation, clip_norm=clip, clip_by=clip_by), trained


def batches_of(ranks: Ranks, flux: Any, step: int, accumulation: int) -> list | None:
    if not (ranks.is_first_stage or ranks.is_last_stage):
        return None
    return [toy_flux.micro_batch(flux, step, ranks.data_rank, index) for index in range(accumulation)]


def train(ranks: Ranks, folder: Path, stages: int, pieces: int, settings: Any, recompute: bool) -> dict[int, Any]:
    """Job of a rank: trains with each accumulation; losses, norms, and the weights of its stage."""
    ranks = ranks.with_stages(stages)
    flux = toy_flux.pipeline(folder)
    results = {}
    for accumulation in ACCUMULATIONS:
        engine, trained = engine_of(ranks, flux, settings, accumulation, CLIP, recompute, pieces=pieces)
        steps = [engine.train_step(batches_of(ranks, flux, step, accumulation), step) for step in range(STEPS)]
        results[accumulation] = {
            "losses": [result.loss for result in steps],
            "levels": [dict(result.deciles) for result in steps],
            "norms": [result.grad_norm for result in steps],
            "weights": {name: p.detach().numpy() for name, p in trained.items()},
            "timed": [timer.event_timers for timer in getattr(engine.timers, "timers", {}).values()],
        }
    return results


@cache
def reference_of(folder: Path, adapted: bool, data_ranks: int, accumulation: int) -> dict[str, Any]:
    """One process's, with which all numbers of stages are compared."""
    return toy_flux.train_plainly(folder, adapter_if(adapted), data_ranks, accumulation, STEPS, CLIP)


def adapter_if(adapted: bool) -> Any:
    return toy_flux.adapter() if adapted else None


@pytest.mark.parametrize(("adapted", "pieces", "stages", "data_ranks"), WAYS)
def test_equals_one_process(folder: Path, adapted: bool, pieces: int, stages: int, data_ranks: int) -> None:
    returned = run_ranks(train, stages * data_ranks, folder, stages, pieces, adapter_if(adapted), stages == 2)
    for accumulation in ACCUMULATIONS:
        expected = reference_of(folder, adapted, data_ranks, accumulation)
        weights: dict[str, torch.Tensor] = {}
        for result in (rank[accumulation] for rank in returned):
            assert not any(result["timed"]), "DeepSpeed keeps something of each step for ever"
            assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
            for levels, own in zip(expected["levels"], result["levels"], strict=True):
                assert own == pytest.approx(levels, rel=1e-5)
            weights |= {name: torch.from_numpy(values) for name, values in result["weights"].items()}
        assert weights.keys() == expected["weights"].keys()
        for name, values in expected["weights"].items():
            assert torch.allclose(weights[name], values, atol=2e-5), name


def train_frozen_first_stage(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Job: only the single blocks are adapted, so that the first of two stages trains nothing."""
    ranks = ranks.with_stages(2)
    flux = toy_flux.pipeline(folder)
    engine, trained = engine_of(ranks, flux, SINGLE_BLOCKS_ONLY, 4, CLIP)
    steps = [engine.train_step(batches_of(ranks, flux, step, 4), step) for step in range(STEPS)]
    return {"losses": [s.loss for s in steps], "norms": [s.grad_norm for s in steps], "trained": len(trained)}


SINGLE_BLOCKS_ONLY = LoraSettings(type="lora", rank=4, include=["single_transformer_blocks.1"])


def test_a_stage_without_trainable_parameters_trains(folder: Path) -> None:
    first, last = run_ranks(train_frozen_first_stage, 2, folder)
    expected = toy_flux.train_plainly(folder, SINGLE_BLOCKS_ONLY, 1, 4, STEPS, CLIP)
    assert first["trained"] == 0 and last["trained"] == len(expected["weights"])
    for result in (first, last):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def step_and_skip(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Job: what one step of plain descent takes off the weights, for each way to limit the gradient; and whether a step
    without finite numbers leaves weights and moments as they are."""
    ranks = ranks.with_stages(2)
    flux = toy_flux.pipeline(folder)
    taken = {}
    for way in ("norm", "layer", "value"):
        engine, trained = engine_of(ranks, flux, None, 1, CLIPS[way], clip_by=way, optimizer=torch.optim.SGD)
        before = {name: p.detach().clone() for name, p in trained.items()}
        engine.train_step(batches_of(ranks, flux, 0, 1), 0)
        taken[way] = {name: (before[name] - p.detach()).numpy() for name, p in trained.items()}
    engine, trained = engine_of(ranks, flux, None, 2, CLIP)
    engine.train_step(batches_of(ranks, flux, 0, 2), 0)
    before = {name: (p.detach().clone(), engine.optimizer.state[p]["exp_avg"].clone()) for name, p in trained.items()}
    good, (stream, labels) = batches_of(ranks, flux, 1, 2)
    bad = stream, labels._replace(target=torch.full_like(labels.target, torch.nan))
    skipped = engine.train_step([good, bad], 1)
    kept = all(
        torch.equal(p, before[name][0]) and torch.equal(engine.optimizer.state[p]["exp_avg"], before[name][1])
        for name, p in trained.items()
    )
    result = engine.train_step(batches_of(ranks, flux, 1, 2), 1)
    return {"taken": taken, "skipped": skipped.grad_norm, "kept": kept, "then": (result.loss, result.grad_norm)}


CLIPS = {"norm": 0.05, "layer": 0.02, "value": 1e-4}


def test_gradients_are_limited_as_a_whole_by_layer_and_by_value_and_not_stepped_if_not_finite(folder: Path) -> None:
    flux = toy_flux.pipeline(folder)
    denoiser, layers = toy_flux.denoiser_and_layers(flux, None)
    stream, labels = toy_flux.micro_batch(flux, 0, 0, 0)
    for layer in layers:
        stream = layer(stream)
    flux.maths.loss(stream, labels).mean().backward()
    gradients = {name: p.grad for name, p in denoiser.named_parameters()}
    names = {id(p): name for name, p in denoiser.named_parameters()}
    expected: dict[str, dict[str, torch.Tensor]] = {"norm": {}, "layer": {}, "value": {}}
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert whole > CLIPS["norm"]
    for layer in layers:
        own = {names[id(p)]: p.grad for p in layer.parameters()}
        norm = torch.stack([g.norm() for g in own.values()]).norm()
        for name, gradient in own.items():
            expected["norm"][name] = gradient * CLIPS["norm"] / whole
            expected["layer"][name] = gradient * min(1.0, CLIPS["layer"] / norm)
            expected["value"][name] = gradient.clamp(-CLIPS["value"], CLIPS["value"])
    ranks = run_ranks(step_and_skip, 2, folder)
    for way, values in expected.items():
        taken = {name: torch.from_numpy(off) for rank in ranks for name, off in rank["taken"][way].items()}
        assert taken.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(taken[name], toy_flux.LEARNING_RATE * value, rtol=1e-3, atol=1e-7)
    plain = toy_flux.train_plainly(folder, None, 1, 2, STEPS, CLIP)
    for rank in ranks:
        assert rank["kept"] and torch.tensor(rank["skipped"]).isnan()
        assert rank["then"] == pytest.approx((plain["losses"][1], plain["norms"][1]), rel=1e-4)


def train_with_dropout(ranks: Ranks, folder: Path, stages: int, recompute: bool) -> list[float]:
    """Job: losses with dropout in the adapter."""
    ranks = ranks.with_stages(stages)
    flux = toy_flux.pipeline(folder)
    engine, _ = engine_of(ranks, flux, toy_flux.adapter(dropout=0.5), 4, CLIP, recompute)
    return [engine.train_step(batches_of(ranks, flux, step, 4), step).loss for step in range(STEPS)]


def test_dropout_is_the_same_at_any_number_of_stages_and_when_recomputed(folder: Path) -> None:
    (one,) = run_ranks(train_with_dropout, 1, folder, 1, False)
    two = run_ranks(train_with_dropout, 2, folder, 2, True)
    without = toy_flux.train_plainly(folder, toy_flux.adapter(), 1, 4, STEPS, CLIP)["losses"]
    assert two[0] == two[1] == pytest.approx(one, rel=1e-6)
    assert one != pytest.approx(without, rel=1e-4)


def evaluate_and_predict(ranks: Ranks, folder: Path) -> tuple[list, list]:
    """Job: per-sample losses and predictions of three micro-batches of two shapes, after a training step."""
    ranks = ranks.with_stages(ranks.world_size)
    flux = toy_flux.pipeline(folder)
    engine, _ = engine_of(ranks, flux, None, 1, 0.0)
    losses = engine.evaluate(batches_of(ranks, flux, 7, 3), 3)
    predictions = engine.predict(batches_of(ranks, flux, 7, 3), 3)
    engine.train_step(batches_of(ranks, flux, 0, 1), 0)
    after = engine.evaluate(batches_of(ranks, flux, 7, 3), 3)
    assert not torch.equal(torch.cat(losses), torch.cat(after)), "training changes what is evaluated"
    return [t.numpy() for t in losses], [t.numpy() for t in predictions]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_evaluation_gives_every_stage_every_sample(folder: Path, stages: int) -> None:
    flux = toy_flux.pipeline(folder)
    _, layers = toy_flux.denoiser_and_layers(flux, None)
    for losses, predictions in run_ranks(evaluate_and_predict, stages, folder):
        for index in range(3):
            stream, labels = toy_flux.micro_batch(flux, 7, 0, index)
            with torch.no_grad():
                for layer in layers:
                    stream = layer(stream)
                expected = flux.maths.loss(stream, labels)
            assert torch.allclose(torch.from_numpy(predictions[index]), stream, atol=1e-6)
            assert torch.allclose(torch.from_numpy(losses[index]), expected, rtol=1e-5)


def test_a_stage_with_two_outputs_runs_its_backward_pass_once() -> None:
    """The stock engine runs it once per output that requires a gradient."""
    assert run_ranks(backward_calls.count, 2, "ours")[0] == backward_calls.MICRO_BATCHES
    assert run_ranks(backward_calls.count, 2, "stock")[0] == 2 * backward_calls.MICRO_BATCHES


def stock_gradient_norms(ranks: Ranks) -> tuple[float, float]:
    """Job: the norm by which the stock engine clips, and the norm of this stage's gradient before clipping."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from utils.parallel.backend import initialize_deepspeed

    initialize_deepspeed()
    torch.manual_seed(ranks.rank)
    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
    module = PipelineModule(layers, num_stages=2, partition_method="uniform", loss_fn=lambda y, _: y.square().mean())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1e-6, "steps_per_print": 10**9}
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    before = []
    engine.clip_fp32_gradients, clip = (lambda: before.append(total_norm(module)) or clip()), engine.clip_fp32_gradients
    kept = {}
    engine.zero_grad = lambda *_: kept.update(after=total_norm(module))
    engine.train_batch(iter([(torch.ones(2, 4), torch.zeros(2))]))
    return before[0] * 1e-6 / kept["after"], before[0]


def total_norm(module: torch.nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()


def test_the_stock_engine_clips_by_the_first_stages_norm_alone() -> None:
    """Which is why ours computes its own; that it is right is shown against one process above."""
    (used, first), (used_last, last) = run_ranks(stock_gradient_norms, 2)
    assert used == pytest.approx(first, rel=1e-3) and used_last == pytest.approx(first, rel=1e-3)
    assert (first**2 + last**2) ** 0.5 != pytest.approx(first, rel=1e-2)


def train_beside_an_unused_weight(ranks: Ranks) -> tuple[float, int]:
    """Job: after three steps the weight that nothing uses, and how often modules were walked through on the way."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    torch.manual_seed(0)
    layer = backward_calls.Dual()
    layer.unused = torch.nn.Parameter(torch.ones(1))
    module = DenoiserPipeline(
        [layer, backward_calls.Head()], [(0, 2)], lambda *fields: fields, lambda y, _: y.square().mean(1)
    )
    engine = Engine(module, torch.optim.AdamW(module.parameters(), lr=0.1), accumulation=1, clip_norm=0.0)
    batch = (torch.full((2, backward_calls.WIDTH), 1.0 + ranks.data_rank),), (torch.zeros(2),)
    engine.train_step([batch], 0)
    walks, modules = 0, torch.nn.Module.named_modules

    def counted(self: torch.nn.Module, *arguments: Any, **keys: Any) -> Any:
        nonlocal walks
        walks += self is module
        return modules(self, *arguments, **keys)

    torch.nn.Module.named_modules = counted
    for step in (1, 2):
        engine.train_step([batch], step)
    torch.nn.Module.named_modules = modules
    return layer.unused.item(), walks


def test_a_weight_without_a_gradient_decays_alike_on_any_number_of_data_ranks() -> None:
    """The stock engine gives it a gradient of zeros before gradients are averaged."""
    ((alone, walks),) = run_ranks(train_beside_an_unused_weight, 1)
    both = {value for value, _ in run_ranks(train_beside_an_unused_weight, 2)}
    assert both == {alone} and alone == pytest.approx((1 - 0.1 * 0.01) ** 3)
    assert walks == 0, "a step with one data rank looks at no module"
