"""Qwen-Image where it is special: the Edit models, the files of ComfyUI, and what is told of other models' files.

Shapes: B batch, L text tokens, D features, C channels, F frames, H W pixels, h w latent cells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.assembly.exports import export_plan
from models.assembly.stage import StagedModel, load_stage
from models.base import BasePipeline
from models.foundation.encoders.qwen_vl import size_of_area
from models.qwen_image import TIMESTEP_ZERO
from tests.models import tiny_qwen_image as tiny
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from tests.runs import launch, metrics, only_run
from tests.utils.run.test_goes_on import run_here
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.writing import tensor_to_image
from utils.quantised.linear import QuantisedLinear
from utils.ranks import Ranks
from utils.run.export import export

CPU = torch.device("cpu")
FOLDERS: dict[str, tuple[type, dict[str, Any], int]] = {
    "edit": (QwenImageEditPipeline, {}, 1),
    "2509": (QwenImageEditPlusPipeline, {}, 3),
    "2511": (QwenImageEditPlusPipeline, {"zero_cond_t": True}, 2),
}
"""The stock pipeline, what its transformer differs in, and how many control images are tried."""


class Processor(Qwen2VLProcessor):
    """The stock processor without its part for clips, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """There is none."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: tiny.write_folder(tmp_path_factory.mktemp(name), stock, **changes)
        for name, (stock, changes, _) in FOLDERS.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("qwen_image"))


def loaded(pipeline: BasePipeline) -> StagedModel:
    return load_stage(pipeline, settings_of(pipeline), stage=0)


def stock_of(folder: Path, stock: type) -> Any:
    """The stock Edit pipeline, its text encoder told which tokens are of pictures: without that, transformers since
    version 5 counts their places like words, and no longer by rows and columns as the model was trained."""
    parts = tiny.STOCK.from_pretrained(folder).components
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    made = stock(**parts, processor=Processor(images, parts["tokenizer"], None))
    made.set_progress_bar_config(disable=True)

    def with_types(_: Any, arguments: tuple, named: dict[str, Any]) -> tuple:
        types = named["input_ids"] == parts["text_encoder"].config.image_token_id
        return arguments, {**named, "mm_token_type_ids": types.int()}

    parts["text_encoder"].register_forward_pre_hook(with_types, with_kwargs=True)
    return made


def picture(*name: Any, batch: int = 1, height: int = 64, width: int = 64) -> torch.Tensor:
    """Pixels (B, 3, 1, H, W) that a file of 256 levels holds exactly."""
    return (normal((batch, 3, 1, height, width), 0, *name) * 64 + 128).round().clamp(0, 255) / 127.5 - 1


def features_with_controls(pipeline: BasePipeline, controls: int) -> dict[str, torch.Tensor]:
    """Control images of sizes of their own."""
    names = ["control_latents", "control_2_latents", "control_3_latents"][:controls]
    shapes = [pipeline.latent_shape(48 + 16 * number, 32) for number in range(controls)]
    drawn = {name: normal((2, *shape), 0, name) for name, shape in zip(names, shapes, strict=True)}
    return {**tiny.features((5, 11)), **drawn}


@pytest.mark.parametrize("name", FOLDERS)
def test_layers_with_control_images_equal_the_whole_module(folders: dict[str, Path], name: str) -> None:
    pipeline = tiny.pipeline(folders[name])
    pipeline.check()
    features = features_with_controls(pipeline, FOLDERS[name][2])
    shape = (2, *pipeline.latent_shape(64, 32))
    x_t, weights, t_B = normal(shape, 0, "x"), normal(shape, 0, "loss"), torch.tensor([0.2513, 0.913])
    ours, reference = loaded(pipeline), loaded(pipeline).denoiser
    stream = pipeline.prepare_inputs(features, x_t, t_B)
    for layer in ours.layers:
        stream = layer(stream)
    (stream * weights).sum().backward()
    expected = tiny.whole(reference, pipeline, features, x_t, t_B)
    (expected * weights).sum().backward()
    assert torch.equal(stream, expected)
    alone = tiny.whole(reference, pipeline, tiny.features((5, 11)), x_t, t_B)
    assert (alone - expected).abs().mean() > 1e-3
    for (parameter_name, parameter), other in zip(
        reference.named_parameters(), ours.denoiser.parameters(), strict=True
    ):
        if parameter.grad is None or not parameter.grad.any():
            assert other.grad is None or not other.grad.any(), parameter_name
        else:
            assert torch.equal(other.grad, parameter.grad), parameter_name


def losses(ranks: Ranks, folder: Path, stages: int) -> list[float]:
    """Job of a rank: losses and gradient norms of a model to which control images are free of noise."""
    from utils.diffusion.losses import Labels
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    ranks = ranks.with_stages(stages)
    pipeline = tiny.pipeline(folder)
    staged = load_stage(pipeline, settings_of(pipeline, pipeline_stages=stages), ranks.stage)
    layers, bounds = staged.layers, staged.bounds
    module = DenoiserPipeline(layers, bounds, pipeline.stream_type, pipeline.maths.loss, recompute=stages > 1)
    trained = list(staged.trained(staged.stage_layers(ranks.stage)).values())
    engine = Engine(module, torch.optim.AdamW(trained, lr=1e-2), accumulation=2, clip_norm=1.0)
    numbers = []
    for step in range(2):
        shape = (2, *pipeline.latent_shape(64, 32))
        batches = []
        for controls in (0, 2):
            x_t, target = normal(shape, step, "x", controls), normal(shape, step, "target", controls)
            features = features_with_controls(pipeline, controls)
            inputs = pipeline.prepare_inputs(features, x_t, torch.tensor([0.2, 0.9]))
            batches.append((inputs, Labels(target, torch.ones(2, 1, 1, 1, 1))))
        result = engine.train_step(batches, step)
        numbers += [result.loss, result.grad_norm]
    return numbers


def test_control_images_cross_stages(folders: dict[str, Path]) -> None:
    (reference,) = run_ranks(losses, 1, folders["2511"], 1)
    for stages in (2, 3):
        for numbers in run_ranks(losses, stages, folders["2511"], stages):
            assert numbers == pytest.approx(reference, rel=2e-5), stages


def test_a_sample_of_a_padded_batch_gives_what_it_gives_alone(folder: Path) -> None:
    pipeline = tiny.pipeline(folder)
    layers, features = loaded(pipeline).layers, tiny.features((5, 11))
    x_t, t_B = normal((2, *pipeline.latent_shape(64, 32)), 0, "x"), torch.tensor([0.2513, 0.913])

    def predicted(features: dict[str, torch.Tensor], rows: slice) -> torch.Tensor:
        stream = pipeline.prepare_inputs(features, x_t[rows], t_B[rows])
        assert (stream.text_mask_BL is None) == bool(features["qwen2_5_vl_mask"].all())
        for layer in layers:
            stream = layer(stream)
        return stream

    alone = predicted({name: feature[:1, :5] for name, feature in features.items()}, slice(0, 1))
    torch.testing.assert_close(predicted(features, slice(0, 2))[:1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_captions_with_pictures_may_be_read_in_8_bits(folders: dict[str, Path]) -> None:
    made = []
    for keys in ({}, {"text_encoder_dtype": "int8"}):
        encoder = tiny.pipeline(folders["2509"], **keys).encoders(1)[1]
        encoder.area = 64 * 64
        encoder.load(CPU)
        made.append(encoder.encode(caption=["make it night"], control=picture("control", height=32)))
    whole, near = (features["qwen2_5_vl"][0] for features in made)
    assert {type(block.attn.qkv) for block in encoder.model.visual.blocks} == {QuantisedLinear}
    assert 0 < (whole - near).norm() < 0.03 * whole.norm()


@torch.no_grad()
@pytest.mark.parametrize(("name", "area"), [("edit", 64 * 64), ("2509", 384 * 384)])
def test_captions_with_pictures_are_those_of_the_stock_pipeline(folders: dict[str, Path], name: str, area: int) -> None:
    """The first Edit model sees its picture at 1024 x 1024, which would take long here."""
    stock_class, _, controls = FOLDERS[name]
    captions = ["make it night", "", "swap the motorcycles of the two " * 20]
    encoder = tiny.pipeline(folders[name]).encoders(controls)[1]
    assert encoder.area == {"edit": 1024 * 1024, "2509": 384 * 384}[name]
    encoder.area = area
    encoder.load(CPU)
    inputs = {input_name: picture(input_name, batch=3, height=32) for input_name in encoder.reads[1:]}
    made = encoder.encode(caption=captions, **inputs)
    assert len(encoder.reads) == 1 + controls
    stock = stock_of(folders[name], stock_class)
    for index, caption in enumerate(captions):
        pictures = [tensor_to_image(pixels_BCFHW[index]) for pixels_BCFHW in inputs.values()]
        pictures = [picture.resize(size_of_area(area, 64, 32), 1) for picture in pictures]
        (text_LD,), mask = stock.encode_prompt([caption], pictures, "cpu")
        assert mask is None
        torch.testing.assert_close(made["qwen2_5_vl"][index], text_LD, rtol=1e-4, atol=1e-5)
        assert len(made["qwen2_5_vl_mask"][index]) == len(text_LD)


@torch.no_grad()
@pytest.mark.parametrize("name", ["2509", "2511"])
def test_an_edit_is_asked_for_as_in_the_stock_pipeline(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From two pictures and a caption to the first prediction; the area that pictures have in the VAE is made small."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    stock = stock_of(folders[name], QwenImageEditPlusPipeline)
    seen: dict[str, torch.Tensor] = {}

    def listen(_: Any, arguments: tuple, named: dict[str, Any], output: tuple) -> None:
        seen.setdefault("prediction", output[0][:, : 2 * 4])
        seen.setdefault("timestep", named["timestep"])

    stock.transformer.register_forward_hook(listen, with_kwargs=True)
    controls = {input_name: picture(input_name) for input_name in ("control", "control_2")}
    caption, noise = "put the dog of the second on the first", normal((1, tiny.CHANNELS, 1, 4, 8), 0, "noise")
    pictures = [tensor_to_image(pixels_BCFHW[0]) for pixels_BCFHW in controls.values()]
    packed = stock._pack_latents(noise, 1, tiny.CHANNELS, 4, 8)
    keys = {"num_inference_steps": 2, "latents": packed, "true_cfg_scale": 1.0, "output_type": "latent"}
    stock(pictures, caption, width=64, height=32, **keys)

    pipeline = tiny.pipeline(folders[name])
    features: dict[str, torch.Tensor] = {}
    for encoder in pipeline.encoders(2)[1:]:
        encoder.load(CPU)
        reads = {input_name: controls.get(input_name, [caption]) for input_name in encoder.reads}
        features |= {feature: made[0][None] for feature, made in encoder.encode(**reads).items()}
    stream = pipeline.prepare_inputs(features, noise, seen["timestep"])
    for layer in loaded(pipeline).layers:
        stream = layer.eval()(stream)
    expected = stock._unpack_latents(seen["prediction"], 32, 64, 8)
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"variant": "edit"}, {"variant": "image"}])
def test_the_variant_is_that_of_the_folder_unless_said(folders: dict[str, Path], options: dict[str, str]) -> None:
    controls = {None: 3, "edit": 1, "image": 0}[options.get("variant")]
    pipeline = tiny.pipeline(folders["2509"], **options)
    assert pipeline.max_controls == controls
    with pytest.raises(UserError, match=f"takes {controls or 'no'} control images"):
        pipeline.encoders_for(controls + 1)


@pytest.mark.parametrize("head", [True, False])
def test_a_file_of_the_text_encoder_is_read(folder: Path, tmp_path: Path, head: bool) -> None:
    """ComfyUI's has the names of the first release, in which nothing is called `language_model`."""
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if head or not name.startswith("lm_head")}
    assert {"model.layers.0.self_attn.q_proj.weight", "visual.patch_embed.proj.weight"} <= tensors.keys()
    save_file(tensors, tmp_path / "qwen.safetensors")
    given = [{"type": "qwen2_5_vl", "path": tmp_path / "qwen.safetensors"}]
    made = []
    for options in ({}, {"text_encoders": given}):
        encoder = tiny.pipeline(folder, **options).encoders()[1]
        encoder.check()
        encoder.load(CPU)
        made.append(encoder.encode(caption=["a hiker"])["qwen2_5_vl"][0])
    assert torch.equal(*made)


