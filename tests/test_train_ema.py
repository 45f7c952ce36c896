"""Moving averages in real runs: what they are, across checkpoints and layouts, and what is made of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import models
from models.assembly.stage import load_stage
from tests.optimizers.test_ema import coefficients
from tests.runs import launch, metrics, only_run
from utils.settings.reader import read_all
from utils.settings.run_tables import EMASettings

Tensors = dict[str, torch.Tensor]


def state(run: Path, step: int, kind: str) -> Tensors:
    """What a checkpoint holds by parameter name: "weights", or "ema". Where there is a master it is the weight."""
    tensors: Tensors = {}
    for file in (run / f"global_step{step}").glob("state-*.safetensors"):
        tensors |= load_file(file)
    found = {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}
    return {
        name: tensors.get(f"optimizer/{name}/master", found[name]) if kind == "weights" else found[name]
        for name in found
    }


def weights_at_start(config: Path, stages: int) -> Tensors:
    settings, _, _ = read_all(config, models.choices(), stages)
    tensors: Tensors = {}
    for stage in range(stages):
        staged = load_stage(models.find("flux")(settings.model, settings.seed), settings, stage)
        tensors |= {name: p.detach() for name, p in staged.trained(staged.stage_layers(stage)).items()}
    return tensors


def assert_averages(averages: Tensors, settings: EMASettings, weights: list[Tensors]) -> None:
    """That they are the closed form in float64 of the weights from the start to the last step."""
    assert averages.keys() == weights[0].keys()
    parts = coefficients(settings, len(weights) - 1)
    for name, average in averages.items():
        expected = sum(part * weights[step][name].double() for step, part in parts.items())
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def held(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """The keys for one picture to be evaluated."""
    (tmp_path / "one").mkdir()
    for name in ("1.png", "1.txt"):
        shutil.copy(pictures / name, tmp_path / "one")
    data = {"resolutions": [64], "directory": [{"path": str(tmp_path / "one")}]}
    (tmp_path / "held.toml").write_text(toml.dumps(data))
    return {"eval_datasets": [{"name": "held", "config": str(tmp_path / "held.toml")}]}


FULL = {"adapter": None, "model__dtype": "bfloat16", "optimizer__lr": 1e-4}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "1 process": (1, {}, {"decay": 0.9, "warmup": "ratio"}),
    "2 data ranks": (2, {}, {"warmup": "power", "power": 1.0, "device": "cpu"}),
    "masters on 2 stages": (
        2,
        {"pipeline_stages": 2, **FULL},
        {"decay": 0.6, "warmup": "none", "update_interval": 2, "evaluate": False},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_the_closed_form_and_leave_training_alone(
    write_config: Callable[..., Path], held: dict[str, Any], layout: str
) -> None:
    """They are those of the weights of their own run, which is evaluated on the way and, where there are data ranks,
    divides them like the optimizer's state; there its weights are compared, bit for bit, with those of a run without
    averages."""
    processes, keys, ema = LAYOUTS[layout]
    keys = {**keys, "max_steps": 4, "checkpoint_every_n_steps": 1}
    divided = {"zero_stage": 1, "offload_optimizer": True} if layout == "2 data ranks" else {}
    config = write_config(**keys, **held, **divided, eval_every_n_steps=2, ema=ema)
    start = weights_at_start(config, keys.get("pipeline_stages", 1))
    codes, log = launch(config, processes=processes)
    assert set(codes) == {0}, log
    run = only_run(config).rename(config.with_name("averaged"))
    weights = [start, *(state(run, step, "weights") for step in range(1, 5))]
    assert any(not torch.equal(weights[0][name], weights[4][name]) for name in start)
    assert sorted(metrics(run, "held/ema_loss")) == ([0, 2, 4] if ema.get("evaluate", True) else [])
    assert_averages(state(run, 4, "ema"), EMASettings(**ema), weights)
    assert (run / "global_step4" / "state-0.1.safetensors").exists() == bool(divided)
    if divided:
        assert "zero_stage:   1, optimizer state divided among 2 data ranks" in log
        assert "adamw in the machine's memory" in log
        config = write_config(**keys)
        codes, log = launch(config, processes=processes)
        assert set(codes) == {0}, log
        for step in range(1, 5):
            plain = state(only_run(config), step, "weights")
            assert all(torch.equal(plain[name], weights[step][name]) for name in start)


def test_they_go_on_across_a_checkpoint_on_another_layout(write_config: Callable[..., Path]) -> None:
    ema = {"decay": 0.7, "warmup": "ratio"}
    config = write_config(max_steps=3, checkpoint_every_n_steps=1, pipeline_stages=2, ema=ema)
    start = weights_at_start(config, 2)
    assert launch(config, processes=2)[0] == [0, 0]
    run = only_run(config)
    config = write_config(max_steps=6, checkpoint_every_n_steps=1, ema=ema)
    codes, log = launch(config, "--resume_from_checkpoint", str(run))
    assert codes == [0], log
    weights = [start, *(state(run, step, "weights") for step in range(1, 7))]
    for step in (3, 6):
        assert_averages(state(run, step, "ema"), EMASettings(**ema), weights[: step + 1])


def test_they_begin_and_end_where_a_run_is_resumed_with_them_and_without(write_config: Callable[..., Path]) -> None:
    ema = {"decay": 0.9, "warmup": "ratio"}
    keys = {"checkpoint_every_n_steps": 1}
    assert launch(write_config(max_steps=1, **keys))[0] == [0]
    config = write_config(max_steps=3, ema=ema, **keys)
    run = only_run(config)
    codes, log = launch(config, "--resume_from_checkpoint", str(run))
    assert codes == [0] and "global_step1 has no moving averages: those of [ema] begin with its weights" in log, log
    assert_averages(state(run, 3, "ema"), EMASettings(**ema), [state(run, step, "weights") for step in (1, 2, 3)])
    # Where averaging began is kept.
    config = write_config(max_steps=4, ema=ema, **keys)
    assert launch(config, "--resume_from_checkpoint", str(run))[0] == [0]
    weights = [state(run, step, "weights") for step in (1, 2, 3, 4)]
    assert_averages(state(run, 4, "ema"), EMASettings(**ema), weights)
    config = write_config(max_steps=5, **keys)
    codes, log = launch(config, "--resume_from_checkpoint", str(run))
    assert codes == [0] and "the moving averages of" in log and "end here: the run has no [ema]" in log, log
    assert not state(run, 5, "ema")


@pytest.mark.parametrize("export", ["beside", "instead"])
def test_what_is_exported_is_what_was_measured_and_drawn(
    write_config: Callable[..., Path], held: dict[str, Any], export: str
) -> None:
    """A run that begins with what was exported measures and draws the same, also on one stage."""
    sample = export == "instead"
    ema = {"decay": 0.8, "warmup": "none", "export": export, "sample": sample}
    drawn = {"prompts": ["a red picture"], "width": 64, "height": 64, "steps": 2}
    keys = {**held, "checkpoint_every_n_steps": None}
    config = write_config(
        **keys, pipeline_stages=2, eval_every_n_steps=3, ema=ema, sampling={**drawn, "sample_every_n_steps": 6}
    )
    codes, log = launch(config, processes=2)
    assert codes == [0, 0], log
    run = only_run(config).rename(config.with_name("averaged"))
    names = {path.name for path in run.glob("epoch*")}
    assert names == ({"epoch3", "epoch3_ema"} if export == "beside" else {"epoch3"})
    losses = {name: metrics(run, f"held/{name}") for name in ("loss", "ema_loss", "ema_loss_quantile_0.50")}
    assert all(sorted(values) == [0, 3, 6] for values in losses.values())
    assert losses["loss"][0] == losses["ema_loss"][0] and losses["loss"][6] != losses["ema_loss"][6]

    measured = {"epoch3": "loss", "epoch3_ema": "ema_loss"} if export == "beside" else {"epoch3": "ema_loss"}
    for name, loss in measured.items():
        file = run / name / "adapter_model.safetensors"
        with safe_open(file, framework="pt") as opened:
            assert ("average" in opened.metadata().get("weights", "")) == (loss == "ema_loss")
        sampling = {**drawn, "sample_before_first_step": True}
        config = write_config(**keys, max_steps=1, adapter__init_from_existing=str(file), sampling=sampling)
        codes, log = launch(config)
        assert codes == [0], log
        assert metrics(only_run(config), "held/loss")[0] == losses[loss][6]
        pictures = [run / "samples" / "step000006", only_run(config) / "samples" / "step000000"]
        first, second = (Image.open(place / "00_a_red_picture.png").tobytes() for place in pictures)
        assert (first == second) == ((loss == "ema_loss") == sample)
        shutil.rmtree(only_run(config))


def test_a_stop_while_they_are_evaluated_leaves_the_weights(write_config: Callable[..., Path]) -> None:
    keys = {"pipeline_stages": 2, "lr_scheduler": "constant"}
    config = write_config(**keys, max_steps=2)
    assert launch(config, processes=2)[0] == [0, 0]
    expected = state(only_run(config), 2, "weights")
    shutil.rmtree(only_run(config))

    shutil.copy(config.with_name("data.toml"), config.with_name("held.toml"))
    config = write_config(
        **keys,
        max_steps=500,
        eval_datasets=[{"name": "held", "config": str(config.with_name("held.toml"))}],
        eval_before_first_step=False,
        eval_every_n_steps=2,
        eval_micro_batch_size_per_gpu=1,
        ema={"decay": 0.9, "warmup": "none"},
    )
    codes, log = launch(config, processes=2, stop_after="held/loss")
    assert codes == [143, 143], log
    run = only_run(config)
    assert sorted(metrics(run, "held/loss")) == [2] and not metrics(run, "held/ema_loss")
    assert (run / "latest").read_text() == "global_step2"
    weights, averages = state(run, 2, "weights"), state(run, 2, "ema")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(not torch.equal(weights[name], averages[name]) for name in expected)
