"""What holds for every test, and the fixtures of small real runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Set before torch starts: the machine's cores are shared with the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# Until all tests are collected: imports and items are objects by the million, all of which stay.
gc.disable()

from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

from tests.processes import start_server, use_server  # noqa: E402
from tests.runs import COLOURS, config_writer, write_short_flux  # noqa: E402

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """The workers of pytest-xdist share the server of the process that starts them: it imports torch and all the rest
    once for all."""
    if not hasattr(node.config, "server"):
        node.config.server = start_server()
    node.workerinput["server"] = node.config.server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a fixture of a module is run by one process: the tests of a file, in test_models.py those of a
    model. Files that start processes come first: they take long, and a long one at the end would leave a core idle."""
    items.sort(key=lambda item: not _starts_processes(item.module))
    for item in items:
        model = item.callspec.params.get("model", "") if hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path} {model}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests of several processes find the server ready that these come from; and the collector looks at what tests
    make, not at all that is imported."""
    gc.freeze()
    gc.enable()
    if hasattr(session.config, "workerinput"):
        use_server(session.config.workerinput["server"])
        return
    starting = any(map(_starts_processes, {item.module for item in session.items}))
    if starting and not session.config.option.collectonly:
        start_server()


def _starts_processes(module: ModuleType) -> bool:
    return any(hasattr(module, name) for name in ("run_ranks", "launch"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven captioned pictures of two shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(COLOURS):
        size = (96, 48) if number % 3 == 0 else (64, 64)
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} picture")
    return folder


@pytest.fixture(scope="session")
def short_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def write_config(tmp_path: Path, pictures: Path, short_flux: Path) -> Callable[..., Path]:
    return config_writer(tmp_path, pictures, short_flux)
