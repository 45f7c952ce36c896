"""The mean of several exports of a run, or their moving average: tensor by tensor, of adapters and of whole models."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from models.assembly.tools.writing import OF_ONE_FILE, Place
from models.foundation.checkpoints.headers import Header, opened, read_header
from utils.adapters.kinds import LAYOUT
from utils.adapters.lora_factors import FOLDED_SCALE, FOLDED_SCALES
from utils.adapters.peft_settings import HEADER
from utils.errors import UserError
from utils.run.export_metadata import of_file
from utils.run.tensor_file import Deferred, write_tensors

logger = logging.getLogger(__name__)

OF_ALL = (FOLDED_SCALE, FOLDED_SCALES, HEADER, LAYOUT, "rank", "alpha")
"""What headers have to agree in, since it says what the numbers in the files mean."""


def weights_of_ema(count: int, decay: float) -> list[float]:
    """The weights of so many exports, the oldest first, in a moving average that begins with the first."""
    return [decay ** (count - 1 - number) * (1.0 if number == 0 else 1 - decay) for number in range(count)]


def average(paths: Sequence[Path], weights: Sequence[float], place: Place) -> None:
    """Writes the mean of files, or of folders with the shards of one model each, in the type that the first has.

    Args:
        weights: of each; they are divided by their sum.

    Raises:
        UserError: they do not have the same tensors.
    """
    total = sum(weights)
    if total <= 0:
        raise UserError.of(f"have the sum {total:g}, by which nothing can be divided", where="--weights")
    shares = [weight / total for weight in weights]
    headers = [read_header(path) for path in paths]
    _check_alike(paths, headers)
    first = headers[0]
    said = [_said(header.paths[0]) for header in headers]
    for path, other in zip(paths[1:], said[1:], strict=True):
        if different := [key for key in OF_ALL if other.get(key) != said[0].get(key)]:
            raise UserError.of(
                f"its header has another `{different[0]}` than that of {paths[0]}: the numbers mean something else; "
                "`convert` both first",
                str(path),
            )
    metadata = {key: text for key, text in said[0].items() if all(other.get(key) == text for other in said)}
    kept = {key: text for key, text in metadata.items() if key not in OF_ONE_FILE or key in (*OF_ALL, "format")}
    titles = [other["modelspec.title"] for other in said if "modelspec.title" in other]
    kept |= {"weights": "average of " + ", ".join(f"{share:.4g}" for share in shares)}
    kept |= {"modelspec.merged_from": ", ".join(titles)} if titles else {}
    for file in first.paths:
        tensors = {key: _mean(headers, shares, key) for key, own in first.files.items() if own == file}
        path = place.file(file.name)
        header = of_file(kept, tensors, layout=kept.get(LAYOUT, "diffusers"), title=path.stem, stem=path.stem)
        write_tensors(path, tensors, header)
        logger.info("written: %s (the mean of %d, %d tensors)", path, len(paths), len(tensors))
    if paths[0].is_dir() and not place.is_file:
        for beside in sorted(paths[0].glob("*.json")):
            shutil.copyfile(beside, place.path / beside.name)


def _said(file: Path) -> dict[str, str]:
    with opened(file) as one:
        return one.metadata() or {}


def _check_alike(paths: Sequence[Path], headers: Sequence[Header]) -> None:
    for path, header in zip(paths[1:], headers[1:], strict=True):
        missing = sorted(headers[0].shapes.keys() ^ header.shapes.keys())
        if missing:
            where = paths[0] if missing[0] in headers[0].shapes else path
            raise UserError.of(
                f"{len(missing)} tensors are in one of {paths[0]} and this, and not in the other; the first is "
                f"'{missing[0]}', in {where}: they are no exports of one kind",
                str(path),
            )
        for key, shape in header.shapes.items():
            if shape != headers[0].shapes[key]:
                raise UserError.of(
                    f"'{key}' is {list(shape)} here and {list(headers[0].shapes[key])} in {paths[0]}; `merge` adds "
                    "adapters of different ranks",
                    str(path),
                )


def _mean(headers: Sequence[Header], shares: Sequence[float], key: str) -> Deferred:
    with opened(headers[0].files[key]) as file:
        dtype = file.get_tensor(key).dtype if not headers[0].shapes[key] else file.get_slice(key)[:1].dtype
    return Deferred(headers[0].shapes[key], dtype, partial(_mean_now, headers, shares, key, dtype))


def _mean_now(headers: Sequence[Header], shares: Sequence[float], key: str, dtype: torch.dtype) -> torch.Tensor:
    total, first = None, None
    for header, share in zip(headers, shares, strict=True):
        with opened(header.files[key]) as file:
            tensor = file.get_tensor(key)
        first = tensor if first is None else first
        if not dtype.is_floating_point:
            if not torch.equal(tensor, first):
                raise UserError.of(f"'{key}' has whole numbers, which differ: there is no mean", str(header.files[key]))
            continue
        total = tensor.float() * share if total is None else total.add_(tensor.float(), alpha=share)
    return first if total is None else total.to(dtype)
