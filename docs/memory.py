"""Writes memory.md with the planner's choices for models at full size: `python docs/memory.py`, some minutes."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.assembly.fitting import Attempt, fit  # noqa: E402
from models.assembly.kept import weight_bytes  # noqa: E402
from models.assembly.memory import GIB, Planner  # noqa: E402
from models.assembly.phases import encoding_bytes  # noqa: E402
from models.assembly.stage import partition  # noqa: E402
from models.base import BasePipeline  # noqa: E402
from models.foundation.checkpoints.configs import made_of  # noqa: E402
from models.foundation.checkpoints.weights import build_empty  # noqa: E402
from optimizers.adamw import AdamW8bitSettings, AdamWSettings  # noqa: E402
from tests.models.full_size import ALL, FullSize  # noqa: E402
from tests.models.full_size_texts import TEXT_ENCODERS, text_encoder_bytes  # noqa: E402
from utils.adapters.lora import LoraSettings  # noqa: E402
from utils.dataset.samples import Bucket  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.settings.schema import Settings  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
CARDS = (12, 16, 24, 32, 48, 80)
BASES = ("bfloat16", "float8", "nf4")
RANK = 32
AUTO = {"activation_checkpointing": "auto", "blocks_to_swap": "auto"}
WAYS = {False: "", True: "recompute", "offload": "offload"}
TOP = f"""# What fits

This page is made by the planner that `--check` and every run use: `python docs/memory.py`. It is counted, not measured;
on an H200 the measured peaks of Flux and Wan lie within 6% of the plan ([benchmarks](benchmarks.md)). Write
`activation_checkpointing = "auto"` and `blocks_to_swap = "auto"` to get these settings for the card that is there, or
`memory_budget_gb` with them to see what another would get.

## LoRA of rank {RANK}, one sample at a time

In each cell what the card needs, and the GiB of a step's peak. *recompute* is `activation_checkpointing = true`,
*offload* is `activation_checkpointing = "offload"`, a number after *swap* is `blocks_to_swap`; nothing means that
nothing is needed. *float8* and *nf4* are `[model] transformer_dtype`, given where the model does not fit in bfloat16.
Encoders are gone before the denoiser comes; they, and decoding samples with the VAE, are not counted.
"""
FULL_CARDS = (24, 48, 80)
FULL = """## In full

One sample at a time. The first two columns are the GiB of a single card with blocks recomputed with offload and none
swapped, for AdamW and for `adamw8bit`, which keeps a quarter of the optimizer's state; more `pipeline_stages` share all
of it. The others are what `"auto"` chooses for AdamW on a card: as above, and last the GiB of the machine's memory that
weights, gradients and optimizer state of the swapped blocks take, where the processor updates them. `zero_stage = 1`,
`2` or `3` divides the optimizer's state, also the gradients, or also the weights of the blocks, among the data ranks of
a stage, and `offload_optimizer = true` keeps that state in the machine's memory; `--check` counts both.
"""
TEXTS_KEPT = (None, "float8", "nf4")
TEXTS = """## Text encoders

While captions are encoded, or samples begin, one encoder is on the card at a time: the GiB of its weights in bfloat16,
and with `[model] text_encoder_dtype`, with which it is never there in full. int8 takes what float8 does. Some hundred
MiB more are for the captions.
"""


CLIPS = (
    ("wan", "2.1_t2v_1.3b"),
    ("wan", "2.1_t2v_14b"),
    ("wan", "2.1_i2v_14b"),
    ("wan", "2.2_i2v_a14b"),
    ("wan", "2.2_ti2v_5b"),
    ("wan_vace", "2.1_1.3b"),
    ("wan_vace", "2.1_14b"),
    ("hunyuan_video", "t2v"),
    ("hunyuan_video_15", "720p_t2v"),
    ("framepack", "13b"),
    ("kandinsky5", "lite_t2v"),
    ("cogvideox", "5b"),
    ("cogvideox", "1.5_5b"),
    ("mochi", "preview"),
    ("ltx_video", "2b_0.9.5"),
    ("ltx_video", "13b"),
    ("ltx2", "2.3_22b"),
    ("cosmos", "7b_v2w"),
    ("cosmos_predict2", "2b_v2w"),
    ("cosmos_predict2", "14b_v2w"),
    ("cosmos_predict25", "2b"),
    ("cosmos_predict25", "14b"),
    ("minimax_h3", "fl2va"),
)
"""Models of clips: type and architecture."""
CLIP_SIZES = ((832, 480, 81), (1280, 720, 121))
CLIP_CARDS = (24, 80)
OF_CLIPS = f"""## Clips

