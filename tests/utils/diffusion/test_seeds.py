"""Draws: the same for the same name, independent for different names, of the right distribution."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.diffusion import seeds

ROOT = Path(__file__).resolve().parents[3]


def test_a_name_gives_the_same_numbers() -> None:
    torch.manual_seed(1)
    first = seeds.normal((3, 4), 5, "noise", 2, "a.png")
    torch.manual_seed(2)
    assert torch.equal(seeds.normal((3, 4), 5, "noise", 2, "a.png"), first)
    assert torch.equal(torch.randn((3, 4), generator=seeds.generator(5, "noise", 2, "a.png")), first)


def test_another_process_draws_the_same() -> None:
    """Unlike Python's own hash of a text, which differs from process to process."""
    code = "from utils.diffusion import seeds; print(seeds.derive(5, 'noise', 2, 'a.png'))"  # noqa: T201
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(printed) == seeds.derive(5, "noise", 2, "a.png")


def test_devices_are_seeded_as_torch_does_without_a_note_for_those_that_nobody_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)

    def refuse(*_: object) -> list[str]:
        raise AssertionError("the stack is told")

    monkeypatch.setattr("traceback.format_stack", refuse)
    seeds.seed_devices(3)
    assert torch.equal(torch.rand(2), expected)


def test_drawing_leaves_the_global_random_state() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    seeds.normal((3,), 0, "noise")
    seeds.permutation(5, 0, "order")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    "other",
    [(1, "noise", 1, 23), (0, "other", 1, 23), (0, "noise", 2, 23), (0, "noise", 12, 3), (0, "noise", "1", "2", 3)],
)
def test_every_part_of_a_name_counts(other: tuple) -> None:
    assert seeds.derive(*other) != seeds.derive(0, "noise", 1, 23)


def test_seeds_fill_63_bits() -> None:
    drawn = [seeds.derive(0, "bits", index) for index in range(2000)]
    assert len(set(drawn)) == 2000
    for bit in range(63):
        share = sum(value >> bit & 1 for value in drawn) / 2000
        assert abs(share - 0.5) < 5 * 0.5 / 2000**0.5
    assert all(0 <= value < 2**63 for value in drawn)


def test_uniform_numbers_are_uniform() -> None:
    """The largest distance of the empirical distribution from the uniform one, against Kolmogorov's 0.1% bound."""
    count = 4000
    drawn = sorted(seeds.uniform(0, "timestep", index) for index in range(count))
    distance = max(max((rank + 1) / count - u, u - rank / count) for rank, u in enumerate(drawn))
    assert distance < 1.95 / count**0.5


def test_uniform_numbers_stay_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "derive", lambda seed, *name: 2**63 - 1)
    assert seeds.uniform(0, "timestep") < 1.0


def test_normal_numbers_are_normal() -> None:
    drawn = torch.cat([seeds.normal((50,), 0, "noise", index) for index in range(200)]).double()
    count = drawn.numel()
    # Mean, variance and fourth moment of the normal distribution, within 4 standard errors.
    assert abs(drawn.mean().item()) < 4 / count**0.5
    assert abs(drawn.var().item() - 1) < 4 * (2 / count) ** 0.5
    assert abs(drawn.pow(4).mean().item() - 3) < 4 * (96 / count) ** 0.5


def test_permutations_are_permutations() -> None:
    assert sorted(seeds.permutation(100, 0, "order", 1)) == list(range(100))
    assert seeds.permutation(100, 0, "order", 1) != seeds.permutation(100, 0, "order", 2)
    assert seeds.permutation(0, 0, "order") == []
