"""The command that draws what a config trains: a picture, or the config's mistakes in one screen."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.assembly.timestep_plot import main
from tests.runs import ROOT

EXAMPLE = (ROOT / "examples" / "flux_lora.toml").read_text()


def config(folder: Path, *lines: str, without: str = "sigmoid_scale = 1.0\n") -> Path:
    """The example, whose paths lead nowhere, with further lines in [model]."""
    assert without in EXAMPLE
    path = folder / "run.toml"
    path.write_text(EXAMPLE.replace(without, "").replace("[model]\n", "\n".join(["[model]", *lines, ""])))
    return path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m utils.diffusion.timesteps` runs it."""
    picture = tmp_path / "timesteps.png"
    monkeypatch.setattr(sys, "argv", ["timesteps", "--config", str(config(tmp_path)), "--plot", str(picture)])
    runpy.run_module("utils.diffusion.timesteps", run_name="__main__")
    with Image.open(picture) as drawn:
        assert drawn.height > 400


def test_every_key_of_the_curves_changes_the_picture(tmp_path: Path) -> None:
    drawn = []
    for lines in ([], ["sigmoid_scale = 2.0"], ["min_t = 0.3"], ["weighting_scheme = 'cosmap'"]):
        main(["--config", str(config(tmp_path, *lines)), "--plot", str(tmp_path / "one.png")])
        with Image.open(tmp_path / "one.png") as picture:
            drawn.append(np.asarray(picture).tobytes())
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["min_snr_gamma = 5"], r"\[model\] min_snr_gamma.*flow matching"),
        (["min_t = 0.5", "max_t = 0.4"], r"\[model\]: min_t and max_t"),
        (["shift = 3.0"], r"\[model\] shift: excludes flux_shift"),
        (["mode_scale = 0.5"], r"\[model\] mode_scale.*is for"),
        (["shift = -1"], r"\[model\] shift: must be greater than 0"),
        (["sift = 1"], r"\[model\] sift: no such key; did you mean `shift`"),
    ],
)
def test_mistakes_of_the_config_are_told(tmp_path: Path, lines: list[str], told: str) -> None:
    path = config(tmp_path, *lines)
    with pytest.raises(SystemExit, match=told) as ended:
        main(["--config", str(path), "--plot", str(tmp_path / "one.png")])
    assert str(path) in str(ended.value.code) and len(str(ended.value.code).splitlines()) < 10
    assert not (tmp_path / "one.png").exists()


def test_a_missing_config_and_an_impossible_picture_are_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be read"):
        main(["--config", str(tmp_path / "none.toml"), "--plot", str(tmp_path / "one.png")])
    for picture in ("one.xyz", "nowhere/one.png"):
        with pytest.raises(SystemExit, match="error: .*(xyz|nowhere)"):
            main(["--config", str(config(tmp_path)), "--plot", str(tmp_path / picture)])
