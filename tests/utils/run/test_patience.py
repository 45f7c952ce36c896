"""A run ends when evaluations gain nothing any more, and leaves what a whole run leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import nan
from pathlib import Path

import pytest

from tests.runs import metrics, only_run
from tests.utils.run.test_goes_on import run_here, with_looks
from tests.utils.run.test_webhook import Server, served
from utils.run.patience import Patience
from utils.run.signals import StopRequests


@pytest.fixture
def server() -> Iterator[Server]:
    with served() as own:
        yield own


@pytest.mark.parametrize(
    ("losses", "is_over"),
    [
        ([], False),
        ([3.0], False),
        ([3.0, 4.0], False),
        ([3.0, 4.0, 3.5], True),
        ([3.0, 4.0, 2.9], False),
        # As low as before is no gain, and neither is what is no number.
        ([3.0, 3.0, 3.0], True),
        ([nan, 3.0, nan], False),
        ([3.0, nan, nan], True),
    ],
)
def test_evaluations_without_gain_are_counted(losses: list[float], is_over: bool) -> None:
    patience = Patience(2, "held/loss")
    patience.follow(list(enumerate(losses)))
    assert patience.is_over is is_over
    never = Patience()
    never.follow(list(enumerate(losses)))
    assert not never.is_over


def test_a_run_without_gain_ends_early_with_its_export(
    write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture, server: Server
) -> None:
    """And tells each evaluation and the end to the server that is named, whose address is nowhere in its folder."""
    keys = {"eval_patience": 1, "eval_before_first_step": True, "save_every_n_steps": None, "optimizer__lr": 3.0}
    keys["monitoring"] = {"webhook": server.address}
    stop = StopRequests()
    config = with_looks(write_config, checkpoint_every_n_steps=None, warmup_steps=0, **keys)
    assert not run_here(config, stop=stop) and stop.exit_code == 0
    run = only_run(config)
    evaluated = metrics(run, "held/loss")
    assert sorted(evaluated) == [0, 2] and evaluated[2] > evaluated[0]
    assert sorted(metrics(run, "train/loss")) == [1, 2]
    assert (run / "step2" / "adapter_model.safetensors").is_file() or (run / "epoch1").is_dir()
    assert (run / "global_step2").is_dir()
    assert "held/loss was lowest at step 0" in caplog.text and (run / "run.html").is_file()
    first, second, end = server.received
    assert [first["event"], first["step"], first["numbers"]["held/loss"]] == ["evaluation", 0, evaluated[0]]
    assert second["step"] == 2 and "held/loss_quantile_0.50" in second["numbers"]
    assert [end["event"], end["how"], end["step"], end["of"]] == ["end", "stopped", 2, 4] and end["run"] == run.name
    texts = [path for path in run.rglob("*") if path.suffix in (".toml", ".json", ".html", ".jsonl")]
    assert len(texts) > 5 and not any(server.address in path.read_text() for path in texts)
