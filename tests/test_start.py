"""What is imported before a mistake is told: time that the user waits for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import models
from tests.runs import ROOT

SLOW = ("accelerate", "av", "bitsandbytes", "deepspeed", "diffusers", "peft", "torch._dynamo", "transformers")
"""What only a run with sound settings imports."""
SCRIPT = """
import contextlib, os, sys
import train

with contextlib.suppress(SystemExit):
    train.main(["--help"])
seen = {name for name in ("torch", *%(slow)r) if name in sys.modules}
codes = [train.main(["--config", config]) for config in sys.argv[1:]]
seen_later = [name for name in %(slow)r if name in sys.modules]
os.write(1, f"\\n{(sorted(seen), codes, seen_later)}\\n".encode())
"""


def test_mistakes_are_told_before_the_slow_imports(tmp_path: Path) -> None:
    """For all models in one new interpreter, in which none of the tests has imported anything."""
    configs = [tmp_path / f"{name}.toml" for name in models.available()]
    for config in configs:
        config.write_text(
            f'dataset = "none.toml"\n[model]\ntype = "{config.stem}"\nno_key = 1\n'
            '[adapter]\ntype = "lora"\nrank = 1\n[optimizer]\ntype = "adamw"\nno_key = 1\n'
        )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % {"slow": SLOW}, *map(str, configs)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == [f"{([], [1] * len(configs), [])}"], done.stderr
    assert done.stderr.count("[model] no_key: no such key") == len(configs)
    assert done.stderr.count("[optimizer] no_key: no such key") == len(configs)
