"""Text encoders of transformers as encoders for the cache.

Shapes: B captions, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from models.foundation.checkpoints.configs import explained
from models.foundation.checkpoints.folders import VOCABULARIES, TextPart, has_vocabulary, problems_of
from models.foundation.checkpoints.gguf_files import is_gguf, t5_tensors
from models.foundation.checkpoints.headers import fingerprint
from models.foundation.checkpoints.loading import loaded
from models.foundation.checkpoints.stock import of_transformers
from models.foundation.checkpoints.weights import load_tensors, mapped_tensors, meta_tensors
from models.foundation.encoders.text_features import EncodedText, TextFeatures
from utils.dataset.samples import Bucket
from utils.errors import UserError
from utils.first_values import none_without_memory
from utils.json_files import read_json
from utils.quantised.formats import FORMATS, FOUR_BITS, unaliased

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SIZES = ("hidden_size", "num_hidden_layers")
"""Keys of a text encoder's configuration that determine the shape of features, or which layers exist."""
VISION_LAYERS = ("num_hidden_layers", "depth")
"""What the number of layers is called in the configuration of the part that sees pictures."""
PRECISE = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Where transformers names parts that stay in float32: beside those in float16, and beside those in either narrow type.
"""
STOCK_FILES = ("model.safetensors", "model.safetensors.index.json")
"""What transformers calls files of weights."""


class TextEncoder:
    """A frozen text encoder as an `Encoder`: captions -> features. `truncated` counts the captions since
    loading that were longer than it reads.

    Args:
        part: which encoder it is.
        folder: the diffusers folder.
        file: a single .safetensors file, or a folder, with weights that replace those of the part.
        dtype: the type in which it computes.
        features: what the model reads from it; their repr is part of the fingerprint.
        kept: the format in which the Linears of its blocks are kept in memory, one of `FORMATS`; None for `dtype`.

    Raises:
        UserError: the configuration in the diffusers folder is missing or damaged, or belongs to another model.
    """

    reads = ("caption",)
    sees_pictures: ClassVar[bool] = False

    def __init__(
        self,
        part: TextPart,
        folder: Path,
        file: Path | None,
        dtype: torch.dtype,
        features: TextFeatures,
        kept: str | None = None,
    ):
        self.part, self.name, self.stock_class, self.names = part, part.name, part.stock_class, part.names
        self.is_t5 = part.is_t5
        self.arguments = part.arguments
        self.folder, self.subfolder = part.root or folder, part.folder
        self.tokenizer_folder = self.folder / part.tokenizer
        self.file, self.dtype, self.features, self.kept = file, dtype, features, kept
        with explained(self.folder / self.subfolder / "config.json", self.stock_class.config_class.__name__):
            config = self.stock_class.config_class.from_dict(part.config(folder))
        self.shapes = features.shapes(config.get_text_config())
        self.model: nn.Module | None = None
        self.truncated = 0

    @cached_property
    def fingerprint(self) -> str:
        folder = self.folder / self.subfolder
        weights = [self.file, folder / "config.json"] if self.file else [folder]
        whole = fingerprint(self.name, repr(self.features), str(self.dtype), self.tokenizer_folder, *weights)
        return fingerprint(whole, unaliased(self.kept)) if self.kept else whole

    def check(self) -> None:
        """Whether the tokenizer can be loaded, and the weights fit the configuration, from their headers alone.

        Raises:
            UserError: they do not; reports both.
        """
        problems = problems_of([self._check_format, self._check_config, self._check_tokenizer, self.check_weights])
        if problems:
            raise UserError(problems)

    def _check_format(self) -> None:
        """Whether its weights can be quantised here."""
        if self.kept is None:
            return
        if self._is_quantised_in_files:
            raise UserError.of(
                f'is quantised already (`quantization_config`), so it cannot be kept as "{self.kept}"; leave [model] '
                "text_encoder_dtype out, or give the plain weights",
                str(self._source),
            )
        FORMATS[self.kept].check("[model] text_encoder_dtype")

    @property
    def _is_quantised_in_files(self) -> bool:
        config = self.config()
        return any(getattr(one, "quantization_config", None) for one in (config, config.get_text_config()))

    @property
    def smaller_formats(self) -> Sequence[str]:
        """Formats in which its Linears would take less memory than they do, the smallest first."""
        if self.kept in FOUR_BITS or self._is_quantised_in_files:
            return ()
        return ("nf4",) if self.kept in FORMATS else ("nf4", "float8")

    def _check_config(self) -> None:
        """Whether a separate folder contains an encoder of the size that the model requires."""
        if self._source == self.folder / self.subfolder:
            return
        asked, own = self._config_in(self.folder / self.subfolder), self.config()
        for name in SIZES:
            sizes = [getattr(config.get_text_config(), name) for config in (own, asked)]
            if sizes[0] != sizes[1]:
                raise UserError.of(
                    f"is an encoder of {name} {sizes[0]}, and the model's own has {sizes[1]}; is it another model's?",
                    str(self._source / "config.json"),
                )

    def _check_tokenizer(self) -> None:
        words, known = len(self.tokenizer), self.config().get_text_config().vocab_size
        # Encoders know some more tokens, which round up the size of a matrix.
        if not known / 2 <= words <= known:
            raise UserError.of(
                f"this tokenizer has {words} tokens, and the encoder in {self.subfolder} knows {known}; is it another "
                "model's?",
                str(self.tokenizer_folder),
            )
        self.token_count("")

    def check_weights(self) -> None:
        """Whether the weights fit the configuration, from their headers alone.

        Raises:
            UserError: they do not.
        """
        tensors = self._tensors(meta_tensors)
        with none_without_memory():
            self._build(None, config=self.needed(), state_dict=tensors, device_map="meta")

    def load(self, device: torch.device) -> None:
        self.truncated = 0
        model = self._load_quantised(device) if self.kept else self.load_model().to(device)
        self.model = model.eval().requires_grad_(False)

    @property
    def _source(self) -> Path:
        return self.file or self.folder / self.subfolder

    def config(self) -> PretrainedConfig:
        """The configuration of the model of transformers."""
        own = (self._source / "config.json").is_file()
        return self._config_in(self._source if own else self.folder / self.subfolder)

    def needed(self) -> PretrainedConfig:
        """The configuration without the layers that nothing is read of: those behind the last hidden state that is
        read, and those that see pictures if there are none."""
        config, kept = self.config(), self.features.layers_kept
        text = config.get_text_config()
        if kept is not None and kept < text.num_hidden_layers:
            text.num_hidden_layers = kept
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:kept]
        vision = None if self.sees_pictures else getattr(config, "vision_config", None)
        for key in VISION_LAYERS if vision is not None else ():
            if hasattr(vision, key):
                setattr(vision, key, 0)
        return config

    @property
    def _unused(self) -> list[str]:
        """Parts of the names of tensors that may be missing."""
        last = [] if self.features.layers_kept is None else [f"layers.{self.features.layers_kept - 1}."]
        return [*last, *(() if self.sees_pictures else self.part.vision)]

    def _config_in(self, folder: Path) -> PretrainedConfig:
        with explained(folder / "config.json", self.stock_class.config_class.__name__):
            return self.stock_class.config_class.from_pretrained(folder)

    @property
    def _is_in_stock_folder(self) -> bool:
        """Whether all weights are in files with the names that transformers gives them."""
        return any((self._source / name).is_file() for name in STOCK_FILES)

    def load_model(self) -> nn.Module:
        """The model of transformers with its weights, on the CPU and not quantised."""
        # In its own folders transformers reads one tensor after the other.
        if self._is_in_stock_folder:
            return self._build(self._source, config=self.needed())
        tensors = self._tensors(load_tensors)
        return self._build(None, config=self.needed(), state_dict=tensors)

    def _load_quantised(self, device: torch.device) -> nn.Module:
        """The model of transformers on a device, where its weights are quantised one by one as they are read."""
        from models.foundation.encoders.quantised import Quantisation

        # Of what is wrong with a tensor that is quantised transformers would say nothing.
        self.check_weights()
        how = {"config": self.needed(), "quantization_config": Quantisation(FORMATS[self.kept])}
        there = {"": device}
        if self._is_in_stock_folder:
            return self._build(self._source, device_map=there, **how)
        tensors = self._tensors(lambda path, _, prefix: mapped_tensors(path, prefix))
        return self._build(None, state_dict=tensors, device_map=there, **how)

    def _tensors(self, read: Callable[[Path, torch.dtype, str], dict[str, Any]]) -> dict[str, Any]:
        """The tensors of the file or folder under the names of transformers, as `read` gives them. Those of a GGUF file
        are decoded one by one, when transformers asks for their values."""
        source = self._source
        if not (self.is_t5 and source.is_file() and is_gguf(source)):
            return self.names.tensors(read, source, self.dtype)
        tensors = t5_tensors(source)
        if read is not meta_tensors:
            return tensors
        return {name: torch.empty(one.shape, dtype=self.dtype, device="meta") for name, one in tensors.items()}

    def _build(self, folder: Path | None, **how: Any) -> nn.Module:
        """The model with its weights; see `loaded`."""
        how |= {"unused": self._unused, "dtype": self.dtype, **self.arguments}
        return loaded(self.stock_class, folder, self._source, **how)

    def empty(self) -> nn.Module:
        """What `load` makes, without memory."""
        with none_without_memory(), torch.device("meta"):
            model = self.stock_class(self.needed()).to(self.dtype).eval()
        with_precise_parts(model, self.dtype)
        return self._quantised(model)

    def _quantised(self, module: nn.Module) -> nn.Module:
        """A module without memory, with its blocks quantised if they are to be."""
        if self.kept:
            from models.foundation.encoders.quantised import quantise_empty

            quantise_empty(module, FORMATS[self.kept])
        return module

    def unload(self) -> None:
        self.model = None

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_folder)

    @property
    def token_limit(self) -> int:
        """The number of tokens that are read of a caption; the rest is cut off."""
        return self.tokenizer.model_max_length if self.features.length is None else self.features.length

    def token_count(self, caption: str) -> int:
        """The number of tokens of a caption, including those that are cut off."""
        return len(self.tokenizer(self.features.written(self.tokenizer, caption)).input_ids)

    @torch.no_grad()
    def encode(self, caption: list[str]) -> EncodedText:
        self.truncated += sum(self.token_count(text) > self.token_limit for text in caption)
        return self.features(self.model, self.tokenizer, caption)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (shape, self.dtype) for name, shape in self.shapes.items()}


def with_precise_parts(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives the parts of a model of transformers that are too large in `dtype`, as in T5 in float16, the type in which
    transformers loads them."""
    plain, strict = (getattr(model, name, None) or () for name in PRECISE)
    kept = {*strict, *(plain if dtype == torch.float16 else ())} if dtype != torch.float32 else set()
    for name, module in model.named_modules():
        if kept & set(name.split(".")):
            module.to(torch.float32)


def load_tokenizer(folder: Path, *, names_padding: bool = True) -> Any:
    """The tokenizer in a folder.

    Args:
        names_padding: whether it must name its padding token.

    Raises:
        UserError: it is not whole.
    """
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    # Without its vocabulary a tokenizer would load all the same, and know no words. ByT5's words are the bytes.
    settings = folder / "tokenizer_config.json"
    needs_none = settings.is_file() and read_json(settings).get("tokenizer_class") == "ByT5Tokenizer"
    if not needs_none and not has_vocabulary(folder):
        raise UserError.of(
            f"the tokenizer's words are missing ({' or '.join(' and '.join(names) for names in VOCABULARIES)}); "
            "download this folder again",
            str(folder),
        )
    try:
        tokenizer = of_transformers("AutoTokenizer").from_pretrained(folder)
    # Three libraries decide which errors they raise; some raise a bare Exception.
    except Exception as error:
        raise UserError.of(f"the tokenizer cannot be loaded ({error}); download it again", str(folder)) from error
    if names_padding and tokenizer.pad_token is None:
        raise UserError.of("names no `pad_token`; download it again", str(folder / "tokenizer_config.json"))
    return tokenizer
