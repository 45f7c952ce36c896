"""Checks whether the files that `[model]` names exist, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from models.foundation.checkpoints.configs import kinds_of
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.recognition import FOLDERS
from models.foundation.checkpoints.stock import is_of_diffusers, of_diffusers, of_transformers
from models.foundation.checkpoints.weights import CheckpointNames
from utils.errors import Problem, UserError
from utils.json_files import ANEW, check_types, read_json, require
from utils.settings.model_schema import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
INDEX_KINDS = {
    "_class_name": str,
    "boundary_ratio": float | None,
    "force_zeros_for_empty_prompt": bool | None,
    "is_distilled": bool | None,
    "sample_sigmas": list[float] | None,
    "text_encoder_select_layers": list[Annotated[int, 0]] | None,
}
TEXT_KINDS = {"dtype": str | None, "torch_dtype": str | None, "text_config": dict | None}
TEXT_CONFIG_KEYS = {
    "clip_text_model": ("hidden_size", "max_position_embeddings", "projection_dim"),
    "llama": ("hidden_size", "num_hidden_layers"),
    # The keys of their text models are in a table of their own, except in older files.
    "gemma3": (),
    "mistral3": (),
    "qwen2_5_vl": (),
    "qwen3_vl": (),
    "llava": (),
    **dict.fromkeys(("mt5", "t5", "umt5"), ("d_model",)),
}
"""The keys that the configuration of a text encoder must have, by `model_type`, since transformers has a default for
everything; all other configurations must have `hidden_size`. They are whole numbers above 0."""

VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
)
"""Files with a tokenizer's vocabulary; any of these sets is enough."""


@dataclass(frozen=True)
class TextPart:
    """A text encoder of a model, and the location of its files.

    Attributes:
        name: its `type` in `[model] text_encoders`, and the name of its store in the cache.
        model_class: name of the class of transformers.
        folder, tokenizer: parts of the diffusers folder.
        names: its names in the publisher's checkpoints.
        model_types: the values that `model_type` may have in its configuration; default: that of its class.
        arguments: of the class, beside the configuration.
        vision: parts of the names of tensors with which it sees pictures, for an encoder that is asked for captions
            alone and of which there are files without them.
        further_tokenizers: parts of the diffusers folder with other encoders' tokenizers, of which the model reads the
            tokens alone.
        root: the folder that contains the parts, if it is not the diffusers folder.
    """

    name: str
    model_class: str
    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    names: CheckpointNames = field(default_factory=CheckpointNames, kw_only=True)
    model_types: tuple[str, ...] = field(default=(), kw_only=True)
    arguments: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)
    vision: tuple[str, ...] = field(default=(), kw_only=True)
    further_tokenizers: tuple[str, ...] = field(default=(), kw_only=True)
    root: Path | None = field(default=None, kw_only=True)

    @property
    def is_t5(self) -> bool:
        """Whether it is a T5, or its multilingual descendant with names of the same kind."""
        return self.model_class in ("T5EncoderModel", "UMT5EncoderModel")

    @property
    def stock_class(self) -> type[PreTrainedModel]:
        """The class of transformers."""
        return of_transformers(self.model_class)

    def override(self, options: ModelSettings) -> Path | None:
        """The file or folder that replaces its weights, if the options give one."""
        return next((entry.path for entry in options.text_encoders if entry.type == self.name), None)

    def config(self, diffusers_folder: Path) -> dict[str, Any]:
        """The configuration of the encoder that the model asks for.

        Raises:
            UserError: it is missing or damaged, or belongs to another model.
        """
        model_types = self.model_types or (self.stock_class.config_class.model_type,)
        keys = TEXT_CONFIG_KEYS.get(model_types[0], ("hidden_size",))
        return read_config(self.root or diffusers_folder, self.folder, model=model_types, keys=keys)


