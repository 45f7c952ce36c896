"""CogView4 where it is special: texts of unequal lengths, the time it is told, a shift by the root of the size.

Shapes: B batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

from models.assembly.stage import StagedModel, load_stage
from models.cogview4 import CogView4Pipeline
from tests.models import tiny_cogview4
from tests.models.tiny_cogview4 import SCHEDULER, TEXT_TOKENS, TEXT_WIDTH
from tests.models.tiny_folder import settings_of
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import normal
from utils.errors import UserError

LENGTHS = (16, 48)
T_B = torch.tensor([0.2513, 0.913])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cogview4.write_folder(tmp_path_factory.mktemp("cogview4"))


def loaded(pipeline: CogView4Pipeline) -> StagedModel:
    return load_stage(pipeline, settings_of(pipeline), stage=0)


def with_stock_attention(pipeline: CogView4Pipeline) -> CogView4Transformer2DModel:
    denoiser = loaded(pipeline).denoiser
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(CogView4AttnProcessor())
    return denoiser


@torch.no_grad()
def test_a_caption_does_not_see_what_the_batch_adds_to_it(folder: Path) -> None:
    pipeline = tiny_cogview4.pipeline(folder)
    x_t, features = normal((2, 4, 6, 4), 0, "x"), tiny_cogview4.features(LENGTHS)
    together, stock = pipeline.prepare_inputs(features, x_t, T_B), with_stock_attention(pipeline)
    for layer in loaded(pipeline).layers:
        together = layer(together)
    for number, length in enumerate(LENGTHS):
        one = slice(number, number + 1)
        own = {name: feature[one, :length] for name, feature in features.items()}
        inputs = pipeline.prepare_inputs(own, x_t[one], T_B[one])
        assert inputs.text_lengths is None
        sizes = inputs.size_B2, inputs.size_B2, torch.zeros(1, 2)
        alone = stock(inputs.x_BChw, inputs.text_BLD, inputs.time_B, *sizes).sample
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_stock_attention_sees_what_is_masked(folder: Path) -> None:
    """Why there is a class of ours: once this fails, the stock one will do."""
    denoiser = with_stock_attention(tiny_cogview4.pipeline(folder))
    mask_BL = tiny_cogview4.features(LENGTHS)["glm_mask"].int()
    sizes_B2, outputs = torch.full((2, 2), 64.0), []
    for seed in range(2):
        masked = normal((2, 48, TEXT_WIDTH), seed, "masked") * (1 - mask_BL[..., None])
        text_BLD = tiny_cogview4.features(LENGTHS)["glm"] + masked
        told = normal((2, 4, 8, 8), 0, "x"), text_BLD, 1000 * T_B, sizes_B2, sizes_B2, 0 * sizes_B2
        outputs.append(denoiser(*told, attention_mask=mask_BL).sample)
    assert (outputs[0] - outputs[1]).abs()[0].mean() > 1e-3


def test_time_and_noise_level_are_those_of_the_stock_steps(folder: Path) -> None:
    """The stock pipeline tells the model its steps before it shifts them."""
    pipeline, steps = tiny_cogview4.pipeline(folder), torch.tensor([1000.0, 812.0, 333.0, 1.0])
    for size, tokens in (((6, 4), 6), ((64, 96), 1536)):
        shift = calculate_shift(tokens, 256, SCHEDULER["base_shift"], SCHEDULER["max_shift"])
        stock = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        stock.set_timesteps(sigmas=(steps / 1000).tolist(), timesteps=steps.tolist(), mu=shift)
        features = tiny_cogview4.features((16,) * len(steps))
        inputs = pipeline.prepare_inputs(features, torch.zeros(len(steps), 4, *size), stock.sigmas[:-1])
        torch.testing.assert_close(inputs.time_B, stock.timesteps, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("constants", [{}, {"base_shift": 0.5, "max_shift": 1.25, "base_image_seq_len": 64}])
def test_timesteps_shift_by_the_root_of_the_size(tmp_path: Path, constants: dict[str, Any]) -> None:
    """By the constants of the folder's scheduler; a `uniform` draw at half is then s / (s + 1)."""
    folder = tiny_cogview4.write_folder(tmp_path, scheduler=constants)
    pipeline = tiny_cogview4.pipeline(folder, flux_shift=True, timestep_sample_method="uniform")
    values = {"base_image_seq_len": 256, **SCHEDULER, **constants}
    for tokens in (256, 1024, 4096, 9000):
        shift = calculate_shift(tokens, *(values[key] for key in ("base_image_seq_len", "base_shift", "max_shift")))
        assert pipeline.maths.timesteps.timestep(0.5, tokens) == pytest.approx(shift / (shift + 1))


@torch.no_grad()
def test_a_long_caption_has_the_shape_that_is_promised(folder: Path) -> None:
    """Cut off at 60 tokens, and filled up to 64."""
    encoder = tiny_cogview4.pipeline(folder).encoders()[1]
    encoder.load(torch.device("cpu"))
    made = encoder.encode(caption=["a" * (TEXT_TOKENS - 2), "a" * (TEXT_TOKENS - 1)])
    promised = encoder.feature_shapes(Bucket(64, 64, 1))
    assert all(tuple(feature[1].shape) == promised[name][0] for name, feature in made.items())
    assert encoder.truncated == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"in_channels": 8}, "CogView4 Control"),
        ({"in_channels": 6}, "takes latents of 6 channels and the VAE makes 4"),
        ({"text_embed_dim": 24}, "takes text of 24 features and GLM makes 16"),
        ({"scheduler": {"use_dynamic_shifting": False}}, "does not shift linearly"),
        ({"scheduler": {"time_shift_type": "exponential"}}, "does not shift linearly"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_cogview4.pipeline(tiny_cogview4.write_folder(tmp_path, **changes)).check()
