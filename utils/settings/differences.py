"""What the same words mean in diffusion-pipe and do not mean here: told to those who come with a config of its."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import Problem
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.schema import Settings


@dataclass(frozen=True)
class Difference:
    """A key of a run's file, or of a dataset file, that has another meaning here.

    Attributes:
        place: "run", "model", "adapter", "optimizer", "dataset" or "directory".
        key: its name there.
        here: what it means here, and what it means in diffusion-pipe.
        matters: whether it makes a difference to a run, or to a directory of a dataset, that is not told anyway.
    """

    place: str
    key: str
    here: str
    matters: Callable[[Any], bool]


OF_DATA = ("dataset", "directory")
DIFFERENCES = (
    Difference(
        "run",
        "lr_scheduler",
        "a schedule ends with the last step of the run, also that of `max_steps`; there always with the last epoch",
        lambda settings: settings.lr_scheduler != "constant" and settings.max_steps is not None,
    ),
    *(
        Difference(
            "model",
            key,
            "without it, this text encoder is not trained; there it is then, with the rate of `[optimizer]`",
            # Every run of these models says so.
            lambda settings: False,
        )
        for key in ("text_encoder_1_lr", "text_encoder_2_lr")
    ),
    *(
        Difference(
            "model",
            key,
            "without it, an expert of Wan 2.2 A14B is trained where it is used, by the `boundary_ratio` of its folder; "
            "there at all noise levels",
            # Every run of an expert says so.
            lambda settings: False,
        )
        for key in ("min_t", "max_t")
    ),
    Difference(
        "optimizer",
        "weight_decay",
        "norms, biases, embeddings and tables do not decay; there all that is trained does",
        lambda settings: settings.adapter is None and "weight_decay" in settings.optimizer.model_fields_set,
    ),
    Difference(
        "adapter",
        "dtype",
        "an adapter is float32 unless it says otherwise, so that small steps are not lost; there it has the dtype of "
        "`[model]`",
        lambda settings: settings.adapter is not None and "dtype" not in settings.adapter.model_fields_set,
    ),
    Difference(
        "dataset",
        "cache_shuffle_num",
        "an epoch uses one of the orders of tags that are cached; there each is a sample, and an epoch so many times "
        "as long. For as many steps, set num_repeats to this number",
        lambda directory: directory.cache_shuffle_num > 1,
    ),
    Difference(
        "dataset",
        "captions.json",
        'an epoch uses one of several captions of a file; there each is a sample, as with multiple_captions = "all"',
        lambda directory: (
            "multiple_captions" not in directory.model_fields_set and (Path(directory.path) / "captions.json").is_file()
        ),
    ),
    Difference(
        "directory",
        "mask_path",
        "a picture without a mask is left out, unless there is a default_mask_file; there it is trained as a whole",
        lambda directory: directory.mask_path is not None and directory.default_mask_file is None,
    ),
)


def differences(settings: Settings, datasets: Mapping[Path, DatasetSettings], file: str) -> Iterator[Problem]:
    """The differences that matter to a run and to its datasets, each once a file."""
    for difference in DIFFERENCES:
        if difference.place not in OF_DATA:
            if difference.matters(settings):
                title = "key" if difference.place == "run" else f"[{difference.place}]"
                yield Problem(file, f"{title} `{difference.key}`", difference.here)
            continue
        for path, dataset in datasets.items():
            if any(difference.matters(dataset.resolved(entry)) for entry in dataset.directory):
                yield Problem(str(path), f"`{difference.key}`", difference.here)