def check_diffusers_folder(
    options: ModelSettings, denoiser: str, text_parts: Sequence[TextPart], *, with_scheduler: bool = True
) -> None:
    """Whether `diffusers_path` is a diffusers folder with all parts, and whether their configurations and the headers
    of their weights can be read.

    A part whose weights come from elsewhere still needs its configuration here, since single files have none.

    Args:
        denoiser: the part that needs no weights with `from_scratch`.
        text_parts: the model's text encoders; for those with a `root`, only the given weights are checked.
        with_scheduler: whether the folder has a scheduler.

    Raises:
        UserError: lists everything that is missing or damaged.
    """
    folder = options.diffusers_path
    assert folder is not None, "the settings' rules ask for it"
    check_folder_type(options)
    check_text_encoder_types(options, [part.name for part in text_parts])
    inside = [part for part in text_parts if part.root is None]
    texts, tokenizers = [part.folder for part in inside], [part.tokenizer for part in inside]
    parts = [*(["scheduler"] if with_scheduler else []), *texts, *tokenizers, denoiser, "vae"]
    present = [part for part in parts if (folder / part).is_dir()]
    problems = [_missing(options, part, inside) for part in parts if part not in present]
    weights = {
        denoiser: (options.transformer_path, "[model] transformer_path"),
        "vae": (options.vae_path, "[model] vae_path"),
        **{part.folder: (part.override(options), "[model] text_encoders") for part in text_parts},
    }
    if options.from_scratch:
        weights.pop(denoiser)
    with_gguf = {denoiser, *(part.folder for part in text_parts if part.is_t5)}
    # A tokenizer may lie in the folder of a processor.
    names = {part: config_name("tokenizer" if part in tokenizers else part) for part in present}
    checks: list[Callable[[], object]] = [partial(read_json, folder / part / names[part]) for part in present]
    for part, (override, option) in weights.items():
        if override is not None:
            checks.append(partial(read_header, override, with_gguf=part in with_gguf))
        elif part in present and any((folder / part).glob("*.safetensors*")):
            checks.append(partial(read_header, folder / part))
        elif part in present:
            problems.append(_without_weights(options, part, option, inside))
    problems += problems_of(checks)
    if problems:
        raise UserError(problems)


def check_folder_type(options: ModelSettings) -> None:
    """Whether `diffusers_path` contains a model of this type, according to its own index.

    Raises:
        UserError: it contains another one; says which.
    """
    file = index_file(options.diffusers_path)
    named = model_index(options.diffusers_path).get("_class_name")
    fitting = FOLDERS.get(named, options.type)
    if fitting != options.type:
        raise UserError.of(
            f'is of {named}: set [model] type = "{fitting}", or give the folder of a model of type "{options.type}"',
            str(file),
        )


def model_index(folder: Path) -> dict[str, Any]:
    """What a diffusers folder's own index says; nothing if it has none.

    Raises:
        UserError: the index is damaged.
    """
    file = index_file(folder)
    return read_json(file, kinds=INDEX_KINDS) if file.is_file() else {}


def index_file(folder: Path) -> Path:
    """Where a diffusers folder's own index is, if it has one; the second is of a pipeline that is put together of
    blocks."""
    return next((folder / name for name in (INDEX, MODULAR_INDEX) if (folder / name).is_file()), folder / INDEX)


def _missing(options: ModelSettings, part: str, text_parts: Sequence[TextPart]) -> Problem:
    """The problem of a folder without a part."""
    if options.architecture is None:
        hint = _address(options.diffusers_path, part) or "download the whole diffusers folder"
        return Problem(str(options.diffusers_path), part, f"this part is missing; {hint}")
    encoder = next((one for one in text_parts if one.tokenizer == part), None)
    if encoder is None:
        return Problem("[model] architecture", "", f"configs/ has no {part} of it; give diffusers_path")
    file, names = encoder.override(options), " or ".join(" and ".join(names) for names in VOCABULARIES)
    beside = f", or put that folder beside {file}" if file else ""
    return Problem(
        "[model] tokenizer_path",
        "",
        f"the tokenizer of the text encoder '{encoder.name}' is missing: give a folder with a folder `{part}` or "
        f"`{encoder.name}` in it, in which its words are ({names}){beside}",
    )


