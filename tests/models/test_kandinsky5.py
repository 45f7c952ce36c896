"""Kandinsky 5: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Kandinsky5I2IPipeline, Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
from einops import rearrange

from models.foundation.layers.kandinsky import mended
from tests import test_models as generic
from tests.models import tiny_kandinsky5 as tiny
from tests.models import tiny_kandinsky5_i2v, tiny_kandinsky5_t2i
from tests.models.batches import Batch
from tests.models.drawn_samples import draw_here, sampling_of
from tests.models.tiny_folder import encoded
from utils.diffusion.seeds import normal
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("kandinsky5"))


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_kandinsky5_t2i.write_folder(tmp_path_factory.mktemp("kandinsky5_t2i"))


def changed(folder: Path, place: Path, stock: type | None = None, **changes: Any) -> Path:
    """The folder with these changes of the transformer's configuration, or of another stock pipeline."""
    for part in folder.iterdir():
        (place / part.name).symlink_to(part)
    files = {"transformer/config.json": changes}
    if stock is not None:
        files["model_index.json"] = {"_class_name": stock.__name__}
    (place / "transformer").unlink()
    (place / "transformer").mkdir()
    for file in (folder / "transformer").iterdir():
        (place / "transformer" / file.name).symlink_to(file)
    for name, content in files.items():
        (place / name).unlink()
        (place / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **content}))
    return place


@torch.no_grad()
def test_a_shorter_text_is_seen_without_the_padding_of_its_batch(folder: Path) -> None:
    """As the stock module, with its own attention, sees each text alone."""
    pipeline, lengths = tiny.pipeline(folder), (5, 11)
    features, x_t = tiny.features(lengths), normal((2, *pipeline.latent_shape(48, 32)), 0, "x")
    batch = Batch(features, x_t, torch.tensor([0.2, 0.9]))
    made = generic.output(pipeline, generic.loaded(pipeline).layers, batch)
    stock = generic.Model("kandinsky5", folder, tiny).stock().transformer
    for number, length in enumerate(lengths):
        own = {name: rows[number : number + 1] for name, rows in features.items()}
        own |= {name: own[name][:, :length] for name in ("qwen2_5_vl", "qwen2_5_vl_mask")}
        expected = tiny.whole(stock, pipeline, own, x_t[number : number + 1], batch.t_B[number : number + 1])
        torch.testing.assert_close(made[number : number + 1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_captions_are_cleaned_as_the_stock_pipeline_does(folder: Path) -> None:
    captions, made = ["a hiker,\n\n a  ridge &amp;amp; a dog ", "a hiker, a ridge & a dog"], {}
    for encoder in tiny.pipeline(folder).encoders()[1:]:
        made |= encoded(encoder, captions)
        assert encoder.truncated == 0
    (expected,) = tiny.prompt_features(generic.Model("kandinsky5", folder, tiny).stock(), captions[:1])
    for name in ("qwen2_5_vl", "clip_pooled"):
        torch.testing.assert_close(made[name][0], expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made[name][0], made[name][1], rtol=1e-4, atol=1e-5)


def test_positions_are_nearer_to_each_other_at_480_lines(folder: Path, picture_folder: Path) -> None:
    clips, pictures = tiny.pipeline(folder), tiny.pipeline(picture_folder)
    for width, height in ((854, 480), (832, 480), (480, 848), (856, 480), (832, 472), (1280, 720), (768, 512)):
        scale = Kandinsky5T2VPipeline._get_scale_factor(None, height // 8 * 8, width // 8 * 8)
        assert clips._scale(height // 8, width // 8) == scale
        assert pictures._scale(height // 8, width // 8) == (1, 1, 1)
    assert clips._scale(60, 104) != clips._scale(90, 160)


def test_the_first_frames_of_a_clip_from_a_picture_are_mended() -> None:
    """With mean and spread far from those behind them, and near; those of short clips are left as they are."""
    stock = Kandinsky5I2VPipeline.__new__(Kandinsky5I2VPipeline)
    latents = normal((1, 4, 12, 2, 3), 0, "latents")
    for spread, mean in ((3.0, 2.0), (0.4, -1.0), (1.01, 0.02)):
        moved = torch.cat([latents[:, :, :4] * spread + mean, latents[:, :, 4:]], dim=2)
        expected = stock.normalize_first_frame(rearrange(moved, "b c f h w -> b f h w c"))
        torch.testing.assert_close(mended(moved), rearrange(expected, "b f h w c -> b c f h w"))
        assert (mended(moved) - moved)[:, :, :4].abs().mean() > 1e-3
    assert torch.equal(mended(latents[:, :, :4]), latents[:, :, :4])


def test_samples_from_a_picture_are_those_of_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    model = generic.Model("kandinsky5_i2v", changed(folder, tmp_path, Kandinsky5I2VPipeline), tiny_kandinsky5_i2v)
    pipeline, sampling = model.pipeline(), sampling_of(tiny_kandinsky5_i2v, "a hiker on a ridge")
    shape = (1, *pipeline.latent_shape(sampling.width, sampling.height, sampling.frames))
    noise = normal(shape, 7, "sample", 0)
    expected = tiny_kandinsky5_i2v.draw(model.stock(), sampling, noise)
    assert expected.isfinite().all() and (expected - noise).abs().mean() > 0.1
    latents = draw_here(pipeline, generic.loaded(pipeline).layers, sampling, noise)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_what_is_trained_follows_from_the_folder(folder: Path, picture_folder: Path, tmp_path: Path) -> None:
    clips, pictures = tiny.pipeline(folder), tiny.pipeline(picture_folder)
    from_picture = tiny.pipeline(changed(folder, tmp_path, Kandinsky5I2VPipeline))
    assert [one.media.max_frames for one in (clips, pictures, from_picture)] == [241, 1, 241]
    assert [one.starts_from_picture for one in (clips, pictures, from_picture)] == [False, False, True]
    assert [one.given_frames((4, 3, 4, 6), 0.5) for one in (clips, from_picture)] == [0, 1]
    assert [encoder.name for encoder in from_picture.encoders()[3:]] == ["vae_first_frame"]
    assert pictures.latent_shape(96, 64) == (4, 8, 12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_type": "nabla"}, "has sparse attention"),
        ({"patch_size": [2, 2, 2]}, r"has patches of \[2, 2, 2\]"),
        ({"in_visual_dim": 16}, "takes latents of 16 channels, gives 4, and the VAE makes 4"),
        ({"in_text_dim": 8}, "has `in_text_dim` 8, and its text encoder makes 16; give Qwen2.5-VL 7B"),
        ({"in_text_dim2": 8}, "has `in_text_dim2` 8, and its text encoder makes 32; give CLIP-L"),
    ],
)
def test_what_does_not_fit_is_told(folder: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(changed(folder, tmp_path, **changes)).check()


@pytest.mark.parametrize("how", [{"visual_cond": True}, {"stock": Kandinsky5I2IPipeline}])
def test_the_model_that_edits_pictures_is_refused(picture_folder: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is of the model that edits pictures"):
        tiny.pipeline(changed(picture_folder, tmp_path, **how)).check()
