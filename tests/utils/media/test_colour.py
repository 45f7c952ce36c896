"""Jitter against Pillow where Pillow does the same, and against what a change of hue must leave alone."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from utils.media.colour import Jitter, jittered

LUMA = torch.tensor([0.299, 0.587, 0.114])


def picture(low=0, high=256):
    levels = np.random.default_rng(0).integers(low, high, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(levels), torch.from_numpy(levels).permute(2, 0, 1)[:, None].float() / 127.5 - 1


def levels_of(pixels_CFHW):
    return ((pixels_CFHW[:, 0] + 1) * 127.5).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.2, 2.0])
@pytest.mark.parametrize(
    ("name", "reference"), [("brightness", ImageEnhance.Brightness), ("saturation", ImageEnhance.Color)]
)
def test_light_and_saturation_are_those_of_pillow(name, reference, factor):
    image, pixels = picture()
    expected = np.asarray(reference(image).enhance(factor)).astype(float)
    assert abs(levels_of(jittered(pixels, Jitter(**{name: factor}))) - expected).max() <= 1.5 * max(1, factor)


def test_contrast_is_about_mid_grey():
    _, pixels = picture(90, 160)
    torch.testing.assert_close(jittered(pixels, Jitter(contrast=1.5)), pixels * 1.5)
    _, pixels = picture()
    torch.testing.assert_close(jittered(pixels, Jitter(contrast=1.5)), (pixels * 1.5).clamp(-1, 1))


def test_hue_turns_around_grey():
    _, pixels = picture(100, 150)
    torch.testing.assert_close(jittered(pixels, Jitter(hue=1.0)), pixels)
    there_and_back = jittered(jittered(pixels, Jitter(hue=0.1)), Jitter(hue=-0.1))
    torch.testing.assert_close(there_and_back, pixels)
    turned = jittered(pixels, Jitter(hue=0.25))
    assert abs(turned - pixels).max() > 0.1
    torch.testing.assert_close(torch.einsum("c,cfhw->fhw", LUMA, turned), torch.einsum("c,cfhw->fhw", LUMA, pixels))
    red = torch.tensor([0.5, 0.0, 0.0]).reshape(3, 1, 1, 1)
    assert jittered(red, Jitter(hue=1 / 3)).argmax() == 1 and jittered(red, Jitter(hue=-1 / 3)).argmax() == 2


def test_greys_stay_grey():
    grey = torch.linspace(-0.5, 0.5, 12).reshape(1, 1, 3, 4).expand(3, 1, 3, 4)
    torch.testing.assert_close(jittered(grey, Jitter(saturation=1.7, hue=0.3)), grey)


def test_frames_change_alike():
    """A frame is changed in a clip as it is alone, and in the order that is documented."""
    clip = torch.cat([picture()[1], picture(0, 100)[1]], dim=1)
    jitter = Jitter(1.2, 0.8, 1.3, 0.05)
    alone = [jittered(clip[:, [index]], jitter) for index in range(2)]
    torch.testing.assert_close(jittered(clip, jitter), torch.cat(alone, dim=1))
    steps = clip[:, 1:]
    for step in (Jitter(brightness=1.2), Jitter(contrast=0.8), Jitter(saturation=1.3), Jitter(hue=0.05)):
        steps = jittered(steps, step)
    inside = (steps.abs() < 0.9).all(0)
    torch.testing.assert_close(alone[1][:, inside], steps[:, inside], atol=1e-5, rtol=0)


def test_no_jitter_changes_nothing():
    _, pixels = picture()
    assert torch.equal(jittered(pixels, Jitter()), pixels)
