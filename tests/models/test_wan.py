"""Wan: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from models.assembly.sample_checks import check_sampling
from models.assembly.stage import load_stage
from models.foundation.encoders.first_frame import given_frames
from models.foundation.layers.given import loss_weights
from models.wan import WAN_LAYOUT, WanPipeline
from tests import test_models as generic
from tests.models import tiny_wan
from tests.models.drawn_samples import draw_samples
from tests.models.tiny_folder import drawn, settings_of, tiny
from tests.processes import run_ranks
from tests.runs import launch, metrics, only_run
from utils.dataset.inputs import ENDS
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image, write_clip
from utils.settings.run_tables import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.write_folder(tmp_path_factory.mktemp("wan"))


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    wan = tiny_wan.pipeline(folder)
    denoiser = load_stage(wan, settings_of(wan), stage=0).denoiser
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    original = WAN_LAYOUT.to_original(tensors)
    again = convert_wan_transformer_to_diffusers({f"model.diffusion_model.{n}": t for n, t in original.items()})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_sample_without_guidance_takes_one_prediction(folder: Path, tmp_path: Path) -> None:
    keys = {**tiny_wan.SAMPLING, "guidance": 1.0, "negative_prompt": ""}
    sampling = SamplingSettings(prompts=["a hiker"], sample_every_n_steps=1, steps=4, seed=7, **keys)
    (painted,) = run_ranks(draw_samples, 1, tiny_wan.pipeline, folder, tmp_path / "cache", 1, sampling)
    noise = normal((1, tiny_wan.CHANNELS, 3, 4, 6), 7, "sample", 0)
    expected = tiny_wan.draw(tiny_wan.STOCK.from_pretrained(folder), sampling, noise)
    torch.testing.assert_close(torch.from_numpy(painted[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["wan_i2v", "wan_i2v_blind"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> generic.Model:
    module = tiny(request.param)
    return generic.Model(request.param, module.write_folder(tmp_path_factory.mktemp(request.param)), module)


@torch.no_grad()
def test_the_first_frame_is_seen_as_the_stock_pipeline_sees_it(variant: generic.Model) -> None:
    """By the VAE, and by CLIP."""
    width, height, frames = 48, 32, 9
    pixels = normal((2, 3, frames, height, width), 0, "clip").clamp(-1, 1)
    pictures = [tensor_to_image(clip[:, :1]) for clip in pixels]
    made: dict[str, torch.Tensor] = {}
    for encoder in variant.pipeline().encoders()[2:]:
        encoder.load(torch.device("cpu"))
        made |= encoder.encode(pixels=pixels)
    stock, noise = variant.stock(), torch.zeros(2, tiny_wan.CHANNELS, 3, 4, 6)
    how = {"height": height, "width": width, "num_frames": frames, "latents": noise, "dtype": torch.float32}
    # Stock gives each picture to all samples of a batch.
    expected = [
        stock.prepare_latents(clip[None, :, 0], 1, tiny_wan.CHANNELS, device="cpu", **how)[1] for clip in pixels
    ]
    torch.testing.assert_close(made["first_frame_latents"], torch.cat(expected)[:, 4:], rtol=1e-4, atol=1e-5)
    assert torch.equal(given_frames(noise[:1], 4), expected[0][:, :4])
    if stock.image_encoder is not None:
        torch.testing.assert_close(made["clip_vision"], stock.encode_image(pictures, "cpu"), rtol=1e-4, atol=1e-5)
    else:
        assert "clip_vision" not in made


@pytest.fixture(scope="module", params=["wan_flf", "wan_i2v_blind"])
def between(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> generic.Model:
    """Of a first and a last frame: in 2.1 a model of its own, in 2.2 the same as of a first frame alone."""
    module = tiny(request.param)
    return generic.Model(request.param, module.write_folder(tmp_path_factory.mktemp(request.param)), module)


def between_options(between: generic.Model) -> dict[str, bool]:
    return {"to_last_frame": True} if between.name == "wan_i2v_blind" else {}


@torch.no_grad()
def test_first_and_last_frame_are_seen_as_the_stock_pipeline_sees_them(between: generic.Model) -> None:
    height, width, frames = 32, 48, 9
    wan, pixels = between.pipeline(**between_options(between)), normal((2, 3, frames, height, width), 0, "clip")
    wan.check()
    pixels, made = pixels.clamp(-1, 1), {}
    for encoder in wan.encoders()[2:]:
        encoder.load(torch.device("cpu"))
        made |= encoder.encode(**{name: pixels for name in encoder.reads})
    assert wan.starts_from_picture and wan.ends_in_picture and all(e.reads == (ENDS,) for e in wan.encoders()[2:])
    stock, noise = between.stock(), torch.zeros(2, tiny_wan.CHANNELS, 3, 4, 6)
    how = {"height": height, "width": width, "num_frames": frames, "latents": noise, "dtype": torch.float32}
    expected = [
        stock.prepare_latents(
            clip[None, :, 0], 1, tiny_wan.CHANNELS, device="cpu", last_image=clip[None, :, -1], **how
        )[1]
        for clip in pixels
    ]
    torch.testing.assert_close(made["first_frame_latents"], torch.cat(expected)[:, 4:], rtol=1e-4, atol=1e-5)
    assert torch.equal(given_frames(noise[:1], 4, to_last=True), expected[0][:, :4])
    if stock.image_encoder is None:
        assert "clip_vision" not in made
        return
    pictures = [tensor_to_image(clip[:, [frame]]) for clip in pixels for frame in (0, -1)]
    seen = stock.encode_image(pictures, "cpu").unflatten(0, (2, 2)).flatten(1, 2)
    torch.testing.assert_close(made["clip_vision"], seen, rtol=1e-4, atol=1e-5)


def test_samples_go_from_one_picture_to_another(between: generic.Model, tmp_path: Path) -> None:
    """The second is cropped to the clip's shape by itself."""
    last = tensor_to_image(normal((3, 1, 8, 8), 0, "last").repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1))
    last.save(tmp_path / "last.png")
    pictures = [[str(tiny("wan_i2v").PICTURE), str(tmp_path / "last.png")]]
    keys = {**tiny_wan.SAMPLING, "control_images": pictures}
    sampling = SamplingSettings(prompts=["a hiker"], sample_every_n_steps=1, steps=2, seed=7, **keys)
    wan = between.pipeline(**between_options(between))
    check_sampling(wan, sampling)
    with pytest.raises(UserError, match="from a first frame to a last: give both with each prompt"):
        check_sampling(wan, sampling.model_copy(update={"control_images": [sampling.control_images[0][:1]]}))
    pipeline_of = partial(tiny("wan_i2v").pipeline, **between_options(between))
    (painted,) = run_ranks(draw_samples, 1, pipeline_of, between.folder, tmp_path / "cache", 1, sampling)
    noise = normal((1, tiny_wan.CHANNELS, 3, 4, 6), 7, "sample", 0)
    first, last = (
        tensor_to_image(load_image(Path(file), View(sampling.width, sampling.height, "center"))) for file in pictures[0]
    )
    how = {"num_frames": sampling.frames, "max_sequence_length": 512, "image": first, "last_image": last}
    expected = drawn(between.stock(), sampling, noise, **how).frames
    torch.testing.assert_close(torch.from_numpy(painted[0]), expected, rtol=1e-4, atol=1e-4)


