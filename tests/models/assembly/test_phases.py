"""The memory of caching, evaluation and sampling, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from torch.profiler import ProfilerActivity, profile

from models.assembly import phases
from models.assembly.encoder_needs import Need
from models.assembly.fitting import fit
from models.assembly.live_bytes import most_at_once
from models.assembly.memory import GIB, Planner
from models.assembly.phases import Decoding, caching_needs, decoding_need, encoding_bytes
from models.assembly.room import MARGIN, SHARE
from models.assembly.stage import partition
from tests.models import tiny_flux, tiny_wan
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.dataset.samples import Bucket
from utils.settings.run_tables import SamplingSettings

BATCH, SIZE = 2, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def really_taken(compute: Callable[[], Any]) -> int:
    """The most bytes that torch has given out on the CPU at once."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    live, highest = 0, 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def test_encoders_take_what_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "LITTLE", 0)
    flux = tiny_flux.pipeline(folder)
    encoders = flux.encoders()
    needs = {need.name: need for need in caching_needs(encoders, Bucket(SIZE, SIZE, 1), BATCH)}
    assert list(needs) == ["vae", "clip", "t5"]
    for encoder in encoders:
        encoder.load(torch.device("cpu"))
        module = encoder.vae if encoder.name == "vae" else encoder.model
        held = {id(one): one.nbytes for one in (*module.parameters(), *module.buffers())}
        assert needs[encoder.name].weights == pytest.approx(sum(held.values()), rel=1e-3)
    vae, *texts = encoders
    pixels = torch.zeros(BATCH, 3, SIZE, SIZE)
    # A CPU's convolutions take some memory of their own.
    taken = really_taken(lambda: vae.vae.encode(pixels).latent_dist.mode())
    assert 0.8 * taken < needs["vae"].activations <= taken
    for encoder in texts:
        ids = torch.zeros(BATCH, encoder.token_limit, dtype=torch.int64)
        taken = really_taken(lambda ids=ids, model=encoder.model: model(input_ids=ids, output_hidden_states=True))
        assert needs[encoder.name].activations == pytest.approx(taken, rel=0.01)
    latent = torch.zeros(1, *flux.latent_shape(SIZE, SIZE, 1))
    decoding = decoding_need(vae, latent.shape[1:])
    weights, taken = needs["vae"].weights, really_taken(lambda: vae.vae.decode(latent))
    assert 0.8 * taken < decoding.whole - weights <= taken
    assert decoding.tiled < decoding.whole
    # Where all cards have room, tiles are not counted.
    monkeypatch.undo()
    assert decoding_need(vae, latent.shape[1:]) == Decoding(decoding.whole, decoding.whole)


def test_long_clips_follow_from_short_ones(tmp_path: Path) -> None:
    wan = tiny_wan.pipeline(tiny_wan.write_folder(tmp_path))
    vae = wan.encoders()[0]
    clip = Bucket(32, 32, 25)
    (need,) = caching_needs([vae], clip, 1)
    vae.load(torch.device("cpu"))
    module = vae.vae.to("meta")
    pixels = 1, 3, clip.frames, clip.height, clip.width
    taken = most_at_once(lambda: module.encode(torch.empty(pixels, device="meta")).latent_dist.mode())
    assert need.activations == taken
    shape = wan.latent_shape(clip.width, clip.height, clip.frames)
    whole = most_at_once(lambda: module.decode(torch.empty(1, *shape, device="meta")))
    assert decoding_need(vae, shape).whole == need.weights + whole


@pytest.mark.parametrize(
    ("name", "group", "bucket"),
    [
        ("AutoencoderKLHunyuanVideo", 4, Bucket(576, 448, 45)),
        ("AutoencoderKLLTXVideo", 8, Bucket(1024, 576, 41)),
    ],
)
def test_clips_are_encoded_at_once_or_in_tiles(name: str, group: int, bucket: Bucket) -> None:
    """What is counted follows from a part of the tiles. HunyuanVideo's VAE goes through more than 16 frames in pieces
    anyway, so that nothing follows from shorter clips."""
    with torch.device("meta"):
        vae = getattr(diffusers, name)().bfloat16().eval()
    latent = 1, (bucket.frames - 1) // group + 1, 1, 1
    encoder = SimpleNamespace(
        leading=0, dtype=torch.bfloat16, feature_shapes=lambda _: {"latents": (latent, torch.bfloat16)}
    )
    pixels = partial(torch.empty, 1, 3, bucket.frames, bucket.height, bucket.width, dtype=torch.bfloat16, device="meta")

    def taken() -> int:
        return most_at_once(lambda: vae.encode(pixels()).latent_dist.mode())

    at_once = taken()
    whole, tiled = encoding_bytes(encoder, vae, bucket, 1)
    assert whole == at_once
    vae.enable_tiling()
    assert tiled == pytest.approx(taken(), rel=0.1) and tiled < 0.7 * whole


