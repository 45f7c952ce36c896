"""The memory of text encoders and of those that look at pictures, counted on the meta device."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from torch import nn

from models.assembly.encoder_needs import Need, reading_needs
from models.assembly.memory import GIB, Planner
from models.assembly.real_integers import RealIntegers
from models.assembly.stage import partition
from tests.models import (
    tiny_flux,
    tiny_hunyuan_video_15_i2v,
    tiny_hunyuan_video_i2v,
    tiny_minimax_h3_fl,
    tiny_minimax_h3_ref,
    tiny_qwen_image,
    tiny_qwen_image_21_edit,
    tiny_wan_flf,
)
from tests.models.assembly.test_phases import really_taken
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.dataset.encoders import Encoder
from utils.dataset.samples import Bucket
from utils.quantised.linear import QuantisedLinear
from utils.settings.run_tables import SamplingSettings

CPU = torch.device("cpu")
PICTURE, CLIP = Bucket(96, 64, 1), Bucket(64, 64, 9)


def seeing(module: ModuleType, folder: Path, controls: int = 0, *stock: type) -> list[Encoder]:
    """The encoders of a tiny model that are shown pictures, but for VAEs."""
    encoders = module.pipeline(module.write_folder(folder, *stock)).encoders_for(controls)
    return [one for one in encoders[1:] if getattr(one, "sees_pictures", hasattr(one, "further_tokens"))]


def inputs_of(encoder: Encoder, bucket: Bucket, batch: int) -> dict[str, Any]:
    """Long captions, and pictures of this size."""
    pixels = torch.zeros(batch, 3, bucket.frames, bucket.height, bucket.width)
    captions = ["a " * getattr(encoder, "caption_tokens", 512)] * batch
    return {name: captions if name == "caption" else pixels for name in encoder.reads}


def really_asked(encoder: Encoder, inputs: dict[str, Any]) -> tuple[int, list[int]]:
    """The bytes of the numbers that the encoder's module is given, which go to its device; and what it takes with them,
    of each call."""
    module, calls = encoder.model, []

    def record(_: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        calls.append((given, named))

    with module.register_forward_pre_hook(record, with_kwargs=True):
        encoder.encode(**inputs)
    given, named = calls[0]
    numbers = [one for one in (*given, *named.values()) if isinstance(one, torch.Tensor) and one.is_floating_point()]
    size = sum(one.nbytes for one in numbers)
    return size, [
        size + really_taken(lambda given=given, named=named: module(*given, **named)) for given, named in calls
    ]


def held(module: nn.Module) -> int:
    return sum({id(one): one.nbytes for one in (*module.parameters(), *module.buffers())}.values())


@pytest.mark.parametrize(
    ("module", "bucket", "batch", "more"),
    [
        (tiny_wan_flf, CLIP, 3, ()),
        (tiny_hunyuan_video_i2v, CLIP, 3, ()),
        (tiny_hunyuan_video_15_i2v, CLIP, 3, ()),
        (tiny_qwen_image, PICTURE, 3, (2, QwenImageEditPlusPipeline)),
        (tiny_qwen_image_21_edit, PICTURE, 1, (2,)),
        (tiny_minimax_h3_fl, CLIP, 1, ()),
        (tiny_minimax_h3_ref, PICTURE, 1, (2,)),
    ],
)
def test_who_sees_pictures_takes_what_is_counted(
    module: ModuleType, bucket: Bucket, batch: int, more: tuple, tmp_path: Path
) -> None:
    (encoder,) = seeing(module, tmp_path, *more)
    (need,) = reading_needs([encoder], bucket, batch)
    assert encoder.model is None
    encoder.load(CPU)
    assert need.weights == held(encoder.model)
    given, taken = really_asked(encoder, inputs_of(encoder, bucket, batch))
    # A convolution of a CPU copies its input.
    assert 0.9 * (max(taken) - given) < need.activations < 1.1 * max(taken)
    if encoder.reads[0] == "caption":
        assert need.activations == pytest.approx(max(taken), rel=0.1)


def test_texts_are_counted_in_the_form_in_which_they_are_kept(tmp_path: Path) -> None:
    folder = tiny_flux.write_folder(tmp_path)
    weights = {}
    for kept in ("float16", "int8"):
        encoder = next(
            one for one in tiny_flux.pipeline(folder, text_encoder_dtype=kept).encoders() if one.name == "t5"
        )
        (need,) = reading_needs([encoder], PICTURE, 1)
        encoder.load(CPU)
        assert need.weights == held(encoder.model)
        assert need.activations
        weights[kept] = encoder.model
    # Some of T5 stays in float32 beside float16.
    assert {one.dtype for one in weights["float16"].parameters()} == {torch.float16, torch.float32}
    assert any(isinstance(one, QuantisedLinear) for one in weights["int8"].modules())


def test_whole_numbers_have_values() -> None:
    values = torch.empty(4, 3, device="meta")
    with RealIntegers():
        numbers = torch.arange(4, device="meta")
        assert numbers.tolist() == [0, 1, 2, 3] and torch.tensor([1, 2]).to("meta").tolist() == [1, 2]
        chosen = numbers > 1
        assert values[chosen].shape == (2, 3) and values[chosen].is_meta
        assert (values * numbers[:, None]).is_meta and torch.ones(2, device="meta").is_meta
        assert values.cpu().is_meta and numbers.float().tolist() == [0.0, 1.0, 2.0, 3.0]
        values[chosen] = 1.0
        assert torch.where(chosen[:, None], values, 0.0).shape == (4, 3)


def planner_of(folder: Path, sampling: SamplingSettings | None = None, **keys: Any) -> Planner:
    flux = tiny_flux.pipeline(folder)
    further = {"sampling": sampling} if sampling else {}
    settings = settings_of(flux, LoraSettings(type="lora", rank=2), pipeline_stages=2, **further, **keys)
    staged = partition(flux, settings, flux.weights.build_empty())
    return Planner(settings, flux, staged, flux.encoders(), {PICTURE: 1}, 1, [PICTURE])


def test_encoders_that_are_not_cached_stay_on_the_first_stage(tmp_path: Path) -> None:
    folder = tiny_flux.write_folder(tmp_path)
    sizes = {"micro_batch_size_per_gpu": 2, "eval_micro_batch_size_per_gpu": 4}
    cached, live = planner_of(folder, **sizes), planner_of(folder, cache_text_embeddings=False, **sizes)
    clip, t5 = reading_needs(live._encoders[1:], PICTURE, 4)
    (before, last), (first, same) = (planner.plans(planner.settings, [0, 0]) for planner in (cached, live))
    more = clip.weights + t5.weights + max(clip.activations, t5.activations)
    assert sum(first.live) == first.training - before.training == first.evaluation - before.evaluation == more
    assert same == last
    assert f"+ text encoders {more / GIB:.2f}" in str(first) and "text encoders" not in str(before)
    # They encode nothing for the cache, unless there are prompts.
    names = {need.name for need in live.phases.caching_needs}
    assert names == {"vae"} and {need.name for need in cached.phases.caching_needs} == {"vae", "clip", "t5"}


def test_for_samples_their_weights_are_there(tmp_path: Path) -> None:
    folder, sampling = tiny_flux.write_folder(tmp_path), SamplingSettings(prompts=["a"], width=64, height=64)
    cached, live = planner_of(folder, sampling), planner_of(folder, sampling, cache_text_embeddings=False)
    needs = live.phases.caching_needs
    assert [need.name for need in needs] == ["vae", "clip", "t5"]
    (before, _), (first, _) = (planner.plans(planner.settings, [0, 0]) for planner in (cached, live))
    assert first.sampling - before.sampling == sum(need.weights for need in needs[1:])


def test_what_looks_at_values_counts_with_its_weights_alone() -> None:
    need = Need("picture", 2 * GIB, None)
    assert need.total == 2 * GIB and "activations cannot be counted" in str(need)
