"""The tests that need a GPU, such as resuming to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from tests.benchmarks.setting import ROOT

MARK = "pytest.mark.gpu"


def measure() -> Iterator[tuple[str, str]]:
    # Only these files: others cannot be imported without PyAV.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = run.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield "pytest -m gpu", "; ".join([lines[-1].strip("= ") if lines else run.stderr[-200:], *failed])
    if run.returncode:
        sys.stdout.write(run.stdout[-6000:])
