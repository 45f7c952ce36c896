"""HiDream against diffusers where it is special: experts and their balance, pictures that are not filled up, Llama.

Shapes: B batch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_hidream_image import MoEGate
from einops import rearrange
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from models.assembly.stage import StagedModel, load_stage
from models.foundation.layers.hidream import Route, routes
from tests.models import tiny_hidream
from tests.models.drawn_samples import draw_samples
from tests.models.tiny_folder import settings_of
from tests.models.tiny_hidream import LLAMA_WIDTH, TEXT_TOKENS, USED_LAYERS
from tests.models.tiny_sd3 import clip_config
from tests.processes import run_ranks
from utils.diffusion import seeds
from utils.diffusion.auxiliary import Output
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.parallel.recompute import run_layer, run_recomputed
from utils.settings.run_tables import SamplingSettings

WEIGHT = 0.5
STOCK_WEIGHT = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hidream.write_folder(tmp_path_factory.mktemp("hidream"))


def loaded(folder: Path, **options: Any) -> tuple[Any, StagedModel]:
    pipeline = tiny_hidream.pipeline(folder, **options)
    return pipeline, load_stage(pipeline, settings_of(pipeline), stage=0)


def inputs(pipeline: Any, size: tuple[int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    return tiny_hidream.features((5, 11)), normal((2, *pipeline.latent_shape(*size)), 0), torch.tensor([0.25, 0.91])


def predicted(layers: list, stream: Any, recompute: bool = False) -> Any:
    for layer in layers:
        again = recompute and getattr(layer, "recomputable", False)
        stream = run_recomputed(layer, stream, trains=True) if again else run_layer(layer, stream)
    return stream


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_are_trained_and_balanced(folder: Path, recompute: bool) -> None:
    """The stock module computes the losses of its routers in training and drops them; in inference its experts have no
    gradient."""
    pipeline, ours = loaded(folder, balance_loss_weight=WEIGHT)
    features, x_t, t_B = inputs(pipeline, (64, 64))
    weights = normal(tuple(x_t.shape), 0, "loss")
    for layer in ours.layers:
        layer.train()
    result = predicted(ours.layers, pipeline.prepare_inputs(features, x_t, t_B), recompute)
    assert isinstance(result, Output) and result.terms_K.shape == (len(pipeline.loss_terms),)
    ((result.prediction * weights).sum() + result.terms_K.sum()).backward()

    reference, losses = loaded(folder)[1].denoiser.train(), []
    for module in reference.modules():
        if isinstance(module, MoEGate):
            # Ours compute no loss that nobody asks for.
            module._force_inference_output = False
            module.register_forward_hook(lambda gate, given, made: losses.append(made[2]))
    output = tiny_hidream.whole(reference, pipeline, features, x_t, t_B)
    expected = rearrange(output, "b c (h w) (p q) -> b c (h p) (w q)", h=4, p=2)
    balance = sum(losses) * WEIGHT / STOCK_WEIGHT
    ((expected * weights).sum() + balance).backward()
    assert len(losses) == 5 and balance > 5 * WEIGHT
    torch.testing.assert_close(result.prediction, expected)
    torch.testing.assert_close(result.terms_K[0], balance)
    gradients = {name: parameter.grad for name, parameter in ours.denoiser.named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
        assert gradients[name].any(), name


def test_without_weight_nothing_is_added(folder: Path) -> None:
    pipeline, staged = loaded(folder, balance_loss_weight=0.0)
    stream = pipeline.prepare_inputs(*inputs(pipeline, (64, 64)))
    assert not predicted([layer.train() for layer in staged.layers], stream).terms_K.any()


def test_experts_are_trained_whatever_the_configuration_says(tmp_path: Path) -> None:
    pipeline = tiny_hidream.pipeline(tiny_hidream.write_folder(tmp_path, force_inference_output=True))
    assert pipeline.build_denoiser().config["force_inference_output"] is False


@torch.no_grad()
def test_pictures_may_stay_as_they_are(folder: Path) -> None:
    """Given tokens instead of a picture, the stock module does not fill them up."""
    pipeline, staged = loaded(folder, fill_up_pictures=False)
    features, x_t, t_B = inputs(pipeline, (32, 96))
    stream = pipeline.prepare_inputs(features, x_t, t_B)
    assert stream.mask_BT is None and stream.x_BTC.shape[1] == 12
    result = predicted([layer.eval() for layer in staged.layers], stream)
    expected = staged.denoiser.eval()(
        rearrange(x_t, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2),
        timesteps=t_B * 1000,
        hidden_states_masks=torch.ones(2, 12),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(2.0)).expand(2, -1, -1),
        img_sizes=[(6, 2)] * 2,
        **tiny_hidream.texts(features),
        return_dict=False,
    )[0]
    assert torch.equal(result, expected)
    filled = tiny_hidream.whole(staged.denoiser, pipeline, features, x_t, t_B)
    assert (result - filled).abs().max() > 1e-3, "what a picture is filled up with is seen"


def test_each_block_gets_its_own_state_and_no_state_travels_in_vain() -> None:
    assert routes([0, 3, 1, 3, 3]) == [
        Route(2, (0, 1, 2)),
        Route(0, (1, 2)),
        Route(1, (0, 1)),
        Route(0, (1,)),
        Route(0, ()),
    ]


def test_llama_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    """One without `text_encoder_4`, as HiDream's; with Llama's weights from ComfyUI's file, too."""
    folder = tiny_hidream.write_folder(tmp_path)
    with_own = tiny_hidream.pipeline(folder).encoders()[-1]
    place = tmp_path / "llama"
    shutil.move(folder / "text_encoder_4", place)
    shutil.copytree(folder / "tokenizer_4", place, dirs_exist_ok=True)
    shutil.rmtree(folder / "tokenizer_4")
    with pytest.raises(UserError, match="llama3_path: is required: .* has no text_encoder_4"):
        tiny_hidream.pipeline(folder).check()
    pipeline = tiny_hidream.pipeline(folder, llama3_path=place)
    pipeline.check()
    encoder = pipeline.encoders()[-1]
    encoder.load(torch.device("cpu"))
    (state,) = encoder.encode(["a ridge"])["llama3"]
    assert state.shape == (len(USED_LAYERS), TEXT_TOKENS, LLAMA_WIDTH) == with_own.feature_shapes(None)["llama3"][0]

    save_file(load_file(place / "model.safetensors"), tmp_path / "llama.safetensors")
    (place / "model.safetensors").unlink()
    file = {"type": "llama3", "path": tmp_path / "llama.safetensors"}
    pipeline = tiny_hidream.pipeline(folder, llama3_path=place, text_encoders=[file])
    pipeline.check()
    encoder = pipeline.encoders()[-1]
    encoder.load(torch.device("cpu"))
    assert torch.equal(encoder.encode(["a ridge"])["llama3"][0], state)


