"""The quickstart's own work: running steps, and making its picture and its report from a run folder."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def quickstart() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(QUICKSTART / "run.py")))


@pytest.fixture
def write_sample(tmp_path: Path) -> Callable[[str, str, str], None]:
    def write(step: str, name: str, colour: str) -> None:
        path = tmp_path / step / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), colour).save(path)

    return write


def test_a_failing_step_is_named_with_its_code(quickstart: SimpleNamespace) -> None:
    with pytest.raises(quickstart.StepFailed, match="training failed with exit code 3") as failure:
        quickstart.run_step("training", sys.executable, "-c", "raise SystemExit(3)")
    assert failure.value.code == 3


def test_the_picture_shows_first_over_last_in_the_order_of_prompts(
    quickstart: SimpleNamespace, tmp_path: Path, write_sample: Callable[[str, str, str], None]
) -> None:
    write_sample("step000010", "00_x", "blue")
    write_sample("step000100", "01_b", "lime")
    write_sample("step000100", "00_a", "red")
    write_sample("step000000", "00_a", "black")
    write_sample("step000000", "01_b", "gray")

    rows = quickstart.before_and_after(tmp_path)
    picture = quickstart.picture_of(rows, ["a", "b"])

    side = 64 * quickstart.ENLARGEMENT
    left, top = quickstart.LABEL_WIDTH, quickstart.LABEL_HEIGHT
    right, below = left + side + quickstart.GAP, top + side + quickstart.GAP
    corners = [(left, top), (right, top), (left, below), (right, below)]
    assert [picture.getpixel(corner) for corner in corners] == [
        (0, 0, 0),
        (128, 128, 128),
        (255, 0, 0),
        (0, 255, 0),
    ]


def test_the_report_takes_the_first_and_the_last_loss_of_the_newest_run(
    quickstart: SimpleNamespace, tmp_path: Path
) -> None:
    for name in ("20260101_00-00-00", "20260102_00-00-00"):
        (tmp_path / name).mkdir()
        rows = [("loss", 9.0, 1), ("stars/loss", 0.5, 0), ("stars/loss", 0.4, 5), ("stars/loss", 0.3, 9)]
        lines = [json.dumps({"name": metric, "value": value, "step": step}) for metric, value, step in rows]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "stars").mkdir()

    run = quickstart.newest_run(tmp_path)

    assert run.name == "20260102_00-00-00"
    assert quickstart.first_and_last(run / "metrics.jsonl", "stars/loss") == (0.5, 0.3)
