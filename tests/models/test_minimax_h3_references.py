"""MiniMax-H3 with references: pictures and clips, as its stock pipeline reads them.

Shapes: B samples, C channels, F frames, H W pixels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.minimax_h3.encoders import MiniMaxH3Ref2VATextEncoderStep, encode_vae_condition
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference, MiniMaxH3VideoReference
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from models.assembly.prompts import prompt_versions
from models.assembly.sample_checks import check_sampling
from models.foundation.encoders.vae import picture_noise
from tests.models import tiny_minimax_h3 as tiny
from tests.models import tiny_minimax_h3_ref as ref
from tests.runs import metrics, only_run
from tests.utils.run.test_goes_on import run_here
from utils.dataset.encoders import inputs_of, item_key
from utils.dataset.samples import Bucket, Control
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.writing import tensor_to_image, write_clip
from utils.settings.schema import SamplingSettings

CPU = torch.device("cpu")
FRAMES = 38
"""Of which the text encoder sees four, and of 13 two."""


class ClipProcessor:
    """The stock processor of clips, which needs torchvision for other sizes alone."""

    temporal_patch_size = 2

    def __call__(self, videos: list[np.ndarray], **how: Any) -> dict[str, torch.Tensor]:
        values, grids = [], []
        for levels_FHWC in videos:
            pixels_1FCHW = torch.from_numpy(levels_FHWC).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
            patches, *grid = Qwen3VLVideoProcessor.patchify(None, pixels_1FCHW, 16, 2, 2)
            values.append(patches[0])
            grids.append(grid)
        return {"pixel_values_videos": torch.cat(values), "video_grid_thw": torch.tensor(grids)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.write_folder(tmp_path_factory.mktemp("minimax_h3_ref"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 40 frames at 24 a second, and stills of the same names."""
    place = tmp_path_factory.mktemp("clips")
    for number in range(3):
        pixels_CFHW = normal((3, 1, 64, 64), 0, "clip", number).mul(0.3).clamp(-1, 1)
        moving_CFHW = torch.cat([pixels_CFHW.roll(shift, 3) for shift in range(40)], dim=1)
        (place / "clips").mkdir(exist_ok=True)
        write_clip(moving_CFHW, 24, place / "clips" / f"{number}.mp4")
        (place / "clips" / f"{number}.txt").write_text("it moves")
    return place / "clips"


def levels_of(frames: int, height: int, width: int, *name: Any) -> torch.Tensor:
    return (normal((2, 3, frames, height, width), 0, *name).clamp(-1, 1) * 127 + 128).to(torch.uint8)


