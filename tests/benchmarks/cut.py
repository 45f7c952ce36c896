"""What the ways to cut a model give, counted for LoRA of rank 32 at full size, blocks recomputed, accumulation 8.

Operations: those of the stage that has most, against equal shares. Memory: the largest planned peak of a stage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.assembly.cut import operations_of, with_cut
from models.assembly.memory import GIB, Planner
from models.assembly.stage import partition
from optimizers.adamw import AdamWSettings
from tests.models.full_size import ALL, FullSize
from utils.adapters.lora import LoraSettings
from utils.settings.schema import Settings

METHODS = ("parameters", "time", "memory")
STAGES = (2, 4)
RANK, ACCUMULATION = 32, 8


def measure() -> Iterator[str]:
    yield f"{'':24}stages  " + "".join(f"{f'{method}: operations, GiB':>30}" for method in METHODS)
    for model in ALL:
        with tempfile.TemporaryDirectory() as folder:
            planner = planner_of(model, Path(folder))
            for stages in STAGES:
                cells = [_cut(planner, stages, method) for method in METHODS]
                yield f"{model.name:24}{stages:6}  " + "".join(f"{cell:>30}" for cell in cells)


def planner_of(model: FullSize, folder: Path) -> Planner:
    """The planner of a run of one stage."""
    pipeline = model.pipeline(folder)
    settings = Settings(
        output_dir=folder,
        dataset=folder,
        model=pipeline.options,
        adapter=LoraSettings(type="lora", rank=RANK),
        optimizer=AdamWSettings(type="adamw", lr=1e-4),
        gradient_accumulation_steps=ACCUMULATION,
        activation_checkpointing=True,
    )
    staged = partition(pipeline, settings, pipeline.weights.build_empty())
    return Planner(settings, pipeline, staged, model.encoders, {model.bucket: 1})


def _cut(planner: Planner, stages: int, method: str) -> str:
    settings = planner.settings.model_copy(update={"pipeline_stages": stages, "partition_method": method})
    cut = with_cut(planner, settings)
    operations = operations_of(planner, cut)
    most = max(operations) * stages / sum(operations)
    largest = max(plan.total for plan in planner.plans(cut, planner.swapped(cut)))
    return f"{most:.3f}, {largest / GIB:.1f}"
