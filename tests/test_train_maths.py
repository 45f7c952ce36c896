"""Runs whose loss is another than the plain one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import launch, metrics, newest_export, only_run

EXTRAS = {
    "model__timestep_sample_method": "beta",
    "model__stratified_timesteps": "epoch",
    "model__min_t": 0.1,
    "model__weighting_scheme": "cosmap",
    "model__noise_offset": 0.1,
    "model__ip_noise_gamma": 0.1,
    "model__loss_type": "pseudo_huber",
}


@pytest.mark.parametrize("target", ["data", "parent"])
def test_a_new_adapter_is_as_its_parent(write_config: Callable[..., Path], pictures: Path, target: str) -> None:
    """With a subject that counts nothing, what is left is regularisation data: its parent's own output is learnt
    already."""
    directories = [
        {"path": str(pictures), "loss_weight": 0.0},
        {"path": str(pictures), "is_regularisation_data": True},
    ]
    config = write_config(data={"directory": directories}, max_steps=2, regularisation_target=target)
    codes, log = launch(config)
    assert codes == [0], log
    losses = metrics(only_run(config), "train/loss").values()
    changed = any(tensor.any() for name, tensor in newest_export(only_run(config)).items() if ".lora_B." in name)
    if target == "parent":
        assert list(losses) == [0.0, 0.0] and not changed
    else:
        assert min(losses) > 0.01 and changed


def test_two_stages_draw_and_weigh_alike(write_config: Callable[..., Path]) -> None:
    """Of a sample that the first stage noises, the last one knows target, weight and width."""
    losses = []
    for stages in (1, 2):
        config = write_config(max_steps=2, pipeline_stages=stages, **EXTRAS)
        codes, log = launch(config, processes=stages)
        assert set(codes) == {0}, log
        losses.append(list(metrics(only_run(config), "train/loss").values()))
        shutil.rmtree(only_run(config))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_folded_guidance_moves_the_targets_of_samples_with_captions(
    write_config: Callable[..., Path], pictures: Path
) -> None:
    """Among 1, 2 stages alike; of samples whose captions are dropped, not at all."""

    def losses(stages: int, folded: float | None, uncond: float = 0.0) -> list[float]:
        directory = {"path": str(pictures), "uncond_fraction": uncond}
        given = write_config(
            data={"directory": [directory]},
            max_steps=2,
            pipeline_stages=stages,
            **({"model__folded_guidance": folded} if folded else {}),
        )
        codes, log = launch(given, processes=stages)
        assert set(codes) == {0}, log
        assert f"cache t5: wanted={8 if folded or uncond else 7} " in log
        values = list(metrics(only_run(given), "train/loss").values())
        shutil.rmtree(only_run(given))
        return values

    plain, folded = losses(1, None), losses(1, 3.0)
    assert losses(2, 3.0) == pytest.approx(folded, rel=1e-5)
    assert folded[0] > 1.05 * plain[0]
    assert losses(1, 3.0, uncond=1.0) == pytest.approx(losses(1, None, uncond=1.0), rel=1e-6)
