"""Runs every benchmark, or those that are named: `python -m tests.benchmarks [overhead] [startup] ...`."""

from __future__ import annotations

import importlib
import subprocess
import sys

BENCHMARKS = (
    "overhead",
    "startup",
    "store",
    "caching",
    "many_samples",
    "backward_calls",
    "parity",
    "precision",
    "optimizers",
    "cut",
    "pipeline",
    "wire",
    "balance",
    "travelling",
    "loading",
    "checkpoint",
)


def main(names: list[str]) -> int:
    if len(names) != 1:
        # Each in a process of its own: they start process groups, and leave their coordinates in the environment.
        return max(subprocess.run([sys.executable, "-m", __package__, name]).returncode for name in names or BENCHMARKS)
    (name,) = names
    benchmark = importlib.import_module(f"{__package__}.{name}")
    sys.stdout.write(f"\n{name}: {benchmark.__doc__.splitlines()[0]}\n")
    for line in benchmark.measure():
        sys.stdout.write(f"  {line}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
