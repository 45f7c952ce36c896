"""Several configs in one command: one run after the other, each on its own, and a table at the end."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import launch, metrics

SHORT = {"max_steps": 2, "warmup_steps": 0, "checkpoint_every_n_steps": 1}
LONG = {**SHORT, "max_steps": 500, "steps_per_print": 1, "checkpoint_every_n_steps": None}


@pytest.fixture
def write(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a config by a name."""

    def write(name: str, **changes: Any) -> Path:
        return write_config(run_name=name, **changes).rename(tmp_path / f"{name}.toml")

    return write


def table_in(log: str) -> dict[str, list[str]]:
    """The table at the end of the log: the last word of a config's path -> its other cells."""
    lines = log[log.rindex("\nconfig ") :].split("\n")[1:]
    rows = [re.split(r" {2,}", line) for line in lines if line]
    return {Path(row[0]).name: row[1:] for row in rows}


def runs_of(config: Path) -> list[Path]:
    return list((config.parent / "runs").glob(f"2*_{config.stem}"))


def test_runs_follow_each_other_and_one_that_fails_hinders_none(write: Callable[..., Path], tmp_path: Path) -> None:
    """On two ranks; of the second run, one rank's file is missing."""
    held_out = [{"name": "held", "fraction": 0.3}]
    (tmp_path / "empty").mkdir()
    configs = [
        write("a", **SHORT, eval_datasets=held_out, eval_every_n_steps=2),
        write("b", **SHORT, adapter__init_from_existing=str(tmp_path / "empty")),
        write("c", **{**SHORT, "max_steps": 3}, pipeline_stages=2),
    ]
    codes, log = launch(configs, processes=2)
    assert codes == [1, 1], log
    assert log.count("run 2 of 3: ") == 1 and log.count("error:") == 1 and "Traceback" not in log
    rows = table_in(log)
    first, last = *runs_of(configs[0]), *runs_of(configs[2])
    loss = f"{metrics(first, 'train/loss')[2]:.4f}"
    assert rows["config"] == ["run folder", "exit", "steps", "training loss", "evaluation loss", "time"]
    assert rows["a.toml"][:-1] == [str(first), "0", "2", loss, f"{metrics(first, 'held/loss')[2]:.4f}"]
    assert rows["b.toml"][:-1] == ["-", "1", "-", "-", "-"] and not runs_of(configs[1])
    assert rows["c.toml"][:-1] == [str(last), "0", "3", f"{metrics(last, 'train/loss')[3]:.4f}", "-"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_ends_the_run_and_the_list_which_can_go_on(write: Callable[..., Path], processes: int) -> None:
    configs = [write("a", **LONG), write("b", **SHORT)]
    codes, log = launch(configs, processes=processes, stop_after="step 2/500", receives=signal.SIGINT)
    # The others know of no signal of their own.
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGINT][-processes:], log
    (first,) = runs_of(configs[0])
    steps = max(metrics(first, "train/loss"))
    row = table_in(log)["a.toml"]
    assert (
        row[:3] == [str(first), row[1], str(steps)] and int(row[1]) > 128 and (first / f"global_step{steps}").is_dir()
    )
    assert table_in(log)["b.toml"][:3] == ["-", "not begun", "-"] and not runs_of(configs[1])
    if processes == 1:
        configs[0] = write("a", **{**LONG, "max_steps": steps + 1})
        codes, log = launch(configs, "--resume_from_checkpoint")
        assert codes == [0], log
        assert "no run of this config has a checkpoint yet, and so it begins" in log
        assert [table_in(log)[name][1:3] for name in ("a.toml", "b.toml")] == [["0", str(steps + 1)], ["0", "2"]]


def test_all_configs_are_read_before_the_first_run(write: Callable[..., Path], tmp_path: Path) -> None:
    configs = [write("a", **SHORT), write("b", **SHORT, no_key=1), write("c", **SHORT, optimizer__lr="much")]
    codes, log = launch(configs)
    assert codes == [1] and log.count("error:") == 1
    assert re.search(r"error: 2 problems\n\n\S*b.toml\n  key `no_key`.*\n\n\S*c.toml\n  \[optimizer\] lr", log), log
    assert "run 1 of" not in log and not (tmp_path / "runs").exists()


def test_a_list_is_checked_one_by_one(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    configs = [write("a", model__diffusers_path=str(tmp_path / "empty")), write("b", **SHORT, pipeline_stages=2)]
    codes, log = launch(configs, "--check")
    assert codes == [1] and "2 = 2 stages x 1 data ranks" in log, log
    rows = table_in(log)
    assert rows["config"] == ["exit", "time"] and [rows[name][0] for name in ("a.toml", "b.toml")] == ["1", "0"]


def test_a_launcher_that_would_begin_the_list_again_is_refused(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    words = ["--config", str(write("a", **SHORT)), str(write("b", **SHORT))]
    with pytest.raises(ValueError, match="--max_restarts: with several configs"):
        train.run_list(train.parse_arguments(words), None, None)
