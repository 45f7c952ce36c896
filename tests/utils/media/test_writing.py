"""What is written is what is read again, up to what H.264 loses."""

import av
import numpy as np
import pytest
import torch

from tests.utils.media.clips import numbered, numbers_of
from utils.media.decode import load_clip, probe
from utils.media.geometry import View
from utils.media.source import Probe
from utils.media.writing import tensor_to_image, write_clip


def clip(frames, width, height):
    levels = np.stack([numbered(index, 64, 48)[:height, :width] for index in range(frames)])
    return torch.from_numpy(levels).permute(3, 0, 1, 2) / 127.5 - 1


@pytest.mark.parametrize(("width", "height"), [(64, 48), (63, 47), (64, 47)])
@pytest.mark.parametrize("fps", [16, 24000 / 1001, 7.5])
def test_a_clip_comes_back(tmp_path, width, height, fps):
    pixels = clip(12, width, height)
    write_clip(pixels, fps, tmp_path / "a.mp4")
    found = probe(tmp_path / "a.mp4")
    assert found == Probe(width + width % 2, height + height % 2, 12, pytest.approx(fps))
    again = load_clip(tmp_path / "a.mp4", View(found.width, found.height), 0, 12, found.fps)
    assert numbers_of(again) == list(range(12))
    assert (again[:, :, :height, :width] - pixels).abs().mean() < 0.03


def test_colours_survive_and_are_named(tmp_path):
    colours = torch.tensor([[0.6, -0.8, -0.8], [-0.7, 0.5, -0.6], [-0.5, -0.4, 0.7], [0.2, 0.2, 0.2]])
    pixels = colours.T.reshape(3, 1, 1, 4, 1).expand(3, 5, 32, 4, 8).reshape(3, 5, 32, 32)
    write_clip(pixels, 8, tmp_path / "a.mp4")
    again = load_clip(tmp_path / "a.mp4", View(32, 32), 0, 5, 8)
    assert (again - pixels)[..., 4::8].abs().max() < 4 / 127.5
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")


def test_values_outside_are_clipped(tmp_path):
    pixels = torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 1, 4).expand(3, 1, 4, 4)
    assert np.array(tensor_to_image(pixels))[0, :, 0].tolist() == [0, 0, 255, 255]
