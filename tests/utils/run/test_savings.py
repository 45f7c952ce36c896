"""What is advised where memory does not suffice: that it may be set, is not set already, and takes less."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.assembly.memory import Planner
from models.assembly.room import parallelism_of
from models.assembly.stage import partition
from optimizers import find
from tests.models import tiny_flux
from tests.models.assembly.test_fitting import BLOCKS, large_folder
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.dataset.samples import Bucket
from utils.run.savings import Parallelism, Saving, of_weights, to_draw, to_evaluate, to_sample, to_train, ways_for
from utils.settings.advice import allows
from utils.settings.run_tables import EMASettings, SamplingSettings
from utils.settings.schema import Settings

PICTURE = Bucket(1024, 1024, 1)
MODEL, OPTIMIZER = "model__", "optimizer__"
"""What the keys of tables begin with."""
CHOICES: list[list[dict[str, Any]]] = [
    [{"activation_checkpointing": way} for way in (False, True, "offload", "auto")]
    + [{"activation_checkpointing": True, "activation_checkpointing_every_n_blocks": 2}],
    [{"blocks_to_swap": swapped} for swapped in (0, 2, BLOCKS, "auto")]
    + [{"blocks_to_swap": 4, "disable_block_swap_for_eval": True}],
    [{"zero_stage": stage} for stage in range(4)],
    [{"offload_optimizer": away} for away in (False, True)],
    [{"ema": ema} for ema in (None, EMASettings(), EMASettings(device="cpu"))],
    [{"micro_batch_size_per_gpu": size} for size in (1, 3, [[512, 4], [1024, 1]])],
    [{}, {"eval_micro_batch_size_per_gpu": 2}, {"image_micro_batch_size_per_gpu": 2}],
    [{"cache_text_embeddings": cached} for cached in (False, True)],
    [{"pipeline_stages": stages} for stages in (1, 2)]
    + [{"pipeline_stages": 2, "schedule": "interleaved", "gradient_accumulation_steps": 4}],
    [{"optimizer__type": name} for name in ("adamw", "adamw8bit", "soap")]
    + [{"optimizer__rounding": "kahan"}, {"optimizer__gradient_release": True, "gradient_clipping": 0.0}],
    [{"model__transformer_dtype": kept} for kept in (None, "bfloat16", "float8", "int4")],
]
WAYS: list[Callable[..., list[Saving]]] = [to_train, to_evaluate, to_sample, of_weights]


def settings_with(adapted: bool, **keys: Any) -> Settings:
    """Of the miniature Flux, whose folder and sizes no rule looks at."""
    flux = tiny_flux.pipeline(tiny_flux.MINI_FLUX)
    own = {name: value for name, value in keys.items() if "__" not in name}
    settings = settings_of(flux, LoraSettings(type="lora", rank=1) if adapted else None, **own)
    in_model, in_optimizer = (
        {name.removeprefix(table): value for name, value in keys.items() if name.startswith(table)}
        for table in (MODEL, OPTIMIZER)
    )
    optimizer = find(in_optimizer.get("type", "adamw")).settings(**{"type": "adamw", "lr": 1e-3} | in_optimizer)
    model = settings.model.model_copy(update=in_model)
    return settings.model_copy(update={"model": model, "optimizer": optimizer})


def sound(count: int) -> Iterator[tuple[Settings, Parallelism]]:
    """Combinations of the choices that a run may have, with numbers of data ranks."""
    draw = random.Random(0)
    bases = {adapted: settings_with(adapted) for adapted in (True, False)}
    while count:
        adapted = draw.random() < 0.5
        settings = settings_with(
            adapted, **{key: value for choice in CHOICES for key, value in draw.choice(choice).items()}
        )
        changed = {key: getattr(settings, key) for key in Settings.model_fields}
        if allows(bases[adapted], **changed):
            count -= 1
            stages = settings.pipeline_stages
            yield settings, Parallelism([BLOCKS] * stages, draw.choice((1, 2)))


def test_what_is_advised_may_be_set_and_is_not_set() -> None:
    """A rule that refused it would send the user in a circle."""
    for settings, parallelism in sound(50):
        given = [
            saving
            for ways, planned in product(WAYS, (False, True))
            for saving in ways(settings, parallelism, planned=planned)
        ]
        for saving in [*given, *to_draw(settings, parallelism)]:
            assert allows(settings, **saving.changes), saving
            assert not saving.changes or settings.model_copy(update=dict(saving.changes)) != settings, saving
        assert len({saving.says for saving in to_train(settings, parallelism)}) == len(to_train(settings, parallelism))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_folder(tmp_path_factory.mktemp("flux"))


def planner_of(folder: Path, settings: Settings, data_ranks: int) -> Planner:
    kept = settings.model.transformer_dtype
    flux = tiny_flux.pipeline(folder, dtype="bfloat16", **({"transformer_dtype": kept} if kept else {}))
    shapes = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tiny_flux.features((512, 512)).items()}
    encoder = SimpleNamespace(feature_shapes=lambda bucket: shapes)
    staged = partition(flux, settings, flux.weights.build_empty())
    return Planner(settings, flux, staged, [encoder], {PICTURE: 1}, data_ranks, [PICTURE])


@pytest.mark.parametrize(
    ("adapted", "data_ranks", "keys"),
    [
        (True, 2, {"micro_batch_size_per_gpu": 2, "model__transformer_dtype": "float8"}),
        (True, 1, {"pipeline_stages": 2, "schedule": "interleaved", "gradient_accumulation_steps": 4}),
        (False, 1, {"ema": EMASettings(), "activation_checkpointing": True}),
        (False, 4, {"zero_stage": 1, "activation_checkpointing": True, "activation_checkpointing_every_n_blocks": 3}),
    ],
)
def test_what_is_advised_changes_the_plan(folder: Path, adapted: bool, data_ranks: int, keys: dict[str, Any]) -> None:
    settings = settings_with(adapted, **keys, model__dtype="bfloat16")
    sampling = SamplingSettings(prompts=["a"], sample_every_n_steps=1)
    settings = settings.model_copy(update={"sampling": sampling})
    planner = planner_of(folder, settings, data_ranks)
    parallelism = parallelism_of(planner, settings)
    assert sum(parallelism.blocks) == BLOCKS and parallelism.data_ranks == data_ranks
    phases = {"training": to_train, "evaluation": to_evaluate, "sampling": to_sample}
    advised = {phase: ways(settings, parallelism) for phase, ways in phases.items()}
    before = peaks(planner, settings)
    for saving in {saving.says: saving for own in advised.values() for saving in own if saving.changes}.values():
        changed = settings.model_copy(update=dict(saving.changes))
        after = peaks(planner_of(folder, changed, data_ranks), changed)
        for phase in [phase for phase, own in advised.items() if saving.says in [one.says for one in own]]:
            assert after[phase] < before[phase], (phase, saving)


def peaks(planner: Planner, settings: Settings) -> dict[str, int]:
    return planner.phases.peaks(planner.plans(settings, planner.swapped(settings)))


def test_the_ways_are_those_of_what_a_run_was_doing() -> None:
    """As it is called in the log and by the watch."""
    settings, parallelism = settings_with(True, micro_batch_size_per_gpu=2), Parallelism([BLOCKS])
    for names, ways in {
        ("evaluation 3", "evaluation after step 3", "evaluation ema_3", "evaluation of averages"): to_evaluate,
        ("samples 3", "samples after step 3"): to_sample,
        ("step 3", "step 3, waiting for its data", "checkpoint of step 3"): to_train,
    }.items():
        assert all(ways_for(name, settings, parallelism) == ways(settings, parallelism) for name in names)
