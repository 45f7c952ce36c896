"""FramePack: sections, and both models. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import calculate_shift
from torch import nn

from models.assembly.drawings import sample_model
from models.assembly.noising import Noising
from models.assembly.prompts import sample_bucket
from models.assembly.stage import StagedModel, load_stage
from models.base import BasePipeline
from models.framepack import FramepackPipeline
from tests.models import tiny_framepack as tiny
from tests.models import tiny_hunyuan_video
from tests.models.drawn_samples import sampling_of
from tests.models.tiny_folder import settings_of
from utils.dataset.batches import FeatureBatch
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.ranks import Ranks
from utils.run.sampling import Begun, denoise

KINDS = ("inverted_anti_drifting", "vanilla")
PROMPT = "a hiker on a ridge"
each_kind = pytest.mark.parametrize("kind", KINDS)
CLIP = (2, 4, 13, 4, 6)
"""The latents of two clips of six sections."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("framepack"))


def features_of(begins: Sequence[int], lengths: tuple[int, ...] = (5, 11)) -> dict[str, torch.Tensor]:
    """Random features of clips, whose sections begin there."""
    of_pictures = tiny.features_of_pictures(CLIP[1:])
    return {
        **tiny.features(lengths),
        **of_pictures,
        "latents": normal(CLIP, 0, "clean"),
        "section": torch.tensor(begins),
    }


def predicted(staged: StagedModel, stream: Any) -> torch.Tensor:
    for layer in staged.layers:
        stream = layer.eval()(stream)
    return stream


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, folder: Path) -> tuple[FramepackPipeline, StagedModel]:
    framepack = tiny.pipeline(folder, sampling_type=request.param)
    return framepack, load_stage(framepack, settings_of(framepack), stage=0)


@each_kind
@pytest.mark.parametrize("count", range(1, 7))
def test_a_section_sees_what_the_stock_pipeline_shows_it(folder: Path, kind: str, count: int) -> None:
    """And is told the same places. In clips of more than four sections some of them share theirs."""
    framepack, frames = tiny.pipeline(folder, sampling_type=kind), 1 + tiny.WINDOW * count
    x_t = normal(CLIP, 1, "noised")[:, :, :frames]
    for section in framepack.sections(x_t.shape[1:]):
        features = features_of([section.start] * 2)
        features["latents"] = features["latents"][:, :, :frames]
        inputs, number = framepack.prepare_inputs(features, x_t, torch.tensor([0.2, 0.9])), section.start // tiny.WINDOW
        clean, first = features["latents"], features["first_frame_latents"]
        _, seen = tiny.section_of(kind, clean, first, number, count)
        assert torch.equal(inputs.x_BCfhw, x_t[:, :, section.start : section.stop])
        assert torch.equal(inputs.clean_BC2hw, seen["latents_clean"])
        assert torch.equal(inputs.middle_BCfhw, seen["latents_history_2x"])
        assert torch.equal(inputs.far_BCfhw, seen["latents_history_4x"])
        order = ("history_4x", "history_2x", "clean")
        places = [*(seen[f"indices_latents_{name}"] for name in order), seen["indices_latents"]]
        assert torch.equal(inputs.places_RN, torch.cat(places)[None])
        assert inputs.frames_Bf.tolist() == [list(section)] * 2
    order = [section.start for section in framepack.sections(x_t.shape[1:])]
    assert order == sorted(order, reverse=kind == KINDS[0]) and len(order) == count


@torch.no_grad()
def test_any_section_is_predicted_as_by_the_stock_module(loaded: tuple[FramepackPipeline, StagedModel]) -> None:
    framepack, staged = loaded
    x_t, t_B = normal(CLIP, 1, "noised"), torch.tensor([0.2, 0.9])
    for begin in (1, 7, 11):
        features = features_of([begin] * 2)
        result = predicted(staged, framepack.prepare_inputs(features, x_t, t_B))
        processors = [block.attn.processor for block in blocks_of(staged)]
        expected = tiny.whole(staged.denoiser, framepack, features, x_t, t_B)
        for block, processor in zip(blocks_of(staged), processors, strict=True):
            block.attn.set_processor(processor)
        assert torch.equal(result, expected)
        assert result[:, :, begin : begin + tiny.WINDOW].abs().amin(dim=(1, 2, 3, 4)).min() > 0


def blocks_of(staged: StagedModel) -> list[nn.Module]:
    return [*staged.denoiser.transformer_blocks, *staged.denoiser.single_transformer_blocks]


