"""Runs every benchmark, or those that are named: `python -m tests.benchmarks [overhead] [startup] ...`."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = ("overhead", "startup", "backward_calls", "parity")


def main(names: list[str]) -> int:
    for name in names or BENCHMARKS:
        benchmark = importlib.import_module(f"tests.benchmarks.{name}")
        sys.stdout.write(f"\n{name}: {benchmark.__doc__.splitlines()[0]}\n")
        sys.stdout.flush()
        for line in benchmark.measure():
            sys.stdout.write(f"  {line}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
