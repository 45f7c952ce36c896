"""Single files without a diffusers folder: what such a folder would say of them, from `configs/` at the top of the
repository, and tokenizers from where the user has them.

`configs/<type>/<architecture>.json` has the configuration of each part by the name of its folder, or the name of one in
`configs/shared/` that several models have. All else here knows folders alone, so one is made of them, with links to the
tokenizers' files and without weights.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from models.foundation.checkpoints.configs import PROCESSOR_FILE, explained
from models.foundation.checkpoints.folders import INDEX, TextPart, config_name, has_vocabulary, problems_of
from models.foundation.checkpoints.gguf_files import is_gguf
from models.foundation.checkpoints.headers import opened, read_header
from utils.errors import Problem, UserError
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SHARED = "shared"
INDEX_KEY = "model_index"
NOTES = (INDEX_KEY, "marked_by", "note")
"""Keys of an architecture that are no parts."""
OF_SENTENCEPIECE = {"T5Tokenizer": "spiece.model", "GemmaTokenizer": "tokenizer.model"}
"""Tokenizers that are made of a vocabulary of SentencePiece, and what its file is called."""
OF_PICTURES = ("processor", "feature_extractor")
"""Ends of the names of parts that prepare pictures for an encoder."""
TOKENIZERS = "[model] tokenizer_path"
SETTINGS = "tokenizer_config.json"
OF_TOKENIZERS = (".json", ".txt", ".model", ".jinja")
VOCABULARY_TENSOR = "spiece_model"
"""The bytes of a vocabulary inside a file of weights, as ComfyUI's files of UMT5 and Gemma have them."""
Files = Mapping[str, Callable[[Path], object]]
"""Name of a file -> what writes it."""


@dataclass(frozen=True)
class Architecture:
    """A model as its publisher has built it.

    Attributes:
        file: the JSON file with the configurations.
    """

    file: Path

    @property
    def name(self) -> str:
        return self.file.stem

    @cached_property
    def _content(self) -> dict[str, Any]:
        return read_json(self.file)

    @property
    def marked_by(self) -> str | None:
        """The end of the name of a tensor that only files of this architecture have, among those with the same other
        tensors."""
        return self._content.get("marked_by")

    @property
    def note(self) -> str | None:
        """What cannot be told by the files."""
        return self._content.get("note")

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of each part, by the name of its folder."""
        return {
            part: read_json(CONFIGS / SHARED / f"{config}.json") if isinstance(config, str) else config
            for part, config in self._content.items()
            if part not in NOTES
        }

    def folder(self, tokenizers: Mapping[str, Files]) -> Path:
        """A new diffusers folder of this architecture, without weights, which is gone when the process ends.

        Args:
            tokenizers: the files of the tokenizers that there are, by the name of their folder.
        """
        folder = _new_folder(f"{self.file.parent.name}-{self.name}-")
        parts = {part: {_file_of(part): _json(config)} for part, config in self.configs.items()}
        without = {part: files for part, files in parts.items() if not part.startswith("tokenizer")}
        for part, files in {**without, **tokenizers, ".": {INDEX: _json(self._content.get(INDEX_KEY, {}))}}.items():
            (folder / part).mkdir(exist_ok=True)
            for name, write in files.items():
                write(folder / part / name)
        return folder


def _file_of(part: str) -> str:
    return PROCESSOR_FILE if part.endswith(OF_PICTURES) else config_name(part)


def architectures(model_type: str) -> list[Architecture]:
    """The architectures of a type whose configurations are known."""
    return [Architecture(file) for file in sorted((CONFIGS / model_type).glob("*.json"))]


def without_folder(options: ModelSettings, pipeline_of: Callable[[ModelSettings], Any]) -> ModelSettings:
    """The options with a diffusers folder, for a model of which there are single files.

    Args:
        pipeline_of: makes a pipeline with options.

    Raises:
        UserError: no configurations of such a model are known, or they do not fit the files, or several do.
    """
    chosen = _chosen(options, pipeline_of)
    bare = pipeline_of(_within(options, chosen, {}))
    inside = [part for part in bare.text_parts if part.root is None]
    tokenizers = {part.tokenizer: _tokenizer(part, bare, chosen) for part in inside}
    tokenizers |= {name: _further(name, part, bare, chosen) for part in inside for name in part.further_tokenizers}
    given = options.tokenizer_path
    if given is not None and not any(has_vocabulary(folder) for folder in (given, *given.glob("*/"))):
        raise UserError.of(
            f"{given} has no tokenizer in it: name the folder with the tokenizers' folders", where=TOKENIZERS
        )
    logger.info("the files are taken as `%s` of configs/%s", chosen.name, options.type)
    if chosen.note:
        logger.warning("[model] architecture: %s", chosen.note)
    return _within(options, chosen, {part: files for part, files in tokenizers.items() if files})


def _within(options: ModelSettings, architecture: Architecture, tokenizers: Mapping[str, Files]) -> ModelSettings:
    made = {"diffusers_path": architecture.folder(tokenizers), "architecture": architecture.name}
    return options.model_copy(update=made)


def _chosen(options: ModelSettings, pipeline_of: Callable[[ModelSettings], Any]) -> Architecture:
    known = architectures(options.type)
    names = ", ".join(one.name for one in known)
    if not known:
        raise UserError.of(
            f"is required: single files hold no configurations, and for {options.type} none are in configs/. Give the "
            "model's folder in diffusers' layout",
            where="[model] diffusers_path",
        )
    if options.architecture is not None:
        named = [one for one in known if one.name == options.architecture]
        if not named:
            raise UserError.of(f"'{options.architecture}' is not known; {names} are", where="[model] architecture")
        return named[0]
    if options.transformer_path is None:
        raise UserError.of(f"is required without files of weights; one of {names}", where="[model] architecture")
    fitting = _fitting(options, known, pipeline_of)
    if len(fitting) == 1:
        return fitting[0]
    raise UserError.of(
        f"the files fit {' and '.join(one.name for one in fitting)}; name the one that they are",
        where="[model] architecture",
    )


def _fitting(
    options: ModelSettings, known: Sequence[Architecture], pipeline_of: Callable[[ModelSettings], Any]
) -> list[Architecture]:
    """The architectures whose tensors are those of the files: of the denoiser's, and where these are the same for
    several, of the VAE's and the text encoders'.

    Raises:
        UserError: there are none; says why the first one is none.
    """
    keys = read_header(options.transformer_path, with_gguf=True).files
    marked = [one for one in known if one.marked_by and any(key.endswith(one.marked_by) for key in keys)]
    tried = marked or [one for one in known if not one.marked_by]
    pipelines = {one: pipeline_of(_within(options, one, {})) for one in tried}
    problems = {one: problems_of([pipeline.weights.check_fit]) for one, pipeline in pipelines.items()}
    fitting = [one for one in tried if not problems[one]]
    if not fitting:
        said = f"the files fit none that is known: {', '.join(one.name for one in known)}"
        raise UserError([Problem("[model] architecture", "", said), *problems[tried[0]]])
    if len(fitting) > 1 and options.vae_path is not None:
        fitting = [one for one in fitting if not problems_of([pipelines[one].encoders()[0].check])] or fitting
    if len(fitting) > 1:
        fitting = [one for one in fitting if not problems_of(_checks_of_texts(pipelines[one]))] or fitting
    return fitting


def _checks_of_texts(pipeline: Any) -> list[Callable[[], None]]:
    """What checks the weights of the text encoders that are given."""
    given = {part.name for part in pipeline.text_parts if part.override(pipeline.options) is not None}
    return [one.check_weights for one in pipeline.encoders() if one.name in given and hasattr(one, "check_weights")]


def _tokenizer(part: TextPart, pipeline: Any, architecture: Architecture) -> Files:
    """The files of a text encoder's tokenizer; none if there is no vocabulary."""
    settings = architecture.configs.get(part.tokenizer, {})
    files = _vocabulary(part, pipeline, OF_SENTENCEPIECE.get(settings.get("tokenizer_class", "")))
    return _with_settings(files, settings)


