"""Pictures with a profile are read in the colours that it means, as sRGB; others as they are."""

import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorTrc
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from tests.utils.media.clips import write_video
from tests.utils.media.icc import DISPLAY_P3, of_grey, of_rgb
from utils.media.decode import load_clip, load_image, load_mask, load_rgba, probe
from utils.media.geometry import View

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""XYZ, under D50, of the primaries of sRGB."""
GAMMA = 2.2
P3 = of_rgb(DISPLAY_P3, GAMMA)
COLOURS = [(200, 60, 40), (40, 160, 60), (60, 70, 180), (128, 128, 128), (255, 255, 255), (0, 0, 0), (250, 200, 150)]


def encoded(linear: np.ndarray) -> np.ndarray:
    """Levels of sRGB (IEC 61966-2-1) of light in [0, 1]."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def meant(levels: np.ndarray) -> np.ndarray:
    """The levels of sRGB that levels of Display P3 (..., 3) mean."""
    xyz = (levels / 255) ** GAMMA @ np.array(DISPLAY_P3)
    return encoded(xyz @ np.linalg.inv(np.array(SRGB)))


def picture(mode="RGB"):
    return Image.fromarray(np.array([COLOURS], np.uint8).repeat(4, 0)).convert(mode)


def levels_of(pixels_CFHW):
    """The first line of a picture (W, C)."""
    return ((pixels_CFHW[:, 0, 0].T + 1) * 127.5).numpy()


VIEW = View(len(COLOURS), 4)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp", "a.avif"])
def test_colours_are_those_that_the_profile_means(tmp_path, name):
    lossless = {"lossless": True} if name.endswith("webp") else {"quality": 100, "subsampling": "4:4:4"}
    wide = picture().resize((64 * len(COLOURS), 64), Image.Resampling.NEAREST)
    wide.save(tmp_path / name, icc_profile=P3, **lossless)
    found = levels_of(load_image(tmp_path / name, View(64 * len(COLOURS), 64)))[32::64]
    assert probe(tmp_path / name).colours == "converted"
    expected = meant(np.array(COLOURS, float))
    assert np.abs(expected - COLOURS).max() > 20, "the profile makes a difference"
    assert np.abs(found - expected).max() <= (2 if name in ("a.png", "a.tif", "a.webp") else 8)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("depth", [8, 16])
def test_greys_are_those_that_the_profile_means(tmp_path, gamma, depth):
    levels = np.linspace(0, 255, 7)
    grey = Image.fromarray((levels[None].repeat(4, 0) * (257 if depth == 16 else 1)).astype(f"uint{depth}"))
    grey.save(tmp_path / "a.png", icc_profile=of_grey(gamma))
    found = levels_of(load_image(tmp_path / "a.png", View(7, 4)))
    assert np.abs(found - encoded((levels.round() / 255) ** gamma)[:, None]).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_opacity_stays(tmp_path, mode):
    image = picture("L" if mode == "LA" else "RGB")
    opacity = Image.fromarray(np.array([[0, 100, 255, 255, 255, 255, 255]], np.uint8).repeat(4, 0))
    if mode == "P":
        image = image.quantize(8)
    else:
        image.putalpha(opacity)
    image.save(tmp_path / "a.png", icc_profile=of_grey(1.0) if mode == "LA" else P3)
    image.save(tmp_path / "plain.png")
    with_profile, plain = (load_rgba(tmp_path / name, VIEW) for name in ("a.png", "plain.png"))
    assert torch.equal(with_profile[3:], plain[3:])
    expected = levels_of(plain)[:, :3]
    expected = encoded(expected / 255) if mode == "LA" else meant(expected)
    # Scaling, to the same size here, weighs colours by their opacity.
    assert np.abs(levels_of(with_profile)[2:, :3] - expected[2:]).max() <= 3
    assert (levels_of(with_profile)[0, :3] == 0).all() or mode == "P"


def test_every_frame_of_an_animation_is_converted(tmp_path):
    frames = [picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], icc_profile=P3, lossless=True)
    frames[0].save(tmp_path / "a.png", icc_profile=P3)
    clip = load_clip(tmp_path / "a.webp", VIEW, 0.0, 2, 10.0)
    assert probe(tmp_path / "a.webp").colours == "converted"
    assert torch.equal(clip[:, :1], load_image(tmp_path / "a.png", VIEW))
    assert torch.equal(clip[:, 1:].flip(-1), clip[:, :1])


def test_levels_of_masks_are_numbers(tmp_path):
    picture("L").save(tmp_path / "a.png", icc_profile=of_grey(1.0))
    picture("L").save(tmp_path / "plain.png")
    assert torch.equal(load_mask(tmp_path / "a.png", VIEW), load_mask(tmp_path / "plain.png", VIEW))


OF_NO_USE = {
    "sRGB": (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), ""),
    "none": (b"", ""),
    "broken": (b"profile", "unknown"),
    "cut off": (P3[:300], "unknown"),
    "of grey": (of_grey(1.0), "unknown"),
}


@pytest.mark.parametrize(("profile", "told"), OF_NO_USE.values(), ids=OF_NO_USE)
def test_pictures_of_srgb_and_those_whose_profile_is_of_no_use_stay_as_they_are(tmp_path, profile, told):
    picture().save(tmp_path / "a.png", **({"icc_profile": profile} if profile else {}))
    assert probe(tmp_path / "a.png").colours == told
    assert (levels_of(load_image(tmp_path / "a.png", VIEW)).round() == np.array(COLOURS)).all()


def test_a_profile_beside_texts_that_pillow_refuses_counts(tmp_path):
    texts = PngInfo()
    texts.add_text("workflow", " " * 3_000_000, zip=True)
    picture().save(tmp_path / "a.png", icc_profile=P3, pnginfo=texts)
    picture().save(tmp_path / "plain.png", icc_profile=P3)
    assert torch.equal(load_image(tmp_path / "a.png", VIEW), load_image(tmp_path / "plain.png", VIEW))


@pytest.mark.parametrize(
    ("transfer", "primaries", "told"),
    [(ColorTrc.BT709, ColorPrimaries.BT709, ""), (ColorTrc.UNSPECIFIED, ColorPrimaries.UNSPECIFIED, "")]
    + [(ColorTrc.ARIB_STD_B67, ColorPrimaries.BT2020, "wide"), (ColorTrc.BT709, ColorPrimaries.SMPTE432, "wide")],
)
def test_a_high_dynamic_range_and_a_wide_gamut_are_told(tmp_path, transfer, primaries, told):
    def tagged(stream):
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, primaries

    assert probe(write_video(tmp_path / "a.mp4", 3, setup=tagged)).colours == told
