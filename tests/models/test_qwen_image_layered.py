"""Qwen-Image-Layered where it is special: pictures with transparency, their layers, and what is told of data and files
that do not fit.

Shapes: B batch, P pictures, H W pixels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from models.assembly.sample_checks import check_sampling
from models.assembly.stage import load_stage
from tests.models import tiny_qwen_image as plain
from tests.models import tiny_qwen_image_layered as tiny
from tests.models.tiny_folder import settings_of
from tests.runs import launch, metrics, only_run
from utils.dataset.encoders import inputs_of, item_key
from utils.dataset.manifest import media_file
from utils.dataset.samples import Bucket, Control, Take, version_of_prompt
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.colour import Jitter
from utils.media.decode import load_rgba
from utils.media.geometry import View
from utils.settings.run_tables import SamplingSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("layered"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in `whole`, and what they are made of in `low` and `top`, with transparency."""
    place = tmp_path_factory.mktemp("stack")
    for name in ("whole", "low", "top"):
        (place / name).mkdir()
    for number in range(4):
        low = Image.new("RGBA", (96, 64), (80 + 10 * number, 120, 170, 255))
        top = Image.new("RGBA", (96, 64), (9, 9, 9, 0))
        top.paste((190, 90 + 10 * number, 110, 160), (10 * number, 8, 10 * number + 40, 50))
        pictures = {"low": low, "top": top, "whole": Image.alpha_composite(low, top)}
        for name, picture in pictures.items():
            picture.save(place / name / f"{number}.png")
        (place / "whole" / f"{number}.txt").write_text(f"a card, {number}")
    return place


def data_of(stack: Path, controls: tuple[str, ...] = ("low", "top"), **keys: Any) -> dict[str, Any]:
    directory = {"path": str(stack / "whole"), "control_path": [str(stack / name) for name in controls], **keys}
    return {"directory": [directory]}


