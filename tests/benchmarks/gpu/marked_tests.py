"""The tests that need a GPU, such as resuming to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from tests.benchmarks.setting import ROOT

MARK = "pytest.mark.gpu"
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")


def measure() -> Iterator[tuple[str, str]]:
    """A row for each test as soon as it is done, so that those before a test that hangs are known."""
    # Only these files: others cannot be imported without PyAV.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", *files]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as run:
        for line in run.stdout:
            said.append(line)
            name, _, outcome = line.partition(" ")
            if "::" in name and outcome.startswith(OUTCOMES):
                yield name.rpartition("/")[2], outcome.split()[0].lower()
    if run.returncode:
        sys.stdout.write("".join(said)[-6000:])
        yield "pytest -m gpu", f"FAILED, exit code {run.returncode}"
