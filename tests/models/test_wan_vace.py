"""Wan VACE where it is special: the clip that is followed, the publisher's names, and what is told of misfits.

Shapes: B batch, C channels, F frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from PIL import Image

from models.assembly.data import check_data, encoders_of
from models.assembly.prompts import prompt_versions
from models.assembly.sample_checks import check_sampling
from models.assembly.stage import load_stage
from models.foundation.encoders.guide import packed, pixels_of_cells, unpacked
from models.wan_vace import VACE_LAYOUT
from tests.models import tiny_wan, tiny_wan_vace
from tests.models.drawn_samples import draw_samples
from tests.models.tiny_folder import drawn, settings_of
from tests.processes import run_ranks
from tests.utils.dataset.conftest import plain_sample
from utils.dataset.collection import Collection, Source
from utils.dataset.encoders import inputs_of, item_key
from utils.dataset.inputs import GUIDE, REGIONS
from utils.dataset.samples import Bucket, Control, Mask, Take
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.decode import load_clip, load_mask
from utils.media.geometry import View
from utils.media.writing import tensor_to_image, write_clip
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.run_tables import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan_vace.write_folder(tmp_path_factory.mktemp("wan_vace"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 24 frames, 16 a second, in the shape of samples."""
    file = tmp_path_factory.mktemp("clip") / "guide.mp4"
    pixels = normal((3, 1, 4, 6), 0, "clip").repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)
    write_clip(torch.cat([pixels.roll(shift, 3) for shift in range(24)], dim=1), 16, file)
    return file


MEANINGS = {False: "weight", True: "made_anew"}


