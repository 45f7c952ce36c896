"""State to resume from, keyed by parameter name: it loads on any number of stages and data ranks.

    global_step1200/
        state-0.safetensors ...   per stage: "weights/<parameter>", "optimizer/<parameter>/<key>", "ema/<parameter>"
        state-0.1.safetensors ... what further data ranks of a stage have of the latter two, where they divide them
        progress.json             the progress of the run, what is owed, and settings that bind the checkpoint
        checksums.json            of all of these files
        done.json                 what was owed and has been done since, see `owed.py`
    latest                        the name of the newest complete checkpoint

`saving.py` writes them. Random numbers and orders need no state, since they are functions of the seed and the progress.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from optimizers.ema import EMA
from optimizers.kinds import State
from optimizers.rounding import MASTER
from optimizers.saved_state import GROUP, restore_groups, unpacked
from utils.dataset.epochs import Continued, Epochs
from utils.dataset.going_on import going_on
from utils.device_memory import size_text
from utils.errors import UserError
from utils.json_files import ANEW, read_json
from utils.ranks import Ranks, gather
from utils.run.checksums import damage_of, own_sum
from utils.run.folder import PROGRESS, checkpoints_before
from utils.run.owed import Owed, done_since, owed_in
from utils.run.progress import Progress
from utils.run.progress_file import CHECKSUMS, CHECKSUMS_KEY, MADE_WITH, read_progress
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

NamedParameters = Mapping[str, torch.nn.Parameter]
Retyped = Callable[[torch.Tensor, torch.Tensor, State], State]


@dataclass(frozen=True)
class ResumeFlags:
    """How a run goes on from a checkpoint, as the command line says.

    Attributes:
        source: a checkpoint, or a run with checkpoints; "" for the newest run, None for a new run.
        reset_dataloader: start the data from the beginning.
        reset_optimizer: start with an optimizer without state.
        reset_optimizer_params: take the keys of [optimizer] from the config where they differ from the checkpoint's.
    """

    source: str | None = None
    reset_dataloader: bool = False
    reset_optimizer: bool = False
    reset_optimizer_params: bool = False


class StartingPoint(NamedTuple):
    """The progress at which training goes on, the epochs from there on, and what is to be told of them."""

    progress: Progress
    epochs: Epochs
    remark: str | None = None


def identity_of(settings: Settings) -> dict[str, Any]:
    """The settings that must not change, or a checkpoint's weights would belong to another model or its draws would
    differ: what the class of each table declares as `binds_checkpoint`."""
    tables = {"[model] ": settings.model, **({"[adapter] ": settings.adapter} if settings.adapter else {})}
    identity = settings.binding()
    for title, table in tables.items():
        identity |= {f"{title}{key}": value for key, value in table.binding().items()}
    return identity


def run_of(settings: Settings) -> dict[str, Any]:
    """What tells a run from others in its `output_dir`, beside `identity_of`: what the tables declare as
    `tells_apart`."""
    return settings.telling() | {f"[model] {key}": value for key, value in settings.model.telling().items()}


def state_file(stage: int, share: int) -> str:
    return f"state-{stage}.{share}.safetensors" if share else f"state-{stage}.safetensors"


def _of_torch(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """The settings that are not those of a checkpoint, by key, with both values.

    A key exists on one side only if the other side has another type, or is older than the key. Then values that are
    missing, off or empty count as equal.
    """
    return [
        f"{key} = {_shown(here.get(key))} (checkpoint: {_shown(there.get(key))})"
        for key in {**here, **there}
        if (here.get(key) or None) != (there.get(key) or None)
    ]


def of_other_run(folder: Path, settings: Settings) -> list[str]:
    """By which settings the checkpoint in `folder` is one of another run than `settings` describe; empty if it is of
    that run, or so damaged that `Checkpoint` refuses it."""
    try:
        made_with = read_progress(folder, ANEW)["made_with"]
    except UserError:
        return []
    there, identity = made_with.get("run"), made_with["identity"]
    if there is None:
        return ["it does not say what it was trained on, since it is of an earlier version"]
    return differing({**run_of(settings), **identity_of(settings)}, {**there, **identity})


def damage_in(folder: Path, ranks: Ranks | None = None) -> str | None:
    """What is damaged in a checkpoint, with the file; None if it is whole. The ranks, which all call it, share the
    reading, and have the same answer."""
    ranks = ranks or Ranks()
    started, size = time.monotonic(), sum(file.stat().st_size for file in folder.glob("*"))
    files, found = _checksums(folder)
    for name in sorted(files)[ranks.rank :: ranks.world_size]:
        if found is None and (damage := damage_of(folder / name, files[name])):
            found = f"{folder / name}: {damage}"
    if found is None:
        try:
            Checkpoint(folder)
        except UserError as error:
            found = f"{error.problems[0].file}: {error.problems[0].message}"
    reasons = gather(ranks, f"whole/{folder}", found)
    found = next((reason for reason in reasons if reason), None)
    if files and found is None:
        logger.info("%s is whole: %s read in %.1f s", folder, size_text(size), time.monotonic() - started)
    return found


def _checksums(folder: Path) -> tuple[Mapping[str, Any], str | None]:
    """The checksums of a checkpoint's files by name, and what is wrong with them; those of an older version have
    none."""
    path = folder / CHECKSUMS
    if not path.exists():
        try:
            says = read_json(folder / PROGRESS).get(CHECKSUMS_KEY)
        except UserError:
            says = None
        if says:
            return {}, f"{path}: is missing"
        logger.info("%s has no checksums: it is of an earlier version", folder)
        return {}, None
    try:
        content = read_json(path, kinds={"files": dict[str, list[int]], "of_these": int})
    except UserError as error:
        return {}, f"{path}: {error.problems[0].message}"
    files = content.get("files", {})
    if content.get("of_these") != own_sum(files):
        return {}, f"{path}: is damaged: its own checksum is another"
    return files, None


class Checkpoint:
    """The checkpoint in `folder`, opened for reading.

    Raises:
        UserError: it is incomplete or has another format; names the checkpoint before it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        content = read_progress(folder, self._cure())
        self.progress = Progress.of_file(content["progress"])
        self.made_with: dict[str, Any] = {key: content["made_with"][key] for key in MADE_WITH}
        self.run: dict[str, Any] | None = content["made_with"].get("run")
        self.order: dict[str, Any] | None = content["made_with"].get("order")
        self.ema_since: int | None = content.get("ema_since")
        self.owed = owed_in(content, self.progress)
        stages = content.get("stages", len(list(folder.glob("state-*.safetensors"))))
        shares = content.get("shares", 1)
        names = [state_file(stage, share) for stage in range(stages) for share in range(shares)]
        files = [self._opened(folder / name) for name in names]
        self._files = {key: file for file in files for key in file.keys()}

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError.of(f"not a whole safetensors file ({error}); {self._cure()}", str(path)) from error

    def _cure(self) -> str:
        """What the user can do if this checkpoint cannot be read: go on from the one before it."""
        before = checkpoints_before(self.folder)
        if before:
            return f"the one before it is --resume_from_checkpoint {before[-1]}"
        return "there is none before it; name another with --resume_from_checkpoint"

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Whether the settings that bind the checkpoint are unchanged; see `identity_of`.

        Raises:
            UserError: names the settings that differ.
        """
        if changed := differing(identity, self.made_with["identity"]):
            raise UserError.of(
                f"{', '.join(changed)}; resume with what the checkpoint was made with, or start a new run with "
                "[adapter] init_from_existing",
                str(self.folder),
            )

    def warn_of_other_run(self, run: Mapping[str, Any]) -> None:
        """Tells what the checkpoint was trained on, if `run` is another; see `run_of`."""
        if self.run is not None and (changed := differing(run, self.run)):
            logger.warning("%s goes on with %s", self.folder, ", ".join(changed))

    def check_optimizer(self, settings: Mapping[str, Any], *, new_parameters: bool, new_state: bool) -> None:
        """Whether [optimizer] is that of the checkpoint, unless the user asked for another.

        Raises:
            UserError: names the keys that differ, and the flag that takes the config's values.
        """
        old = self.made_with["optimizer"]
        if new_state:
            return
        if old.get("type") != settings["type"]:
            raise UserError.of(
                f"is '{settings['type']}', the checkpoint's is '{old.get('type')}', whose state it cannot use; pass "
                "--reset_optimizer to begin with a new state",
                str(self.folder),
                "[optimizer] type",
            )
        changed = [key for key in settings if settings[key] != old.get(key)]
        if changed and not new_parameters:
            values = ", ".join(f"{key} = {settings[key]} (checkpoint: {old.get(key)})" for key in changed)
            raise UserError.of(
                f"{values}; pass --reset_optimizer_params to take the config's", str(self.folder), "[optimizer]"
            )

    def starting_point(self, epochs: Epochs, *, restart_data: bool) -> StartingPoint:
        """Where training goes on: where the checkpoint was made, also with another global batch or other data (see
        `going_on`); with `restart_data` at the beginning of its epoch."""
        progress, remark = self.progress, None
        if restart_data:
            progress = replace(progress, step_in_epoch=0, epoch_loss_sum=0.0, epoch_losses=0)
            epochs = epochs.continuing(Continued(progress.epoch, progress.step, 0, {}))
        else:
            epochs, remark = going_on(
                epochs,
                progress.epoch,
                progress.step,
                step_in_epoch=progress.step_in_epoch,
                share=progress.step_in_epoch / self.made_with["steps_in_epoch"],
                order=self.order,
            )
        if progress.step_in_epoch >= epochs.steps_in(progress.epoch):
            progress = progress.next_epoch()
        return StartingPoint(progress, epochs, remark)

    def still_owed(self) -> Owed:
        """What was due after the checkpoint's step and is not done yet."""
        owed = self.owed
        for duty in done_since(self.folder) if owed.duties else ():
            owed = owed.without(duty)
        return owed

    def check_weights(self, parameters: NamedParameters) -> None:
        """Whether the checkpoint has weights for exactly the parameters that the run trains, from its headers.

        Raises:
            UserError: names the first that does not fit.
        """
        for name, parameter in parameters.items():
            self._check(f"weights/{name}", parameter.shape)
        others = [key for key in self._files if key.startswith("weights/") and key[len("weights/") :] not in parameters]
        if others:
            raise UserError.of(
                f"has '{others[0]}', which this run does not train; resume with the [model] and [adapter] that it was "
                "made with",
                str(self.folder),
            )

    def load_weights(self, parameters: NamedParameters) -> None:
        """Copies the weights of these parameters; in another type than they had, from what is known most exactly.

        Raises:
            UserError: the checkpoint lacks one, or it has another shape.
        """
        retyped = []
        with torch.no_grad():
            for name, parameter in parameters.items():
                weight = self._read(f"weights/{name}", parameter.shape)
                if weight.dtype != parameter.dtype:
                    retyped.append(f"'{name}' was {_of_torch(weight.dtype)} and is {_of_torch(parameter.dtype)}")
                    weight = self._value(name)
                parameter.copy_(weight)
        if retyped:
            logger.info("%d of %d weights go on in another type: %s", len(retyped), len(parameters), retyped[0])

    def load_optimizer(
        self, parameters: NamedParameters, optimizer: torch.optim.Optimizer, retyped: Retyped | None = None
    ) -> None:
        """Restores the optimizer's state for these parameters, in the types in which it was saved.

        Args:
            retyped: what makes the state of a parameter that has another type than when it was saved; see
                `OptimizerKind`. None where none has.
        """
        prefix = "optimizer/"
        keys: dict[str, list[str]] = {}
        for entry in self._files:
            if entry.startswith(prefix):
                name, _, key = entry.removeprefix(prefix).rpartition("/")
                keys.setdefault(name, []).append(key)
        of_groups: dict[torch.Tensor, dict[str, Any]] = {}
        for name, parameter in parameters.items():
            state = {key: self._read(f"{prefix}{name}/{key}") for key in keys.get(name, [])}
            kept = unpacked(state, parameter.device)
            of_groups[parameter] = kept.pop(GROUP, {})
            if kept and self._read(f"weights/{name}", parameter.shape).dtype != parameter.dtype:
                assert retyped, f"{name} has another type than in {self.folder}"
                kept = retyped(parameter, self._value(name).to(parameter.device), kept)
            optimizer.state[parameter] = kept
        restore_groups(optimizer, of_groups)

    def load_ema(self, ema: EMA | None) -> None:
        """Restores the values of the averages, which have just begun with the run's weights. Warns if the checkpoint or
        the run has none."""
        if ema and self.ema_since is None:
            logger.warning("%s has no moving averages: those of [ema] begin with its weights", self.folder)
        elif ema:
            ema.since = self.ema_since
            for name, average in ema.averages.items():
                average.copy_(self._read(f"ema/{name}", average.shape))
        elif self.ema_since is not None:
            logger.warning("the moving averages of %s end here: the run has no [ema]", self.folder)

    def _value(self, name: str) -> torch.Tensor:
        """A parameter's value as exactly as it is known: that of the optimizer's master where there is one."""
        master = f"optimizer/{name}/{MASTER}"
        return self._read(master if master in self._files else f"weights/{name}")

    def _read(self, key: str, shape: torch.Size | None = None) -> torch.Tensor:
        self._check(key, shape)
        return self._files[key].get_tensor(key)

    def _check(self, key: str, shape: torch.Size | None) -> None:
        if key not in self._files:
            raise UserError.of(
                f"'{key}' is not in the checkpoint; was it made with another [model] or [adapter]?", str(self.folder)
            )
        stored = self._files[key].get_slice(key).get_shape()
        if shape is not None and stored != list(shape):
            raise UserError.of(
                f"'{key}' is {stored}, this run's is {list(shape)}; resume with the [model] and [adapter] that it was "
                "made with",
                str(self.folder),
            )