def test_a_lora_in_comfyuis_names_is_read_by_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    pipeline, adapter = tiny.pipeline(folder), LoraSettings(type="lora", rank=4, alpha=2.0)
    settings = settings_of(pipeline, adapter, save_format="both")
    staged = load_stage(pipeline, settings, stage=0)
    parameters = staged.trained(staged.layers)
    for name, parameter in parameters.items():
        parameter.data += normal(tuple(parameter.shape), 0, "moved", name)
    export(tmp_path, Ranks(), parameters, export_plan(pipeline, settings, staged), step=1)
    results = []
    for file in ("adapter_model.safetensors", "adapter_model_comfyui.safetensors"):
        stock = tiny.STOCK.from_pretrained(folder)
        stock.load_lora_weights(tmp_path, weight_name=file)
        x_t = normal((1, *pipeline.latent_shape(64, 32)), 0, "x")
        features = tiny.features((5,))
        with torch.no_grad():
            results.append(tiny.whole(stock.transformer, pipeline, features, x_t, torch.tensor([0.3])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_comfyui_knows_2511_by_what_is_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, marked in (("2509", False), ("2511", True)):
        pipeline = tiny.pipeline(folders[name])
        settings = settings_of(pipeline, save_format="comfyui")
        staged = load_stage(pipeline, settings, stage=0)
        plan = export_plan(pipeline, settings, staged)
        export(tmp_path / name, Ranks(), staged.trained(staged.layers), plan, step=1)
        file = tmp_path / name / "model_comfyui.safetensors"
        assert (TIMESTEP_ZERO in load_file(file)) == marked
        tiny.pipeline(folders[name], transformer_path=file).check()
    with pytest.raises(UserError, match="give the folder of 2511"):
        tiny.pipeline(folders["2509"], transformer_path=file).check()


def without_processor(folder: Path) -> None:
    shutil.rmtree(folder / "processor")


def of_another_width(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "joint_attention_dim": 3584}))