def _address(folder: Path, part: str) -> str | None:
    """Where a part is to be had, if the folder's index of blocks names another place."""
    entry = model_index(folder).get(part)
    source = entry[-1] if isinstance(entry, list) and entry else None
    named = source.get("pretrained_model_name_or_path") if isinstance(source, dict) else None
    if not named:
        return None
    inside = f", its folder `{source['subfolder']}`," if source.get("subfolder") else ""
    return f"it is of {named}{inside} by {index_file(folder).name}: download it here, as `{part}`"


def _without_weights(options: ModelSettings, part: str, option: str, text_parts: Sequence[TextPart]) -> Problem:
    """The problem of a part without weights."""
    if options.architecture is None:
        hint = f"no .safetensors here; download them, or name a file with {option}"
        return Problem(str(options.diffusers_path / part), "weights", hint)
    encoder = next((one for one in text_parts if one.folder == part), None)
    entry = f', as an entry {{ type = "{encoder.name}", path = ... }}' if encoder else ""
    return Problem(option, "", f"the weights of the part {part} are needed{entry}")


def config_name(part: str) -> str:
    """What the file with the configuration of a part of a diffusers folder is called."""
    # A processor of captions and pictures has the tokenizer in it.
    kinds = dict.fromkeys(("tokenizer", "processor"), "tokenizer_config.json") | {"scheduler": "scheduler_config.json"}
    return kinds.get(part.split("_")[0], "config.json")


def has_vocabulary(folder: Path) -> bool:
    """Whether a tokenizer's words are in a folder."""
    return any(all((folder / name).is_file() for name in names) for names in VOCABULARIES)


def problems_of(checks: Iterable[Callable[[], object]]) -> list[Problem]:
    """The problems of all checks, each of which raises a UserError or does nothing."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    return problems


def all_of(problems: Iterable[Problem]) -> list[Problem]:
    """The problems of a generator, and those of a UserError that ends it."""
    found: list[Problem] = []
    try:
        for problem in problems:
            found.append(problem)
    except UserError as error:
        found += error.problems
    return found


def check_text_encoder_types(options: ModelSettings, types: Sequence[str]) -> None:
    """Whether every entry of `text_encoders` names one of the model's encoders, and no two the same."""
    seen = [entry.type for entry in options.text_encoders]
    wrong = [name for name in seen if name not in types]
    twice = {name for name in seen if seen.count(name) > 1}
    if wrong:
        raise UserError.of(
            f"'{wrong[0]}' is none of this model's text encoders; it has {', '.join(types)}",
            where="[model] text_encoders",
        )
    if twice:
        raise UserError.of(f"'{twice.pop()}' is given twice", where="[model] text_encoders")


def read_config(
    folder: Path, part: str = "", *, model: str | tuple[str, ...], keys: Sequence[str] = ()
) -> dict[str, Any]:
    """The configuration of a part of a diffusers folder.

    Args:
        model: the required class of diffusers or `model_type` of transformers, or several allowed ones.
        keys: the keys that it must have.

    Raises:
        UserError: it is missing or damaged, or belongs to another model.
    """
    file = folder / part / "config.json"
    config = read_json(file)
    known = (model,) if isinstance(model, str) else model
    named = config.get("_class_name", config.get("model_type", known[0]))
    if named not in known:
        raise UserError.of(f"is a configuration of {named}; one of {' or '.join(known)} belongs here", str(file))
    require(config, keys, str(file))
    # A class of transformers checks the types of its own configuration.
    of_text = {**TEXT_KINDS, **dict.fromkeys(keys, Annotated[int, 1])}
    kinds = kinds_of(of_diffusers(known[0])) if is_of_diffusers(known[0]) else of_text
    check_types(config, kinds, str(file), ANEW)
    if unset := [key for key in keys if config[key] is None]:
        raise UserError.of(f"`{unset[0]}` is null, and has a value in this model; {ANEW}", str(file))
    return config
