"""Masks at the size of a latent, against means taken by hand."""

import pytest
import torch

from utils.dataset.masks import MASK, MaskEncoder
from utils.dataset.samples import Bucket


def of_pictures(width, height, frames):
    """The latents of a VAE of stills: 16 channels, an eighth of the size."""
    return 16, height // 8, width // 8


def of_clips(width, height, frames):
    """Those of a causal VAE of clips: the first frame alone, the others by four."""
    return 16, (frames - 1) // 4 + 1, height // 8, width // 8


def test_each_place_of_a_latent_has_the_mean_of_its_pixels():
    mask_B1FHW = torch.rand(2, 1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    found = MaskEncoder(of_pictures).encode(mask=mask_B1FHW)[MASK]
    assert found.shape == (2, 1, 2, 3)
    for y in range(2):
        for x in range(3):
            block = mask_B1FHW[:, :, 0, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            torch.testing.assert_close(found[:, :, y, x], block.mean((2, 3)))


def test_the_first_frame_of_a_clip_stands_for_itself():
    mask_B1FHW = torch.rand(1, 1, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    found = MaskEncoder(of_clips).encode(mask=mask_B1FHW)[MASK]
    assert found.shape == (1, 1, 3, 2, 2)
    for f, frames in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        for y in range(2):
            for x in range(2):
                block = mask_B1FHW[:, :, frames, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                torch.testing.assert_close(found[:, :, f, y, x], block.mean((2, 3, 4)))


def test_latent_frames_that_cover_unlike_numbers_of_frames():
    """And are cached apart from others."""
    mask_B1FHW, groups = torch.rand(1, 1, 6, 16, 16, generator=torch.Generator().manual_seed(0)), [1, 3, 2]
    encoder = MaskEncoder(lambda width, height, frames: (4, 3, height // 8, width // 8), lambda frames: groups)
    found = encoder.encode(mask=mask_B1FHW)[MASK]
    for f, frames in enumerate(mask_B1FHW.split(groups, dim=2)):
        torch.testing.assert_close(found[0, 0, f, 1, 0], frames[0, 0, :, 8:, :8].mean())
    assert encoder.fingerprint != MaskEncoder(of_clips).fingerprint


def test_a_still_in_a_model_of_clips():
    mask = torch.ones(1, 1, 1, 16, 16)
    assert torch.equal(MaskEncoder(of_clips).encode(mask=mask)[MASK], torch.ones(1, 1, 1, 2, 2))


@pytest.mark.parametrize(("shape", "bucket"), [(of_pictures, Bucket(24, 16, 1)), (of_clips, Bucket(24, 16, 9))])
def test_shapes_are_those_that_come(shape, bucket):
    encoder = MaskEncoder(shape)
    found = encoder.encode(mask=torch.ones(3, 1, bucket.frames, bucket.height, bucket.width))
    expected = encoder.feature_shapes(bucket)
    assert {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in found.items()} == expected