def sampling_of(clip: Path, **keys: Any) -> SamplingSettings:
    keys = {**tiny_wan_vace.SAMPLING, "control_images": [str(clip)], **keys}
    return SamplingSettings(prompts=["a hiker"], sample_every_n_steps=1, steps=2, seed=7, **keys)


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mask for it, of which half is white, another half in each frame."""
    file = tmp_path_factory.mktemp("mask") / "mask.mp4"
    halves = torch.tensor([-1.0, 1.0]).repeat_interleave(24).expand(3, 1, 32, 48)
    write_clip(torch.cat([halves.roll(2 * shift, 3) for shift in range(24)], dim=1), 16, file)
    return file


@pytest.mark.parametrize(("references", "is_masked"), [(0, False), (2, False), (0, True), (2, True)])
def test_a_sample_follows_its_clip_as_in_the_stock_pipeline(
    folder: Path, clip: Path, mask: Path, tmp_path: Path, references: int, is_masked: bool
) -> None:
    """Keeps what its mask says, and shows what is on its references, which are as large as the sample here: where they
    are scaled, the stock pipeline has other filters."""
    size, shown = (48, 32), []
    for number in range(references):
        pixels = normal((3, 1, 4, 6), number, "reference").repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)
        shown.append(tensor_to_image(pixels))
        shown[-1].save(tmp_path / f"{number}.png")
    files = [str(clip), *(str(tmp_path / f"{number}.png") for number in range(references))]
    sampling = sampling_of(clip, control_images=[files], mask_images=[str(mask)] * is_masked)
    pipeline_of = partial(tiny_wan_vace.pipeline, references=references, mask_means=MEANINGS[is_masked])
    check_sampling(pipeline_of(folder), sampling)
    (painted,) = run_ranks(draw_samples, 1, pipeline_of, folder, tmp_path / "cache", 1, sampling)
    guide_CFHW = load_clip(clip, View(*size, "center"), 0.0, sampling.frames, 16.0)
    assert (guide_CFHW[:, 0] - guide_CFHW[:, -1]).abs().mean() > 0.1
    frames = [tensor_to_image(guide_CFHW[:, [frame]]) for frame in range(sampling.frames)]
    noise = normal((1, tiny_wan_vace.CHANNELS, 3 + references, 4, 6), 7, "sample", 0)
    how = {"num_frames": sampling.frames, "max_sequence_length": tiny_wan_vace.TEXT_TOKENS, "video": frames}
    if is_masked:
        region_1FHW = load_mask(mask, View(*size, "center"), 0.0, sampling.frames, 16.0).round()
        levels_3FHW = (2 * region_1FHW - 1).expand(3, -1, -1, -1)
        assert (region_1FHW[:, 0] - region_1FHW[:, -1]).abs().mean() > 0.1
        how["mask"] = [tensor_to_image(levels_3FHW[:, [frame]]) for frame in range(sampling.frames)]
    stock = tiny_wan_vace.STOCK.from_pretrained(folder)
    expected = drawn(stock, sampling, noise, reference_images=shown or None, **how).frames
    torch.testing.assert_close(torch.from_numpy(painted[0]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_references_lead_the_clip_that_is_made(folder: Path) -> None:
    """The last one first. They are made with it, and left out of what is shown."""
    wan = tiny_wan_vace.pipeline(folder, references=2, latents="mode")
    encoder, plain = wan.encoders_for(3)[0], tiny_wan_vace.pipeline(folder, latents="mode").encoders()[0]
    for one in (encoder, plain):
        one.load(torch.device("cpu"))
    inputs = {
        name: normal((2, 3, frames, 32, 48), 0, name).clamp(-1, 1)
        for name, frames in (("pixels", 9), ("control_2", 1), ("control_3", 1))
    }
    latents = encoder.encode(**inputs)["latents"]
    parts = [plain.encode(pixels=inputs[name])["latents"] for name in ("control_3", "control_2", "pixels")]
    assert torch.equal(latents, torch.cat(parts, dim=2)) and wan.latent_shape(48, 32, 9) == tuple(latents.shape[1:])
    assert encoder.feature_shapes(Bucket(48, 32, 9))["latents"][0] == tuple(latents.shape[1:])
    assert torch.equal(encoder.decode(latents), plain.decode(parts[2]))
    guides = wan.encoders_for(3)[2].feature_shapes(Bucket(48, 32, 9))["guide_latents"][0]
    assert guides == (2 * latents.shape[1], *latents.shape[2:])


def test_what_is_followed_lies_on_its_clip_in_place_and_time(folder: Path, clip: Path) -> None:
    """Also where references are fitted whole into the clip's shape."""
    version, _ = prompt_versions(tiny_wan_vace.pipeline(folder, references=1), sampling_of(clip))
    own = replace(version.sample, media=version.sample.controls[0].media)
    controls = (replace(own.controls[0], bucket=Bucket(32, 32, 1)),)
    late = replace(version, sample=replace(own, controls=controls), take=Take(crop=(1.0, 0.0), start=0.5))
    assert late.sample.rules.control_fit == "pad"
    encoder = SimpleNamespace(name="vae_guide", fingerprint="", reads=(GUIDE,))
    expected = load_clip(clip, View(32, 32, (1.0, 0.0)), 0.5, 9, 16.0)
    assert torch.equal(inputs_of(encoder, late)[GUIDE], expected)
    assert item_key(encoder, late) != item_key(encoder, replace(late, take=Take(crop=(1.0, 0.0))))


