"""Exports weights for other programs: an adapter as one file, a trained denoiser as a diffusers folder and a single
file.

Every stage writes what it holds into a part file; the main rank maps the parts into memory and writes the exports, so
that no process holds the whole model; only tensors that a further layout fuses are copied.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from optimizers.ema import EMA
from utils.adapters import in_full, mixed
from utils.adapters.kinds import COMFYUI, COMFYUI_FILE, LAYOUT, AdapterFile, ExportWishes, ModelNames
from utils.ranks import Ranks
from utils.run.attempts import Attempt
from utils.run.durable import sync_folder, write_bytes
from utils.run.export_metadata import of_file, of_training
from utils.run.file_names import DENOISER_COMFYUI, FileNames
from utils.run.progress import Progress
from utils.run.tensor_file import write_tensors
from utils.settings.schema import AdapterSettings

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
SHARD_BYTES = 5 * 2**30
OF_AVERAGES = "_ema"
"""The suffix of an export with averages beside the export of the weights."""
AVERAGES = {"weights": "exponential moving average"}
"""Metadata of an export of the averages."""
SETTINGS_HASH = "settings_hash"
"""Where the metadata say with which settings an export was made."""


@dataclass(frozen=True)
class PartFolder:
    """A module as a part of a diffusers folder.

    Attributes:
        name: of the folder.
        config: its `config.json`.
        prefix: of the names of its tensors, if several modules are trained.
        stem: of the name of the file with its weights.
    """

    name: str
    config: Mapping[str, object]
    prefix: str = ""
    stem: str = "diffusion_pytorch_model"

    def own(self, names: Iterable[str]) -> dict[str, str]:
        """Its tensors among `names`: name within the module -> name."""
        return {name.removeprefix(self.prefix): name for name in names if name.startswith(self.prefix)}


@dataclass(frozen=True)
class ExportPlan:
    """What a run's exports contain.

    Attributes:
        adapter: its settings, or None for a full fine-tune.
        dtype: of the exported weights; None for that of training.
        formats: names of the layouts to write.
        names: the names of the model's modules in files of adapters; None for a full fine-tune.
        layouts: for a full fine-tune: name of a further layout -> function from tensors with diffusers' names to
            tensors in that layout.
        folders: the modules that are trained, as parts of a diffusers folder.
        metadata: about the run, written into every file.
        frozen: the untrained tensors of the denoiser that this process holds, which a whole denoiser needs too.
        beside: what reads each tensor that a whole model needs beside its denoiser, for the process that writes them.
        note: what one must know to use an export, told with each.
        files: what the files are called.
        shard_bytes: size of the largest file of a denoiser in diffusers' layout.
    """

    adapter: AdapterSettings | None
    names: ModelNames | None
    dtype: torch.dtype | None
    formats: tuple[str, ...]
    layouts: Mapping[str, Callable[[Tensors], Tensors]]
    folders: tuple[PartFolder, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    beside: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    note: str | None = None
    files: FileNames = FileNames()
    shard_bytes: int = SHARD_BYTES


def export_name(run: Path, progress: Progress, epoch_ended: bool) -> str:
    """The name of an export, `epoch3` or `step500`; or `epoch3_step500` if an `epoch3` of another step exists, since
    epochs start again after --reset_dataloader."""
    step = f"step{progress.step}"
    if not epoch_ended:
        return step
    name = f"epoch{progress.epoch + 1}"
    there = {_step_of(run / taken) for taken in (name, name + OF_AVERAGES)}
    return name if there <= {None, str(progress.step)} else f"{name}_{step}"


EXPORT_NAME = re.compile(r"(epoch\d+(_step\d+)?|step\d+)(_ema)?")
"""The names that exports are given."""


def remove_older_exports(run: Path, keep: int) -> None:
    """Removes the exports of a run's earliest steps so that those of `keep` steps are left, and tells which. What has
    another name than an export is given stays. That one cannot be removed is told, and no error."""
    by_step: dict[int, list[Path]] = {}
    for made in exports_in(run):
        if EXPORT_NAME.fullmatch(made.folder.name) and made.metadata["step"].isdigit():
            by_step.setdefault(int(made.metadata["step"]), []).append(made.folder)
    for folder in [folder for step in sorted(by_step)[:-keep] for folder in by_step[step]]:
        try:
            # Renamed first, so that a half-removed one does not look whole if the process is killed.
            shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.removed")))
        except OSError as error:
            logger.warning("an older export cannot be removed: %s (%s)", folder, error.strerror)
        else:
            logger.info("removed an older export, as keep_exports = %d asks: %s", keep, folder.name)


def _step_of(folder: Path) -> str | None:
    """The step of an export, None if there is no such export."""
    file = next(folder.rglob("*.safetensors"), None)
    return file and _metadata_of(file).get("step", "unknown")


def _metadata_of(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


@dataclass(frozen=True)
class MadeExport:
    """An export in a run's folder, with the metadata of its files."""

    folder: Path
    metadata: Mapping[str, str]

    def is_by(self, plan: ExportPlan, step: int) -> bool:
        """Whether a run with this plan made it after this step."""
        wanted = {"step": str(step), SETTINGS_HASH: plan.metadata.get(SETTINGS_HASH)}
        return all(self.metadata.get(key) == value for key, value in wanted.items())