@torch.no_grad()
def test_references_are_read_as_by_the_stock_pipeline(folder: Path) -> None:
    """Labels, pictures and clips, of sizes of their own, before the caption; and their latents."""
    text, *vaes = ref.pipeline(folder).encoders(4)[1:]
    levels = {
        "controlclip": levels_of(1, 32, 48, "a"),
        "controlclip_2": levels_of(FRAMES, 64, 32, "b"),
        "controlclip_3": levels_of(1, 64, 32, "c"),
        "controlclip_4": levels_of(13, 32, 32, "d"),
    }
    for encoder in (text, *vaes):
        encoder.load(CPU)
    assert text.reads == ("caption", *levels) and [vae.reads for vae in vaes] == [(name,) for name in levels]
    captions, pixels = ["a fox", ""], {name: one / 127.5 - 1 for name, one in levels.items()}
    read = text.encode(caption=captions, **pixels)
    stock = tiny.STOCK.from_pretrained(folder)
    stock.processor.video_processor = ClipProcessor()
    for number, caption in enumerate(captions):
        references = []
        for one in levels.values():
            levels_FHWC = one[number].permute(1, 2, 3, 0).numpy()
            picture = MiniMaxH3ImageReference(Image.fromarray(levels_FHWC[0]))
            references.append(MiniMaxH3VideoReference(levels_FHWC) if len(levels_FHWC) > 1 else picture)
        state = PipelineState()
        state.set("prompt", caption)
        state.set("normalized_references", references)
        _, state = MiniMaxH3Ref2VATextEncoderStep()(stock, state)
        torch.testing.assert_close(read["qwen3_vl"][number], state.get("prompt_embeds")[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(read["qwen3_vl_kinds"][number], state.get("text_token_tags"))
    plain = AutoencoderKLMiniMaxH3.from_pretrained(folder / "vae")
    units = stock.pixel_mean, stock.pixel_std, stock.keyframe_encode_seed
    for name, vae in zip(levels, vaes, strict=True):
        (drawn,) = vae.encode(**{name: pixels[name]}).values()
        clean = torch.cat([encode_vae_condition(plain, one, *units) for one in levels[name].split(1)])
        noise = torch.cat([picture_noise(one, clean[:1]) for one in pixels[name].split(1)])
        assert (drawn - torch.lerp(clean, noise, 0.001)).abs().mean() < 1e-5, name


def test_a_control_that_is_a_clip_is_read_as_one(folder: Path, clips: Path) -> None:
    """From its beginning, in the lengths of the model, and no longer than the sample."""
    h3 = ref.pipeline(folder)
    keys = {
        "prompts": ["a fox"],
        "guidance": 1.0,
        "width": 64,
        "height": 64,
        "control_images": [[str(clips / "0.mp4")]],
    }
    read = {}
    for frames in (1, 13, 48):
        (version,) = prompt_versions(h3, SamplingSettings(**keys, frames=frames))
        encoders = h3.encoders(1)[1:]
        (pixels,) = inputs_of(encoders[1], version).values()
        assert torch.equal(inputs_of(encoders[0], version)["controlclip"], pixels)
        read[frames] = pixels, item_key(encoders[1], version)
    assert [pixels.shape[1] for pixels, _ in read.values()] == [1, 13, FRAMES]
    assert len({key for _, key in read.values()}) == 3
    assert torch.equal(read[48][0][:, :13], read[13][0])


def test_references_that_qwen_would_see_at_another_size_are_told(
    tmp_path: Path, clips: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And more of them than the model takes."""
    folder = ref.write_folder(tmp_path)
    h3 = ref.pipeline(folder)

    def problems(*sizes: tuple[int, int, int]) -> list[str]:
        controls = [Control(SimpleNamespace(locator="a.mp4", frames=30), Bucket(*size)) for size in sizes]
        return [one.message for one in h3.problems_of_data([SimpleNamespace(controls=tuple(controls))])]

    assert problems((64, 64, 13), (48, 32, 1)) == []
    assert "1 reference clips are pictures here, of their first frame" in caplog.text
    (message,) = problems((64, 64, 13), (1024, 512, FRAMES))
    assert message.startswith(
        "the reference a.mp4 of 38 frames has 1024 x 512 pixels, and Qwen3-VL would see it at 704"
    )
    assert message.endswith("; set another control_resolution")
    for many in ([(64, 64, 13)] * 4, [(64, 64, 1)] * 10):
        assert problems(*many) == ["the model takes 9 pictures and 3 clips as references; give fewer"]
    keys = {"prompts": ["a fox"], "guidance": 1.0, "frames": 13, "steps": 3, "control_images": [[str(clips / "0.mp4")]]}
    check_sampling(h3, SamplingSettings(**keys, width=64, height=64))
    with pytest.raises(UserError, match="would see it at .*; set another width and height"):
        check_sampling(h3, SamplingSettings(**keys, width=1024, height=1024))
    settings = folder / "processor" / "video_preprocessor_config.json"
    settings.write_text(json.dumps({"size": {"longest_edge": 2**20}}))
    with pytest.raises(UserError, match="lacks `shortest_edge`"):
        problems((64, 64, 13))
    settings.unlink()
    assert problems((64, 64, 1)) == []
    with pytest.raises(UserError, match=r"video_preprocessor_config\.json"):
        problems((64, 64, 13))


def test_references_are_for_a_transformer_of_their_own(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tiny.write_folder(tmp_path)
    h3 = tiny.pipeline(plain)
    with pytest.raises(UserError, match=r"set \[model\] from_references = true, or leave control_path out"):
        h3.encoders_for(1)
    with pytest.raises(UserError, match="transformer_ref: this part is missing"):
        ref.pipeline(plain).check()
    with pytest.raises(UserError, match="takes 12 control images, and there are 13"):
        ref.pipeline(folder).encoders_for(13)
    assert not caplog.messages
    ref.pipeline(folder).encoders_for(0)
    assert "no [[directory]] has a control_path with references" in caplog.text


@pytest.mark.parametrize(
    ("option", "without", "said"),
    [
        ("from_first_frame", None, "key frames and references are for two transformers"),
        (None, "processor", "processor"),
    ],
)
def test_what_references_need_is_told(tmp_path: Path, option: str | None, without: str | None, said: str) -> None:
    folder = ref.write_folder(tmp_path)
    if without:
        shutil.rmtree(folder / without)
    with pytest.raises(UserError, match=said):
        ref.pipeline(folder, **({option: True} if option else {})).check()


def test_it_trains_with_references(
    folder: Path, clips: Path, write_config: Callable[..., Path], pictures: Path
) -> None:
    """Clips, with a clip and a picture for each, and a sample that is shown such."""
    h3 = ref.pipeline(folder)
    h3.check()
    stills = clips.with_name("stills")
    stills.mkdir()
    for number in range(3):
        tensor_to_image(normal((3, 1, 64, 64), 0, "still", number)).save(stills / f"{number}.png")
    rules = {"path": str(clips), "control_path": [str(clips), str(stills)], "control_resolution": 32}
    options = h3.options.model_dump(mode="json", exclude_unset=True)
    given = [[str(clips / "0.mp4"), str(stills / "1.png")]]
    shown = {**ref.SAMPLING, "width": 64, "height": 64, "frames": 13, "control_images": given, "steps": 2}
    asked = {"prompts": ["a red clip"], "sample_every_n_steps": 2, **shown}
    data = {"directory": [rules], "resolutions": [32], "frame_buckets": [18]}
    config = write_config(data=data, model=options, max_steps=2, sampling=asked, lr_scheduler="constant")
    assert run_here(config)
    assert list(metrics(only_run(config), "train/loss")) == [1, 2]
    (sample,) = (only_run(config) / "samples" / "step000002").glob("00_*.mp4")
    assert sample.stat().st_size
