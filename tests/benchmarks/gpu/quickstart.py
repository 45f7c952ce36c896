"""`make quickstart` on the card."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from tests.benchmarks.setting import ROOT


def measure() -> Iterator[tuple[str, str]]:
    started = time.monotonic()
    command = [sys.executable, "examples/quickstart/run.py"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = [line for line in run.stdout.splitlines() if "eval loss" in line]
    yield "800 steps of the miniature", f"{said[-1].strip() if said else 'FAILED'}, {time.monotonic() - started:.0f} s"
    if run.returncode or not said:
        sys.stdout.write(run.stdout[-4000:])
