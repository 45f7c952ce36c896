"""Noise against its definitions: the formulas, its variance, and that it belongs to the sample alone.

Shapes: one sample, a picture (C H W) or a clip (C F H W).
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from utils.diffusion import seeds
from utils.diffusion.noise import NoiseOptions, perturbed, sample_noise

SHAPES = [(4, 16, 24), (4, 5, 16, 24)]
NAME = ("noise", 2, "a.png")


def plain(shape: tuple[int, ...]) -> torch.Tensor:
    return seeds.normal(shape, 7, *NAME)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_options_it_is_the_draw(shape: tuple[int, ...]) -> None:
    noise = sample_noise(torch.ones(shape), NoiseOptions(), 7, *NAME)
    assert torch.equal(noise, plain(shape))
    assert perturbed(noise, NoiseOptions(), 7, *NAME) is noise


@pytest.mark.parametrize("shape", SHAPES)
def test_an_offset_is_one_number_a_channel(shape: tuple[int, ...]) -> None:
    added = sample_noise(torch.zeros(shape), NoiseOptions(noise_offset=0.1), 7, *NAME) - plain(shape)
    torch.testing.assert_close(added, added.flatten(1).mean(1).view(-1, *[1] * (len(shape) - 1)).expand(shape))
    assert len(added.flatten(1).mean(1).unique()) == 4


def test_offsets_have_the_deviation_asked_for() -> None:
    shape, options = (16, 1, 1), NoiseOptions(noise_offset=0.3)
    offsets = torch.cat(
        [sample_noise(torch.zeros(shape), options, n, *NAME) - seeds.normal(shape, n, *NAME) for n in range(200)]
    )
    assert offsets.std().item() == pytest.approx(0.3, rel=0.05)
    assert abs(offsets.mean().item()) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale", "strengths"), [(0.5, [0.1, 0.6, 1.1, 0.6]), (-0.15, [0.1, 0.0, 0.0, 0.0])])
def test_adaptive_offsets_follow_the_channels_means(shape: tuple, scale: float, strengths: list[float]) -> None:
    """noise_offset + scale * |mean|, not below 0; as a multiple of the plain offset."""
    means = torch.tensor([0.0, 1.0, 2.0, -1.0]).view(-1, *[1] * (len(shape) - 1))
    clean = means.expand(shape).contiguous()
    base, adaptive = (
        sample_noise(clean, NoiseOptions(noise_offset=0.1, adaptive_noise_scale=value), 7, *NAME) - plain(shape)
        for value in (0.0, scale)
    )
    ratio = (adaptive / base).flatten(1).mean(1)
    assert ratio.tolist() == pytest.approx([strength / 0.1 for strength in strengths], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pyramid_is_its_definition(shape: tuple[int, ...]) -> None:
    """Level by level, frame by frame."""
    discount, frames = 0.4, [()] if len(shape) == 3 else [(f,) for f in range(shape[1])]
    options = NoiseOptions(multires_noise_iterations=3, multires_noise_discount=discount)
    noise = sample_noise(torch.zeros(shape), options, 7, *NAME)
    expected = plain(shape).clone()
    for level in range(3):
        ratio = (2 + 2 * seeds.uniform(7, *NAME, "pyramid ratio", level)) ** level
        size = (max(1, int(16 / ratio)), max(1, int(24 / ratio)))
        coarse = seeds.normal((1, 4 * len(frames), *size), 7, *NAME, "pyramid", level)[0]
        for channel in range(4):
            for number, frame in enumerate(frames):
                one = coarse[channel * len(frames) + number][None, None]
                expected[(channel, *frame)] += discount**level * interpolate(one, (16, 24), mode="bilinear")[0, 0]
    torch.testing.assert_close(noise, expected / expected.std())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [1, 6, 50])
def test_the_pyramid_has_variance_one_and_more_coarse_noise(shape: tuple[int, ...], iterations: int) -> None:
    options = NoiseOptions(multires_noise_iterations=iterations, multires_noise_discount=0.8)
    noise = sample_noise(torch.zeros(shape), options, 7, *NAME)
    assert noise.shape == shape
    assert noise.std().item() == pytest.approx(1.0, rel=1e-5)
    if iterations > 1:
        means = noise.unfold(-1, 8, 8).unfold(-3, 8, 8).mean((-1, -2))
        plain_means = plain(shape).unfold(-1, 8, 8).unfold(-3, 8, 8).mean((-1, -2))
        assert means.std() > 1.2 * plain_means.std()


@pytest.mark.parametrize("shape", SHAPES)
def test_perturbation_is_another_noise(shape: tuple[int, ...]) -> None:
    noise = plain(shape)
    added = (perturbed(noise, NoiseOptions(ip_noise_gamma=0.1), 7, *NAME) - noise) / 0.1
    assert added.std().item() == pytest.approx(1.0, rel=0.1)
    assert abs((added * noise).mean().item()) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        NoiseOptions(noise_offset=0.1, adaptive_noise_scale=0.5),
        NoiseOptions(multires_noise_iterations=4),
        NoiseOptions(ip_noise_gamma=0.2),
    ],
    ids=str,
)
def test_noise_belongs_to_its_name(options: NoiseOptions) -> None:
    def drawn(name: tuple) -> torch.Tensor:
        return perturbed(sample_noise(torch.ones(4, 8, 8), options, 7, *name), options, 7, *name)

    torch.manual_seed(1)
    first = drawn(NAME)
    torch.manual_seed(2)
    assert torch.equal(drawn(NAME), first)
    assert not torch.equal(drawn(("noise", 3, "a.png")), first)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "noise_offset and multires_noise_iterations"),
        ({"adaptive_noise_scale": 0.1}, "adaptive_noise_scale changes noise_offset"),
        ({"noise_offset": -0.1}, "noise_offset must not be below 0"),
        ({"multires_noise_discount": 0.0}, "multires_noise_discount"),
        ({"ip_noise_gamma": -1.0}, "ip_noise_gamma"),
    ],
)
def test_contradictions_are_refused_by_name(wrong: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NoiseOptions(**wrong)
