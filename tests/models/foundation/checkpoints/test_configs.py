"""Configurations of models with values of other types than their classes take."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from models.foundation.checkpoints.configs import kinds_of
from models.foundation.checkpoints.stock import of_diffusers
from tests.models import tiny_flux
from utils.errors import UserError
from utils.json_files import is_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def change(tmp_path: Path, made: Path) -> Callable[..., Path]:
    def with_values(file: str, **values: Any) -> Path:
        folder = shutil.copytree(made, tmp_path / "flux")
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))
        return folder

    return with_values


@pytest.mark.parametrize(
    "file, values, words",
    [
        ("transformer/config.json", {"num_layers": "2"}, '`num_layers` is "2", and a whole number of at least 0 is'),
        (
            "transformer/config.json",
            {"guidance_embeds": "false"},
            '`guidance_embeds` is "false", and true or false or',
        ),
        ("transformer/config.json", {"axes_dims_rope": [4, "4", 8]}, '`axes_dims_rope` is [4, "4", 8], and a list'),
        ("vae/config.json", {"scaling_factor": None}, "`scaling_factor` is null, and a number is meant"),
        ("vae/config.json", {"down_block_types": ["x"]}, "no AutoencoderKL can be made of this"),
        ("vae/config.json", {"block_out_channels": 8}, "`block_out_channels` is 8, and a list"),
        ("text_encoder/config.json", {"hidden_size": [32]}, "`hidden_size` is [32], and a whole number of at least 1"),
        ("text_encoder_2/config.json", {"dropout_rate": "x"}, "no T5Config can be made of this"),
        ("model_index.json", {"_class_name": ["FluxPipeline"]}, '`_class_name` is ["FluxPipeline"], and a text is'),
        ("scheduler/scheduler_config.json", {"shift": "3"}, '`shift` is "3", and a number is meant'),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": 1}, "`use_dynamic_shifting` is 1, and true or"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -5}, "`num_train_timesteps` is -5, and a whole"),
    ],
)
def test_values_are_told(change: Callable[..., Path], file: str, values: dict[str, Any], words: str) -> None:
    pipeline = tiny_flux.pipeline(change(file, **values))
    with pytest.raises(UserError) as raised:
        pipeline.check()
        pipeline.scheduler()
    assert f"{Path(file)}\n" in str(raised.value) and words in str(raised.value)


def test_keys_that_the_class_does_not_know_are_told(
    change: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = tiny_flux.pipeline(change("transformer/config.json", num_lbyers=3, _note="mine"))
    pipeline.weights.build_empty()
    assert (
        'transformer/config.json: FluxTransformer2DModel has no use for "num_lbyers": is a key misspelt?' in caplog.text
    )


@pytest.mark.parametrize(
    "name, config",
    [
        # As published: annotations and defaults of the classes say less.
        ("HiDreamImageTransformer2DModel", {"axes_dims_rope": [64, 32, 32], "max_resolution": [128, 128]}),
        ("UNet2DConditionModel", {"attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10]}),
        ("UNet2DConditionModel", {"mid_block_only_cross_attention": None, "norm_eps": 1e-5, "dropout": 0}),
        ("UNet2DConditionModel", {"upcast_attention": None, "time_embedding_dim": None, "dropout": 0.0}),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": None, "shift": 3, "max_shift": 1.15}),
        ("UniPCMultistepScheduler", {"sigma_max": 80.0, "disable_corrector": [], "solver_p": None}),
        ("AutoencoderKL", {"block_out_channels": [128, 256, 512, 512], "latents_mean": None, "shift_factor": 0.1}),
        ("ZImageTransformer2DModel", {"all_patch_size": [2], "rope_theta": 256.0, "t_scale": 1000}),
        ("HunyuanDiT2DModel", {"patch_size": 2, "mlp_ratio": 4.3637}),
    ],
)
def test_published_values_pass(name: str, config: dict[str, Any]) -> None:
    kinds = kinds_of(of_diffusers(name))
    assert [key for key in config if not is_of(config[key], kinds[key])] == []


def test_the_defaults_of_all_classes_pass() -> None:
    wrong = []
    for name in dir(diffusers):
        if name.endswith(("Transformer2DModel", "Transformer3DModel", "Scheduler")) or name.startswith("Autoencoder"):
            cls = getattr(diffusers, name)
            kinds = kinds_of(cls)
            for key, one in inspect.signature(cls.__init__).parameters.items():
                if key in kinds and one.default is not one.empty and not is_of(one.default, kinds[key]):
                    wrong.append(f"{name}.{key} = {one.default!r}: {kinds[key]}")
    assert wrong == []