def exports_in(run: Path) -> list[MadeExport]:
    """The exports in a run's folder, the newest last."""
    found = []
    for folder in run.iterdir():
        file = next(folder.rglob("*.safetensors"), None) if folder.is_dir() and not folder.suffix else None
        metadata = _metadata_of(file) if file else {}
        if "step" in metadata:
            found.append((file.stat().st_mtime_ns, MadeExport(folder, metadata)))
    return [made for _, made in sorted(found, key=lambda one: one[0])]


def export_with_averages(
    folder: Path,
    ranks: Ranks,
    parameters: Mapping[str, torch.Tensor],
    plan: ExportPlan,
    step: int,
    ema: EMA | None = None,
    *,
    adds: bool = False,
    to_use: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Exports the weights, and their averages, beside them or instead of them as [ema] says; see `export`.

    Args:
        to_use: makes a context in which the parameters have the values to export.
    """
    instead = ema is not None and ema.settings.export == "instead"
    if not instead:
        with to_use():
            export(folder, ranks, parameters, plan, step, adds=adds)
    if ema:
        target = folder if instead else folder.with_name(folder.name + OF_AVERAGES)
        averaged = replace(plan, metadata={**plan.metadata, **AVERAGES})
        with ema.swapped():
            export(target, ranks, parameters, averaged, step, adds=adds)


def export(
    folder: Path,
    ranks: Ranks,
    parameters: Mapping[str, torch.Tensor],
    plan: ExportPlan,
    step: int,
    *,
    adds: bool = False,
) -> None:
    """Writes the export into `folder`; all ranks call it with the weights that they write of their stage, by name.

    Args:
        adds: what an export of the same weights has left there and this one does not write stays.

    Raises:
        Failed: on every rank, if one cannot write; nothing of it is left.
    """
    parts, unfinished = (folder.with_name(folder.name + suffix) for suffix in (".parts", ".unfinished"))
    attempt = Attempt(f"export {folder.name} {step}", ranks)
    try:
        if ranks.is_main:
            attempt.alone(_make_anew, parts)
        attempt.meet()
        if parameters or (ranks.data_rank == 0 and (plan.frozen or plan.beside)):
            own = plan if ranks.data_rank == 0 else replace(plan, frozen={}, beside={})
            attempt.alone(_write_part, parts / f"{ranks.stage}.{ranks.data_rank}.safetensors", parameters, own)
        attempt.meet()
        if ranks.is_main:
            attempt.alone(_join, parts, unfinished, plan, step, folder.name)
            attempt.alone(partial(_put, unfinished, folder, adds=adds))
        attempt.meet()
    finally:
        if ranks.is_main:
            shutil.rmtree(parts, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
    if ranks.is_main:
        logger.info("exported %s", folder)
        if plan.note:
            logger.info(plan.note)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_part(path: Path, parameters: Mapping[str, torch.Tensor], plan: ExportPlan) -> None:
    written = {**{name: read() for name, read in plan.beside.items()}, **plan.frozen, **parameters}
    # An adapter is rounded when it is whole, since how depends on both of its factors.
    dtype = None if plan.adapter else plan.dtype
    write_tensors(path, {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in written.items()})


def _join(parts: Path, unfinished: Path, plan: ExportPlan, step: int, name: str) -> None:
    """Writes the export of the parts of all stages, whose name says of which step or epoch it is."""
    tensors: Tensors = {}
    for part in sorted(parts.glob("*.safetensors")):
        tensors |= load_file(part)
    _make_anew(unfinished)
    write_files(unfinished, tensors, plan, {**plan.metadata, "step": str(step)}, name)


def write_files(folder: Path, tensors: Tensors, plan: ExportPlan, metadata: Mapping[str, str], name: str) -> None:
    """Writes the files of an export into a folder; `name` is that of the export, for theirs."""
    place = _Place(folder, name, plan.files)
    write = _write_adapter if plan.adapter else _write_denoiser
    write(place, tensors, plan, {**metadata, "format": "pt"})


@dataclass(frozen=True)
class _Place:
    """Where the files of an export are written.

    Attributes:
        folder: which gets its name when all is written.
        export: that name.
        files: what the files are called.
    """

    folder: Path
    export: str
    files: FileNames

    def write(self, usual: str, tensors: Tensors, metadata: Mapping[str, str]) -> None:
        """A file with this usual name."""
        name = self.files.of_file(usual, self.export)
        layout = COMFYUI if usual in (COMFYUI_FILE, DENOISER_COMFYUI) else metadata.get(LAYOUT, "diffusers")
        title = self.files.title(self.export)
        header = of_file(metadata, tensors, layout=layout, title=title, stem=Path(name).stem)
        header |= of_training(metadata) if "step" in metadata else {}
        write_tensors(self.folder / name, tensors, header)


def _put(finished: Path, folder: Path, *, adds: bool) -> None:
    """Gives a finished export its place, in which nothing else stays unless it `adds` to what is there."""
    if not (adds and folder.is_dir()):
        shutil.rmtree(folder, ignore_errors=True)
        finished.rename(folder)
        sync_folder(folder.parent)
        return
    for path in finished.iterdir():
        # A file is replaced by being renamed, a folder is not.
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.rename(folder / path.name)
    finished.rmdir()


def adapter_files(tensors: Tensors, plan: ExportPlan, metadata: Mapping[str, str]) -> Mapping[str, AdapterFile | str]:
    """The files of an adapter's export by name, by the adapter's kind, with what is trained in full beside it.

    Raises:
        ValueError: a layout has no place for a tensor.
    """
    factors, whole = in_full.divided(tensors)
    wishes, wishes_of_whole = (
        ExportWishes(
            plan.formats, plan.names, {part.name: part.own(own) for part in plan.folders}, metadata, plan.dtype
        )
        for own in (factors, whole)
    )
    files = mixed.to_files(factors, plan.adapter, wishes)
    return in_full.with_whole(files, whole, factors, wishes_of_whole) if whole else files


def further_layouts(tensors: Tensors, plan: ExportPlan) -> Iterator[tuple[str, Tensors]]:
    """(name of the file, tensors) of a whole denoiser in each layout other than diffusers'.

    Raises:
        ValueError: a layout has no place for a tensor.
    """
    for name, convert in plan.layouts.items():
        if name in plan.formats:
            yield DENOISER_COMFYUI if name == COMFYUI else f"model_{name}.safetensors", convert(tensors)


def _write_adapter(place: _Place, tensors: Tensors, plan: ExportPlan, metadata: dict[str, str]) -> None:
    for name, file in adapter_files(tensors, plan, metadata).items():
        if isinstance(file, str):
            write_bytes(place.folder / name, file.encode())
        else:
            place.write(name, file.tensors, file.metadata)


def _write_denoiser(place: _Place, tensors: Tensors, plan: ExportPlan, metadata: dict[str, str]) -> None:
    """`<denoiser>/` as diffusers loads it, in shards, and one file per further layout."""
    for part in plan.folders if "diffusers" in plan.formats else ():
        part_place = replace(place, folder=place.folder / part.name)
        part_place.folder.mkdir()
        write_bytes(part_place.folder / "config.json", json.dumps(dict(part.config), indent=2).encode())
        own = {here: tensors[name] for here, name in part.own(tensors).items()}
        _write_shards(part_place, own, metadata, plan.shard_bytes, part.stem)
    for name, converted in further_layouts(tensors, plan):
        place.write(name, converted, metadata)


def _write_shards(place: _Place, tensors: Tensors, metadata: dict[str, str], shard_bytes: int, stem: str) -> None:
    shards: list[Tensors] = [{}]
    for name, tensor in sorted(tensors.items()):
        size = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        place.write(f"{stem}.safetensors", shards[0], metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        place.write(file, shard, metadata)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    write_bytes(place.folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())
