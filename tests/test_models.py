"""What holds for every model and its variants: it is the stock module in layers, fed and read as the stock pipeline
does; it trains alike at any number of stages, recomputed or not; and what it exports is loaded by others and by itself.

Shapes: B batch; latents (B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import models
from models.assembly.exports import export_plan
from models.assembly.prompts import prompt_encoders
from models.assembly.stage import StagedModel, load_stage
from models.base import BasePipeline
from models.foundation.encoders.vae import distribution_of
from tests.models.attention_masks import Masks
from tests.models.batches import Batch, batch_of, micro_batches, sizes_of
from tests.models.drawn_samples import draw_samples, sampling_of
from tests.models.tiny_folder import MASKED, VARIANTS, encoded, settings_of, tiny
from tests.processes import run_ranks
from tests.runs import COLOURS, launch, metrics, only_run
from utils.adapters.lora import LoraSettings
from utils.diffusion.auxiliary import Output
from utils.diffusion.seeds import normal
from utils.parallel.attention import set_kernels
from utils.parallel.homes import BlockHomes
from utils.parallel.partition import repeated_blocks
from utils.parallel.recompute import run_layer
from utils.parallel.swap import BlockSwap
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

STEPS, STAGES = 2, 3
LEARNING_RATE, CLIP_NORM = 1e-2, 1.0
RANKS = (None, 4)
"""A model is trained in full, and as a LoRA of a rank."""
TRAINED, DRAWN = "test_stages_and_recomputing_change_nothing", "test_samples_are_those_of_the_stock_pipeline"
"""The tests of what several processes make of a model, which are started once for both."""
GONE_ON = ("anima", "flux3", "hidream", "ltx2", "sdxl", "wan")
"""Types whose runs draw samples and are gone on with: ensembles, losses of layers, parts that are not loaded, clips,
and a plain one. All share the code of checkpoints and of pictures, and of every type it is tested that adapters and
weights are read again, and that samples are those of the stock pipeline."""
CAPTIONS = ["a hiker on a ridge", "", "two motorcycles and a dog " * 20]
LORA_FILE, LORA_COMFYUI, DENOISER_COMFYUI = (
    "adapter_model.safetensors",
    "adapter_model_comfyui.safetensors",
    "model_comfyui.safetensors",
)


class Model(NamedTuple):
    """A model's type or variant, its tiny folder, and the module that knows how the stock library uses it."""

    name: str
    folder: Path
    tiny: ModuleType

    def pipeline(self, **options: Any) -> BasePipeline:
        return self.tiny.pipeline(self.folder, **options)

    def stock(self) -> Any:
        stock = self.tiny.STOCK.from_pretrained(self.folder)
        stock.set_progress_bar_config(disable=True)
        return stock