def write_clips(folder: Path) -> Path:
    """Three captioned clips of twelve frames."""
    folder.mkdir()
    for number in range(3):
        pixels = normal((3, 1, 8, 8), number, "clip").repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)
        write_clip(torch.cat([pixels.roll(shift, 3) for shift in range(12)], dim=1), 16, folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(f"clip number {number}")
    return folder


def test_clips_train_from_their_first_frames(
    variant: generic.Model, write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    """With samples of a picture; still pictures are refused."""
    clips = write_clips(tmp_path / "clips")
    options = variant.pipeline().options.model_dump(mode="json", exclude_unset=True)
    sampling = {"prompts": ["a clip"], "sample_every_n_steps": 10, **variant.tiny.SAMPLING, "steps": 2}
    keys = {"model": options, "sampling": sampling, "max_steps": 10, "micro_batch_size_per_gpu": 1}
    data = {"frame_buckets": [9], "directory": [{"path": str(clips)}]}
    _, log = launch(write_config(**keys, data={"directory": [{"path": str(pictures)}]}))
    assert "7 of the samples are still pictures" in log
    _, log = launch(write_config(**{**keys, "sampling": {**sampling, "frames": 1}}, data=data))
    assert "[sampling] frames: one frame is the picture itself" in log
    codes, log = launch(write_config(**keys, data=data, pipeline_stages=2), processes=2)
    assert codes == [0, 0], log
    losses = list(metrics(only_run(tmp_path / "run.toml"), "train/loss").values())
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.fixture(scope="module")
def ti2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TI2V-5B: its VAE makes patches of the pixels first."""
    changes = {"in_channels": 12, "out_channels": 12}
    vae = {**tiny_wan.VAE, "z_dim": 12, "in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
    vae |= {"scale_factor_spatial": 16, "latents_mean": [0.1] * 12, "latents_std": [1.5] * 12}
    place = tiny_wan.write_folder(tmp_path_factory.mktemp("ti2v"), vae=vae, **changes)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    return place


def test_ti2v_draws_as_the_stock_pipeline(ti2v_folder: Path, tmp_path: Path) -> None:
    model = generic.Model("wan", ti2v_folder, tiny_wan)
    model.pipeline().check()
    assert (model.pipeline().media.spatial, model.pipeline().media.fps) == (32, 24.0)
    keys = {**tiny_wan.SAMPLING, "width": 64}
    sampling = SamplingSettings(prompts=["a hiker"], sample_every_n_steps=1, steps=4, seed=7, **keys)
    (painted,) = run_ranks(draw_samples, 1, tiny_wan.pipeline, ti2v_folder, tmp_path / "cache", 1, sampling)
    noise = normal((1, 12, 3, 2, 4), 7, "sample", 0)
    expected = tiny_wan.draw(model.stock(), sampling, noise)
    torch.testing.assert_close(torch.from_numpy(painted[0]), expected, rtol=1e-4, atol=1e-4)


def test_ti2v_trains_clips_from_their_first_frames_and_pictures_from_text(
    ti2v_folder: Path, write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    """On two stages as on one: what does not count is known to the last."""
    wan = tiny_wan.pipeline(ti2v_folder, from_first_frame=True)
    clips = write_clips(tmp_path / "clips")
    data = {"frame_buckets": [9], "directory": [{"path": str(clips)}, {"path": str(pictures)}]}
    keys = {
        "model": wan.options.model_dump(mode="json", exclude_unset=True),
        "adapter": {"type": "lora", "rank": 4},
        "micro_batch_size_per_gpu": 1,
        "max_steps": 5,
    }
    losses = []
    for stages in (1, 2):
        codes, log = launch(write_config(**keys, data=data, pipeline_stages=stages), processes=stages)
        assert set(codes) == {0}, log
        run = only_run(tmp_path / "run.toml")
        losses.append(list(metrics(run, "train/loss").values()))
        shutil.rmtree(run)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("given", [False, True])
def test_ti2v_gives_each_token_its_time(ti2v_folder: Path, given: bool) -> None:
    """As the stock transformer with a time for each token, which is 0 in the first frame where that is given; that
    frame does not count."""
    wan = tiny_wan.pipeline(ti2v_folder, from_first_frame=given)
    staged = generic.loaded(wan)
    shape = (2, 12, 3, 4, 6)
    x_t, clean, weights = (normal(shape, 0, name) for name in ("x", "clean", "weights"))
    t_B = torch.tensor([0.2513, 0.913])
    given_B = torch.tensor([wan.given_frames(shape[1:], 0.0)] * 2)
    features = {**tiny_wan.features((5, 11)), "latents": clean, **({"given_frames": given_B} if given else {})}
    stream = wan.prepare_inputs(features, x_t, t_B)
    for layer in staged.layers:
        stream = layer(stream)
    assert given_B.tolist() == [given, given]
    (stream * weights * loss_weights(given_B, 3)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in staged.denoiser.named_parameters()}

    reference = generic.loaded(wan).denoiser
    seen, time_BT = x_t.clone(), (t_B * 1000)[:, None].repeat(1, 3 * 2 * 3)
    counted = torch.ones(shape)
    if given:
        seen[:, :, 0] = clean[:, :, 0]
        time_BT[:, : 2 * 3] = 0
        counted[:, :, 0], counted[:, :, 1:] = 0.0, 1.5
    missing = tiny_wan.TEXT_TOKENS - features["umt5"].shape[1]
    text_BLD = torch.nn.functional.pad(features["umt5"], (0, 0, 0, missing))
    (expected,) = reference(seen, time_BT, text_BLD, return_dict=False)
    (expected * weights * counted).sum().backward()
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({"in_channels": 9}, {}, "takes 9 channels, and the VAE makes 4; text to video takes 4, picture to video 12"),
        ({"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}, {}, "must be 512"),
        ({}, {"from_first_frame": True}, "is for TI2V-5B alone"),
        (
            {},
            {"to_last_frame": True},
            "is for picture to video of Wan 2.2 A14B; this model does not go to a last frame",
        ),
        (
            {"in_channels": 12, "pos_embed_seq_len": 10},
            {},
            "has `pos_embed_seq_len`, as Wan 2.1 for a first and a last",
        ),
        ({}, {"expert": "low"}, r"\[model\] expert: there is no .*transformer_2"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict, options: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_wan.pipeline(tiny_wan.write_folder(tmp_path, **changes), **options).check()


def test_the_image_encoder_may_lie_elsewhere(tmp_path: Path) -> None:
    i2v, file = tiny("wan_i2v"), tmp_path / "clip_vision_h.safetensors"
    for name in ("picture", "text"):
        (tmp_path / name).mkdir()
    folder = i2v.write_folder(tmp_path / "picture")
    shutil.copy(folder / "image_encoder" / "model.safetensors", file)
    pixels, made = torch.rand(1, 3, 5, 32, 32) * 2 - 1, []
    for options in ({}, {"image_encoder_path": file}):
        pipeline = i2v.pipeline(folder, **options)
        pipeline.check()
        *_, clip = pipeline.encoders()
        clip.load(torch.device("cpu"))
        made.append(clip.encode(pixels=pixels)["clip_vision"])
    assert torch.equal(*made)
    tensors = load_file(file)
    lacks = next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lacks}, file)
    for options, told in (
        ({}, "q_proj.weight' of the model is not in the file"),
        ({"image_encoder_path": tmp_path / "none"}, "there is no"),
    ):
        with pytest.raises(UserError, match=told):
            i2v.pipeline(folder, **{"image_encoder_path": file, **options}).check()
    blind = tiny_wan.write_folder(tmp_path / "text")
    with pytest.raises(UserError, match="is for models that see the first frame through an image encoder"):
        tiny_wan.pipeline(blind, image_encoder_path=file).check()


def test_the_clip_of_another_size_is_told(tmp_path: Path) -> None:
    folder = tiny("wan_flf").write_folder(tmp_path, pos_embed_seq_len=514)
    with pytest.raises(UserError, match="has places for 514 tokens of two pictures, and the image_encoder .* makes 10"):
        tiny("wan_flf").pipeline(folder).check()
    with pytest.raises(UserError, match="this model always goes to a last frame: leave it out"):
        tiny("wan_flf").pipeline(folder, to_last_frame=True).check()


def a14b(place: Path, ratio: object = 0.875, **options: object) -> WanPipeline:
    """A model of two experts, of which the index alone is there."""
    (place / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": ratio}))
    (place / "transformer_2").mkdir(exist_ok=True)
    return tiny_wan.pipeline(place, **options)


ALL, HIGH, LOW = (0.0, 1.0), (0.875, 1.0), (0.0, 0.875)
BEYOND = ": beyond that range the other expert is used, and this one trained in vain"
RANGES: dict[str, tuple[dict[str, object], tuple[float, float], str]] = {
    "high": ({}, HIGH, "high expert is trained at noise levels from 0.875 to 1; by the folder's boundary_ratio it is "),
    "low": ({"expert": "low"}, LOW, "low expert is trained at noise levels from 0 to 0.875; by the folder's"),
    "inside": ({"max_t": 0.95}, (0.875, 0.95), "from 0.875 to 0.95; by the folder's"),
    "the other side of low": ({"expert": "low", "min_t": 0.5}, (0.5, 0.875), "from 0.5 to 0.875; by the folder's"),
    "all, as asked": ({"min_t": 0.0}, ALL, f"it is used from 0.875 to 1{BEYOND}"),
    "all of low": ({"expert": "low", "max_t": 1.0}, ALL, f"it is used from 0 to 0.875{BEYOND}"),
    "the other's": ({"max_t": 0.8}, (0.0, 0.8), "from 0 to 0.8; by the folder's boundary_ratio it is used from 0.875"),
}


@pytest.mark.parametrize("case", RANGES)
def test_an_expert_is_trained_where_it_is_used(case: str, tmp_path: Path) -> None:
    options, (low, high), told = RANGES[case]
    wan = a14b(tmp_path, **options)
    sampler = wan.maths.timesteps
    drawn = [sampler.timestep(quantile / 100, 1024) for quantile in range(101)]
    assert low <= drawn[0] and drawn[-1] <= high
    assert (sampler.min_t, sampler.max_t) == (low, high)
    ((key, remark),) = wan.remarks()
    assert key == ("max_t" if wan.options.expert == "low" else "min_t") and told in remark
    assert (BEYOND in remark) == (case in ("all, as asked", "all of low", "the other's"))


@pytest.mark.parametrize("ratio", [None, 0, 1.5])
def test_a_folder_of_two_experts_without_a_boundary_is_told(ratio: object, tmp_path: Path) -> None:
    wan = a14b(tmp_path, ratio)
    assert (wan.options.min_t, wan.options.max_t) == ALL
    ((_, remark),) = wan.remarks()
    assert "from 0 to 1; from where to where it is used is not known, since model_index.json has no boundary" in remark
    (tmp_path / "transformer_2").rmdir()
    assert not list(tiny_wan.pipeline(tmp_path).remarks())


def test_a_boundary_that_is_no_number_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'`boundary_ratio` is "0.9", and a number or null is meant'):
        a14b(tmp_path, "0.9").check_folder()


def test_the_range_of_an_expert_is_in_the_log_and_in_the_record(
    folder: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    place = tmp_path / "a14b"
    place.mkdir()
    for part in folder.iterdir():
        (place / part.name).symlink_to(part)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").unlink()
    (place / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.9}))
    options = tiny_wan.pipeline(place).options.model_dump(mode="json", exclude_unset=True)
    codes, log = launch(write_config(model=options, max_steps=1))
    assert codes == [0], log
    assert "[model] min_t: the high expert is trained at noise levels from 0.9 to 1" in log
    assert tomllib.loads((only_run(tmp_path / "run.toml") / "settings.toml").read_text())["model"]["min_t"] == 0.9
