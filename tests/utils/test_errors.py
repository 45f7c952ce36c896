"""Names from files command no terminal and break no line."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import toml

import train as train_py
from utils.errors import Problem, UserError, printable, without_controls
from utils.ranks import Ranks, disconnect
from utils.run import reporting
from utils.run.dataset_page import PageEntry, write_page
from utils.run.signals import StopRequests


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("größe 🐈.png", "größe 🐈.png"),
        ("a\x1b[2J.png", "a\\x1b[2J.png"),
        ("a\nb\tc\r.png", "a\\x0ab\\x09c\\x0d.png"),
        ("a\x9b31m\x7f", "a\\x9b31m\\x7f"),
        (os.fsdecode(b"a\xff.png"), "a\\udcff.png"),
    ],
)
def test_names_are_one_line_without_commands(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(Path(name)) == shown


def test_what_is_found_twice_is_told_once() -> None:
    found = [Problem("a.toml", "key `x`", "no such key"), Problem("b.toml", "", "empty")]
    assert str(UserError([*found, found[0]])) == str(UserError(found))
    assert str(UserError([*found, found[0]])).startswith("2 problems\n")


def test_a_log_keeps_its_lines_and_commands_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert without_controls("one\n\ttwo\x1b]0;title\x07") == "one\n\ttwo\\x1b]0;title\\x07"
    handler = reporting._AboveProgressBar()
    handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "cache: %s", ("\x1b[31m",), None))
    reporting.report_user_error(UserError.of("is \x1b[8m wrong", "a\nb"), Ranks())
    said = capsys.readouterr().err
    assert "cache: \\x1b[31m\n" in said and "is \\x1b[8m wrong" in said and "\x1b[31m" not in said


def test_lists_and_pages_have_names_in_one_line(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A broken file of an evil name among good ones."""
    config = write_config(max_failed_fraction=0.5)
    data = toml.loads(config.with_name("data.toml").read_text())
    folder = tmp_path / "evil"
    folder.mkdir()
    for file in Path(data["directory"][0]["path"]).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "a\x1b[2J\nb.png").write_bytes(b"broken")
    data["directory"][0]["path"] = str(folder)
    config.with_name("data.toml").write_text(toml.dumps(data))
    try:
        arguments = train_py.parse_arguments(["--config", str(config), "--cache_only"])
        assert train_py.run(arguments, Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()
    (listed,) = (tmp_path / "runs").rglob("failed.csv")
    assert "\x1b" not in listed.read_text()
    rows = list(csv.DictReader(listed.read_text().splitlines()))
    assert [row["file"] for row in rows] == [f"{folder}/a\\x1b[2J\\x0ab.png"]
    page = write_page(tmp_path, "t", "s", [PageEntry("a caption", {}, {"file": "a\x1b\nb", "other": "\udcff"})])
    assert "a\\x1b\\x0ab" in page.read_text() and "\\udcff" in page.read_text()
