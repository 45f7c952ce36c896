"""CLIP text encoders against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModelWithProjection

from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.stock import of_transformers
from models.foundation.encoders.clip import ClipEncoder, ClipFeatures, Pooled, weighed
from models.foundation.encoders.text import load_tokenizer
from tests.models import tiny_sd15
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import encoded, randomised
from tests.models.tiny_sd3 import CLIP_G_WIDTH, clip_config
from tests.runs import launch, metrics, only_run
from utils.dataset.samples import Bucket
from utils.run.dataset_page import PAGE_NAME

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


def clip(folder: Path, model_class: str, pooled: Pooled | None) -> ClipEncoder:
    part = TextPart("words", model_class, "text_encoder_2", "tokenizer_2")
    return ClipEncoder(part, folder, None, torch.float32, ClipFeatures("words", 77, pooled))


@torch.no_grad()
@pytest.mark.parametrize(
    ("pooled", "stock_class"),
    [("text_embeds", "CLIPTextModelWithProjection"), ("pooler_output", "CLIPTextModel"), (None, "CLIPTextModel")],
)
def test_features_are_those_of_transformers(folder: Path, pooled: Pooled | None, stock_class: str) -> None:
    encoder = clip(folder, stock_class, pooled)
    encoder.check()
    made = encoded(encoder, CAPTIONS)
    assert encoder.truncated == 1
    tokens = load_tokenizer(folder / "tokenizer_2")(
        CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    stock = of_transformers(stock_class).from_pretrained(folder / "text_encoder_2")
    output = stock(tokens.input_ids, output_hidden_states=True)
    expected = {"words": output.hidden_states[-2], **({"words_pooled": output[pooled]} if pooled else {})}
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    shapes = {name: shape for name, (shape, _) in encoder.feature_shapes(Bucket(64, 64, 1)).items()}
    assert shapes == {name: tuple(feature.shape[1:]) for name, feature in made.items()}


# Weights

PLAIN = "a red fox and a hiker on a ridge"
WEIGHTED = "a (red fox:1.5) and [a hiker] on a ridge"
WEIGHTS = [("a", 1.0), ("red fox", 1.5), ("and", 1.0), ("a hiker", 1 / 1.1), ("on a ridge", 1.0)]


@pytest.fixture
def encoder(folder: Path) -> ClipEncoder:
    return clip(folder, "CLIPTextModelWithProjection", "text_embeds")


def expected_weights(encoder: ClipEncoder, pieces: list[tuple[str, float]]) -> torch.Tensor:
    """One for each token of a caption, (77,)."""
    counts = [len(encoder.tokenizer(text, add_special_tokens=False).input_ids) for text, _ in pieces]
    of_tokens = [weight for count, (_, weight) in zip(counts, pieces, strict=True) for _ in range(count)][:75]
    return torch.tensor([1.0, *of_tokens, *[1.0] * (76 - len(of_tokens))])


def test_weights_multiply_the_tokens_of_their_piece_and_keep_the_mean(encoder: ClipEncoder) -> None:
    plain = encoded(encoder, [PLAIN, CAPTIONS[0]])
    made = encoded(encoder, [WEIGHTED, CAPTIONS[0]], weighted_tags=True)
    assert torch.equal(made["words"][1], plain["words"][1]), "beside a caption with weights"
    assert torch.equal(made["words_pooled"], plain["words_pooled"])

    factors = made["words"][0] / plain["words"][0]
    weights_L = expected_weights(encoder, WEIGHTS)
    assert weights_L.unique().tolist() == pytest.approx([1 / 1.1, 1.0, 1.5])
    torch.testing.assert_close(factors / factors[0], weights_L[:, None].expand_as(factors), rtol=1e-4, atol=0)
    assert made["words"][0].mean().item() == pytest.approx(plain["words"][0].mean().item(), rel=1e-4)


def test_weights_of_half_precision_are_reckoned_in_float32() -> None:
    hidden_BLD = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0)) + 0.3
    weights_BL = torch.linspace(0.5, 1.5, 77)[None]
    result = weighed(hidden_BLD.bfloat16(), weights_BL)
    assert result.dtype == torch.bfloat16
    expected = weighed(hidden_BLD.bfloat16().float(), weights_BL)
    assert torch.equal(result, expected.bfloat16())


def test_a_long_caption_with_weights_is_cut(encoder: ClipEncoder) -> None:
    fox = [("a red fox", 1.0), ("two motorcycles " * 30, 1.2), ("a ridge", 0.5)]
    encoder.load(torch.device("cpu"))
    encoder.encode(weighted_caption=[fox, WEIGHTS])
    assert encoder.truncated == 1 and encoder.token_count(fox) > encoder.token_limit == 77
    tokens_BL, weights_BL = encoder.features.tokens(encoder.tokenizer, [fox, WEIGHTS])
    plain = encoder.tokenizer("".join(f"{text} " for text, _ in fox), truncation=True, max_length=77).input_ids
    assert tokens_BL[0].tolist() == plain
    assert torch.equal(weights_BL, torch.stack([expected_weights(encoder, pieces) for pieces in (fox, WEIGHTS)]))
    assert weights_BL[0, -2:].tolist() == [pytest.approx(1.2), 1.0]


def test_weighted_captions_train_frozen_and_trained_encoders_alike(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    model = tiny_sd15.write_folder(tmp_path / "model")
    data = {"weighted_tags": True, "caption_prefix": "(bright:3) "}
    losses = []
    for rates, marked in (({}, data), ({"text_encoder_1_lr": 1e-3}, data), ({}, {**data, "weighted_tags": False})):
        options = tiny_sd15.pipeline(model, **rates).options.model_dump(mode="json", exclude_unset=True)
        config = write_config(model=options, data=marked, max_steps=1)
        codes, log = launch(config)
        assert codes == [0], log
        losses.append(metrics(only_run(config), "train/loss")[1])
        only_run(config).rename(tmp_path / str(len(losses)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def test_marks_of_weights_are_no_tokens_of_the_dump(write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    options = tiny_sd15.pipeline(tiny_sd15.write_folder(tmp_path / "model")).options
    data = {"weighted_tags": True, "instance_prompt": "(a:1.5)"}
    config = write_config(model=options.model_dump(mode="json", exclude_unset=True), data=data)
    codes, log = launch(config, "--dump_dataset", str(tmp_path / "dump"))
    assert codes == [0], log
    assert "3 of 77" in (tmp_path / "dump" / PAGE_NAME).read_text()