def run_of(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    model = tiny.pipeline(folder).options.model_dump(mode="json", exclude_unset=True)
    return {"model": model, "data": data, "lr_scheduler": "constant"}


@pytest.mark.parametrize("size", [(96, 64), (64, 32)])
def test_pictures_are_read_as_the_stock_pipeline_does(tmp_path: Path, size: tuple[int, int]) -> None:
    levels_HW4 = np.random.default_rng(0).integers(0, 256, (96, 144, 4), dtype=np.uint8)
    levels_HW4[:40, :, 3], levels_HW4[60:, :, 3] = 0, 255
    image = Image.fromarray(levels_HW4)
    image.save(tmp_path / "a.png")
    stock = VaeImageProcessor(vae_scale_factor=16)
    (expected_4HW,) = stock.preprocess(stock.resize(image, size[1], size[0]), size[1], size[0])
    pixels_4HW = load_rgba(tmp_path / "a.png", View(*size, "none"))[:, 0]
    torch.testing.assert_close(pixels_4HW, expected_4HW, rtol=0, atol=1e-6)


def test_layers_are_seen_as_their_picture_is(folder: Path, stack: Path) -> None:
    """Cropped, mirrored and in changed colours alike, they still make the picture; and the cache tells all apart."""
    media = [media_file(stack / name / "2.png") for name in ("whole", "low", "top")]
    bucket = Bucket(32, 32, 1)
    whole = version_of_prompt("a card", bucket, media[:1], 0.0)
    sample = replace(whole.sample, controls=tuple(Control(layer, bucket) for layer in media[1:]))
    take = Take(crop=(0.25, 0.5), flip=True, jitter=Jitter(brightness=0.9, hue=0.1))
    version = replace(whole, sample=sample, take=take)
    of_layers, _, of_whole = tiny.pipeline(folder).encoders()
    pixels_4PHW = inputs_of(of_layers, version)["layers"]
    (picture, low, top), opacity = pixels_4PHW[:3].unbind(1), (pixels_4PHW[3:, 2] + 1) / 2
    torch.testing.assert_close(torch.lerp(low, top, opacity), picture, rtol=0, atol=8 / 127.5)
    assert (low - top).abs().max() > 0.3 and 0.1 < opacity.mean() < 0.9
    assert torch.equal(inputs_of(of_whole, version)["rgba"], pixels_4PHW[:, :1])

    other = replace(sample, controls=(sample.controls[0], Control(media[0], bucket)))
    swapped = replace(sample, controls=sample.controls[::-1])
    versions = [
        version,
        replace(version, take=Take()),
        replace(version, sample=other),
        replace(version, sample=swapped),
    ]
    assert len({item_key(of_layers, version) for version in versions}) == 4
    assert len({item_key(of_whole, version) for version in versions}) == 2


@torch.no_grad()
def test_each_picture_is_encoded_and_shown_by_itself(folder: Path) -> None:
    autoencoder, _, of_whole = tiny.pipeline(folder, latents="mode").encoders()
    for encoder in (autoencoder, of_whole):
        encoder.load(CPU)
    pixels_B4PHW = normal((2, 4, 3, 32, 48), 0, "pixels").clamp(-1, 1)
    latents = autoencoder.encode(layers=pixels_B4PHW)["latents"]
    for number in range(3):
        (alone,) = of_whole.encode(rgba=pixels_B4PHW[:, :, number : number + 1]).values()
        assert torch.equal(latents[:, :, number : number + 1], alone)
    version = autoencoder.decode(latents)
    pixels_B4HW = super(type(autoencoder), autoencoder).decode(latents[:, :, 1:2])[:, :, 0]
    on_grey = torch.lerp(torch.zeros(2, 3, 32, 48), pixels_B4HW[:, :3], (pixels_B4HW[:, 3:] + 1) / 2)
    torch.testing.assert_close(version[:, :, 0, :, 48:96], on_grey)


def test_tokens_know_their_layer_and_the_picture(folder: Path) -> None:
    """What is predicted for one picture depends on all, and on what is taken apart."""
    pipeline = tiny.pipeline(folder)
    layers = load_stage(pipeline, settings_of(pipeline), stage=0).layers
    shape = pipeline.latent_shape(32, 48)
    x_t, features = normal((1, *shape), 0, "x"), tiny.features((5,)) | tiny.features_of_pictures(shape, 1)

    @torch.no_grad()
    def predicted(x_t: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
        stream = pipeline.prepare_inputs(features, x_t, torch.tensor([0.4]))
        for layer in layers:
            stream = layer.eval()(stream)
        return stream

    result = predicted(x_t, features)
    assert result.shape == x_t.shape
    swapped = predicted(x_t[:, :, [0, 2, 1]], features)[:, :, [0, 2, 1]]
    other = predicted(x_t, features | {"rgba_latents": -features["rgba_latents"]})
    for changed in (swapped, other):
        assert ((result - changed).abs().mean(dim=(0, 1, 3, 4)) > 1e-4).all()


def test_a_stack_of_pictures_trains(folder: Path, stack: Path, write_config: Callable[..., Path]) -> None:
    """With samples of one of them, and a dump to look at."""
    data = data_of(stack)
    sampling = {**tiny.SAMPLING, "control_images": [str(stack / "whole" / "1.png")], "prompts": ["a card"], "steps": 2}
    keys = {**run_of(folder, data), "max_steps": 10, "sampling": {**sampling, "sample_every_n_steps": 10}}
    config = write_config(data=data)
    seen = config.with_name("data.toml").rename(config.with_name("seen.toml"))
    evaluation = {"eval_every_n_steps": 10, "eval_datasets": [{"name": "seen", "config": str(seen)}]}
    config = write_config(**keys, **evaluation)
    codes, log = launch(config)
    assert codes == [0], log
    losses = metrics(only_run(config), "seen/loss")
    assert losses[10] < losses[0]
    (sample,) = (only_run(config) / "samples" / "step000010").iterdir()
    with Image.open(sample) as picture:
        assert picture.size == (tiny.PIXELS[1] * sampling["width"], sampling["height"])
    codes, log = launch(config, "--dump_dataset", str(config.with_name("dump")))
    assert codes == [0], log
    with Image.open(next(config.with_name("dump").glob("*/000000.png"))) as picture:
        assert picture.width / picture.height == pytest.approx(tiny.PIXELS[1] * 96 / 64, rel=0.2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one layer": ({"controls": ("low",)}, "into 2 layers, and the samples have 1"),
    "no layers": ({"controls": ()}, "into 2 layers, and the samples have 0"),
    "another size": ({"control_resolution": 32}, "have layers of another size; leave control_resolution out"),
    "masks": ({"alpha_mask": True}, "have a mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_do_not_fit_are_told(folder: Path, stack: Path, write_config: Callable[..., Path], name: str) -> None:
    keys, told = REFUSED[name]
    data = data_of(stack, **keys)
    if not data["directory"][0]["control_path"]:
        del data["directory"][0]["control_path"]
    codes, log = launch(write_config(**run_of(folder, data)), "--check")
    assert codes != [0] and told in " ".join(log.split()), log


def test_a_layer_of_another_size_is_told(
    folder: Path, stack: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    (tmp_path / "cut").mkdir()
    for file in (stack / "top").iterdir():
        Image.open(file).resize((48, 32)).save(tmp_path / "cut" / file.name)
    data = data_of(stack)
    data["directory"][0]["control_path"][1] = str(tmp_path / "cut")
    data["directory"][0]["control_fit"] = "pad"
    codes, log = launch(write_config(**run_of(folder, data)), "--check")
    assert codes != [0] and "do not lie on one another" in " ".join(log.split()), log
    assert "leave control_fit out" in " ".join(log.split())


def without_index(folder: Path) -> Path:
    (folder / "model_index.json").unlink()
    return folder


@pytest.mark.parametrize("indexed", [True, False])
def test_each_type_names_the_other(tmp_path: Path, indexed: bool) -> None:
    spoil = (lambda folder: folder) if indexed else without_index
    of_layers, of_pictures = spoil(tiny.write_folder(tmp_path / "a")), spoil(plain.write_folder(tmp_path / "b"))
    with pytest.raises(UserError, match='Layered.*type = "qwen_image_layered"'):
        plain.pipeline(of_layers).check()
    with pytest.raises(UserError, match='type = "qwen_image"'):
        tiny.pipeline(of_pictures).check()
    with pytest.raises(UserError, match='type = "qwen_image_layered"'):
        plain.pipeline(of_pictures, transformer_path=of_layers / "transformer").check()
    with pytest.raises(UserError, match='type = "qwen_image"'):
        tiny.pipeline(of_layers, transformer_path=of_pictures / "transformer").check()


def test_a_vae_without_transparency_is_told(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    AutoencoderKLQwenImage(**{**tiny.VAE, "input_channels": 3}).save_pretrained(folder / "vae")
    with pytest.raises(UserError, match="`input_channels` must be 4.* and is 3"):
        tiny.pipeline(folder).check()


def test_samples_are_of_pictures(folder: Path) -> None:
    """Which stand still: one frame is what is wanted."""
    given = {"prompts": ["a card"], "sample_every_n_steps": 1, **tiny.SAMPLING}
    check_sampling(tiny.pipeline(folder), SamplingSettings(**given))
    with pytest.raises(UserError, match="give one for each prompt"):
        check_sampling(tiny.pipeline(folder), SamplingSettings(**{**given, "control_images": []}))
