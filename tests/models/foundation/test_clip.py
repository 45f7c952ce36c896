"""CLIP text encoders against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.foundation.clip import Pooled, clip
from models.foundation.text_encoders import load_tokenizer
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import randomised
from tests.models.tiny_sd3 import CLIP_G_WIDTH, clip_config
from utils.dataset.samples import Bucket

CAPTIONS = ["a hiker on a ridge", "", "two motorcycles and a dog " * 40]
PROJECTED_WIDTH = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = clip_config(CLIP_G_WIDTH, projection_dim=PROJECTED_WIDTH)
    randomised(CLIPTextModelWithProjection(config), 0).save_pretrained(folder / "text_encoder_2")
    (folder / "tokenizer_2").symlink_to(MINI_FLUX / "tokenizer")
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    ("pooled", "stock_class"),
    [("text_embeds", CLIPTextModelWithProjection), ("pooler_output", CLIPTextModel), (None, CLIPTextModel)],
)
def test_features_are_those_of_transformers(folder: Path, pooled: Pooled | None, stock_class: type) -> None:
    encoder = clip("words", folder, "text_encoder_2", "tokenizer_2", None, torch.float32, pooled)
    encoder.check()
    encoder.load(torch.device("cpu"))
    made = encoder.encode(caption=CAPTIONS)
    assert encoder.truncated == 1
    tokens = load_tokenizer(folder / "tokenizer_2")(
        CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    output = stock_class.from_pretrained(folder / "text_encoder_2")(tokens.input_ids, output_hidden_states=True)
    expected = {"words": output.hidden_states[-2], **({"words_pooled": output[pooled]} if pooled else {})}
    torch.testing.assert_close(made, expected)
    shapes = {name: shape for name, (shape, _) in encoder.feature_shapes(Bucket(64, 64, 1)).items()}
    assert shapes == {name: tuple(feature.shape[1:]) for name, feature in made.items()}