def test_samples_of_a_batch_have_sections_of_their_own(loaded: tuple[FramepackPipeline, StagedModel]) -> None:
    """With texts of different lengths, and with gradients as of each alone."""
    framepack, staged = loaded
    x_t, t_B, weights = normal(CLIP, 1, "noised"), torch.tensor([0.2, 0.9]), normal(CLIP, 0, "loss")
    together = features_of([3, 9])
    inputs = framepack.prepare_inputs(together, x_t, t_B)
    assert len(inputs.places_RN) == (1 if framepack.options.sampling_type == "vanilla" else 2)
    result, weight = predicted(staged, inputs), staged.denoiser.clean_x_embedder.proj_2x.weight
    (gradient,) = torch.autograd.grad((result * weights).sum(), weight)
    alone = []
    for row in range(2):
        own = {name: one[row : row + 1] for name, one in together.items()}
        if row == 0:
            own |= {name: own[name][:, :5] for name in ("llama", "llama_mask")}
        stream = framepack.prepare_inputs(own, x_t[row : row + 1], t_B[row : row + 1])
        made = predicted(staged, stream)
        torch.testing.assert_close(result[row : row + 1], made, rtol=1e-4, atol=1e-5)
        alone += torch.autograd.grad((made * weights[row]).sum(), weight)
    torch.testing.assert_close(gradient, sum(alone), rtol=1e-4, atol=1e-4)


class PlainEngine:
    """Predicts in this process."""

    def __init__(self, staged: StagedModel):
        self.module, self._staged = staged.denoiser, staged

    def predict(self, batches: Sequence[tuple], count: int) -> list[torch.Tensor]:
        return [predicted(self._staged, stream) for stream, _ in batches]


@torch.no_grad()
@pytest.mark.parametrize(("frames", "steps"), [(9, 4), (49, 2)])
def test_clips_of_any_number_of_sections_are_those_of_the_stock_pipeline(
    loaded: tuple[FramepackPipeline, StagedModel], frames: int, steps: int
) -> None:
    framepack, staged = loaded
    stock = tiny.STOCK.from_pretrained(framepack.options.diffusers_path)
    stock.set_progress_bar_config(disable=True)
    sampling = sampling_of(tiny, PROMPT).model_copy(update={"frames": frames, "steps": steps})
    noise = normal((1, *framepack.latent_shape(48, 32, frames)), 7, "sample", 0)
    expected = tiny.draw(stock, sampling, noise, sampling_type=framepack.options.sampling_type)
    latents = drawn(framepack, staged, sampling, noise)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


def drawn(framepack: FramepackPipeline, staged: StagedModel, sampling: Any, noise: torch.Tensor) -> torch.Tensor:
    """What is drawn from this noise, as `utils.run.sampling` draws it."""
    settings, ranks = settings_of(framepack, sampling=sampling), Ranks()
    model = sample_model(framepack, framepack.encoders(), settings, ranks, Path("nowhere"), in_cache=False)
    (drawing,) = model.drawings()
    features = drawing.features()
    latents = model.before(noise, features[0])
    begun = Begun(drawing, drawing.schedule.of(sampling.steps), features, latents, torch.Generator())
    return denoise(PlainEngine(staged), ranks, model, begun)


def batch(*samples: str) -> FeatureBatch:
    features = features_of([1] * 2, (5, 5))
    del features["section"]
    clean = torch.stack([normal(CLIP[1:], 0, "clean", sample) for sample in samples])
    rows = {name: one[:1].expand(len(samples), *one.shape[1:]) for name, one in features.items()}
    weight = torch.ones(len(samples), 1, *CLIP[2:])
    weight[:, :, :, :2] = 0.0
    return FeatureBatch({**rows, "latents": clean}, list(samples), Bucket(48, 32, 49), weight)


def test_a_section_is_drawn_for_each_sample_and_counts_alone(folder: Path) -> None:
    """In the first stage as in the last, in any company; each about as often; and beside masks."""
    names, framepack = [f"sample {number}" for number in range(60)], tiny.pipeline(folder)
    inputs = Noising(framepack, wants_labels=False).training(batch(*names), epoch=2).inputs
    labels = Noising(framepack, wants_inputs=False).training(batch(*names), epoch=2).labels
    weight = labels.weight
    assert weight.shape == (60, 1, *CLIP[2:]) and not weight[:, :, :, :2].any()
    counted_Bf = weight[:, 0, :, -1, -1] > 0
    for row, frames in zip(counted_Bf, inputs.frames_Bf, strict=True):
        assert row.nonzero().flatten().tolist() == frames.tolist()
    torch.testing.assert_close(weight[:, :, :, 2:].mean(dim=(1, 2, 3, 4)), torch.ones(60))
    begins = inputs.frames_Bf[:, 0].tolist()
    assert set(begins) == {1, 3, 5, 7, 9, 11} and all(3 <= begins.count(begin) <= 20 for begin in set(begins))
    alone = Noising(framepack).training(batch(names[7]), epoch=2)
    assert alone.inputs.frames_Bf[0].tolist() == inputs.frames_Bf[7].tolist()
    assert torch.equal(alone.inputs.x_BCfhw[0], inputs.x_BCfhw[7])
    # What is seen has no noise.
    assert torch.equal(alone.inputs.clean_BC2hw[0, :, :1], batch("a").features["first_frame_latents"][0])
    others = Noising(framepack, wants_labels=False).training(batch(*names), epoch=3).inputs
    assert others.frames_Bf[:, 0].tolist() != begins


