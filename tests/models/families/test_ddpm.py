"""DDPM's keys: the objective that is trained and the stock scheduler that draws have the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from models.families.ddpm import DDPMOptions, ddpm_objective, scheduler_config
from utils.diffusion.seeds import normal
from utils.errors import UserError

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def options_of(folder: Path, config: dict[str, Any], **options: Any) -> DDPMOptions:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return DDPMOptions(type="sdxl", diffusers_path=folder, **options)


@pytest.mark.parametrize(
    ("config", "options", "kind"),
    [
        (SDXL, {}, "epsilon"),
        ({**SDXL, "prediction_type": "v_prediction"}, {}, "v"),
        (SDXL, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v"),
        (SDXL, {"beta_schedule": "linear"}, "epsilon"),
        ({}, {"beta_schedule": "squaredcos_cap_v2"}, "epsilon"),
    ],
)
def test_training_and_drawing_have_the_same_steps(tmp_path: Path, config: dict, options: dict, kind: str) -> None:
    given = options_of(tmp_path, config, **options)
    objective, stock = ddpm_objective(given), DDPMScheduler.from_config(scheduler_config(given))
    assert objective.kind == kind and given.timestep_sample_method == "uniform"
    clean, noise = normal((3, 4, 5, 5), 0, "clean"), normal((3, 4, 5, 5), 0, "noise")
    steps = torch.tensor([0, 400, 999])
    t_B = steps / 1000
    assert objective.model_time(t_B).tolist() == steps.tolist()
    noised = stock.add_noise(clean, noise, steps)
    torch.testing.assert_close(objective.noised(clean, noise, t_B), noised, rtol=1e-4, atol=1e-5)
    expected = stock.get_velocity(clean, noise, steps) if kind == "v" else noise
    torch.testing.assert_close(objective.target(clean, noise, t_B), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        ({**SDXL, "prediction_type": "sample"}, {}, "'sample' is not trained; set .* epsilon or v_prediction"),
        (SDXL, {"rescale_betas_zero_snr": True}, "needs a model that predicts v"),
        ({**SDXL, "trained_betas": [0.1]}, {}, "trained_betas"),
    ],
)
def test_what_cannot_be_trained_is_told(tmp_path: Path, config: dict, options: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        ddpm_objective(options_of(tmp_path, config, **options))
