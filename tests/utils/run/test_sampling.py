"""Samples on disk."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from tests.runs import MINI_FLUX
from utils.diffusion.seeds import normal
from utils.ranks import Ranks
from utils.run.clip_score import ClipScore
from utils.run.contact_sheet import CELL, GAP, HEAD, MOST_STEPS, SIDE, write_sheet
from utils.run.sample_texts import Origin, parameters
from utils.run.sampling import Drawing, _write, begin
from utils.settings.run_tables import SamplingSettings
from utils.settings.sample_requests import SampleRequest, requests_of


def test_a_clip_is_written_with_its_middle_frame(tmp_path: Path) -> None:
    pixels_CFHW = torch.stack([torch.full((3, 16, 16), level) for level in (-1.0, 1.0, -1.0)], dim=1)
    _write(pixels_CFHW, 8.0, tmp_path / "a.png", "a fox\nSteps: 3")
    with av.open(str(tmp_path / "a.mp4")) as clip:
        assert clip.metadata["comment"] == "a fox\nSteps: 3"
    assert Image.open(tmp_path / "a.png").info == {"parameters": "a fox\nSteps: 3"}
    assert Image.open(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)


def test_without_pyav_the_middle_frame_is_written_and_the_clip_is_missed_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    _write(torch.zeros(3, 3, 16, 16), 8.0, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert "PyAV" in caplog.text


def request_of(**keys: object) -> SampleRequest:
    sampling = SamplingSettings(samples=[{"prompt": "a Füchsin", **keys}], width=64, height=32, guidance=2.5, steps=7)
    return requests_of(sampling, True)[0]


def test_a_text_says_how_a_sample_was_drawn(tmp_path: Path) -> None:
    shown = {"control_images": ["x/a, b.png"], "mask_image": "x/mask.mp4"}
    request = request_of(negative_prompt="dark", adapter_scale=0.5, frames=5, seed=3, **shown)
    text = parameters(request, Origin("flux", "a run", 12), "Euler")
    assert text == (
        "a Füchsin\nNegative prompt: dark\nSteps: 7, Sampler: Euler, CFG scale: 2.5, Seed: 3, Size: 64x32, Frames: 5, "
        'Control images: "a, b.png", Mask: mask.mp4, Adapter scale: 0.5, Model: flux, Run: a run, Training step: 12'
    )
    _write(torch.zeros(3, 1, 16, 16), 8.0, tmp_path / "a.png", text)
    assert Image.open(tmp_path / "a.png").info["parameters"] == text
    assert "Seed: 0, Place: 0" in parameters(request_of(), Origin("flux", "a run", 12), "Euler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_of_its_own_is_that_of_the_stock_pipeline(dtype: torch.dtype) -> None:
    """One generator draws the noise and what follows."""
    schedule = SimpleNamespace(of=lambda steps: SimpleNamespace())
    drawing = Drawing(request_of(seed=5), lambda: [{}], 1, (4, 3, 5), schedule)
    model = SimpleNamespace(features_everywhere=False, noise_dtype=dtype, before=lambda latents, features: latents)
    begun = begin(Ranks(), model, drawing)
    generator = torch.Generator("cpu").manual_seed(5)
    expected = randn_tensor((1, 4, 3, 5), generator=generator, dtype=dtype)
    assert torch.equal(begun.latents, expected.float())
    assert torch.equal(torch.randn(3, generator=begun.generator), torch.randn(3, generator=generator))
    others = begin(Ranks(), model, replace(drawing, request=request_of()))
    assert torch.equal(others.latents, normal((1, 4, 3, 5), 0, "sample", 0))


def test_a_sheet_has_a_row_a_prompt_and_a_column_a_step(tmp_path: Path) -> None:
    """Prompts that are drawn no more come last; of many steps the first and the last are shown."""
    assert write_sheet(tmp_path) is None
    drawn = {step: ["00_a"] if step < 20 else ["00_b", "01_c"] for step in range(30)}
    for step, names in drawn.items():
        folder = tmp_path / f"step{step:06d}"
        folder.mkdir()
        for name in names:
            colour = (8 * step, 255, 0) if name == "00_a" else (8 * step, 0, 255)
            Image.new("RGB", (320, 160), colour).save(folder / f"{name}.png")
    sheet = Image.open(write_sheet(tmp_path))
    width, height = CELL, CELL // 2
    assert sheet.size == (SIDE + MOST_STEPS * (width + GAP), HEAD + 3 * (height + GAP))
    rows = [HEAD + row * (height + GAP) + 5 for row in range(3)]
    last = SIDE + (MOST_STEPS - 1) * (width + GAP) + 5
    assert [sheet.getpixel((last, row)) for row in rows] == [(232, 0, 255), (232, 0, 255), (255, 255, 255)]
    assert [sheet.getpixel((SIDE + 5, row)) for row in rows] == [(255, 255, 255), (255, 255, 255), (0, 255, 0)]
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_score_is_the_cosine_of_transformers(tmp_path: Path) -> None:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizerFast.from_pretrained(MINI_FLUX / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 8}
    seen = {**text, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=4)).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    files, prompts = [tmp_path / "a.png", tmp_path / "b.png"], ["a red star", "a blue circle " * 20]
    for file, colour in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (16, 24), colour).save(file)
    tokens = tokenizer(prompts, max_length=8, truncation=True, padding=True, return_tensors="pt")
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        scores = model(**tokens, **pixels).logits_per_image.diag() / model.logit_scale.exp()
    made = ClipScore(tmp_path, torch.device("cpu")).of(files, prompts)
    assert made == pytest.approx(100 * scores.mean().item(), abs=1e-3)
