"""The samples of a run one by one, each with its own values, wherever they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import Problem
from utils.settings.prompt_files import Entry, PromptFile
from utils.settings.run_tables import SampleSettings, SamplingSettings

OWN = ("negative_prompt", "steps", "width", "height", "frames", "seed", "guidance", "adapter_scale")
"""What a sample may have other than `[sampling]`."""
OF_PROMPTS = ("control_images", "mask_images")
"""Lists of `[sampling]` with an entry for each of `prompts`."""


@dataclass(frozen=True)
class SampleRequest:
    """One sample that is to be drawn.

    Attributes:
        place: among all samples of the run, from 0.
        settings: `[sampling]` with this prompt alone, and its values.
        seeded: whether the seed is its own, and not that of all.
        file, where: where it is written: a file of prompts, or the run's own (""), and the place in it.
    """

    place: int
    settings: SamplingSettings
    seeded: bool = False
    file: str = ""
    where: str = "[sampling]"

    @property
    def prompt(self) -> str:
        return self.settings.prompts[0]

    @property
    def mask_image(self) -> Path | None:
        return self.settings.mask_images[0] if self.settings.mask_images else None

    @property
    def control_images(self) -> Sequence[Path]:
        return self.settings.control_images[0] if self.settings.control_images else ()

    def problem(self, of: Problem) -> Problem:
        """A problem of its `settings`, where it is written."""
        return of if of.file else Problem(self.file, of.where.replace("[sampling]", self.where), of.message)


def requests_of(
    sampling: SamplingSettings, guided_by_second: bool, file: PromptFile | None = None
) -> list[SampleRequest]:
    """All samples of a run, in the order in which they are drawn: `prompts`, `samples`, those of `prompt_file`.

    Args:
        guided_by_second: whether the model's samples are guided by a second prediction.
        file: what `prompt_file` says; default: what it said at first.

    Raises:
        UserError: the file cannot be read, or something in it is wrong.
    """
    found = [*_of_prompts(sampling)]
    for number, sample in enumerate(sampling.samples, start=1):
        found.append(_of_sample(sampling, sample, where=f"[[sampling.samples]] {number}"))
    file = file or (sampling.from_file if sampling.prompt_file else None)
    for entry in file.entries if file else ():
        sample = entry.settings.model_copy(update=_guidance(entry, guided_by_second))
        found.append(_of_sample(sampling, sample, file=str(file.path), where=entry.where))
    return [SampleRequest(place, *one) for place, one in enumerate(found)]


def remarks_of(file: PromptFile, guided_by_second: bool) -> list[Problem]:
    """What of a file is not used for a model."""
    remarks = [*file.remarks]
    for entry in file.entries:
        if entry.cfg is None:
            continue
        if guided_by_second and entry.settings.guidance is not None:
            told = f"is not used: this model is guided by a second prediction, as cfg_scale ({entry.cfg:g}, --l) says"
            remarks.append(Problem(str(file.path), f"{entry.where} guidance (--g)", told))
        elif not guided_by_second and entry.cfg > 1:
            told = "is not used: this model's samples are not guided by a second prediction; its guidance is --g"
            remarks.append(Problem(str(file.path), f"{entry.where} cfg_scale (--l)", told))
    return remarks


def _guidance(entry: Entry, guided_by_second: bool) -> dict[str, Any]:
    return {"guidance": entry.cfg} if guided_by_second and entry.cfg is not None else {}


def _of_prompts(sampling: SamplingSettings) -> Iterator[tuple]:
    for index, prompt in enumerate(sampling.prompts):
        own = {key: _at(index, getattr(sampling, key)) for key in OF_PROMPTS}
        yield (_alone(sampling, prompt, **own),)


def _at(index: int, given: list[Any]) -> list[Any]:
    """What a prompt has of a list with an entry for each prompt, or a single one for all."""
    return given[:1] if len(given) <= 1 else given[index : index + 1]


def _of_sample(sampling: SamplingSettings, sample: SampleSettings, *, where: str, file: str = "") -> tuple:
    values = {key: value for key in OWN if (value := getattr(sample, key)) is not None}
    for key, own in (("control_images", sample.control_images), ("mask_images", sample.mask_image)):
        # Several are one for each of `prompts`.
        of_all = getattr(sampling, key) if len(getattr(sampling, key)) == 1 else []
        values[key] = [own] if own else of_all
    return _alone(sampling, sample.prompt, **values), sample.seed is not None, file, where


def _alone(sampling: SamplingSettings, prompt: str, **values: Any) -> SamplingSettings:
    without = {"samples": [], "prompt_file": None}
    return sampling.model_copy(update={"prompts": [prompt], **without, **values})