@lru_cache(maxsize=1)
def stock_of(model: Model) -> Any:
    """The stock pipeline, for tests that leave it as it is."""
    return model.stock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test is made for every type, and for the variants of which it shows something."""
    variants = [name for name, tests in VARIANTS.items() if metafunc.function.__name__ in tests]
    metafunc.parametrize("model", [*models.available(), *variants], indirect=True, scope="module")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    module = tiny(request.param)
    return Model(request.param, module.write_folder(tmp_path_factory.mktemp(request.param)), module)


def loaded(pipeline: BasePipeline, adapter: AdapterSettings | None = None) -> StagedModel:
    """The denoiser with its weights, in layers."""
    return load_stage(pipeline, settings_of(pipeline, adapter), stage=0)


def output(pipeline: BasePipeline, layers: list[nn.Module], batch: Batch) -> torch.Tensor:
    """What the layers in a row give in evaluation."""
    stream = pipeline.prepare_inputs(batch.features, batch.x_t, batch.t_B)
    for layer in layers:
        stream = layer.eval()(stream)
    return stream


def test_no_mask_meets_cudnns_attention(model: Model) -> None:
    pipeline = model.pipeline()
    batch = batch_of(model, pipeline, sizes_of(model)[0])
    stream = pipeline.prepare_inputs(batch.features, batch.x_t, batch.t_B)
    set_kernels()
    with torch.no_grad(), Masks() as masks:
        for layer in loaded(pipeline).layers:
            stream = run_layer(layer.eval(), stream)
    assert True not in masks.allowed
    assert masks.allowed or model.name not in MASKED


@pytest.mark.parametrize("number", range(2))
def test_layers_equal_the_whole_module(model: Model, number: int) -> None:
    pipeline = model.pipeline()
    pipeline.check()
    batch = batch_of(model, pipeline, sizes_of(model)[number])
    staged = loaded(pipeline)
    result = output(pipeline, staged.layers, batch)
    weights = normal(tuple(result.shape), 0, "loss")
    (result * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in staged.denoiser.named_parameters()}

    reference = staged.denoiser.eval()
    reference.zero_grad()
    expected = model.tiny.whole(reference, pipeline, batch.features, batch.x_t, batch.t_B)
    (expected * weights).sum().backward()
    rounded = getattr(model.tiny, "ROUNDED_OTHERWISE", False)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 if rounded else 0)
    for name, parameter in reference.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            assert gradients[name] is None or not gradients[name].any(), name
        elif rounded or name.startswith(getattr(model.tiny, "SUMMED_OTHERWISE", ())):
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(gradients[name], parameter.grad), name


def test_layers_hold_every_parameter_once(model: Model) -> None:
    pipeline = model.pipeline()
    denoiser = pipeline.weights.build()
    held = [id(p) for layer in pipeline.to_layers(denoiser) for p in layer.parameters()]
    assert sorted(held) == sorted(id(p) for p in denoiser.parameters())


@torch.no_grad()
def test_text_is_that_of_the_stock_pipeline(model: Model) -> None:
    made: dict[str, Any] = {}
    for encoder in prompt_encoders(model.pipeline().encoders()):
        made |= encoded(encoder, CAPTIONS)
    expected = model.tiny.prompt_features(stock_of(model), list(CAPTIONS))
    for number, features in enumerate(expected):
        assert features.keys() == made.keys()
        for name, feature in features.items():
            torch.testing.assert_close(made[name][number], feature, rtol=1e-4, atol=1e-5, check_dtype=False)


@torch.no_grad()
def test_latents_are_those_of_the_stock_pipeline(model: Model) -> None:
    pipeline = model.pipeline(latents="mode")
    autoencoder = pipeline.encoders()[0]
    autoencoder.load(torch.device("cpu"))
    stock = stock_of(model)
    channels, pictures = getattr(model.tiny, "PIXELS", (3, 1))
    for width, height, frames in sizes_of(model):
        pixels_BCFHW = normal((2, channels, frames * pictures, height, width), 0, "pixels").clamp(-1, 1)
        latents = autoencoder.encode(pixels=pixels_BCFHW)["latents"]
        torch.testing.assert_close(latents, model.tiny.stock_latents(stock, pixels_BCFHW), rtol=1e-4, atol=1e-5)
        assert pipeline.latent_shape(width, height, frames) == tuple(latents.shape[1:])
        decoded = autoencoder.decode(latents)
        assert decoded.shape == (2, 3, frames, height, pictures * width)
        if pixels_BCFHW.shape == decoded.shape:
            # The stock VAE there and back.
            taken = pixels_BCFHW[:, :, 0] if latents.dim() == 4 else pixels_BCFHW
            expected = stock.vae.decode(distribution_of(stock.vae.encode(taken)).mode()).sample.clamp(-1, 1)
            torch.testing.assert_close(decoded, expected.view_as(decoded), rtol=0, atol=1e-3)
            assert decoded.std() > 1e-2


def test_samples_are_those_of_the_stock_pipeline(model: Model) -> None:
    """Sign and direction of time are those of the stock pipeline, or the first step would already differ."""
    pipeline, sampling = model.pipeline(), sampling_of(model.tiny, CAPTIONS[0])
    shape = (1, *pipeline.latent_shape(sampling.width, sampling.height, sampling.frames))
    noise = normal(shape, 7, "sample", 0)
    expected = model.tiny.draw(stock_of(model), sampling, noise)
    assert (expected - noise).abs().mean() > 0.1
    for made in made_by_stages(model):
        (latents,) = made.drawn
        torch.testing.assert_close(torch.from_numpy(latents), expected, rtol=1e-4, atol=1e-4)


def moved(model: Model, place: Path, adapter: AdapterSettings | None, save_format: str) -> StagedModel:
    """What is exported into `place`: weights that training has moved."""
    pipeline = model.pipeline()
    settings = settings_of(pipeline, adapter, save_format=save_format)
    staged = load_stage(pipeline, settings, stage=0)
    parameters = staged.trained(staged.layers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.1)
    export(place, Ranks(), parameters, export_plan(pipeline, settings, staged), step=7)
    return staged


def load_by_peft(denoiser: nn.Module, folder: Path, prefix: str) -> None:
    """For models that diffusers loads no adapters into."""
    factors = {name.removeprefix(prefix): factor for name, factor in load_file(folder / LORA_FILE).items()}
    inject_adapter_in_model(LoraConfig.from_pretrained(folder), denoiser)
    assert not set_peft_model_state_dict(denoiser, factors).unexpected_keys


@torch.no_grad()
def test_an_adapter_is_loaded_by_the_stock_pipeline_and_gone_on_from(model: Model, tmp_path: Path) -> None:
    pipeline, adapter = model.pipeline(), LoraSettings(type="lora", rank=4, alpha=2.0)
    batch = batch_of(model, pipeline, sizes_of(model)[0])
    save_format = "both" if pipeline.original_layout else "diffusers"
    expected = output(pipeline, moved(model, tmp_path / "out", adapter, save_format).layers, batch)
    plain = output(pipeline, loaded(pipeline).layers, batch)
    assert (expected - plain).abs().mean() > 1e-3

    stock = model.stock()
    theirs = getattr(stock, pipeline.denoiser_folder).eval()
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(tmp_path / "out", weight_name=LORA_FILE)
    else:
        load_by_peft(theirs, tmp_path / "out", f"{pipeline.denoiser_folder}.")
    result = model.tiny.whole(theirs, pipeline, batch.features, batch.x_t, batch.t_B)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    files = [LORA_FILE, LORA_COMFYUI] if save_format == "both" else [LORA_FILE]
    for file in files:
        again = loaded(pipeline, adapter.model_copy(update={"init_from_existing": tmp_path / "out" / file}))
        torch.testing.assert_close(output(pipeline, again.layers, batch), expected, rtol=1e-4, atol=1e-5)


def test_all_weights_are_read_from_what_was_exported(model: Model, tmp_path: Path) -> None:
    pipeline = model.pipeline()
    save_format = "both" if pipeline.original_layout else "diffusers"
    written = moved(model, tmp_path, None, save_format).denoiser
    sources = [tmp_path / pipeline.denoiser_folder]
    if save_format == "both":
        sources.append(tmp_path / DENOISER_COMFYUI)
        # As ComfyUI's checkpoints have it, if what was exported is none yet.
        prefixed = {f"model.diffusion_model.{name}": t for name, t in load_file(sources[-1]).items()}
        if not any(name.startswith("model.diffusion_model.model.") for name in prefixed):
            save_file(prefixed, tmp_path / "prefixed.safetensors")
            sources.append(tmp_path / "prefixed.safetensors")
    for source in sources:
        again = loaded(model.pipeline(transformer_path=source)).denoiser
        for (name, parameter), other in zip(written.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(parameter, other), (source.name, name)


def adapter_of(rank: int | None) -> AdapterSettings | None:
    return LoraSettings(type="lora", rank=rank) if rank else None


class Made(NamedTuple):
    """What a rank, which is a stage, makes of a model.

    Attributes:
        trained: what `steps_of` gives, in full and as a LoRA, with blocks that are recomputed.
        drawn: the latents of each sample.
    """

    trained: list[list[float]]
    drawn: list[np.ndarray]


@lru_cache(maxsize=1)
def made_by_stages(model: Model) -> list[Made]:
    """What each stage makes of what the tests of this model or variant ask for."""
    return run_ranks(make, STAGES, model.name, model.folder, VARIANTS.get(model.name, (TRAINED, DRAWN)))


def make(ranks: Ranks, name: str, folder: Path, wanted: Collection[str]) -> Made:
    """Job of a rank."""
    from utils.parallel.backend import initialize_deepspeed

    initialize_deepspeed()
    ranks, model = ranks.with_stages(ranks.world_size), Model(name, folder, tiny(name))
    trained = [steps_of(ranks, model, rank) for rank in RANKS if TRAINED in wanted]
    if DRAWN not in wanted:
        return Made(trained, [])
    cache = folder.with_name(f"{folder.name}_cache")
    sampling = sampling_of(model.tiny, CAPTIONS[0])
    return Made(trained, draw_samples(ranks, model.tiny.pipeline, folder, cache, ranks.stages, sampling))


def steps_of(ranks: Ranks, model: Model, rank: int | None) -> list[float]:
    """Losses and gradient norms of some steps."""
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    pipeline = model.pipeline()
    cut = {"pipeline_stages": ranks.stages, **getattr(model.tiny, "CUT", {})}
    staged = load_stage(pipeline, settings_of(pipeline, adapter_of(rank), **cut), ranks.stage)
    module = DenoiserPipeline(staged.layers, staged.bounds, pipeline.stream_type, pipeline.maths.loss, recompute=True)
    trained = list(staged.trained(staged.stage_layers(ranks.stage)).values())
    engine = Engine(module, torch.optim.AdamW(trained, lr=LEARNING_RATE), accumulation=2, clip_norm=CLIP_NORM)
    results = [engine.train_step(micro_batches(model, pipeline, step), step) for step in range(STEPS)]
    return [number for result in results for number in (result.loss, result.grad_norm)]


@lru_cache(maxsize=len(RANKS))
def reference_of(model: Model, rank: int | None) -> list[float]:
    """What both of the following tests compare with."""
    return train_plainly(model, rank)


def train_plainly(model: Model, rank: int | None, *, swapped: bool = False) -> list[float]:
    """The same in this process: no engine, the layers in a row. With `swapped`, all blocks share the room of two."""
    pipeline = model.pipeline()
    staged = load_stage(pipeline, settings_of(pipeline, adapter_of(rank)), stage=0)
    count = len(repeated_blocks(staged.layers)) if swapped else 0
    swap = BlockSwap(BlockHomes(staged.layers, count).filled())
    swap.start(torch.device("cpu"))
    trained = list(staged.trained(staged.layers).values())
    optimizer, numbers = torch.optim.AdamW(trained, lr=LEARNING_RATE), []
    for step in range(STEPS):
        losses = []
        for stream, labels in micro_batches(model, pipeline, step):
            with swap.forward_pass():
                for position, layer in enumerate(staged.layers):
                    run = partial(run_layer, stream=stream)
                    stream = swap.run(position, layer.train(), run, recomputed=False)
            prediction, terms = stream if isinstance(stream, Output) else (stream, torch.zeros(1))
            losses.append(pipeline.maths.loss(prediction, labels).mean() / 2)
            (losses[-1] + terms.sum() / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        numbers += [sum(losses).item(), norm.item()]
    return numbers


def test_stages_and_recomputing_change_nothing(model: Model) -> None:
    for made in made_by_stages(model):
        for numbers, rank in zip(made.trained, RANKS, strict=True):
            reference = reference_of(model, rank)
            assert len({round(one, 5) for one in reference}) == 2 * STEPS, "a model that learns nothing shows nothing"
            assert numbers == pytest.approx(reference, rel=2e-5), "in full" if rank is None else "as a LoRA"


def test_swapping_blocks_changes_no_bit(model: Model) -> None:
    assert train_plainly(model, RANKS[-1], swapped=True) == reference_of(model, RANKS[-1])


def test_a_folder_of_pictures_trains(model: Model, write_config: Callable[..., Path], pictures: Path) -> None:
    """Plan, cache and evaluation on two stages; for some types samples too, and going on where both are one. All that
    is evaluated has one shape, and is one micro-batch."""
    data = getattr(model.tiny, "dataset_of", lambda pictures: {})(pictures)
    config = write_config(data={**data, "enable_ar_bucket": False})
    seen = config.with_name("data.toml").rename(config.with_name("seen.toml"))
    keys = {
        "data": data,
        "model": model.pipeline().options.model_dump(mode="json", exclude_unset=True),
        "eval_datasets": [{"name": "seen", "config": str(seen)}],
        "eval_every_n_steps": 3,
        "eval_quantiles": [0.25, 0.75],
        "eval_micro_batch_size_per_gpu": len(COLOURS),
        "checkpoint_every_n_steps": 3,
        "adapter": {"type": "lora", "rank": 4},
        "lr_scheduler": "constant",
        **getattr(model.tiny, "CUT", {}),
    }
    if model.name in GONE_ON:
        keys["sampling"] = {"prompts": CAPTIONS[:1], "steps": 2, "sample_every_n_steps": 3, **model.tiny.SAMPLING}
    config = write_config(**keys, max_steps=3, pipeline_stages=2)
    codes, log = launch(config, processes=2)
    assert codes == [0, 0], log
    assert "estimated memory per rank" in log and "cannot be counted" not in log
    steps = 3
    if model.name in GONE_ON:
        steps = 6
        codes, log = launch(write_config(**keys, max_steps=steps, pipeline_stages=1), "--resume_from_checkpoint")
        assert codes == [0], log
        assert "encoded=0" in log
    run = only_run(config)
    assert list(metrics(run, "train/loss")) == list(range(1, steps + 1))
    losses = metrics(run, "seen/loss")
    assert list(losses) == list(range(0, steps + 1, 3)) and losses[steps] < losses[0]
    assert model.name not in GONE_ON or any((run / "samples" / f"step{steps:06}").iterdir())
    assert (run / "global_step3").is_dir()
