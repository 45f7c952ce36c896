"""State to resume from, keyed by parameter name: it loads on any number of stages and data ranks.

    global_step1200/
        state-0.safetensors ...   per stage: "weights/<parameter>" and "optimizer/<parameter>/<key>"
        progress.json             where the run stood, and what it was made with
    latest                        the name of the newest complete checkpoint

A checkpoint is written beside its place and renamed when all its bytes are on disk; `latest` follows. What is random
or ordered needs no state: it is a function of the seed and the progress.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils import ranks as together
from utils.ranks import Ranks
from utils.run.folder import LATEST
from utils.run.progress import Progress
from utils.settings.errors import SettingsError
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

FORMAT = 1
NamedParameters = Mapping[str, torch.nn.Parameter]


def identity_of(settings: Settings) -> dict[str, Any]:
    """The settings without which a checkpoint's weights would mean another model, or its draws be others."""
    adapter = settings.adapter
    return {
        "seed": settings.seed,
        "[model] type": settings.model.type,
        "[adapter] type": adapter and adapter.type,
        "[adapter] rank": adapter and adapter.rank,
        "[adapter] alpha": adapter and adapter.alpha,
    }


def save(
    folder: Path,
    ranks: Ranks,
    progress: Progress,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    made_with: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of this step into the run's folder; all ranks call it, one per stage writes.

    Args:
        parameters: the trainable parameters of this stage by name.
        made_with: settings that a resumed run should share; told to the user where they differ.
    """
    name = f"global_step{progress.step}"
    unfinished = folder / f"{name}.unfinished"
    if ranks.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    together.barrier()
    if ranks.data_rank == 0:
        _write_synced(unfinished / f"state-{ranks.stage}.safetensors", _state(parameters, optimizer))
    together.barrier()
    if ranks.is_main:
        content = {"format": FORMAT, "progress": progress.as_dict(), "made_with": dict(made_with)}
        (unfinished / "progress.json").write_text(json.dumps(content, indent=2))
        shutil.rmtree(folder / name, ignore_errors=True)
        unfinished.rename(folder / name)
        replace_text(folder / LATEST, name)
    together.barrier()
    return folder / name


def _state(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"weights/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _as_kept(value: torch.Tensor, device: torch.device) -> torch.Tensor | int:
    """A piece of an optimizer's state as the optimizer keeps it: torch counts steps in a float tensor on the CPU,
    bitsandbytes in a plain int, which as a tensor it would bring to the GPU and read back at every step."""
    if value.ndim:
        return value.to(device)
    return value if value.is_floating_point() else int(value)


def _write_synced(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes a small file so that it always holds either the old or the new text."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


class Checkpoint:
    """The checkpoint in `folder`, opened for reading.

    Raises:
        SettingsError: it is incomplete or of another format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            content = json.loads((self.folder / "progress.json").read_text())
        except (OSError, ValueError) as error:
            raise SettingsError.of(
                f"the checkpoint cannot be read ({error}); name another with --resume_from_checkpoint",
                str(self.folder),
            ) from error
        if content.get("format") != FORMAT:
            raise SettingsError.of("the checkpoint is of another version of penstock", str(self.folder))
        self.progress = Progress(**content["progress"])
        self.made_with: dict[str, Any] = content["made_with"]
        files = [safe_open(path, framework="pt") for path in sorted(self.folder.glob("state-*.safetensors"))]
        self._files = {key: file for file in files for key in file.keys()}

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Whether what decides what the weights mean and what is drawn is as it was; see `identity_of`.

        Raises:
            SettingsError: naming what differs.
        """
        old = self.made_with["identity"]
        changed = [
            f"{key} = {identity[key]} (checkpoint: {old.get(key)})" for key in identity if identity[key] != old.get(key)
        ]
        if changed:
            raise SettingsError.of(
                f"{', '.join(changed)}; resume with what the checkpoint was made with, or start a new run with "
                "[adapter] init_from_existing",
                str(self.folder),
            )

    def check_optimizer(self, settings: Mapping[str, Any], *, new_parameters: bool, new_state: bool) -> None:
        """Whether [optimizer] is that of the checkpoint, unless the user asked for another.

        Raises:
            SettingsError: naming the keys that differ and the flag that takes the config's.
        """
        old = self.made_with["optimizer"]
        if new_state:
            return
        if old["type"] != settings["type"]:
            raise SettingsError.of(
                f"is '{settings['type']}', the checkpoint's is '{old['type']}', whose state it cannot use; pass "
                "--reset_optimizer to begin with a new state",
                str(self.folder),
                "[optimizer] type",
            )
        changed = [key for key in settings if settings[key] != old.get(key)]
        if changed and not new_parameters:
            values = ", ".join(f"{key} = {settings[key]} (checkpoint: {old.get(key)})" for key in changed)
            raise SettingsError.of(
                f"{values}; pass --reset_optimizer_params to take the config's", str(self.folder), "[optimizer]"
            )

    def starting_point(self, global_batch: int, steps_per_epoch: int, *, restart_data: bool) -> Progress:
        """Where training goes on: where the checkpoint stands, at the same place of the epoch if a step now takes
        another number of samples; with `restart_data` at the beginning of the first epoch."""
        progress = self.progress
        if restart_data:
            progress = replace(progress, epoch=0, step_in_epoch=0, epoch_loss_sum=0.0)
        progress = progress.with_global_batch(self.made_with["global_batch"], global_batch)
        if progress.step_in_epoch >= steps_per_epoch:
            progress = progress.next_epoch()
        logger.info("resuming %s at step %d, epoch %d", self.folder, progress.step, progress.epoch + 1)
        return progress

    def load_weights(self, parameters: NamedParameters) -> None:
        """Copies the weights of these parameters.

        Raises:
            SettingsError: the checkpoint lacks one, or it has another shape.
        """
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self._read(f"weights/{name}", parameter.shape))

    def load_optimizer(self, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer its state for these parameters back, in the types that it was saved in."""
        prefix = "optimizer/"
        keys: dict[str, list[str]] = {}
        for entry in self._files:
            if entry.startswith(prefix):
                name, _, key = entry.removeprefix(prefix).rpartition("/")
                keys.setdefault(name, []).append(key)
        for name, parameter in parameters.items():
            state = {key: self._read(f"{prefix}{name}/{key}") for key in keys.get(name, [])}
            optimizer.state[parameter] = {key: _as_kept(value, parameter.device) for key, value in state.items()}

    def _read(self, key: str, shape: torch.Size | None = None) -> torch.Tensor:
        if key not in self._files:
            raise SettingsError.of(
                f"'{key}' is not in the checkpoint; was it made with another [model] or [adapter]?", str(self.folder)
            )
        tensor = self._files[key].get_tensor(key)
        if shape is not None and tensor.shape != shape:
            raise SettingsError.of(
                f"'{key}' is {list(tensor.shape)}, this run's is {list(shape)}; resume with the "
                "[model] and [adapter] that it was made with",
                str(self.folder),
            )
        return tensor