def _with_settings(files: Files, settings: Mapping[str, Any]) -> Files:
    return {**files, SETTINGS: _json(settings)} if files and settings and SETTINGS not in files else files


def _further(name: str, part: TextPart, pipeline: Any, architecture: Architecture) -> Files:
    """The files of a tokenizer that has no encoder, from the folder of this name where the other's may be."""
    weights, given = part.override(pipeline.options), pipeline.options.tokenizer_path
    places = [place / name for place in (given, weights and _folder_of(weights)) if place]
    files = next((_linked(folder) for folder in places if has_vocabulary(folder)), {})
    return _with_settings(files, architecture.configs.get(name, {}))


def _linked(folder: Path) -> Files:
    return {file.name: _link(file) for file in sorted(folder.iterdir()) if file.suffix in OF_TOKENIZERS}


def _vocabulary(part: TextPart, pipeline: Any, inside: str | None) -> Files:
    """The files of a text encoder's words; `inside` is what they are called if its weights hold them."""
    weights = {one.name: one.override(pipeline.options) for one in pipeline.text_parts}
    for folder in _places(part, pipeline.options.tokenizer_path, weights):
        if has_vocabulary(folder):
            return _linked(folder)
    file = weights[part.name]
    if file is None or not file.is_file():
        return {}
    if is_gguf(file):
        return {"tokenizer.json": _of_gguf(file)}
    keys = read_header(file).files if inside else ()
    key = next((key for key in keys if key.endswith(VOCABULARY_TENSOR)), None)
    return {inside: _of_tensor(file, key)} if key else {}


def _places(part: TextPart, given: Path | None, weights: Mapping[str, Path | None]) -> Iterator[Path]:
    """The folders in which a tokenizer may be: in the one that is given, then beside the encoder's weights. Either is
    taken itself where no other encoder could be meant."""
    if given is not None:
        yield from (given / part.tokenizer, given / part.name)
        if len(weights) == 1:
            yield given
    own, folders = weights[part.name], {name: _folder_of(file) for name, file in weights.items() if file is not None}
    if own is None:
        return
    beside = folders.pop(part.name)
    yield from (own.with_suffix(""), beside / part.tokenizer, beside / part.name)
    if beside not in folders.values():
        yield beside


def _folder_of(file: Path) -> Path:
    return file if file.is_dir() else file.parent


def _json(content: Mapping[str, Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _link(file: Path) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        try:
            path.symlink_to(file.resolve())
        # Not everyone may make links on Windows.
        except OSError:
            shutil.copyfile(file, path)

    return write


def _of_tensor(file: Path, key: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with opened(file) as one:
            path.write_bytes(one.get_tensor(key).numpy().tobytes())

    return write


def _of_gguf(file: Path) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        from transformers import AutoTokenizer

        with explained(file, "tokenizer"):
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(path.parent)

    return write


@cache
def _made() -> set[Path]:
    """The folders that were made by this process."""
    folders: set[Path] = set()

    def remove(owner: int = os.getpid()) -> None:
        # What a process forks off ends before it does.
        for folder in folders if os.getpid() == owner else ():
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folders


def _new_folder(prefix: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    _made().add(folder)
    return folder
