"""Cosmos-Predict2: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from models.foundation.checkpoints.layouts.cosmos_predict2 import COSMOS_PREDICT2_LAYOUT
from models.foundation.checkpoints.recognition import owner_of_names, recognised
from models.foundation.layers.given import loss_weights
from tests import test_models as generic
from tests.models import tiny_cosmos_predict2, tiny_cosmos_predict2_v2w
from tests.models.tiny_cosmos_predict2_v2w import GIVEN_TIME
from utils.diffusion.seeds import normal
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cosmos_predict2.write_folder(tmp_path_factory.mktemp("cosmos_predict2"))


@pytest.fixture(scope="module")
def v2w_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cosmos_predict2_v2w.write_folder(tmp_path_factory.mktemp("cosmos_predict2_v2w"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = generic.loaded(tiny_cosmos_predict2.pipeline(folder, **options)).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    tensors = tensors_of(folder)
    original = COSMOS_PREDICT2_LAYOUT.to_original(tensors)
    again = convert_cosmos_transformer_checkpoint_to_diffusers({f"net.{name}": one for name, one in original.items()})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_publishers_file_is_read(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(folder)
    original = COSMOS_PREDICT2_LAYOUT.to_original({name: tensor + 1 for name, tensor in tensors.items()})
    theirs = {f"net.{name}": tensor.contiguous() for name, tensor in original.items()}
    save_file({**theirs, "net.pos_embedder.seq": torch.arange(8)}, tmp_path / "cosmos.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "cosmos.safetensors")
    assert all(torch.equal(read[name], tensors[name] + 1) for name in tensors)


def compared(folder: Path, features: dict[str, torch.Tensor], counts: torch.Tensor, whole: Any) -> None:
    """Whether what video to world predicts, and its gradients, are those of `whole` (denoiser, x_t, t_B), with these
    weights of the frames."""
    cosmos = tiny_cosmos_predict2.pipeline(folder)
    staged, shape = generic.loaded(cosmos), (2, 4, 3, 4, 6)
    x_t, weights = normal(shape, 0, "x"), normal(shape, 0, "weights")
    t_B = torch.tensor([0.2513, 0.913])
    stream = cosmos.prepare_inputs(features, x_t, t_B)
    for layer in staged.layers:
        stream = layer(stream)
    (stream * weights * counts).sum().backward()
    gradients = {name: parameter.grad for name, parameter in staged.denoiser.named_parameters()}
    reference = generic.loaded(cosmos).denoiser
    expected = whole(reference, cosmos, x_t, t_B)
    (expected * weights * counts).sum().backward()
    torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_video_to_world_in_layers_is_the_whole_module(v2w_folder: Path) -> None:
    """Within rounding, as the stock module makes one tensor of the times of all tokens, to which the gradients of all
    layers are added."""
    features = tiny_cosmos_predict2_v2w.features((5, 11))
    features |= tiny_cosmos_predict2_v2w.features_of_pictures((4, 3, 4, 6))
    compared(
        v2w_folder,
        features,
        torch.ones(()),
        lambda denoiser, cosmos, x_t, t_B: tiny_cosmos_predict2_v2w.whole(denoiser, cosmos, features, x_t, t_B),
    )


@pytest.mark.parametrize("given", [(1, 2), (0, 1), None])
def test_given_frames_have_no_noise_a_time_and_a_mask_of_their_own(
    v2w_folder: Path, given: tuple[int, int] | None
) -> None:
    """In training, where one or two are given; they do not count. Pictures have none."""
    given_B = torch.tensor(given or (0, 0))
    clean = normal((2, 4, 3, 4, 6), 0, "clean")
    features = {**tiny_cosmos_predict2.features((5, 11)), "latents": clean}
    features |= {"given_frames": given_B} if given else {}

    def whole(denoiser: Any, cosmos: Any, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen, mask = x_t.clone(), torch.zeros(2, 1, 3, 4, 6)
        time_B1f11 = t_B.view(2, 1, 1, 1, 1).repeat(1, 1, 3, 1, 1)
        for sample, count in enumerate(given_B.tolist()):
            seen[sample, :, :count], mask[sample, :, :count] = clean[sample, :, :count], 1
            time_B1f11[sample, :, :count] = GIVEN_TIME
        keys = {"fps": 16, "condition_mask": mask}
        return tiny_cosmos_predict2.whole(denoiser, cosmos, features, seen, time_B1f11, **keys)

    compared(v2w_folder, features, loss_weights(given_B, 3), whole)


def test_the_weights_of_frames_are_1_on_average() -> None:
    weights = loss_weights(torch.tensor([0, 1, 2]), 4)[:, 0, :, 0, 0]
    torch.testing.assert_close(weights, torch.tensor([[1.0] * 4, [0.0, *[4 / 3] * 3], [0.0, 0.0, 2.0, 2.0]]))


def test_how_many_frames_are_given(folder: Path, v2w_folder: Path) -> None:
    cosmos = tiny_cosmos_predict2.pipeline(v2w_folder, second_frame_share=0.25)
    assert [cosmos.given_frames((4, 3, 4, 6), quantile) for quantile in (0.0, 0.24, 0.25, 0.9)] == [2, 2, 1, 1]
    assert [cosmos.given_frames((4, frames, 4, 6), 0.0) for frames in (1, 2)] == [0, 1]
    assert tiny_cosmos_predict2.pipeline(folder).given_frames((4, 3, 4, 6), 0.0) == 0


def test_text_to_image_takes_pictures_alone(folder: Path, v2w_folder: Path) -> None:
    models = [tiny_cosmos_predict2.pipeline(place, frame_rate=10.0) for place in (folder, v2w_folder)]
    assert [(one.media.max_frames, one.media.fps, one.starts_from_picture) for one in models] == [
        (1, 10.0, False),
        (93, 10.0, True),
    ]
    assert generic.loaded(models[1]).layers[0].fps == 10.0


def test_sizes_beyond_the_positions_are_refused(folder: Path) -> None:
    """Of 32 cells in each direction, two to a place of 16 pixels."""
    cosmos = tiny_cosmos_predict2.pipeline(folder)
    assert cosmos.too_large(256, 256) is None and "ends at 256 x 256" in cosmos.too_large(272, 256)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        (
            {"in_channels": 16},
            {},
            "takes 16 channels, and the VAE makes 4; text to image takes 4, video to world takes 5",
        ),
        ({"text_embed_dim": 8}, {}, "takes text of 8 features and T5 makes 64; give T5-11B"),
        ({"extra_pos_embed_type": "learnable"}, {}, 'is of Cosmos 1.0: set .model. type = "cosmos"'),
        ({"use_crossattn_projection": True}, {}, 'is of Cosmos-Predict2.5: set .model. type = "cosmos_predict25"'),
        ({}, {"second_frame_share": 0.1}, "second_frame_share: is for video to world alone"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict, options: dict, said: str) -> None:
    cosmos = tiny_cosmos_predict2.pipeline(tiny_cosmos_predict2.write_folder(tmp_path, **changes), **options)
    with pytest.raises(UserError, match=said):
        cosmos.check()


BLOCK = "net.blocks.0.adaln_modulation_self_attn.1.weight"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["net.blocks.block0.blocks.0.block.attn.to_q.0.weight"], "Cosmos 1.0"),
        (["learnable_pos_embed.pos_emb_t", "time_embed.t_embedder.linear_1.weight"], "Cosmos 1.0"),
        ([BLOCK, "net.crossattn_proj.0.weight"], "Cosmos-Predict2.5"),
        ([BLOCK, "net.llm_adapter.blocks.0.self_attn.q_proj.weight"], "Anima"),
        ([BLOCK], "Cosmos-Predict2"),
    ],
)
def test_relatives_are_told_apart_by_their_files(names: list[str], what: str) -> None:
    assert recognised({name: (8, 8) for name in names}).what == what


def test_an_adapter_is_known_by_its_names() -> None:
    wan = ["blocks.0.self_attn.q", "blocks.0.cross_attn.o", "blocks.0.ffn.0"]
    theirs = ["blocks.0.self_attn.q_proj", "blocks.0.cross_attn.output_proj", "blocks.0.mlp.layer1"]
    ours = [f"transformer_blocks.0.norm{number}.linear_1" for number in (1, 2, 3)]
    assert [owner_of_names(names) for names in (wan, theirs, ours)] == ["Wan", "Cosmos-Predict2", "Cosmos-Predict2"]
