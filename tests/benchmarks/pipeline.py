"""Two stages against one: how much of the ideal m / (m + 1) of 1F1B a step of m micro-batches reaches. Stages of two
pieces idle less, and may be above it.

Full training of a small Flux of equal blocks, cut in the middle or into four pieces, and of the miniature, cut by
counted operations. Each process has one thread and one core. The reference is the same step in one stage, in two
processes side by side that know nothing of each other, so that both cores are as busy as with two stages. Two figures:

- by the clock: the shortest of some steps each, rounds of both alternating. It means something on a quiet machine.
- by processor time, which other programs do not lengthen much: every instruction of the schedule takes the least that
  it took in any step, and the two stages' instructions are put in order, a receiver behind its sender. It has all that
  the engine adds, and not the time in which both processes wait.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.benchmarks.setting import MINI_FLUX
from tests.processes import run_ranks
from utils.ranks import Ranks

ACCUMULATIONS = (1, 2, 4, 8, 16)
ROUNDS, STEPS = 3, 5
BATCH, TEXT, CELLS = 16, 16, 8
EQUAL_BLOCKS = {"num_layers": 0, "num_single_layers": 8}
WANTED = 0.9
WIRE = ("Send", "Recv")


class Steps(NamedTuple):
    """What some steps took in seconds.

    Attributes:
        clock: the shortest.
        instructions: the schedule's, in order, with the least processor time of each.
    """

    clock: float
    instructions: list[tuple[str, float]]


def measure() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "transformer"
        folder.mkdir()
        config = json.loads((MINI_FLUX / "transformer" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **EQUAL_BLOCKS}))
        for title, source, starts in (
            ("equal blocks", Path(name), (5,)),
            ("equal blocks", Path(name), (3, 5, 7)),
            ("miniature", MINI_FLUX, (4,)),
        ):
            yield f"{title}, cut before {' and '.join(f'layer {start}' for start in starts)}:"
            yield from _efficiencies(source, starts)


def _efficiencies(folder: Path, starts: tuple[int, ...]) -> Iterator[str]:
    alone: list[Steps] = []
    staged: list[list[Steps]] = []
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(2) as pool:
            alone += [found for (found,) in pool.map(lambda core: run_ranks(steps, 1, folder, (), core), range(2))]
        staged.append(run_ranks(steps, 2, folder, starts, 0))
    for accumulation in ACCUMULATIONS:
        one = min(found[accumulation].clock for found in alone)
        two = min(max(found[accumulation].clock for found in ranks) for ranks in staged)
        stages = [_least(ranks[stage][accumulation] for ranks in staged) for stage in range(2)]
        busy, together = _sum(_least(found[accumulation] for found in alone)), _in_order(stages)
        ideal = accumulation / (accumulation + 1)
        clock, processor = one / two / 2 / ideal, busy / together / 2 / ideal
        verdict = "ok" if processor >= WANTED else "TOO SLOW"
        each = " and ".join(f"{1000 * _sum(stage):.0f}, wire {1000 * _sum(stage, WIRE):.1f}" for stage in stages)
        yield (
            f"accumulation {accumulation:2}: {1000 * busy:.0f} ms, {1000 * together:.0f} in two stages (busy {each}), "
            f"efficiency {processor * ideal:.3f}, {processor:.3f} of the ideal: {verdict}; by the clock "
            f"{1000 * one:.0f} and {1000 * two:.0f} ms, {clock:.3f}"
        )


def _sum(instructions: Sequence[tuple[str, float]], begins: tuple[str, ...] = ("",)) -> float:
    """The seconds of the instructions whose names begin so."""
    return sum(seconds for name, seconds in instructions if name.startswith(begins))


def _least(found: Iterable[Steps]) -> list[tuple[str, float]]:
    """Each instruction, and the least processor time that it took."""
    together = list(zip(*(one.instructions for one in found), strict=True))
    return [(same[0][0], min(seconds for _, seconds in same)) for same in together]


def _in_order(stages: Sequence[list[tuple[str, float]]]) -> float:
    """The end of the last instruction of both stages, if what receives waits for what sends, and nothing else does."""
    ends, clocks, places = {}, [0.0, 0.0], [0, 0]
    while any(place < len(stage) for place, stage in zip(places, stages, strict=True)):
        for number, stage in enumerate(stages):
            while places[number] < len(stage):
                name, seconds = stage[places[number]]
                # By its sender, its kind, and its number among those.
                sender = 1 - number if name.startswith("Recv") else number
                message = (
                    sender,
                    name.removeprefix("Send").removeprefix("Recv"),
                    sum(other == name for other, _ in stage[: places[number]]),
                )
                if name.startswith("Recv") and message not in ends:
                    break
                begin = max(clocks[number], ends[message] if name.startswith("Recv") else 0.0)
                clocks[number] = begin + seconds
                if name.startswith("Send"):
                    ends[message] = clocks[number]
                places[number] += 1
    return max(clocks)


def steps(ranks: Ranks, folder: Path, starts: tuple[int, ...], core: int) -> dict[int, Steps]:
    """Job of a rank: some steps with each accumulation.

    Args:
        starts: the first layers of all pieces but the first; none for one stage.
        core: that of the first rank.
    """
    os.sched_setaffinity(0, {(core + ranks.rank) % os.cpu_count()})
    torch.set_num_threads(1)
    found = {}
    for accumulation in ACCUMULATIONS:
        engine, batches = engine_and_batches(folder, starts, accumulation)
        taken: list[tuple[str, float]] = []
        engine._INSTRUCTION_MAP = {
            kind: _timed(kind.__name__, run, taken) for kind, run in engine._INSTRUCTION_MAP.items()
        }
        clock, instructions = float("inf"), None
        for step in range(STEPS):
            taken.clear()
            began = time.perf_counter()
            engine.train_step(batches, step)
            clock = min(clock, time.perf_counter() - began)
            pairs = zip(instructions or taken, taken, strict=True)
            instructions = [(name, min(before, seconds)) for (name, before), (_, seconds) in pairs]
        found[accumulation] = Steps(clock, instructions)
    return found


def _timed(name: str, run: Any, taken: list[tuple[str, float]]) -> Any:
    def timed(engine: Any, **keys: Any) -> None:
        began = time.process_time()
        run(engine, **keys)
        taken.append((name, time.process_time() - began))

    return timed


def engine_and_batches(folder: Path, starts: tuple[int, ...], accumulation: int) -> tuple[Any, Sequence[Any]]:
    """An engine with this rank's stage, random weights, and the micro-batches of a step."""
    from models.flux import FluxOptions, FluxPipeline
    from utils.diffusion.losses import Labels
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    options = FluxOptions(
        type="flux", dtype="float32", diffusers_path=folder, max_sequence_length=TEXT, from_scratch=True
    )
    flux = FluxPipeline(options, seed=0)
    denoiser = flux.weights.build()
    layers = flux.to_layers(denoiser)
    flux.weights.fill(denoiser, flux.weights.open(denoiser), layers)
    bounds = list(zip((0, *starts), (*starts, len(layers)), strict=True))
    module = DenoiserPipeline(layers, bounds, flux.stream_type, flux.maths.loss, stages=min(2, len(bounds)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    engine = Engine(module, optimizer, accumulation=accumulation, clip_norm=1.0)
    sizes = denoiser.config
    draw = torch.Generator().manual_seed(0)

    def batch() -> tuple[Any, Labels]:
        x_t = torch.randn(BATCH, sizes.in_channels // 4, CELLS, CELLS, generator=draw)
        features = {
            "t5": torch.randn(BATCH, TEXT, sizes.joint_attention_dim, generator=draw),
            "clip_pooled": torch.randn(BATCH, sizes.pooled_projection_dim, generator=draw),
        }
        labels = Labels(torch.randn(x_t.shape, generator=draw), torch.ones(BATCH, 1, 1, 1))
        return flux.prepare_inputs(features, x_t, torch.rand(BATCH, generator=draw)), labels

    return engine, [batch() for _ in range(accumulation)]
