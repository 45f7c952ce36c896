"""The miniature Flux as a user meets it: what its scripts draw and make, and the folder that is shipped.

Shapes: B batch, L text tokens, D features, C channels, H height, W width.
"""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

MINI_FLUX = Path(__file__).resolve().parents[2] / "examples" / "mini_flux"
TEXT_TOKENS = 16


def script(name: str) -> Iterator[ModuleType]:
    """A script of the example, which finds its neighbours as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MINI_FLUX))
        yield import_module(name)


@pytest.fixture(scope="module")
def draw() -> Iterator[ModuleType]:
    yield from script("draw")


@pytest.fixture(scope="module")
def make_parts() -> Iterator[ModuleType]:
    yield from script("make_parts")


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(MINI_FLUX)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_seed_gives_the_same_pictures_whatever_their_number(draw: ModuleType) -> None:
    few, many, others = (list(draw.captioned_pictures(*order)) for order in ((3, 5), (6, 5), (3, 6)))

    assert few == many[:3]
    assert few != others


def test_the_command_line_writes_what_the_function_draws(draw: ModuleType, tmp_path: Path) -> None:
    order = ["--count", "2", "--seed", "5", "--shapes", "star"]
    subprocess.run([sys.executable, MINI_FLUX / "draw.py", "--out", tmp_path, *order], check=True)

    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["00001.png", "00001.txt", "00002.png", "00002.txt"]
    for number, (picture, words) in enumerate(draw.captioned_pictures(2, 5, ["star"]), start=1):
        assert Image.open(tmp_path / f"{number:05d}.png").tobytes() == picture.tobytes()
        assert (tmp_path / f"{number:05d}.txt").read_text() == words + "\n"
        assert " star on a " in words


@pytest.mark.parametrize(
    ("shape", "area"),
    # A star is ten triangles with sides of 1 and 0.42, a tenth of a turn apart.
    [("circle", np.pi), ("square", 1.8**2), ("triangle", 1.8), ("star", 5 * 0.42 * np.sin(np.pi / 5))],
)
def test_shapes_cover_what_geometry_says(draw: ModuleType, shape: str, area: float) -> None:
    radius = Random(0).uniform(15, 22)
    picture = np.asarray(draw.draw(shape, "red", "white", Random(0))).astype(float)
    red, white = (np.array(colour) for colour in (draw.COLOURS["red"], draw.BACKGROUNDS["white"]))
    coverage = ((picture - white) @ (red - white)) / ((red - white) @ (red - white))

    assert coverage.sum() == pytest.approx(area * radius**2, rel=0.03)
    assert tuple(picture[0, 0]) == draw.BACKGROUNDS["white"]


def test_every_word_of_a_caption_is_one_token(draw: ModuleType, make_parts: ModuleType, pipeline: FluxPipeline) -> None:
    words = make_parts.vocabulary()
    assert len(words) > 200
    assert {*draw.SHAPES, *draw.COLOURS, *draw.BACKGROUNDS, "a", "an", "on", "background"} <= {*words}
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert {len(ids) for ids in tokenizer(words, add_special_tokens=False).input_ids} == {1}


@pytest.mark.parametrize("text", ["an orange star on a cyan background", "a zebra quickly jumps"])
def test_text_survives_both_tokenizers(text: str, pipeline: FluxPipeline) -> None:
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_script_makes_the_shipped_parts(make_parts: ModuleType, pipeline: FluxPipeline) -> None:
    words = make_parts.vocabulary()
    for made, shipped in (
        (make_parts.clip_tokenizer(words), pipeline.tokenizer),
        (make_parts.t5_tokenizer(words), pipeline.tokenizer_2),
    ):
        assert made.get_vocab() == shipped.get_vocab()
    for made, shipped in (
        (make_parts.clip_text_encoder(pipeline.tokenizer), pipeline.text_encoder),
        (make_parts.t5_text_encoder(pipeline.tokenizer_2), pipeline.text_encoder_2),
    ):
        torch.testing.assert_close(dict(made.state_dict()), dict(shipped.state_dict()))
    made, shipped = (
        {name: weight.shape for name, weight in part.state_dict().items()}
        for part in (make_parts.transformer(), pipeline.transformer)
    )
    assert made == shipped


@torch.no_grad()
def test_random_text_encoders_tell_captions_apart(draw: ModuleType, pipeline: FluxPipeline) -> None:
    words = list(product(draw.SHAPES, draw.COLOURS, draw.BACKGROUNDS))
    text_BLD, pooled_BD, _ = pipeline.encode_prompt(
        [draw.caption(*triple) for triple in words], max_sequence_length=TEXT_TOKENS
    )
    neighbours = [
        (a, b)
        for a, b in product(range(len(words)), repeat=2)
        if sum(x != y for x, y in zip(words[a], words[b], strict=True)) == 1
    ]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    shown, unseen = order[:64], order[64:]
    for features_BD in (pooled_BD, text_BLD.flatten(1)):
        one, other = features_BD[torch.tensor(neighbours)].unbind(1)
        assert (one - other).norm(dim=1).min() > 0.05 * features_BD.norm(dim=1).mean()

        # A linear map fitted on two captions of three names shape, colour and background of the others.
        inputs_BD = torch.nn.functional.pad(features_BD - features_BD.mean(0), (0, 1), value=1.0).double()
        for kind in zip(*words, strict=True):
            classes = torch.tensor([sorted(set(kind)).index(word) for word in kind])
            targets_BK = torch.nn.functional.one_hot(classes).double()
            weights_DK = torch.linalg.pinv(inputs_BD[shown], rtol=1e-6) @ targets_BK[shown]
            assert torch.equal((inputs_BD[unseen] @ weights_DK).argmax(1), classes[unseen])


@torch.no_grad()
def test_autoencoder_keeps_pictures_of_every_shape(draw: ModuleType, pipeline: FluxPipeline) -> None:
    pictures = [picture for picture, _ in draw.captioned_pictures(48, 99, list(draw.SHAPES))]
    vae = pipeline.vae
    pixels_BCHW = pipeline.image_processor.preprocess(pictures)
    posterior = vae.encode(pixels_BCHW).latent_dist
    latents_BCHW = posterior.mode()
    scaled_BCHW = (latents_BCHW - vae.config.shift_factor) * vae.config.scaling_factor

    assert (vae.decode(latents_BCHW).sample - pixels_BCHW).abs().mean() < 0.05
    assert posterior.std.max() < 1e-3
    assert scaled_BCHW.shape == (48, 4, 8, 8)
    assert scaled_BCHW.mean().item() == pytest.approx(0, abs=0.1)
    assert scaled_BCHW.std().item() == pytest.approx(1, abs=0.1)


def test_stock_pipeline_draws_a_picture(pipeline: FluxPipeline) -> None:
    picture = pipeline(
        "a red circle on a white background",
        height=64,
        width=64,
        num_inference_steps=4,
        max_sequence_length=TEXT_TOKENS,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    assert picture.size == (64, 64)
    assert np.asarray(picture).std() > 1


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in MINI_FLUX.rglob("*") if path.is_file()) <= 12e6
