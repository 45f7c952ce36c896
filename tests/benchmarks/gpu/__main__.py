"""Runs the parts that are named, or all: `python -m tests.benchmarks.gpu [--out FILE] [environment] [attention] ...`.

Prints one table last, and puts it in the place for it in docs/benchmarks.md, or in the file that `--out` names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
TOGETHER = (
    {"environment": 30},
    {"marked_tests": 95, "quickstart": 95},
    {"first_light": 105},
    {"attention": 45},
    {"full_size": 175},
    {"optimizer_step": 30},
)
"""Parts in the order in which they run: what is right before how fast it is, and those together that may disturb one
another; and how many seconds each may take."""
PARTS = {part: seconds for parts in TOGETHER for part, seconds in parts.items()}
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="parts to run; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="file for the table")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one part, in this process; rows go to --out
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if asked.only:
        return _measure(asked.only, asked.out)
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        for parts in TOGETHER:
            chosen = [part for part in parts if part in (asked.parts or PARTS)]
            for found in pool.map(partial(_rows, folder=Path(folder)), chosen):
                rows += found
            if chosen:
                # Whoever ends this before all is done has what is done.
                _write(_table(rows), asked.out)
    sys.stdout.write(_table(rows))
    return 1 if any("FAILED" in (name, value.partition(",")[0]) for _, name, value in rows) else 0


def _rows(part: str, folder: Path) -> list[tuple[str, str, str]]:
    """What a part found: itself, a name, what was measured."""
    started, place = time.monotonic(), folder / part
    problem = _run(part, place)
    found = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    sys.stdout.write(f"-- {part}: {time.monotonic() - started:.0f} s\n")
    sys.stdout.flush()
    return [(part, name, value) for name, value in (*found, *([("FAILED", problem)] if problem else []))]


def _measure(part: str, out: Path) -> int:
    module = importlib.import_module(f"{__package__}.{part}")
    with out.open("w") as file:
        for name, value in module.measure():
            file.write(json.dumps([name, value]) + "\n")
            file.flush()
            sys.stdout.write(f"  {name}: {value}\n")
            sys.stdout.flush()
    return 0


def _run(part: str, place: Path) -> str | None:
    """Runs a part in a process of its own; what went wrong, if anything did."""
    command = [sys.executable, "-m", __package__, "--only", part, "--out", str(place)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return within(PARTS[part], command, cwd=ROOT, env=environment)


def within(seconds: float, command: list[str], **how: Any) -> str | None:
    """Runs a command; after so many seconds it is ended with all that it has started, which would take the card's time
    and memory from the next one. What went wrong, if anything did."""
    with subprocess.Popen(command, start_new_session=True, **how) as run:
        try:
            code = run.wait(seconds)
        except BaseException as error:
            os.killpg(run.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"took more than {seconds} s"
    return f"exit code {code}" if code else None


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| part | what | measured |", "|---|---|---|"]
    lines += [f"| {part} | {name} | {value} |" for part, name, value in rows]
    return "\n".join(lines) + "\n"


def _write(table: str, out: Path) -> None:
    text = out.read_text(encoding="utf-8") if out.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    out.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
