"""What stages do not send one another, each makes to the bit as the first one had it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.assembly.activations import tensors_of
from models.assembly.stage import load_stage
from tests.models.batches import SIZES, features_of
from tests.models.tiny_folder import settings_of, tiny
from utils.diffusion.seeds import normal
from utils.parallel.remaking import Remaking, arrived, leaving

REMADE = (
    "anima",
    "chroma",
    "cogvideox_15_i2v",
    "cogview4",
    "cosmos",
    "cosmos_predict2",
    "cosmos_predict25",
    "ernie_image",
    "flux",
    "flux2",
    "flux3",
    "framepack",
    "hidream",
    "hunyuan_image",
    "hunyuan_video",
    "hunyuan_video_15",
    "ideogram4",
    "kandinsky5",
    "kandinsky5_t2i",
    "krea2",
    "ltx_video",
    "ltx2",
    "ltx2_3",
    "lumina2",
    "minimax_h3",
    "qwen_image",
    "qwen_image_layered",
    "wan",
    "wan_vace",
    "z_image",
)
"""Types whose entry says what is not sent; on a pretended device all types are looked at, by
`test_pretended_device.py`."""


@torch.no_grad()
@pytest.mark.parametrize("name", REMADE)
def test_an_entry_without_weights_makes_what_is_not_sent(name: str, tmp_path: Path) -> None:
    module = tiny(name)
    pipeline = module.pipeline(module.write_folder(tmp_path))
    first = load_stage(pipeline, settings_of(pipeline), stage=0).layers[0]
    elsewhere = Remaking.of(pipeline.to_layers(pipeline.weights.build_empty())[0])
    shape = (2, *pipeline.latent_shape(*getattr(module, "SIZES", SIZES)[0]))
    stream = first(pipeline.prepare_inputs(features_of(module, shape), normal(shape, 0, "x"), torch.tensor([0.2, 0.9])))

    sent = leaving(stream, elsewhere)
    left_out = [one for one, field in sent._asdict().items() if field is None and getattr(stream, one) is not None]
    assert left_out and set(left_out) <= set(elsewhere.fields)
    again = arrived(sent, elsewhere)
    for field in left_out:
        made, had = (list(tensors_of(getattr(one, field))) for one in (again, stream))
        assert len(made) == len(had) and all(map(torch.equal, made, had)), field
        assert [one.dtype for one in made] == [one.dtype for one in had], field


def test_what_has_a_gradient_is_sent(tmp_path: Path) -> None:
    module = tiny("cosmos")
    pipeline = module.pipeline(module.write_folder(tmp_path))
    entry = load_stage(pipeline, settings_of(pipeline), stage=0).layers[0]
    shape = (2, *pipeline.latent_shape(*SIZES[0]))
    stream = entry(pipeline.prepare_inputs(features_of(module, shape), normal(shape, 0, "x"), torch.tensor([0.2, 0.9])))
    sent = leaving(stream, Remaking.of(entry))
    assert sent.places_BTD is stream.places_BTD and sent.places_BTD.requires_grad and sent.rope_TE is None
    assert arrived(sent, Remaking.of(entry)).places_BTD is sent.places_BTD


def test_all_else_is_sent() -> None:
    stream, nothing = (torch.ones(1),), Remaking.of(torch.nn.Linear(1, 1))
    assert leaving(stream, nothing) is stream and arrived(stream, nothing) is stream
