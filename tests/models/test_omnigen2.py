"""OmniGen2 where it is special: references, the steps of samples and of training, and what is told of other models'
parts.

Shapes: B batch, D features, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.assembly.prompts import schedule_of
from models.assembly.stage import load_stage
from models.omnigen2 import OmniGen2Pipeline
from tests.models import tiny_omnigen2, tiny_omnigen2_edit
from tests.models.tiny_folder import settings_of
from tests.models.tiny_omnigen2 import TEXT_TOKENS
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.settings.run_tables import SamplingSettings

T_B = torch.tensor([0.2513, 0.913])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_omnigen2.write_folder(tmp_path_factory.mktemp("omnigen2"))


@torch.no_grad()
def predicted(pipeline: OmniGen2Pipeline, features: Mapping[str, torch.Tensor], x_t: torch.Tensor) -> torch.Tensor:
    stream = pipeline.prepare_inputs(features, x_t, T_B[: len(x_t)])
    for layer in load_stage(pipeline, settings_of(pipeline), stage=0).layers:
        stream = layer.eval()(stream)
    return stream


def test_a_sample_of_a_padded_batch_gives_what_it_gives_alone(folder: Path) -> None:
    pipeline, x_t = tiny_omnigen2.pipeline(folder), normal((2, 4, 6, 4), 0, "x")
    features = tiny_omnigen2.features((5, 40)) | tiny_omnigen2_edit.features_of_pictures((4, 6, 4))
    alone = {name: one[:1, :5] if name.startswith("qwen") else one[:1] for name, one in features.items()}
    assert pipeline.prepare_inputs(alone, x_t[:1], T_B[:1]).text_mask_BL is None
    expected = predicted(pipeline, alone, x_t[:1])
    torch.testing.assert_close(predicted(pipeline, features, x_t)[:1], expected, rtol=1e-4, atol=1e-5)
    # The order counts, as captions name the references by it.
    names = {"control_latents": "control_2_latents", "control_2_latents": "control_latents"}
    turned = {names.get(name, name): one for name, one in alone.items()}
    assert (predicted(pipeline, turned, x_t[:1]) - expected).abs().mean() > 1e-3


def test_text_and_references_are_encoded_for_up_to_five(folder: Path) -> None:
    pipeline = tiny_omnigen2.pipeline(folder, latents="mode")
    encoders = pipeline.encoders_for(5)
    assert [encoder.reads for encoder in encoders[2:]] == [("control",), *((f"control_{n}",) for n in range(2, 6))]
    assert encoders[0].draw == "mode" and {encoder.draw for encoder in encoders[2:]} == {"sample"}
    with pytest.raises(UserError, match="this model takes 5 control images, and there are 6"):
        pipeline.encoders_for(6)


@pytest.mark.parametrize(
    ("side", "config", "expected"),
    [
        (1024, "{}", [0, 0.0943, 0.2381, 0.4839]),
        (512, '{"dynamic_time_shift": true}', [0, 0.1724, 0.3846, 0.6522]),
        (512, '{"dynamic_time_shift": false}', [0, 0.25, 0.5, 0.75]),
    ],
)
def test_samples_take_the_publishers_steps(tmp_path: Path, side: int, config: str, expected: list[float]) -> None:
    """Of the VAE here a cell has 8 pixels, as of the real one."""
    pipeline = tiny_omnigen2.pipeline(tiny_omnigen2.write_folder(tmp_path, scheduler=config))
    sampling = SamplingSettings(prompts=["a"], width=side * pipeline.cell // 8, height=side * pipeline.cell // 8)
    scheduler = schedule_of(pipeline, sampling).of(4)
    torch.testing.assert_close(1 - scheduler.sigmas[:-1], torch.tensor(expected), rtol=0, atol=1e-4)
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(4096, [0.033986, 0.240489, 0.740242]), (1024, [0.055871, 0.347511, 0.827388])],
)
def test_training_shifts_as_the_publishers(folder: Path, tokens: int, expected: list[float]) -> None:
    timesteps = tiny_omnigen2.pipeline(folder, timestep_sample_method="uniform", flux_shift=True).maths.timesteps
    made = [1 - timesteps.timestep(1 - t, tokens) for t in (0.1, 0.5, 0.9)]
    assert made == pytest.approx(expected, abs=1e-6)


def test_what_guides_follows_from_the_references(folder: Path) -> None:
    """Without them, or with no guidance of their own, a second prediction is enough: it sees none."""
    pictured, plain = (tiny_omnigen2.pipeline(folder, image_guidance=q) for q in (2.5, 1.0))
    assert [one.contrasts(2) for one in (pictured, plain)] == [(True, False), (False,)]
    assert pictured.contrasts(0) == (True,)
    plainly, shown = SamplingSettings(), SamplingSettings(prompts=["a"], control_images=["fox.png"])
    (problem,) = pictured.problems_of_samples(plainly)
    assert "is for samples with control images, and there are none" in problem.message
    assert not [*pictured.problems_of_samples(shown), *tiny_omnigen2.pipeline(folder).problems_of_samples(plainly)]
    p, n, b = (torch.tensor([value]) for value in (5.0, 3.0, 2.0))
    assert pictured.guided(p, n, 4.0, b) == 2 + 2.5 * (3 - 2) + 4 * (5 - 3)
    assert plain.guided(p, b, 4.0) == 2 + 4 * (5 - 2)


def sample(*sides: int) -> Any:
    """A sample with references of these longer sides in pixels."""
    controls = [SimpleNamespace(bucket=SimpleNamespace(width=side, height=16)) for side in sides]
    return SimpleNamespace(controls=controls, media=SimpleNamespace(locator="fox.png"))


def test_references_that_leave_no_places_for_text_are_told(folder: Path) -> None:
    """Of 300 places the text has up to 160, and the picture one."""
    pipeline = tiny_omnigen2.pipeline(folder)
    token = 2 * pipeline.cell
    assert pipeline.problems_of_data([sample(), sample(64 * token, 64 * token, 11 * token)]) == []
    (problem,) = pipeline.problems_of_data([sample(), sample(64 * token, 64 * token, 12 * token)])
    assert "of fox.png take 140 of the 300 places in a row, which leaves 159 for text" in problem.message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"patch_size": 4}, "has patches of side 4"),
        ({"in_channels": 16}, "takes latents of 16 channels and the VAE makes 4"),
        ({"out_channels": 8}, "takes 4 channels and makes 8"),
        ({"text_feat_dim": 24}, "takes text of 24 features and Qwen2.5-VL makes 16"),
        (
            {"axes_lens": [160, 64, 64]},
            f"{TEXT_TOKENS} tokens are more than this model has places for; set at most 159",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_omnigen2.pipeline(tiny_omnigen2.write_folder(tmp_path, **changes)).check()


@pytest.mark.parametrize(
    ("axes", "told"),
    [([4, 4, 6], "must be even and add up to the 12 channels"), ([5, 1, 6], "must be even"), ([6, 6], "axes_dim_rope")],
)
def test_rotary_axes_that_do_not_fill_a_head_are_told(tmp_path: Path, axes: list[int], told: str) -> None:
    folder = tiny_omnigen2.write_folder(tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "axes_dim_rope": axes}))
    with pytest.raises(UserError, match=told):
        tiny_omnigen2.pipeline(folder).check()


def test_a_folder_without_its_processor_is_told(tmp_path: Path) -> None:
    folder = tiny_omnigen2.write_folder(tmp_path)
    (folder / "processor" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="tokenizer_config.json"):
        tiny_omnigen2.pipeline(folder).check()