def test_evaluation_takes_the_same_sections_at_every_noise_level(folder: Path) -> None:
    names, framepack = [f"sample {number}" for number in range(12)], tiny.pipeline(folder)
    found = [Noising(framepack).evaluation(batch(*names), "held out", q).inputs.frames_Bf for q in (0.2, 0.8)]
    assert torch.equal(*found) and len(found[0].unique()) > 4


def test_what_is_made_at_once_of_a_clip_is_a_section(folder: Path) -> None:
    """By which work and tokens are counted: a long clip has no more of them."""
    framepack = tiny.pipeline(folder)
    shapes = [framepack.latent_shape(48, 32, frames) for frames in (9, 49)]
    assert [framepack.made_at_once(shape) for shape in shapes] == [(4, tiny.WINDOW, 4, 6)] * 2
    assert BasePipeline.made_at_once(tiny_hunyuan_video.pipeline(folder), shapes[1]) == shapes[1]


def test_the_shift_is_that_of_the_stock_pipeline(folder: Path) -> None:
    """By the tokens of a section, and at most 7."""
    framepack = tiny.pipeline(folder, latent_window_size=9)
    for width, height in ((320, 256), (640, 608)):
        tokens = framepack.tokens(framepack.latent_shape(width, height, 109))
        assert tokens == 9 * (height // 16) * (width // 16)
        expected = min(calculate_shift(tokens), math.log(7.0))
        assert framepack.resolution_shift.mu(tokens) == pytest.approx(expected)
    assert expected == math.log(7.0)


def test_what_siglip_sees_is_what_the_stock_pipeline_gives_it(folder: Path) -> None:
    """To a level of 256, by which its processor is off without torchvision."""
    stock, (*_, siglip) = tiny.STOCK.from_pretrained(folder), tiny.pipeline(folder).encoders()
    pixels_CFHW = load_image(tiny.PICTURE, View(48, 32, "center"))
    siglip.load(torch.device("cpu"))
    asked: list[torch.Tensor] = []
    for model in (siglip.model, stock.image_encoder):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
        )
    siglip.encode(pixels=pixels_CFHW[None])
    stock.encode_image(pixels_CFHW[None, :, 0])
    torch.testing.assert_close(asked[0], asked[1], rtol=0, atol=2.01 * 2 / 255)
    assert asked[0].shape == (1, 3, tiny.SIDE, tiny.SIDE) and asked[0].std() > 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes 8 channels, and the VAE makes 4; give HunyuanVideo's own VAE"),
        ({"image_proj_dim": 16}, "has `image_proj_dim` 16, and its image encoder makes 8; give SigLIP"),
        ({"has_clean_x_embedder": False}, "has no `has_clean_x_embedder`; give the configuration of FramePack"),
        ({"pooled_projection_dim": 8}, "has `pooled_projection_dim` 8, and its text encoder makes 32; give CLIP-L"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()


def test_files_of_hunyuan_video_and_of_framepack_are_told_apart(folder: Path, tmp_path: Path) -> None:
    other = tiny_hunyuan_video.write_folder(tmp_path)
    file = "transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r'it looks like HunyuanVideo: set \[model\] type = "hunyuan_video"'):
        tiny.pipeline(folder, transformer_path=other / file).check()
    with pytest.raises(UserError, match=r'holds FramePack: set \[model\] type = "framepack"'):
        tiny_hunyuan_video.pipeline(other, transformer_path=folder / file).check()


def test_which_of_the_two_models_it_is_taken_for_is_told(folder: Path) -> None:
    (remark,) = tiny.pipeline(folder).remarks()
    assert remark[0] == "sampling_type" and "FramePack F1 is trained with vanilla" in remark[1]
    assert not list(tiny.pipeline(folder, sampling_type="vanilla").remarks())


def test_clips_have_whole_sections(folder: Path) -> None:
    published = tiny.pipeline(folder, latent_window_size=9)
    assert [published.media.frames(count) for count in (36, 37, 81, 129, 10_000)] == [1, 37, 73, 109, 1801]
    sampling = sampling_of(tiny, PROMPT)
    with pytest.raises(UserError, match=r"makes clips of 1, 37, 73 \.\.\. up to 1801 frames; set 73 instead of 81"):
        sample_bucket(published, sampling.model_copy(update={"frames": 81}))
    still = SimpleNamespace(bucket=Bucket(48, 32, 1), media=SimpleNamespace(locator="fox.png"))
    (problem,) = published.problems_of_data([still])
    assert "1 of the samples are still pictures, the first is fox.png" in problem.message
