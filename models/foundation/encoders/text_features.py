"""What models read from text encoders: functions (text encoder, tokenizer, captions) -> named features.

The repr of each is part of the keys of cached items: with another name, field or order of fields, all captions are
encoded again.

Shapes: B captions, L tokens, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EncodedText = dict[str, torch.Tensor | list[torch.Tensor]]
Shapes = dict[str, tuple[int, ...]]


class TextFeatures(ABC):
    """What a model reads from a text encoder. Subclasses are frozen dataclasses.

    Attributes:
        name: of the features, and of the encoder unless `encoder` says otherwise.
        length: number of tokens of a caption that are read, including those that `written` adds; None for as many as
            the tokenizer says.
        layers_kept: so many layers of the encoder are built, those behind the last hidden state that is read are not
            needed; None for all of them.
    """

    name: str
    length: int | None

    @property
    def layers_kept(self) -> int | None:
        return None

    @property
    def encoder(self) -> str:
        """The name of the text encoder."""
        return self.name

    @abstractmethod
    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> Mapping[str, Any]:
        """The features of captions: tensors (B, ...), or lists with one tensor per caption if lengths differ. The
        features of a caption must not depend on the others."""

    @abstractmethod
    def shapes(self, config: PretrainedConfig) -> Shapes:
        """The shapes of the features of the longest caption, by name.

        Args:
            config: the configuration of the encoder's text model.
        """

    def written(self, tokenizer: Any, caption: str) -> str:
        """The caption with the text that is put around it before tokenization."""
        return caption


@dataclass(frozen=True, repr=False)
class ClipPooled(TextFeatures):
    """The pooled output of CLIP (B, D), over the tokenizer's whole length, without a mask."""

    name: ClassVar[str] = "clip"
    length: ClassVar[None] = None

    def __repr__(self) -> str:
        # The name that keys of cached items contain.
        return "clip_pooled"

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return {"clip_pooled": text_encoder(tokens.input_ids.to(text_encoder.device)).pooler_output}

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {"clip_pooled": (config.hidden_size,)}


class HiddenStates(TextFeatures):
    """Features with one hidden state for all `length` tokens."""

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (self.length, config.hidden_size)}


class MaskedHiddenStates(TextFeatures):
    """Features with one hidden state for up to `length` tokens, and a mask."""

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (self.length, config.hidden_size), f"{self.name}_mask": (self.length,)}


@dataclass(frozen=True)
class T5Features(HiddenStates):
    """The last hidden state of T5 (B, L, D), padded to `length` tokens without a mask, as in inference."""

    name: ClassVar[str] = "t5"
    length: int

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return {"t5": text_encoder(tokens.input_ids.to(text_encoder.device))[0]}


@dataclass(frozen=True)
class MaskedT5Features(HiddenStates):
    """The last hidden state of T5 (B, L, D) with padding up to `length`, which T5 itself ignores."""

    name: ClassVar[str] = "t5"
    length: int

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        tokens = tokens.to(text_encoder.device)
        return {"t5": text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]}


@dataclass(frozen=True)
class ProjectedFeatures(TextFeatures):
    """CLIP's pooled and projected feature of a caption that is padded to `length` tokens (B, P), without a mask.

    Attributes:
        name: the encoder's name with the suffix `_pooled`.
    """

    name: str
    length: int

    @property
    def encoder(self) -> str:
        return self.name.removesuffix("_pooled")

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (config.projection_dim,)}

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return {self.name: text_encoder(tokens.input_ids.to(text_encoder.device)).text_embeds}


@dataclass(frozen=True)
class TrueLengthFeatures(MaskedHiddenStates):
    """The last hidden state of the tokens of each caption, (l, D) with l up to `length`, and a mask (l,) of ones: for
    models that mask the padding or set it to zero, so that it is not cached.

    Attributes:
        padding_tokens: number of padding tokens that the model sees all the same.
    """

    name: str
    length: int
    padding_tokens: int = 0

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        padding = "max_length" if self.padding_tokens else "longest"
        tokens = tokenizer(captions, padding=padding, max_length=self.length, truncation=True, return_tensors="pt").to(
            text_encoder.device
        )
        hidden_BLD = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        lengths = (tokens.attention_mask.sum(1) + self.padding_tokens).clamp(max=self.length).tolist()
        return {
            self.name: [hidden[:length] for hidden, length in zip(hidden_BLD, lengths, strict=True)],
            f"{self.name}_mask": [torch.ones(length, dtype=torch.bool) for length in lengths],
        }


@dataclass(frozen=True)
class PaddedFeatures(MaskedHiddenStates):
    """The last hidden state of an encoder (B, L, D), padded to `length` tokens, and a mask (B, L) that leaves out the
    padding, which the encoder itself ignores: for models that mask the padding in one place and see it in another."""

    name: str
    length: int

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        tokens = tokens.to(text_encoder.device)
        hidden_BLD = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {self.name: hidden_BLD, f"{self.name}_mask": tokens.attention_mask.bool()}


def chat(tokenizer: Any, messages: Sequence[tuple[str, Any]], **further: Any) -> str:
    """Messages, each (role, content), in the chat template of a tokenizer.

    Args:
        further: variables of the template.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.chat_template is None:
        raise UserError.of("has no chat template; download this folder again", str(tokenizer.name_or_path))
    written = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(written, tokenize=False, **further)


@dataclass(frozen=True)
class ChatFeatures(MaskedHiddenStates):
    """A hidden state of a chat model that reads the caption as a user's message: for each caption with the template
    around it (l, D) with l up to `length`, and a mask (l,) of ones.

    Attributes:
        layer: index of the hidden state; the first ones are the embeddings.
        thinking: the value of `enable_thinking` for the template.
    """

    name: str
    length: int
    layer: int = -2
    thinking: bool = True

    def written(self, tokenizer: Any, caption: str) -> str:
        return chat(tokenizer, [("user", caption)], add_generation_prompt=True, enable_thinking=self.thinking)

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        chats = [self.written(tokenizer, caption) for caption in captions]
        tokens = tokenizer(chats, padding="longest", max_length=self.length, truncation=True, return_tensors="pt").to(
            text_encoder.device
        )
        mask_BL = tokens.attention_mask.bool()
        states = text_encoder(tokens.input_ids, attention_mask=mask_BL, output_hidden_states=True).hidden_states
        features = [hidden[mask] for hidden, mask in zip(states[self.layer], mask_BL, strict=True)]
        return {
            self.name: features,
            f"{self.name}_mask": [torch.ones(len(hidden), dtype=torch.bool) for hidden in features],
        }
