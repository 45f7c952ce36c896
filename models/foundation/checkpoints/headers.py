"""Headers of safetensors and GGUF files, and fingerprints of files."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.foundation.checkpoints.gguf_files import GgufFile, is_gguf
from utils.errors import UserError, printable
from utils.json_files import ANEW, read_json, require

USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "adapter_model.safetensors")
INDEX = ".index.json"
WEIGHT_MAP = "weight_map"
SUFFIXES = (".safetensors", ".sft")
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
CONVERSION = (
    "import sys, torch; from safetensors.torch import save_file; "
    "t = torch.load(sys.argv[1], 'cpu', weights_only=True); "
    "t = next((t[key] for key in ('state_dict', 'module', 'model') if key in t), t); "
    "save_file({key: one.clone().contiguous() for key, one in t.items() if torch.is_tensor(one)}, sys.argv[2])"
)
"""Makes a safetensors file of one that torch has written."""
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Header:
    """The tensors of a file or of its shards: the file and the shape of each."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @property
    def paths(self) -> list[Path]:
        return sorted(set(self.files.values()))


def read_header(path: Path, *, with_gguf: bool = False) -> Header:
    """The header of a safetensors file, or of the files in a folder that belong together.

    Args:
        with_gguf: whether it may be a GGUF file too.

    Raises:
        UserError: there is no such file, or it is not a whole one.
    """
    if path.is_file() and is_gguf(path):
        if not with_gguf:
            raise UserError.of(
                "is a GGUF file, which the denoiser's may be ([model] transformer_path), and T5's and UMT5's; give a "
                "safetensors file",
                str(path),
            )
        tensors = GgufFile(path).tensors
        return Header(dict.fromkeys(tensors, path), {key: tensor.shape for key, tensor in tensors.items()})
    paths = [path] if path.is_file() else _files_in(path)
    if not paths:
        raise UserError.of("no safetensors file here; give a .safetensors file or a folder with some", str(path))
    files, shapes = {}, {}
    for file in paths:
        with opened(file) as one:
            for key in one.keys():
                files[key] = file
                shapes[key] = tuple(one.get_slice(key).get_shape())
    return Header(files, shapes)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file that is read in this context.

    Raises:
        UserError: it cannot be read, is not whole, or has numbers of a type that torch does not have.
    """
    try:
        with safe_open(file, framework="pt") as one:
            yield one
    except (SafetensorError, OSError) as error:
        hint = ANEW if file.suffix in SUFFIXES else f"give one; {_other_format(file)}"
        raise UserError.of(f"not a whole safetensors file ({error}); {hint}", str(file)) from error


def _other_format(file: Path) -> str:
    """What to do with a file of another format."""
    if file.suffix not in PICKLED:
        return "of other formats only GGUF is read, for the denoiser"
    made = shlex.join([str(file), str(file.with_suffix(".safetensors"))])
    return f'what torch has written is converted by\n  python -c "{CONVERSION}" {made}'


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder's weights: those with a usual name, in shards or as one file (others are variants, such as
    `.fp16`), otherwise shards with another name, otherwise all safetensors files."""
    for name in USUAL_NAMES:
        if (folder / f"{name}{INDEX}").is_file():
            return _shards(folder / f"{name}{INDEX}")
        if (folder / name).is_file():
            return [folder / name]
    variants = sorted(folder.glob(f"*.safetensors{INDEX}"))
    return _shards(variants[0]) if variants else sorted(folder.glob("*.safetensors"))


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    content = read_json(index, kinds={WEIGHT_MAP: dict[str, str]})
    require(content, [WEIGHT_MAP], str(index))
    names = set(content[WEIGHT_MAP].values())
    if lost := sorted(name for name in names if printable(name) != name or not (index.parent / name).is_file()):
        raise UserError.of(f"names '{printable(lost[0])}', and there is no such file beside it; {ANEW}", str(index))
    return sorted(index.parent / name for name in names)


def fingerprint(*parts: Path | str | Mapping[str, Any]) -> str:
    """A hash of what a cached item is made with: settings completely, files by their size and 64 evenly spaced blocks.

    Another training of the same model differs in every block, so reading four megabytes is enough to tell two files
    apart, whereas reading them completely would take a minute.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            for file in [part] if part.is_file() else sorted(p for p in part.iterdir() if p.is_file()):
                _digest_file(digest, file)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _digest_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}".encode())
    step = max(FINGERPRINT_BLOCK_BYTES, size // FINGERPRINT_BLOCKS)
    with file.open("rb") as opened:
        for offset in range(0, size, step):
            opened.seek(offset)
            digest.update(opened.read(FINGERPRINT_BLOCK_BYTES))
