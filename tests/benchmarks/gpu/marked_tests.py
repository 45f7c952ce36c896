"""The tests that need a GPU, such as resuming to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator


def measure() -> Iterator[tuple[str, str]]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield "pytest -m gpu", "; ".join([lines[-1].strip("= ") if lines else run.stderr[-200:], *failed])
    if run.returncode:
        sys.stdout.write(run.stdout[-6000:])
