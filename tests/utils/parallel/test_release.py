"""Steps within the backward pass against steps after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimizers.adamw import AdamW
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.adapters.attach import base_name
from utils.parallel.clipping import by_layer
from utils.ranks import Ranks
from utils.settings.model_schema import ModelSettings
from utils.settings.rules import check_rules
from utils.settings.schema import Settings

STEPS = 3
CLIPS = (("norm", 0.0), ("layer", 0.02), ("value", 1e-4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux.write_folder(tmp_path_factory.mktemp("flux"))


def train(ranks: Ranks, folder: Path, stages: int) -> dict[tuple[bool, str], dict[str, Any]]:
    """Job: losses, norms and weights, and the most bytes of gradients that there were, with steps within the backward
    pass and after it. The third step has a number that is none."""
    return {
        (released, by): train_in(ranks.with_stages(stages), folder, released, by, clip)
        for released in (False, True)
        for by, clip in CLIPS
    }


def train_in(ranks: Ranks, folder: Path, released: bool, by: str, clip: float) -> dict[str, Any]:
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.partition import stage_bounds
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    flux = toy_flux.pipeline(folder)
    denoiser, layers = toy_flux.denoiser_and_layers(flux, None)
    bounds = stage_bounds("uniform", [1] * len(layers), ranks.stages)
    module = DenoiserPipeline(layers, bounds, flux.stream_type, flux.maths.loss, recompute=1)
    held = {id(p) for p in module.parameters()}
    trained = {base_name(name): p for name, p in denoiser.named_parameters() if id(p) in held}
    most, per_layer = 0, []
    for layer in module.forward_funcs:
        per_layer.append(sum(p.nbytes for p in layer.parameters() if id(p) in held))

    def measure(_: torch.nn.Parameter) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in trained.values() if p.grad is not None))

    # Before those of the engine, which let gradients go.
    for parameter in trained.values():
        parameter.register_post_accumulate_grad_hook(measure)
    optimizer = AdamW(list(trained.values()), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    engine = Engine(module, optimizer, accumulation=1, clip_norm=clip, clip_by=by, release=released)
    results = []
    for step in range(STEPS):
        stream, labels = toy_flux.micro_batch(flux, step, ranks.data_rank, 0)
        if step == 2:
            labels = labels._replace(target=torch.full_like(labels.target, torch.nan))
        result = engine.train_step([(stream, labels)], step)
        results += [result.loss, result.grad_norm]
    weights = {name: p.detach().numpy().copy() for name, p in trained.items()}
    return {"results": results, "weights": weights, "most": most, "layers": per_layer}


def test_norms_are_summed_in_one_order_in_all_runs() -> None:
    """Where a set orders parameters by their addresses, the last bit of a layer's norm differs from run to run."""
    trained = [torch.nn.Parameter(torch.zeros(1)) for _ in range(64)]
    ((*found,),) = by_layer(trained, layers=())
    assert [id(parameter) for parameter in found] == [id(parameter) for parameter in trained]


@pytest.mark.parametrize(("stages", "data_ranks"), [(1, 1), (2, 1), (1, 2)])
def test_steps_within_the_backward_pass_are_those_after_it(folder: Path, stages: int, data_ranks: int) -> None:
    for rank in run_ranks(train, stages * data_ranks, folder, stages):
        for by, _ in CLIPS:
            after, within = rank[False, by], rank[True, by]
            assert within["results"] == pytest.approx(after["results"], rel=1e-5, nan_ok=True)
            for name, values in after["weights"].items():
                torch.testing.assert_close(torch.from_numpy(within["weights"][name]), torch.from_numpy(values))
            assert after["most"] >= sum(after["layers"]) > 2 * max(after["layers"])
            assert within["most"] <= max(within["layers"]), "the gradients of more than a layer are there at once"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"gradient_accumulation_steps": 2, "gradient_clipping": 0.0}, "set gradient_accumulation_steps = 1"),
        ({}, "before the norm of the whole gradient is known; set gradient_clipping = 0"),
        ({"gradient_clipping_by": "layer", "zero_stage": 1}, "is not for zero_stage"),
        ({"gradient_clipping_by": "layer", "offload_optimizer": True}, "is not for offload_optimizer"),
        ({"gradient_clipping_by": "value", "blocks_to_swap": 2}, "is not for blocks_to_swap of a full fine-tune"),
    ],
)
def test_what_would_make_other_steps_of_them_is_refused(keys: dict[str, Any], words: str) -> None:
    optimizer = {"type": "adamw", "lr": 1e-3, "gradient_release": True}
    settings = Settings(output_dir="a", dataset="b", model=ModelSettings(type="flux"), optimizer=optimizer, **keys)
    found = [one for one in check_rules(settings, 1) if one.where == "[optimizer] gradient_release"]
    assert len(found) == 1 and words in found[0].message
