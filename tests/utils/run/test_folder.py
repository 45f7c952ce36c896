"""What a run's folder holds of the user's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.folder import create
from utils.settings.schema import Settings

CONFIG = """# mine
[monitoring]
enable_wandb = true
wandb_api_key = "0123secret"
"""


def test_files_are_kept_as_given_but_for_the_accounts_key(tmp_path: Path) -> None:
    config, dataset = tmp_path / "run.toml", tmp_path / "data.toml"
    config.write_text(CONFIG)
    dataset.write_text("# data")
    settings = Settings(
        output_dir=tmp_path / "runs",
        dataset=dataset,
        eval_datasets=[{"name": "held/out", "config": dataset}],
        model={"type": "flux"},
        optimizer={"type": "adamw", "lr": 1e-3},
        monitoring={"enable_wandb": True, "wandb_api_key": "0123secret"},
    )
    folder = create(settings, Ranks(), config)
    assert {path.name for path in folder.iterdir()} == {
        "config.toml",
        "settings.toml",
        "dataset.toml",
        "dataset_held_out.toml",
    }
    assert (folder / "config.toml").read_text() == CONFIG.replace("0123secret", "")
    assert not any("secret" in path.read_text() for path in folder.iterdir())


def test_a_place_that_takes_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(
        output_dir=tmp_path / "file" / "runs",
        dataset=tmp_path / "data.toml",
        model={"type": "flux"},
        optimizer={"type": "adamw", "lr": 1e-3},
    )
    with pytest.raises(UserError, match="key `output_dir`: the run's folder .*file/runs.* cannot be made"):
        create(settings, Ranks(), tmp_path / "run.toml")
