"""The losses of an evaluation, sample by sample, and what they say: how sure their mean is, whether it has changed
since the evaluation before, and how it differs by size and by directory.

They are kept in `evaluations/step000500.json` of the run's folder, so that a run that goes on compares with the same
evaluation as one that was never stopped.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.dataset.samples import Sample
from utils.errors import UserError
from utils.json_files import read_json
from utils.run.durable import replace_text
from utils.run.statistics import mean, standard_error, student_bound

FOLDER = "evaluations"
NAME = re.compile(r"(?P<prefix>(?:ema_)?)step(?P<step>\d+)\.json")
ERROR, CHANGE, CHANGE_ERROR = "_standard_error", "_change", "_change_error"
"""What the names of a loss's own numbers end with: its standard error; how much it has changed since the evaluation
before; and half the width of that change's interval of 95 % confidence."""
ENDINGS = (ERROR, CHANGE, CHANGE_ERROR)
EXTREMES = 3
"""So many files with the highest losses, and with the lowest, are named."""


@dataclass(frozen=True)
class Evaluated:
    """A set's losses.

    Attributes:
        quantiles: at which each sample was evaluated.
        losses: sample's id -> its loss at each quantile.
    """

    quantiles: Sequence[float]
    losses: Mapping[str, Sequence[float]]

    def means(self) -> dict[str, float]:
        """The mean loss of each sample."""
        return {name: mean(losses) for name, losses in self.losses.items()}

    def numbers(self, loss: str) -> dict[str, float]:
        """The loss at each quantile, their mean, and its standard error if there are at least two samples.

        Args:
            loss: name of the loss.
        """
        by_quantile = zip(self.quantiles, zip(*self.losses.values(), strict=True), strict=True)
        found = {f"{loss}_quantile_{quantile:.2f}": mean(losses) for quantile, losses in by_quantile}
        found[loss] = mean([one for losses in self.losses.values() for one in losses])
        if len(self.losses) > 1:
            found[f"{loss}{ERROR}"] = standard_error(list(self.means().values()))
        return found


@dataclass(frozen=True)
class Change:
    """How much a loss has changed since an earlier evaluation, of the samples that both have: they and their noise are
    the same, so that far smaller changes are seen than the standard errors of both would let one see.

    Attributes:
        since: the step of the earlier one.
        error: half the width of the interval of 95 % confidence.
    """

    since: int
    value: float
    error: float

    @property
    def verdict(self) -> str:
        if self.value + self.error < 0:
            return "better"
        return "worse" if self.value - self.error > 0 else "neither better nor worse for sure"

    def __str__(self) -> str:
        return f"{self.value:+.5f} ± {self.error:.5f} since step {self.since}, {self.verdict}"


def change_of(now: Mapping[str, float], before: Mapping[str, float], since: int) -> Change | None:
    """The change of the mean from `before` to `now`, each by sample; None with less than two samples in both."""
    differences = [now[name] - before[name] for name in sorted(now.keys() & before.keys())]
    if len(differences) < 2:
        return None
    error = student_bound(len(differences) - 1) * standard_error(differences)
    return Change(since, mean(differences), error)


def groups_of(samples: Sequence[Sample], means: Mapping[str, float]) -> list[list[Any]]:
    """For each size and each directory, if there are several of them: kind, name, number of samples, mean loss."""
    kinds: dict[str, dict[str, list[float]]] = {"size": defaultdict(list), "directory": defaultdict(list)}
    for sample in samples:
        kinds["size"][str(sample.bucket)].append(means[sample.id])
        kinds["directory"][str(sample.rules.path)].append(means[sample.id])
    several = {kind: groups for kind, groups in kinds.items() if len(groups) > 1}
    return [[kind, name, len(own), mean(own)] for kind, groups in several.items() for name, own in groups.items()]


def extremes_of(samples: Sequence[Sample], means: Mapping[str, float]) -> list[list[Any]]:
    """The files with the highest losses and those with the lowest, from high to low: file, loss."""
    ordered = sorted(([str(sample.media.locator), means[sample.id]] for sample in samples), key=lambda one: -one[1])
    return ordered if len(ordered) <= 2 * EXTREMES else [*ordered[:EXTREMES], *ordered[-EXTREMES:]]


class KeptEvaluations:
    """Those in a run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER

    def _found(self, prefix: str) -> Iterator[tuple[int, Path]]:
        for path in sorted(self.folder.glob("*.json")):
            named = NAME.fullmatch(path.name)
            if named and named["prefix"] == prefix:
                yield int(named["step"]), path

    def before(self, step: int, prefix: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """The last evaluation before a step: its step, and of each set what `keep` has written; nothing if there is
        none that can be read."""
        for earlier, path in sorted(self._found(prefix), reverse=True):
            if earlier < step:
                try:
                    sets = read_json(path)
                    sets = {name: one for name, one in sets.items() if isinstance(one, dict)}
                    return earlier, {name: one for name, one in sets.items() if isinstance(one.get("samples"), dict)}
                except UserError:
                    continue
        return 0, {}

    def newest(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """The last evaluation of the weights."""
        return self.before(10**12, "")

    def keep(self, step: int, prefix: str, sets: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes an evaluation.

        Args:
            sets: name -> {"samples": {id: mean loss}, "groups": see `groups_of`, "extremes": see `extremes_of`}.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(exist_ok=True)
        replace_text(self.folder / f"{prefix}step{step:06d}.json", json.dumps(sets))

    def forget_after(self, step: int) -> None:
        """Removes what comes again in a run that goes on from a step."""
        for prefix in ("", "ema_"):
            for later, path in list(self._found(prefix)):
                if later > step:
                    path.unlink(missing_ok=True)