def without_picture_token(folder: Path) -> None:
    for file in (folder / "tokenizer").glob("*.json"):
        file.write_text(file.read_text().replace("<|image_pad|>", "<|other|>"))


MISTAKES: dict[str, tuple[type, dict[str, Any], Callable[[Path], None] | None, str]] = {
    "layered": (QwenImageLayeredPipeline, {"use_layer3d_rope": True, "use_additional_t_cond": True}, None, "Layered"),
    "no processor": (QwenImageEditPipeline, {}, without_processor, "they lie in the folder of an Edit model"),
    "other words": (QwenImageEditPipeline, {}, without_picture_token, r"another <\|image_pad\|> than the encoder"),
    "other text": (tiny.STOCK, {}, of_another_width, "`joint_attention_dim` 3584, where .* make 16"),
    "other latents": (tiny.STOCK, {"in_channels": 64}, None, "`in_channels` 64, where .* make 16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_told(tmp_path: Path, mistake: str) -> None:
    stock, changes, spoil, told = MISTAKES[mistake]
    folder = tiny.write_folder(tmp_path, stock, **changes)
    if spoil:
        spoil(folder)
    with pytest.raises(UserError, match=told):
        tiny.pipeline(folder).check()


def test_an_edit_model_without_control_images_is_warned_of(
    folders: dict[str, Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.pipeline(folder).encoders_for(0)
    tiny.pipeline(folders["edit"]).encoders_for(1)
    assert not caplog.messages
    tiny.pipeline(folders["edit"]).encoders_for(0)
    assert "no [[directory]] has a control_path" in caplog.text


def test_an_edit_model_trains_on_pairs(
    folders: dict[str, Path], write_config: Callable[..., Path], pictures: Path
) -> None:
    """On two stages, with samples; a prompt without its pictures is refused."""
    options = tiny.pipeline(folders["2511"]).options.model_dump(mode="json", exclude_unset=True)
    pairs = {"directory": [{"path": str(pictures), "control_path": [str(pictures)] * 2, "control_resolution": 32}]}
    keys = {"data": pairs, "model": options, "max_steps": 8, "lr_scheduler": "constant"}
    asked = {"prompts": ["a red picture"], "sample_every_n_steps": 8, **tiny.SAMPLING}
    refusals = {
        "gives 0 per prompt, and the data has 2 per sample": {"sampling": asked},
        "reads control images with a caption": {"cache_text_embeddings": False},
    }
    for told, refused in refusals.items():
        with pytest.raises(UserError, match=told):
            run_here(write_config(**keys, **refused))
    data = write_config(**keys).with_name("data.toml")
    seen = data.rename(data.with_name("seen.toml"))
    evaluation = {"eval_every_n_steps": 8, "eval_datasets": [{"name": "seen", "config": str(seen)}]}
    shown = {**asked, "control_images": [[str(pictures / "0.png"), str(pictures / "1.png")]]}
    config = write_config(**keys, **evaluation, pipeline_stages=2, sampling=shown)
    codes, log = launch(config, processes=2)
    assert codes == [0, 0], log
    losses = metrics(only_run(config), "seen/loss")
    assert losses[8] < losses[0]
    assert (only_run(config) / "samples" / "step000008" / "00_a_red_picture.png").exists()
