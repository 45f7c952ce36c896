"""Makes every part of the miniature Flux but the autoencoder: tokenizers, text encoders, configurations.

    python examples/mini_flux/make_parts.py

The text encoders are random and stay so: each word is one token, hence a constant vector of its own, and
the transformer learns what it means. The transformer, too, is random here, until it is trained; weights that
are already there are left alone.
"""

import json
import logging
from argparse import ArgumentParser
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from string import ascii_letters, digits, punctuation

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from draw import BACKGROUNDS, COLOURS, SHAPES
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

log = logging.getLogger(__name__)

# One token each, so that an adapter can be taught them. Any other word is spelled.
COMMON_WORDS = """
    a an the this that these those one two three four five six seven eight nine ten some many few all both no
    and or not but with without of in on at by to from for over under above below behind beside between near
    inside outside around through across into onto up down left right top bottom middle center corner edge
    front back side background foreground is are was be has have it its he she they we you i
    big small large little tiny huge tall short long wide narrow thick thin round flat sharp soft hard smooth
    rough bright dark light pale deep shiny plain simple old new young good bad nice beautiful happy sad warm
    cold hot wet dry full empty open closed fast slow
    pink brown silver gold golden grey beige violet turquoise
    line dot ring heart arrow cross moon sun cloud diamond hexagon pentagon oval rectangle cube sphere spiral
    shape color colour picture image photo drawing painting sketch pattern texture style pixel art icon logo
    man woman boy girl child person people face eye hand head hair body cat dog bird fish horse cow sheep bear
    mouse rabbit lion flower tree leaf grass forest mountain hill river lake sea ocean beach sky rain snow
    fire water stone rock sand earth house room door window wall floor roof table chair bed book cup bottle
    box ball car train boat ship plane bike road street city bridge garden field park
    day night morning evening summer winter spring autumn
    stands sits runs walks flies holds looks wearing standing sitting running looking
""".split()

END_OF_WORD = "</w>"
WORD_START = "▁"

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
}


def vocabulary() -> list[str]:
    """The words that are one token each, in a fixed order and without repeats."""
    return list(dict.fromkeys([*SHAPES, *COLOURS, *BACKGROUNDS, *COMMON_WORDS]))


def _byte_pairs(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    pieces = [*word[:-1], word[-1] + END_OF_WORD]
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        pair = min(known, key=ranks.__getitem__)
        at = list(pairwise(pieces)).index(pair)
        pieces[at : at + 2] = ["".join(pair)]
    return pieces


def merges_for(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, best first, that leave each of the words in one piece.

    A merge added later never disturbs an earlier word: that word's merges rank better, and they suffice.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := _byte_pairs(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    return list(ranks)


def clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Byte-level: what is not among the words is spelled byte by byte, in lower case."""
    merges = merges_for(words)
    # The library hands the alphabet out in an order that changes from run to run.
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(character + END_OF_WORD for character in alphabet),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer(words: Sequence[str]) -> T5TokenizerFast:
    """Unigram: the pieces are the words, and printable ASCII characters for everything else."""
    word_score, character_score = -5.0, -10.0
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(WORD_START + word, word_score) for word in words]
    characters = WORD_START + ascii_letters + digits + punctuation
    pieces += [(character, character_score) for character in characters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Random; its pooled output `(B, 32)` is the state of the end token."""
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_text_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Random; its output is `(B, tokens, 64)`."""
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def transformer() -> FluxTransformer2DModel:
    """Random, of 2.3M parameters. 64x64 pixels are 4x8x8 latents, packed 2x2 into 16 tokens of 16."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def main() -> None:
    parser = ArgumentParser(description="Makes the parts of the miniature Flux that need no training.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    folder = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer, tokenizer_2 = clip_tokenizer(vocabulary()), t5_tokenizer(vocabulary())
    parts = {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": clip_text_encoder(tokenizer),
        "text_encoder_2": t5_text_encoder(tokenizer_2),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
    }
    if not list((folder / "transformer").glob("*.safetensors")):
        parts["transformer"] = transformer().to(torch.bfloat16)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", encoding="utf-8")
    log.info("wrote %s to %s", ", ".join(parts), folder)


if __name__ == "__main__":
    main()