def test_wans_vae_of_patches_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration has the channels of patches; a picture has three."""
    config = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "base_dim": 8, "z_dim": 4}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan(**config, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    encoder = SimpleNamespace(
        leading=0, dtype=torch.float32, feature_shapes=lambda _: {"latents": ((4, 1, 1, 1), torch.float32)}
    )
    monkeypatch.setattr(phases, "LITTLE", 0)
    whole, tiled = encoding_bytes(encoder, vae, Bucket(64, 64, 1), 1)
    assert whole == most_at_once(lambda: vae.encode(torch.empty(1, 3, 1, 64, 64, device="meta")).latent_dist.mode())
    assert tiled is not None


def test_an_encoder_is_told_with_what_it_takes_in_tiles() -> None:
    need = Need("vae", GIB, 8 * GIB, 2 * GIB)
    assert need.least == 3 * GIB and str(need) == "vae 9.00 at once, 3.00 in tiles, if there is no room for that"
    assert str(Need("vae", GIB, GIB, 2 * GIB)) == "vae 2.00"


def test_fluxs_vae_at_full_size() -> None:
    """At 1024 x 1024 in bfloat16 the last level of the decoder has 256 channels: half a GiB for a picture. At the
    peak there are three of them, the input of a block, and two on the way through it."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, **blocks)
        vae, latent = vae.bfloat16().eval(), torch.empty(1, 16, 128, 128, dtype=torch.bfloat16)
    assert most_at_once(lambda: vae.decode(latent)) == pytest.approx(3 * 256 * 1024**2 * 2, rel=0.02)


def planner_of(folder: Path, trained: int, evaluated: int, sampled: int, **keys: Any) -> Planner:
    """Of a tiny Flux, for pictures of these sizes."""
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    sampling = SamplingSettings(prompts=["a"], width=sampled, height=sampled)
    settings = settings_of(flux, LoraSettings(type="lora", rank=2), sampling=sampling, **keys)
    staged = partition(flux, settings, flux.weights.build_empty())
    sizes = {Bucket(trained, trained, 1): 1}, 1, [Bucket(evaluated, evaluated, 1)]
    return Planner(settings, flux, staged, flux.encoders(), *sizes)


def test_every_phase_is_told_with_its_peak_and_which_decides(folder: Path) -> None:
    sizes = {"training": (512, 64, 64), "evaluation": (64, 512, 64), "sampling": (64, 64, 512)}
    for phase, chosen in sizes.items():
        planner = planner_of(folder, *chosen, eval_micro_batch_size_per_gpu=4)
        told = planner.text(planner.settings).splitlines()
        assert [line.split(":")[0].strip() for line in told[2:6]] == ["caching", "training", "evaluation", "sampling"]
        assert "vae" in told[2] and "t5" in told[2] and "decodes at once" in told[5]
        (plan,) = planner.plans(planner.settings, [0])
        if phase == "training":
            assert plan.total == plan.training > max(plan.evaluation, plan.sampling)
        else:
            assert plan.total == getattr(plan, phase) > plan.training
    assert planner.text(planner.settings).endswith("takes most")


def test_a_forward_pass_takes_what_is_counted(folder: Path) -> None:
    planner = planner_of(folder, 64, 256, 256)
    (plan,) = planner.plans(planner.settings, [0])
    counted = plan.evaluation - plan.weights - plan.between
    flux, staged = tiny_flux.pipeline(folder, dtype="bfloat16"), planner.staged
    staged.denoiser.to_empty(device="cpu")
    shapes = tiny_flux.features((512,))
    first = flux.prepare_inputs(
        {name: torch.zeros(1, *encoder_shape(planner, name)) for name in shapes},
        torch.zeros(1, *flux.latent_shape(256, 256, 1)),
        torch.zeros(1),
    )

    def run() -> None:
        stream = type(first)(*(None if field is None else field.clone() for field in first))
        for layer in staged.layers:
            stream = layer(stream)

    assert counted == pytest.approx(really_taken(run), rel=0.1)


def encoder_shape(planner: Planner, name: str) -> tuple[int, ...]:
    bucket = Bucket(256, 256, 1)
    shapes: dict[str, Any] = {}
    for encoder in planner._encoders:
        shapes |= encoder.feature_shapes(bucket)
    return shapes[name][0]


def test_auto_looks_at_all_phases(folder: Path) -> None:
    """Evaluation of large pictures takes more than training on small ones, and decides how many blocks are swapped."""
    auto = {"activation_checkpointing": False, "blocks_to_swap": "auto", "eval_micro_batch_size_per_gpu": 4}
    small, large = (planner_of(folder, 64, size, 64, **auto) for size in (64, 512))
    (plain,) = large.plans(large.settings, [0])
    assert plain.evaluation > plain.training
    memory = (plain.total - 1 + MARGIN * GIB) / (1 - SHARE)
    assert fit(small, memory).blocks_to_swap == 0
    assert fit(large, memory).blocks_to_swap > 0
