"""A display that goes away ends nothing, and what it does not take is written elsewhere."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from utils.ranks import Ranks
from utils.run.display import LOG, Shown, Unshown, go_on_in, guarded_streams
from utils.run.reporting import start_logging


@pytest.fixture
def logging_kept() -> Iterator[None]:
    """Leaves the logging of the tests as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def broken_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def closed_file() -> io.TextIOWrapper:
    stream = open(os.devnull, "w")
    stream.close()
    return stream


GONE = {
    "pipe": (broken_pipe, "Broken pipe"),
    "full": (full_disk, "No space left on device"),
    "closed": (closed_file, "closed file"),
    "none": (lambda: None, "it is closed"),
}


@pytest.mark.parametrize("how", GONE)
def test_a_log_goes_on_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_kept: None, how: str
) -> None:
    opened, reason = GONE[how]
    stream = opened()
    monkeypatch.setattr(sys, "stderr", stream)
    with guarded_streams():
        start_logging(Ranks())
        logging.getLogger("penstock").info("before there is a folder")
        with tqdm(total=2) as bar:
            bar.update(1)
        go_on_in(tmp_path)
        logging.getLogger("penstock").warning("after that")
        sys.stderr.write("an error\n")
    assert sys.stderr is stream
    first, *lines = (tmp_path / LOG).read_text().splitlines()
    assert first.startswith("stderr cannot be written (") and reason in first
    assert [line.split(" ", 1)[-1].strip() for line in lines if line] == [
        "INFO    before there is a folder",
        "WARNING after that",
        "error",
    ]
    if how != "closed" and stream:
        # What Python does at its end.
        stream.flush()
        stream.close()


def test_a_disk_that_has_room_again_is_written_again(tmp_path: Path) -> None:
    class Disk(io.StringIO):
        full = False

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    disk, unshown = Disk(), Unshown()
    shown = Shown(disk, "stderr", unshown)
    for full, text in ((False, "one"), (True, "two"), (False, "three")):
        disk.full = full
        shown.write(text)
    assert disk.getvalue() == "onethree"
    unshown.place(tmp_path / "nowhere")
    unshown.place(tmp_path)
    assert (tmp_path / LOG).read_text().endswith("what it does not take is here\ntwo")


def test_what_is_shown_is_in_no_other_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_kept: None
) -> None:
    with guarded_streams():
        go_on_in(tmp_path)
        start_logging(Ranks())
        logging.getLogger("penstock").info("here")
        sys.stdout.write("there\n")
    shown = capsys.readouterr()
    assert "here" in shown.err and shown.out == "there\n" and not list(tmp_path.iterdir())


def test_a_traceback_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", broken_pipe())
    with pytest.raises(RuntimeError), guarded_streams():
        go_on_in(tmp_path)
        sys.stderr.write("first\n")
        raise RuntimeError("our own mistake")
    assert "RuntimeError: our own mistake" in (tmp_path / LOG).read_text()


def test_a_process_whose_readers_are_gone_ends_with_its_own_code(tmp_path: Path) -> None:
    """Also what C writes to a descriptor that was closed goes into no file."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from utils.run.display import go_on_in, guarded_streams\n"
        "with guarded_streams():\n"
        f"    go_on_in(Path({str(tmp_path)!r}))\n"
        f"    file = open({str(tmp_path / 'data')!r}, 'w')\n"
        "    os.write(2, b'from a library')\n"
        "    sys.stderr.write('told\\n'); sys.stdout.write('a plan\\n')\n"
        "    file.write('data'); file.close()\n"
        "sys.exit(7)\n"
    )
    with open("/dev/full", "w") as full:
        command = f'exec {sys.executable} -c "$CODE" 2>&-'
        done = subprocess.run(["sh", "-c", command], stdout=full, env={**os.environ, "CODE": code}, check=False)
    assert done.returncode == 7
    assert (tmp_path / "data").read_text() == "data"
    assert "told\n" in (tmp_path / LOG).read_text() and "a plan\n" in (tmp_path / LOG).read_text()
