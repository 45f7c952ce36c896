"""What a run's folder holds of the user's files."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.folder import create, go_on
from utils.settings.reader import settings_hash
from utils.settings.schema import Settings

CONFIG = """# mine
[monitoring]
enable_wandb = true
wandb_api_key = "0123secret"
webhook = "https://example.org/0123secret"
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
        monitoring={"enable_wandb": True, "wandb_api_key": "0123secret", "webhook": "https://example.org/0123secret"},
    )
    folder = create(settings, Ranks(), config)
    assert {path.name for path in folder.iterdir()} == {
        "config.toml",
        "settings.toml",
        "dataset.toml",
        "dataset_held_out.toml",
    }
    without = CONFIG.replace("https://example.org/0123secret", "").replace("0123secret", "")
    assert (folder / "config.toml").read_text() == without
    assert not any("secret" in path.read_text() for path in folder.iterdir())


KEYS = {
    "escapes": ('wandb_api_key = "\\u0030123secret"', "0123secret"),
    "escapes in its name": ('"wandb_api\\u005fkey" = "0123secret"', "0123secret"),
    "several lines": ('wandb_api_key = """\\\n  0123\\\n  secret"""', "0123secret"),
    "a comment": ('wandb_api_key = "0123secret" # or 0123secret\n# wandb_api_key = "4567secret"', "0123secret"),
    "a comment alone": ('# wandb_api_key = "4567secret"', None),
    "a comment without one": ('wandb_api_key = "0123secret"\n# wandb_api_key = "" # or wandb_api_key in', "0123secret"),
    "a part of a name": ('wandb_api_key = "enable"', "enable"),
    "a table in a line": ("", "0123secret"),
}


@pytest.mark.parametrize("spelled", KEYS)
def test_the_accounts_key_is_never_written(tmp_path: Path, spelled: str) -> None:
    lines, key = KEYS[spelled]
    config, dataset = tmp_path / "run.toml", tmp_path / "data.toml"
    table = f"[monitoring]\nenable_wandb = true\n{lines}\n"
    if not lines:
        table = 'monitoring = { enable_wandb = true, wandb_api_key = "\\U00000030123secret" }\n'
    config.write_text(f'epochs = 3\n# mine\n{table}[[eval_datasets]]\nname = "a"\nconfig = "b.toml"\n')
    if not lines:
        config.write_text(f'epochs = 3\n{table}eval_datasets = [{{ name = "a", config = "b.toml" }}]\n')
    dataset.write_text("# data")
    assert tomllib.loads(config.read_text())["monitoring"].get("wandb_api_key") == key
    settings = Settings(
        output_dir=tmp_path / "runs",
        dataset=dataset,
        model={"type": "flux"},
        optimizer={"type": "adamw", "lr": 1e-3},
        monitoring={"enable_wandb": True, "wandb_api_key": key},
    )
    written = (create(settings, Ranks(), config) / "config.toml").read_text()
    assert "secret" not in written and "123" not in written
    left = {"monitoring": {"enable_wandb": True}, "eval_datasets": [{"name": "a", "config": "b.toml"}], "epochs": 3}
    found = tomllib.loads(written)
    assert found["monitoring"].pop("wandb_api_key", "") == "" and found == left


def test_each_time_that_a_run_goes_on_leaves_its_settings(tmp_path: Path) -> None:
    """Beside those of the start; the hash that exports have is at the head of each."""
    config, dataset = tmp_path / "run.toml", tmp_path / "data.toml"
    config.write_text("# first")
    dataset.write_text("# data")
    keys = {"output_dir": tmp_path / "runs", "dataset": dataset, "model": {"type": "flux"}}
    first, second, third = (Settings(**keys, optimizer={"type": "adamw", "lr": lr}) for lr in (1e-3, 1e-4, 1e-5))
    folder = create(first, Ranks(), config)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    config.write_text("# second")
    dataset.write_text("# more data")
    assert go_on(folder, second, Ranks(), config, 500) == folder
    go_on(folder, third, Ranks(), config, 500)
    go_on(folder, third, Ranks(), config, 700)
    assert {path.name: path.read_text() for path in folder.iterdir() if path.is_file()} == before
    records = {path.name: path for path in folder.iterdir() if path.is_dir()}
    assert records.keys() == {"resumed_step500", "resumed_step500_2", "resumed_step700"}
    assert (records["resumed_step500"] / "config.toml").read_text() == "# second"
    assert (records["resumed_step500"] / "dataset.toml").read_text() == "# more data"
    made = {"resumed_step500": second, "resumed_step500_2": third, "resumed_step700": third}
    for place, settings in {folder: first, **{records[name]: settings for name, settings in made.items()}}.items():
        head = (place / "settings.toml").read_text().splitlines()[0]
        assert head == f"# settings_hash: {settings_hash(settings)}"
    assert len({settings_hash(settings) for settings in (first, second, third)}) == 3


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