@torch.no_grad()
def test_it_is_encoded_as_the_stock_pipeline_does(folder: Path) -> None:
    pixels_BCFHW = normal((2, 3, 9, 32, 48), 0, "guide").clamp(-1, 1)
    encoder = tiny_wan_vace.pipeline(folder).encoders_for(1)[2]
    encoder.load(torch.device("cpu"))
    made = encoder.encode(**{GUIDE: pixels_BCFHW})["guide_latents"]
    stock, mask = tiny_wan_vace.STOCK.from_pretrained(folder), torch.ones(1, 3, 9, 32, 48)
    expected = [stock.prepare_video_latents(one[None], mask, [[]], None, "cpu") for one in pixels_BCFHW]
    torch.testing.assert_close(made, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert stock.prepare_masks(mask, [[]]).eq(1).all()


@torch.no_grad()
@pytest.mark.parametrize("references", [0, 2])
def test_regions_reach_the_model_as_in_the_stock_pipeline(folder: Path, references: int) -> None:
    """To the bit, where the VAE's statistics are powers of two, by which the stock pipeline multiplies the inverse."""
    names = ["control_2", "control_3"][:references]
    pictures = {name: normal((1, 3, 1, 32, 48), 0, name).clamp(-1, 1) for name in names}
    guide_BCFHW = normal((1, 3, 9, 32, 48), 0, "guide").clamp(-1, 1)
    region_B1FHW = (normal((1, 1, 9, 32, 48), 0, "region") > 0).float()
    wan = tiny_wan_vace.pipeline(folder, references=references, mask_means="made_anew")
    encoder, stock = wan.encoders_for(1 + references)[2], tiny_wan_vace.STOCK.from_pretrained(folder)
    encoder.load(torch.device("cpu"))
    for vae in (encoder.vae, stock.vae):
        vae.register_to_config(latents_std=[0.5, 2.0, 1.0, 4.0])
    made = encoder.encode(**{REGIONS: torch.cat([guide_BCFHW, region_B1FHW], dim=1)}, **pictures)
    shapes = encoder.feature_shapes(Bucket(48, 32, 9))
    assert {name: (tuple(one.shape[1:]), one.dtype) for name, one in made.items()} == shapes
    shown, mask = [[picture[0, :, 0] for picture in pictures.values()]], region_B1FHW.expand(-1, 3, -1, -1, -1)
    latents = stock.prepare_video_latents(guide_BCFHW, mask, shown, None, "cpu")
    expected = torch.cat([latents, stock.prepare_masks(mask, shown)], dim=1)
    x_t = torch.zeros(1, *wan.latent_shape(48, 32, 9))
    inputs = wan.prepare_inputs({**made, **tiny_wan_vace.features((5,))}, x_t, torch.ones(1))
    assert torch.equal(inputs.control_BCfhw, expected)


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 81])
def test_masks_become_channels_as_in_the_stock_pipeline(folder: Path, frames: int) -> None:
    """And fit into an eighth of as many bytes."""
    region_B1FHW = (normal((1, 1, frames, 32, 48), 0, "region") > 0).float()
    stock = SimpleNamespace(
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2))),
    )
    expected = tiny_wan_vace.STOCK.prepare_masks(stock, region_B1FHW.expand(-1, 3, -1, -1, -1), [[]])
    made = pixels_of_cells(region_B1FHW, ((frames - 1) // 4 + 1, 4, 6))
    assert torch.equal(made, expected)
    assert packed(made).shape[1] == 8 and torch.equal(unpacked(packed(made)).float(), expected)


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    wan = tiny_wan_vace.pipeline(folder)
    denoiser = load_stage(wan, settings_of(wan), stage=0).denoiser
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    original = VACE_LAYOUT.to_original(tensors)
    again = convert_wan_transformer_to_diffusers({f"model.diffusion_model.{n}": t for n, t in original.items()})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_second_chain_ends_with_its_last_hint(folder: Path) -> None:
    """What no later block reads does not travel on."""
    wan = tiny_wan_vace.pipeline(folder)
    layers = load_stage(wan, settings_of(wan), stage=0).layers
    shape = (2, *wan.latent_shape(48, 32, 9))
    features = tiny_wan_vace.features((5, 11)) | tiny_wan_vace.features_of_pictures(shape[1:])
    stream, carried = wan.prepare_inputs(features, normal(shape, 0, "x"), torch.tensor([0.2, 0.9])), []
    for layer in layers[:-1]:
        stream = layer(stream)
        carried.append((stream.control_BTD is not None, stream.hint_BTD is not None))
    # Hints for the first block and the third.
    assert carried == [(True, False), (True, True), (True, False), (True, False), (False, True), (False, False)]


def test_what_is_to_be_followed_must_be_there(folder: Path, clip: Path) -> None:
    wan = tiny_wan_vace.pipeline(folder)
    with pytest.raises(
        UserError, match="is shown 0 reference pictures: the samples have 0 files beside them, and need 1"
    ):
        wan.encoders_for(0)
    with pytest.raises(UserError, match="follows a clip: give one, or a still picture, for each prompt"):
        check_sampling(wan, sampling_of(clip, control_images=[]))
    with pytest.raises(UserError, match="and behind it as many references as .* has, 2"):
        check_sampling(tiny_wan_vace.pipeline(folder, references=2), sampling_of(clip))
    with pytest.raises(UserError, match="control_images"):
        check_sampling(wan, sampling_of(clip, frames=33))


def test_what_is_kept_in_samples_must_be_told_and_lie_on_what_they_follow(
    folder: Path, clip: Path, mask: Path, tmp_path: Path
) -> None:
    weighing, keeping = (tiny_wan_vace.pipeline(folder, mask_means=meaning) for meaning in ("weight", "made_anew"))
    check_sampling(keeping, sampling_of(clip))
    with pytest.raises(UserError, match=r'mask_images: .* mask_means = "made_anew"\); leave it out'):
        check_sampling(weighing, sampling_of(clip, mask_images=[str(mask)]))
    with pytest.raises(UserError, match="mask_images: has 2 entries for 1 prompts"):
        check_sampling(keeping, sampling_of(clip, mask_images=[str(mask)] * 2))
    Image.new("L", (48, 48)).save(tmp_path / "square.png")
    with pytest.raises(UserError, match="mask_images: .*square.png is 48x48 and .* 48x32, so that it does not lie"):
        check_sampling(keeping, sampling_of(clip, mask_images=[str(tmp_path / "square.png")]))
    with pytest.raises(UserError, match=r"mask_images: .*none.png"):
        check_sampling(keeping, sampling_of(clip, mask_images=[str(tmp_path / "none.png")]))
    write_clip(torch.ones(3, 5, 32, 48), 16, tmp_path / "short.mp4")
    with pytest.raises(UserError, match=r"mask_images: .*short.mp4.* ends after"):
        check_sampling(keeping, sampling_of(clip, mask_images=[str(tmp_path / "short.mp4")]))


def sample(
    side: int | None = None, mask: str | None = None, guide: int = 1, start: float = 0.0, width: int = 24
) -> Any:
    """One of nine frames, 16 a second, with so many frames to follow at 8 a second."""
    followed = SimpleNamespace(frames=guide, fps=8.0, locator="pose.mp4", width=width, height=16)
    return SimpleNamespace(
        rules=SimpleNamespace(control_resolution=side),
        mask=mask,
        media=SimpleNamespace(locator="fox.mp4", width=48, height=32),
        bucket=Bucket(48, 32, 9),
        fps=16.0,
        takes=(Take(start=start),),
        controls=(Control(followed, Bucket(48, 32, 1)),),
    )


def test_what_does_not_go_with_what_is_followed_is_told(folder: Path) -> None:
    """A still may be followed for ever; the last of nine frames is shown half a second after the first."""
    plain, led = (tiny_wan_vace.pipeline(folder, references=references) for references in (0, 1))
    assert (
        plain.problems_of_data([sample(), sample(mask="mask.png"), sample(guide=5), sample(guide=6, start=0.2)]) == []
    )
    (problem,) = plain.problems_of_data([sample(), sample(512)])
    assert "clips are followed at their own size, and fox.mp4 is one with it" in problem.message
    (problem,) = led.problems_of_data([sample(), sample(mask="mask.png")])
    assert (
        "[[directory]] mask_path" in problem.where
        and "masks do not say what they mean for reference pictures" in problem.message
    )
    (problem,) = plain.problems_of_data([sample(guide=4), sample(guide=5, start=0.2), sample(guide=5)])
    assert "2 of the samples go on where what they follow has ended: the first is fox.mp4" in problem.message
    assert "pose.mp4 has 4 frames, 8 per second" in problem.message
    (problem,) = plain.problems_of_data([sample(), sample(width=32)])
    assert "first are pose.mp4 and fox.mp4, 32 x 16 and 48 x 32; scale one to the shape" in problem.message


def masked(still: bool = True, **rules: Any) -> Any:
    """The same with a mask, a still or a clip of four frames, 8 a second."""
    media = SimpleNamespace(frames=1 if still else 4, fps=8.0, locator="mask.mp4")
    unset = {"color_jitter": None, "unmasked_weight": 0.0, "normalize_masked_area": False, "mask_probability": 1.0}
    one = sample(mask=SimpleNamespace(media=media, is_alpha=False))
    one.rules = SimpleNamespace(control_resolution=None, **{**unset, **rules})
    return one


def test_what_does_not_go_with_what_is_kept_is_told(folder: Path) -> None:
    wan = tiny_wan_vace.pipeline(folder, references=1, mask_means="made_anew")
    assert wan.problems_of_data([masked()]) == []
    weights = ("unmasked_weight", 0.5), ("normalize_masked_area", True), ("mask_probability", 0.5)
    for key, value in weights:
        (problem,) = wan.problems_of_data([masked(), masked(**{key: value})])
        assert problem.where == f"[[directory]] {key}" and "masks are no weights of the loss" in problem.message
    (problem,) = wan.problems_of_data([masked(color_jitter=(0.1, 0, 0, 0))])
    assert "color_jitter" in problem.where and "other colours than the clip" in problem.message
    (problem,) = wan.problems_of_data([masked(), masked(still=False)])
    assert "1 of the samples go on where their mask has ended: the first is fox.mp4" in problem.message
    assert "mask.mp4 has 4 frames, 8 per second" in problem.message


def test_masks_of_regions_weigh_nothing_and_must_be_there(folder: Path) -> None:
    own = plain_sample("a", Bucket(48, 32, 1), controls=(Control(plain_sample("b").media, Bucket(48, 32, 1)),))
    mask = Mask(plain_sample("c").media, is_alpha=False)
    source = Source("train", Path("dataset.toml"), DatasetSettings(directory=[{"path": "clips"}]))
    of = {meaning: tiny_wan_vace.pipeline(folder, mask_means=meaning) for meaning in MEANINGS.values()}
    data = [Collection(source, [own, replace(own, mask=mask)], [], [], 2)]
    names = {meaning: [one.name for one in encoders_of(wan, data)] for meaning, wan in of.items()}
    assert names == {"weight": ["vae", "umt5", "vae_guide", "mask"], "made_anew": ["vae", "umt5", "vae_regions"]}
    without = [replace(data[0], samples=[own])]
    for wan in of.values():
        check_data(wan, data)
    check_data(of["weight"], without)
    with pytest.raises(UserError, match="masks: the model is to keep .* and no file has a mask"):
        check_data(of["made_anew"], without)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"in_channels": 16}, "takes 16 channels, and the VAE makes 4"),
        ({"vace_in_channels": 96}, "takes 96 channels of what it follows, and the VAE makes 72 with the mask"),
        ({"image_dim": 16}, "sees a first frame by CLIP"),
        ({"vace_layers": [2, 0]}, "`vace_layers` must be in ascending order"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_wan_vace.pipeline(tiny_wan_vace.write_folder(tmp_path, **changes)).check()


def test_a_file_of_vace_is_told_from_wan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has all tensors of Wan, and its own."""
    for name, module in (("vace", tiny_wan_vace), ("wan", tiny_wan)):
        (tmp_path / name).mkdir()
        module.write_folder(tmp_path / name)
    (file,) = (tmp_path / "vace" / "transformer").glob("*.safetensors")
    tiny_wan.pipeline(tmp_path / "wan", transformer_path=file).check()
    assert "has no use for" in caplog.text and 'it looks like Wan VACE: set [model] type = "wan_vace"' in caplog.text
