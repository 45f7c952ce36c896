"""Cosmos-Predict2.5: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from models.assembly.exports import export_plan
from models.foundation.checkpoints.layouts.cosmos_predict2 import COSMOS_PREDICT2_LAYOUT
from models.foundation.checkpoints.recognition import recognised
from tests import test_models as generic
from tests.models import tiny_cosmos_predict25
from tests.models.tiny_folder import settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError

GIVEN_TIME = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cosmos_predict25.write_folder(tmp_path_factory.mktemp("cosmos_predict25"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = generic.loaded(tiny_cosmos_predict25.pipeline(folder, **options)).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_file_is_read_as_the_stock_converter_reads_it(folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    theirs = {f"net.{name}": one.contiguous() for name, one in COSMOS_PREDICT2_LAYOUT.to_original(tensors).items()}
    assert recognised({name: tensor.shape for name, tensor in theirs.items()}).what == "Cosmos-Predict2.5"
    save_file({**theirs, "net.accum_iteration": torch.ones(1)}, tmp_path / "cosmos.safetensors")
    again = convert_cosmos_transformer_checkpoint_to_diffusers(dict(theirs))
    read = tensors_of(folder, transformer_path=tmp_path / "cosmos.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and torch.equal(again[name], tensors[name]) for name in tensors)


@torch.no_grad()
@pytest.mark.parametrize("counts", [(1, 2), (0, 1)])
def test_given_frames_have_no_noise_a_time_and_a_mask_of_their_own(folder: Path, counts: tuple[int, int]) -> None:
    cosmos, given_B = tiny_cosmos_predict25.pipeline(folder), torch.tensor(counts)
    clean, x_t = (normal((2, 4, 3, 4, 6), 0, name) for name in ("clean", "x"))
    t_B = torch.tensor([0.2513, 0.913])
    features = {**tiny_cosmos_predict25.features((5, 11)), "latents": clean, "given_frames": given_B}
    stream, staged = cosmos.prepare_inputs(features, x_t, t_B), generic.loaded(cosmos)
    for layer in staged.layers:
        stream = layer(stream)
    seen, mask = x_t.clone(), torch.zeros(2, 1, 3, 4, 6)
    time_B1f11 = t_B.view(2, 1, 1, 1, 1).repeat(1, 1, 3, 1, 1)
    for sample, count in enumerate(counts):
        seen[sample, :, :count], mask[sample, :, :count] = clean[sample, :, :count], 1
        time_B1f11[sample, :, :count] = GIVEN_TIME
    expected = tiny_cosmos_predict25.whole(staged.denoiser, cosmos, features, seen, time_B1f11, mask)
    torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)


def test_how_many_frames_are_given(folder: Path) -> None:
    """None for half of the clips, two for a quarter of the others; a still has none to give."""
    cosmos = tiny_cosmos_predict25.pipeline(folder, first_frame_share=0.5, second_frame_share=0.25)
    assert [cosmos.given_frames((4, 3, 4, 6), quantile) for quantile in (0.0, 0.12, 0.13, 0.49, 0.5)] == [2, 2, 1, 1, 0]
    assert [cosmos.given_frames((4, frames, 4, 6), 0.0) for frames in (1, 2)] == [0, 1]


def test_it_is_not_told_the_frame_rate(folder: Path) -> None:
    cosmos = tiny_cosmos_predict25.pipeline(folder)
    assert generic.loaded(cosmos).layers[0].fps is None and cosmos.problems_of_data([]) == []


def test_what_captions_take_in_the_cache_is_told(folder: Path) -> None:
    said = dict(tiny_cosmos_predict25.pipeline(folder, max_sequence_length=2**17).remarks())
    # 2 x 16 features of 4 bytes for each of the tokens.
    assert said["max_sequence_length"].startswith("each caption takes 16 MiB in the cache")


def test_who_reads_its_exports_is_told(folder: Path) -> None:
    cosmos = tiny_cosmos_predict25.pipeline(folder)
    for save_format, is_told in (("both", True), ("diffusers", False)):
        settings = settings_of(cosmos, save_format=save_format)
        note = export_plan(cosmos, settings, generic.loaded(cosmos)).note
        assert (note is not None and "not known to have a model of Cosmos-Predict2.5" in note) == is_told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 4}, "takes 4 channels, and the VAE makes 4; the model takes 5: give the VAE of Wan 2.1"),
        ({"crossattn_proj_in_channels": 8}, "takes text of 8 features, and all layers of the encoder make 32"),
        ({"use_crossattn_projection": False}, 'is of Cosmos-Predict2: set .model. type = "cosmos_predict2"'),
        ({"img_context_dim_in": 8}, "is of Cosmos-Transfer2.5: it is not trained here; give Cosmos-Predict2.5"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict, said: str) -> None:
    cosmos = tiny_cosmos_predict25.pipeline(tiny_cosmos_predict25.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        cosmos.check()
