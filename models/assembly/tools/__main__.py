"""Looks at files of weights, merges adapters into one another or into their base, extracts an adapter from two
checkpoints, changes its rank or its layout, and averages exports.

python -m utils.adapters.tools info FILE
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from models.assembly.tools import adapters, averages, info, whole_models
from models.assembly.tools.low_rank import Cut
from models.assembly.tools.model import add_arguments, open_model
from models.assembly.tools.writing import LAYOUTS, OTHER_NAMES, Place
from utils.errors import UserError
from utils.settings.model_schema import torch_dtype

DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 1, after a message, if what it was given is wrong."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m utils.adapters.tools", description=(__doc__ or "").rpartition("\n\n")[0], allow_abbrev=False
    )
    tools = parser.add_subparsers(required=True, metavar="TOOL")

    looks = tools.add_parser("info", help="kind, ranks, alpha, names, model and metadata of files, or of folders")
    looks.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    looks.set_defaults(run=_info)

    merges = tools.add_parser("merge", help="adapters into one, exactly or of a rank; or into their base")
    merges.add_argument("paths", nargs="+", type=Path, metavar="ADAPTER")
    merges.add_argument("--weights", nargs="+", type=float, metavar="W", help="of each adapter; default: 1")
    merges.add_argument(
        "--into_base", action="store_true", help="write the whole model with the adapters in its weights"
    )
    merges.set_defaults(run=_merge)

    extracts = tools.add_parser("extract", help="the LoRA that is the difference of a trained model from its base")
    extracts.add_argument("tuned", type=Path, metavar="TRAINED", help="file or folder of the trained weights")
    extracts.set_defaults(run=_extract)

    resizes = tools.add_parser("resize", help="the nearest LoRA of another rank, of an adapter of any kind")
    resizes.add_argument("path", type=Path, metavar="ADAPTER")
    resizes.set_defaults(run=_resize)

    converts = tools.add_parser("convert", help="an adapter in another program's layout")
    converts.add_argument("path", type=Path, metavar="ADAPTER")
    converts.set_defaults(run=_convert)

    means = tools.add_parser("average", help="the mean of several exports, adapters or whole models")
    means.add_argument("paths", nargs="+", type=Path, metavar="EXPORT", help="the oldest first")
    how = means.add_mutually_exclusive_group()
    how.add_argument("--weights", nargs="+", type=float, metavar="W", help="of each export; default: all alike")
    how.add_argument("--ema", type=float, metavar="DECAY", help="a moving average with this decay, as in 0.8")
    means.set_defaults(run=_average)

    for tool in (merges, extracts, resizes):
        tool.add_argument("--rank", type=int, metavar="R", help="the largest rank of a layer")
        tool.add_argument(
            "--energy", type=float, metavar="E", help="as many ranks as have this part of the update's square, as 0.95"
        )
    for tool in (merges, extracts, resizes, converts, means):
        tool.add_argument("--out", type=Path, required=True, metavar="PATH", help="a .safetensors file, or a folder")
    for tool in (merges, extracts, resizes, converts):
        names = [*LAYOUTS, *OTHER_NAMES]
        tool.add_argument("--layout", choices=names, default=LAYOUTS[0], help="whose names are written")
        tool.add_argument("--dtype", choices=DTYPES, help="type of what is written; default: float32, or the base's")
        add_arguments(tool)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    described = "\n\n".join(info.describe(path) for path in arguments.paths)
    sys.stdout.write(f"{described}\n")


def _merge(arguments: argparse.Namespace) -> None:
    place, cut = _place(arguments), _cut(arguments, is_needed=False)
    weights = _weights(arguments)
    given = list(zip(arguments.paths, weights, strict=True))
    if not arguments.into_base:
        adapters.merge(open_model(arguments, arguments.paths), given, place, cut)
        return
    if cut or place.is_file or arguments.layout != LAYOUTS[0]:
        raise UserError.of(
            "writes a whole model into a folder, in all layouts; leave --rank, --energy and --layout out, and name a "
            "folder with --out",
            where="--into_base",
        )
    whole_models.merge_into_base(open_model(arguments, arguments.paths), given, place)


def _extract(arguments: argparse.Namespace) -> None:
    place, cut = _place(arguments), _cut(arguments)
    whole_models.extract(open_model(arguments), arguments.tuned, place, cut)


def _resize(arguments: argparse.Namespace) -> None:
    place, cut = _place(arguments), _cut(arguments)
    adapters.resize(open_model(arguments, [arguments.path]), arguments.path, place, cut)


def _convert(arguments: argparse.Namespace) -> None:
    place = _place(arguments)
    adapters.convert(open_model(arguments, [arguments.path]), arguments.path, place)


def _average(arguments: argparse.Namespace) -> None:
    place = Place(arguments.out)
    place.check()
    if len(arguments.paths) < 2:
        raise UserError.of("name two exports or more", where="average")
    if arguments.ema is not None and not 0 < arguments.ema < 1:
        raise UserError.of(f"is {arguments.ema:g}, and is to be between 0 and 1", where="--ema")
    weights = averages.weights_of_ema(len(arguments.paths), arguments.ema) if arguments.ema else _weights(arguments)
    averages.average(arguments.paths, weights, place)


def _weights(arguments: argparse.Namespace) -> list[float]:
    weights = arguments.weights or [1.0] * len(arguments.paths)
    if len(weights) != len(arguments.paths):
        raise UserError.of(
            f"are {len(weights)} for {len(arguments.paths)} files; write one for each", where="--weights"
        )
    return weights


def _cut(arguments: argparse.Namespace, *, is_needed: bool = True) -> Cut | None:
    rank, energy = arguments.rank, arguments.energy
    if rank is None and energy is None:
        if is_needed:
            raise UserError.of(
                "say how large the LoRA is to be: --rank, as in 16, or --energy, as in 0.95", where="rank"
            )
        return None
    if rank is not None and rank < 1:
        raise UserError.of(f"is {rank}, and is to be 1 or more", where="--rank")
    if energy is not None and not 0 < energy <= 1:
        raise UserError.of(f"is {energy:g}, and is to be above 0 and at most 1", where="--energy")
    return Cut(rank, energy)


def _place(arguments: argparse.Namespace) -> Place:
    layout = OTHER_NAMES.get(arguments.layout, arguments.layout)
    place = Place(arguments.out, layout, torch_dtype(arguments.dtype) if arguments.dtype else None)
    place.check()
    return place


if __name__ == "__main__":
    sys.exit(main())
