"""The flags of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NEWEST_RUN = ""
"""What --resume_from_checkpoint holds when it names no folder."""
ALONE = {
    flag: ("resume_from_checkpoint", "cache_only", "regenerate_cache", "dump_dataset", "check", other)
    for flag, other in (("export", "sample_only"), ("sample_only", "export"))
}
"""Flags that ask for one thing -> those that ask for something that is not done with it."""
FLAGS: dict[str, dict[str, Any]] = {
    "config": {"type": Path, "required": True, "help": "TOML file of the run"},
    "resume_from_checkpoint": {
        "nargs": "?",
        "const": NEWEST_RUN,
        "metavar": "FOLDER",
        "help": "go on from this checkpoint, or the newest of this run folder, or of the newest run of this config",
    },
    "export": {
        "metavar": "CHECKPOINT",
        "help": "export the weights of this checkpoint, or of the newest of this run folder, as the config asks for, "
        "and end",
    },
    "sample_only": {
        "metavar": "CHECKPOINT",
        "help": "draw the config's samples with the weights of this checkpoint, or of the newest of this run folder, "
        "and end",
    },
    "cache_only": {"action": "store_true", "help": "encode the datasets and end"},
    "regenerate_cache": {"action": "store_true", "help": "encode everything again"},
    "trust_cache": {"action": "store_true", "help": "take files seen before as unchanged, without looking at them"},
    "reset_dataloader": {"action": "store_true", "help": "on resuming, begin the epoch's data from the start"},
    "reset_optimizer": {"action": "store_true", "help": "on resuming, begin with an optimizer that remembers nothing"},
    "reset_optimizer_params": {
        "action": "store_true",
        "help": "on resuming, take the keys of [optimizer] from the config where they differ from the checkpoint's",
    },
    "dump_dataset": {
        "type": Path,
        "metavar": "FOLDER",
        "help": "write what the trainer sees of the data, decoded, with a page to look through, and end",
    },
    "check": {"action": "store_true", "help": "check config, datasets and folders, print the plan, and end"},
    "master_port": {"type": int, "help": "port at which the processes meet, where the launcher names none"},
    "local_rank": {"type": int, "help": "given by launchers; the environment's LOCAL_RANK is what counts"},
}