Of one clip: the tokens of its latents, the MiB that it takes in the cache (latents and the longest caption), the GiB
with which the VAE encodes it at once, and in tiles, as it does where the card has no room for that: neighbouring tiles
are blended, and differ a little from the whole. The VAEs of Wan and CogVideoX go through a clip part by part and
remember what they need of the frames before, HunyuanVideo's blends pieces of 16 frames as its stock pipeline does; all
others see the whole clip. Then what a LoRA of rank {RANK} needs on a card, as above; FramePack's sections are as long
in each clip. Sides are multiples of what the model asks for, so that 720 lines may be 704, and clips are cut to the
frames that it was made for.
"""


def main() -> None:
    adapted = "\n".join(lora_row(model) for model in ALL)
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lora = f"| | {cards} |\n|---|{'---|' * len(CARDS)}\n{adapted}\n"
    full_cards = " | ".join(f"{card} GB" for card in FULL_CARDS)
    in_full = "\n".join(full_row(model) for model in ALL)
    in_full = f"| | AdamW | adamw8bit | {full_cards} |\n|---|---|---|{'---|' * len(FULL_CARDS)}\n{in_full}\n"
    clips = "\n".join(clip_row(*model, *size) for model in CLIPS for size in CLIP_SIZES)
    of_cards = " | ".join(f"{card} GB" for card in CLIP_CARDS)
    rule = f"|---|---|---|---|---|{'---|' * len(CLIP_CARDS)}"
    clips = f"| | tokens | cache | VAE | in tiles | {of_cards} |\n{rule}\n{clips}\n"
    parts = (TOP, lora, FULL, in_full, OF_CLIPS, clips, TEXTS, texts_table())
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def clip_row(model_type: str, architecture: str, width: int, height: int, frames: int) -> str:
    """What a clip of this size takes of a published model."""
    import models

    options = models.find(model_type).Options(type=model_type, architecture=architecture, from_scratch=True)

    def published(_: Path, **keys: Any) -> BasePipeline:
        return models.build(options.model_copy(update={"transformer_dtype": keys["transformer_dtype"]}))

    pipeline = models.build(options)
    media, encoders = pipeline.media, pipeline.encoders(int(pipeline.follows_clip))
    sides = [side // media.spatial * media.spatial for side in (width, height)]
    bucket = Bucket(*sides, media.frames(frames))
    latent = pipeline.latent_shape(bucket.width, bucket.height, bucket.frames)
    cached = [one for encoder in encoders for one in encoder.feature_shapes(bucket).values()]
    vae = encoders[0]
    config, file = vae.family.config(vae.folder, vae.file), vae.folder / "vae" / "config.json"
    empty = build_empty(lambda: made_of(vae.family.model_class, config, file)).to(vae.dtype).to("meta").eval()
    needs = encoding_bytes(vae, empty, bucket, 1)
    model = SimpleNamespace(pipeline=published, encoders=encoders, bucket=bucket)
    channels, latent_frames, *cells_hw = latent
    cells = (
        f"{model_type} {architecture}, {bucket.width} x {bucket.height} x {bucket.frames}",
        f"{pipeline.tokens((channels, 1, *cells_hw)) * latent_frames:,}",
        f"{sum(math.prod(shape) * dtype.itemsize for shape, dtype in cached) / 2**20:.1f}",
        *("-" if need is None else f"{(need + weight_bytes([empty])) / GIB:.1f}" for need in needs),
        *_choices(model, CLIP_CARDS),
    )
    return f"| {' | '.join(cells)} |"


def texts_table() -> str:
    """What text encoders take in each format."""
    rows = [
        f"| {name} | {' | '.join(f'{text_encoder_bytes(name, kept) / GIB:.1f}' for kept in TEXTS_KEPT)} |"
        for name in TEXT_ENCODERS
    ]
    heads = " | ".join(kept or "bfloat16" for kept in TEXTS_KEPT)
    return "\n".join([f"| | {heads} |", f"|---|{'---|' * len(TEXTS_KEPT)}", *rows]) + "\n"


def lora_row(model: FullSize) -> str:
    """The choices for a model on all cards."""
    width, height, frames = model.size
    size = f"{width} x {height}" + (f" x {frames}" if frames > 1 else "")
    return f"| {model.name}, {size} | {' | '.join(_choices(model, CARDS))} |"


def _choices(model: FullSize, cards: Sequence[int]) -> Iterator[str]:
    planners: dict[str, Planner] = {}
    for card in cards:
        for base in BASES:
            if base not in planners:
                adapter = LoraSettings(type="lora", rank=RANK)
                planners[base] = _planner(model, AdamWSettings(type="adamw", lr=1e-4), adapter, base, **AUTO)
            chosen = _chosen(planners[base], card)
            if chosen:
                yield f"{'' if base == BASES[0] else f'{base}, '}{chosen}"
                break
        else:
            yield "-"


def _chosen(planner: Planner, card: int) -> str | None:
    """What fits the card; None if nothing does."""
    try:
        settings = fit(planner, card * GIB)
    except UserError:
        return None
    swap = f"swap {settings.blocks_to_swap}" if settings.blocks_to_swap else ""
    (plan,) = planner.plans(settings, planner.swapped(settings))
    host = f"host {plan.host / GIB:.0f}" if settings.swaps_trained else ""
    parts = [WAYS[settings.activation_checkpointing], swap, f"{_total(planner, settings):.1f}", host]
    return ", ".join(part for part in parts if part)


def full_row(model: FullSize) -> str:
    """What a model takes in full with two optimizers, and the choices for AdamW."""
    least = {"activation_checkpointing": "offload", "blocks_to_swap": 0}
    adamw, eight_bits = (
        _planner(model, optimizer, None, BASES[0], **AUTO)
        for optimizer in (AdamWSettings(type="adamw", lr=1e-5), AdamW8bitSettings(type="adamw8bit", lr=1e-5))
    )
    totals = [f"{_total(one, one.settings.model_copy(update=least)):.0f}" for one in (adamw, eight_bits)]
    choices = [_chosen(adamw, card) or "-" for card in FULL_CARDS]
    return f"| {model.name} | {' | '.join([*totals, *choices])} |"


def _total(planner: Planner, settings: Settings) -> float:
    return Attempt(settings, planner.plans(settings, planner.swapped(settings))).total / GIB


def _planner(model: FullSize, optimizer: Any, adapter: Any, base: str, **keys: Any) -> Planner:
    with tempfile.TemporaryDirectory() as folder:
        pipeline = model.pipeline(Path(folder), transformer_dtype=base)
        settings = Settings(
            output_dir=Path(folder),
            dataset=Path(folder),
            model=pipeline.options,
            adapter=adapter,
            optimizer=optimizer,
            **keys,
        )
        staged = partition(pipeline, settings, pipeline.weights.build_empty())
        planner = Planner(settings, pipeline, staged, model.encoders, {model.bucket: 1})
        # Reads the files, which are gone afterwards.
        planner.plans(settings, planner.swapped(settings))
        for way in WAYS:
            chosen = settings.model_copy(update={"activation_checkpointing": way})
            planner.plans(chosen, planner.swapped(chosen))
        return planner


if __name__ == "__main__":
    main()