@pytest.mark.parametrize("single_file", [False, True])
def test_four_bits_are_near_the_whole(folder: Path, tmp_path: Path, single_file: bool) -> None:
    tiny_hidream.write_llama(tmp_path, tmp_path, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    file = {"type": "llama3", "path": tmp_path / "model.safetensors"}
    states, encoders = [], []
    for four_bit in (False, True):
        options = {"llama3_4bit": four_bit, "text_encoders": [file] if single_file and four_bit else []}
        encoder = tiny_hidream.pipeline(folder, llama3_path=tmp_path, **options).encoders()[-1]
        encoder.load(torch.device("cpu"))
        states.append(encoder.encode(["a hiker on a ridge"])["llama3"].float())
        encoders.append(encoder)
    assert encoders[0].fingerprint != encoders[1].fingerprint
    sizes = [sum(p.nbytes for p in encoder.model.layers.parameters()) for encoder in encoders]
    assert sizes[1] < sizes[0] / 4
    assert 0 < (states[0] - states[1]).abs().mean() < 0.3 * states[0].abs().mean()


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchLCMScheduler(shift=6.0),
    ],
    ids=["full", "dev"],
)
def test_samples_are_drawn_by_the_folders_scheduler(tmp_path: Path, scheduler: Any) -> None:
    (tmp_path / "model").mkdir()
    folder = tiny_hidream.write_folder(tmp_path / "model", scheduler=scheduler)
    sampling = SamplingSettings(
        prompts=["a ridge"], width=64, height=64, guidance=1.0, steps=4, sample_every_n_steps=1, seed=7
    )
    noise = normal((1, 4, 8, 8), 7, "sample", 0)
    ((latents,),) = run_ranks(draw_samples, 1, tiny_hidream.pipeline, folder, tmp_path / "cache", 1, sampling)
    stock = tiny_hidream.STOCK.from_pretrained(folder)
    # Of what the scheduler of dev draws.
    torch.manual_seed(seeds.generator(7, "sample steps", 0).initial_seed())
    expected = tiny_hidream.draw(stock, sampling, noise)
    torch.testing.assert_close(torch.from_numpy(latents), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_scheduler_is_told(tmp_path: Path) -> None:
    folder = tiny_hidream.write_folder(tmp_path)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"))
    with pytest.raises(UserError, match="is of DDIMScheduler, and samples are drawn with"):
        tiny_hidream.pipeline(folder).scheduler()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"in_channels": 8}, "takes latents of 8 channels and the VAE makes 4"),
        ({"llama_layers": [0, 3]}, "has 5 blocks and 2 llama_layers"),
        ({"llama_layers": []}, "has 5 blocks and 0 llama_layers"),
        ({"llama_layers": [0, 1, 2, 3, 31]}, "reads layer 31 of Llama, whose layers are 0 to 3"),
        ({"caption_channels": [64, 48]}, "takes states of 48 features and Llama has 32"),
        ({"text_emb_dim": 48}, "takes 48 pooled features and CLIP-L and CLIP-G make 40"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_hidream.pipeline(tiny_hidream.write_folder(tmp_path, **changes)).check()


def test_a_width_that_is_missing_is_told_with_all_else(tmp_path: Path) -> None:
    folder = tiny_hidream.write_folder(tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "caption_channels": [64]}))
    with pytest.raises(UserError, match="needs two `caption_channels`"):
        tiny_hidream.pipeline(folder).check()


def test_a_file_in_the_place_of_llamas_folder_is_told(tmp_path: Path) -> None:
    folder = tiny_hidream.write_folder(tmp_path)
    file = folder / "text_encoder_4" / "model.safetensors"
    with pytest.raises(UserError, match=r"\[model\] llama3_path: is the folder of Llama.*is a file"):
        tiny_hidream.pipeline(folder, llama3_path=file).check()


def test_an_ordinary_clip_reads_77_tokens(tmp_path: Path) -> None:
    folder = tiny_hidream.write_folder(tmp_path)
    CLIPTextModelWithProjection(clip_config(24, max_position_embeddings=20)).save_pretrained(folder / "text_encoder_2")
    with pytest.raises(UserError, match="CLIP has 20 positions, so 24 is too much"):
        tiny_hidream.pipeline(folder).check()
