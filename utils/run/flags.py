"""The flags of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.settings import diffusion_pipe

NEWEST_RUN = ""
"""What --resume_from_checkpoint holds when it names no folder."""
ALONE = {
    flag: ("resume_from_checkpoint", "cache_only", "regenerate_cache", "dump_dataset", "check", other)
    for flag, other in (("export", "sample_only"), ("sample_only", "export"))
}
"""Flags that ask for one thing -> those that ask for something that is not done with it."""
OF_ONE_CONFIG = ("export", "sample_only", "dump_dataset")
"""Flags that ask for something of one config's own."""
FLAGS: dict[str, dict[str, Any]] = {
    "config": {
        "type": Path,
        "required": True,
        "nargs": "+",
        "action": "extend",
        "metavar": "FILE",
        "help": "TOML file of the run; of several, each is run on its own, one after the other",
    },
    "resume_from_checkpoint": {
        "nargs": "?",
        "const": NEWEST_RUN,
        "metavar": "FOLDER",
        "help": "go on from this checkpoint, or the newest of this run folder, or of the newest run of this config; "
        "of several configs each goes on from its own newest, and begins if it has none",
    },
    "export": {
        "metavar": "CHECKPOINT",
        "help": "export the weights of this checkpoint, or of the newest of this run folder, as the config asks for, "
        "and end",
    },
    "sample_only": {
        "metavar": "CHECKPOINT",
        "help": "draw the config's samples with the weights of this checkpoint, or of the newest of this run folder, "
        "or of this exported file or folder, and end",
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


def check_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the process, as argparse does, if flags do not go together."""
    for name in arguments.foreign:
        flag = diffusion_pipe.FLAGS[name]
        if not flag.harmless(getattr(arguments, f"foreign_{name}")):
            parser.error(f"--{name}: {flag.advice}")
    resets = [name for name in FLAGS if name.startswith("reset_") and getattr(arguments, name)]
    if resets and arguments.resume_from_checkpoint is None:
        parser.error(f"--{resets[0]} says how to resume; give --resume_from_checkpoint with it")
    for flag in [flag for flag in ALONE if getattr(arguments, flag) is not None]:
        if others := [name for name in ALONE[flag] if getattr(arguments, name) not in (None, False)]:
            parser.error(f"--{flag} does nothing else; leave --{others[0]} out, or --{flag}")
        if getattr(arguments, flag) == "":
            parser.error(f"--{flag}: name a checkpoint, or a run's folder")
    if len(arguments.configs) > 1:
        _check_list(parser, arguments)


def _check_list(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    seen: set[Path] = set()
    for config in arguments.configs:
        if config.resolve() in seen:
            parser.error(f"--config: {config} is named twice; to run it twice, copy it")
        seen.add(config.resolve())
    if own := [name for name in OF_ONE_CONFIG if getattr(arguments, name) is not None]:
        parser.error(f"--{own[0]} is for one config; name one alone with it")
    if arguments.resume_from_checkpoint:
        parser.error(
            "--resume_from_checkpoint: with several configs each goes on from its own newest checkpoint; leave "
            f"{arguments.resume_from_checkpoint} out, or name one config"
        )


def words_of(arguments: argparse.Namespace) -> Iterator[str]:
    """The command line again, without its configs."""
    foreign = {name: f"foreign_{name}" for name in arguments.foreign}
    for name, place in {**{name: name for name in FLAGS if name != "config"}, **foreign}.items():
        value = getattr(arguments, place)
        if value is None or value is False:
            continue
        yield f"--{name}"
        if value is not True and value != NEWEST_RUN:
            yield str(value)
