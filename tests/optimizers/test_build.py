"""Optimizers against their published updates, and the groups that they are given."""

import pytest
import torch
from torch import nn

import optimizers
from optimizers import build, check
from optimizers.adamw import AdamW8bitSettings, AdamWSettings
from optimizers.parameter_groups import groups_of
from optimizers.sgd import SGDSettings
from utils.errors import UserError


def test_adamw_follows_its_published_update() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    settings = AdamWSettings(type="adamw", lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.05)
    optimizer = build(groups_of([("w", weight)], lr=0.1, weight_decay=0.05), settings)
    expected, mean, square = weight.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    for step, gradient in enumerate(torch.tensor([[[0.3, -0.1]], [[-0.2, 0.4]], [[0.1, 0.1]]]).double(), 1):
        weight.grad = gradient.clone()
        optimizer.step()
        # Loshchilov and Hutter 2019, algorithm 2.
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        unbiased, spread = mean / (1 - 0.8**step), (square / (1 - 0.9**step)).sqrt()
        expected = expected - 0.1 * (unbiased / (spread + 1e-6) + 0.05 * expected)
        torch.testing.assert_close(weight.detach(), expected)


def test_sgd_follows_its_published_update() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    settings = SGDSettings(type="sgd", lr=0.1, momentum=0.5, weight_decay=0.0)
    optimizer = build([{"params": [weight]}], settings)
    expected, velocity = weight.detach().clone(), torch.zeros(2)
    for gradient in torch.tensor([[0.3, -0.1], [-0.2, 0.4]]):
        weight.grad = gradient.clone()
        optimizer.step()
        velocity = 0.5 * velocity + gradient
        expected = expected - 0.1 * velocity
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_eight_bits_without_a_gpu_is_told() -> None:
    with pytest.raises(UserError, match=r"\[optimizer\] type.*GPUs only.*adamw"):
        build([{"params": [nn.Parameter(torch.ones(2))]}], AdamW8bitSettings(type="adamw8bit", lr=1.0))


def test_what_a_device_cannot_run_is_told_of_its_type_alone() -> None:
    eight_bits = AdamW8bitSettings(type="adamw8bit", lr=1.0)
    check(eight_bits, "cuda")
    check(AdamWSettings(type="adamw", lr=1.0), "cpu")
    with pytest.raises(UserError, match=r"\[optimizer\] type.*GPUs only.*adamw"):
        check(eight_bits, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_eight_bits_stay_near_full_precision() -> None:
    # Below 4096 elements bitsandbytes keeps 32 bits, and nothing would be tested.
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).cuda()
    gradients = torch.randn(5, 64, 128, generator=torch.Generator().manual_seed(1)).cuda()
    ends = []
    for name in ("adamw", "adamw8bit"):
        weight = nn.Parameter(start.clone())
        optimizer = build([{"params": [weight]}], optimizers.find(name).settings(type=name, lr=1e-2))
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    moved = (ends[0] - start).abs().mean()
    assert (ends[0] - ends[1]).abs().mean() < 0.1 * moved


def test_groups_keep_names_and_decay_matrices_only() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    module[2].weight.requires_grad_(False)
    decayed, kept = groups_of(module.named_parameters(), lr=0.5, weight_decay=0.1)
    assert (decayed["names"], decayed["weight_decay"], decayed["lr"]) == (["0.weight"], 0.1, 0.5)
    assert (kept["names"], kept["weight_decay"]) == (["0.bias", "1.weight", "1.bias", "2.bias"], 0.0)
    assert kept["params"][1] is module[1].weight


def test_groups_without_decay_are_one() -> None:
    (group,) = groups_of(nn.Linear(2, 3).named_parameters(), lr=0.5, weight_decay=0.0)
    assert group["names"] == ["weight", "bias"]


def test_a_groups_own_decay_counts_first() -> None:
    module = nn.Linear(2, 2)
    settings = AdamWSettings(type="adamw", lr=0.1, weight_decay=0.3)
    optimizer = build(groups_of(module.named_parameters(), lr=0.1, weight_decay=0.3), settings)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_parameters_with_rates_of_their_own_are_groups_of_their_own():
    module = nn.ModuleDict({"unet": nn.Linear(2, 3), "text_encoder": nn.Linear(2, 3)})
    groups = groups_of(
        module.named_parameters(),
        lr=0.5,
        weight_decay=0.1,
        own_lr=lambda name: 0.25 if name.startswith("text_encoder.") else None,
    )
    assert [(group["names"], group["lr"], group["initial_lr"], group["weight_decay"]) for group in groups] == [
        (["unet.weight"], 0.5, 0.5, 0.1),
        (["unet.bias"], 0.5, 0.5, 0.0),
        (["text_encoder.weight"], 0.25, 0.25, 0.1),
        (["text_encoder.bias"], 0.25, 0.25, 0.0),
    ]
