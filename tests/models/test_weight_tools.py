"""The tools for files of weights: what they write has the effect that was asked for, in the stock library, in PEFT and
by ComfyUI's names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline as StockPipeline
from diffusers import FluxTransformer2DModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.assembly.tools.__main__ import main
from models.assembly.tools.averages import weights_of_ema
from models.base import BasePipeline
from models.flux import BFL_LAYOUT
from models.foundation.checkpoints.adapter_files import read_updates
from tests.models import tiny_flux
from tests.models.test_adapter_exports import exported, merged, pipelines  # noqa: F401
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI_FILE, ModelNames
from utils.adapters.loha import LohaSettings
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings
from utils.adapters.oft import OftSettings
from utils.diffusion.seeds import normal
from utils.settings.schema import AdapterSettings

Tensors = dict[str, torch.Tensor]
ONE, OTHER = LoraSettings(type="lora", rank=4, alpha=1.5), LoraSettings(type="lora", rank=2, include=["attn.to_q"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[AdapterSettings], Path]:
    """Exports of random factors, in both layouts."""
    place, made = tmp_path_factory.mktemp("adapters"), []

    def find(adapter: AdapterSettings) -> Path:
        if adapter not in made:
            made.append(adapter)
            exported(tiny_flux.pipeline(base), place / str(len(made)), adapter, small=0.3)
        return place / str(made.index(adapter) + 1)

    return find


def names_of(base: Path) -> ModelNames:
    from models.assembly.stage import model_names

    pipeline = tiny_flux.pipeline(base)
    return model_names(pipeline, pipeline.weights.build_empty())


def weights_of(base: Path) -> Tensors:
    return load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")


def deltas(path: Path, base: Path) -> Tensors:
    """What an adapter adds to each weight."""
    weights = weights_of(base)
    return {name: update.delta(weights[name]) for name, update in read_updates(path, names_of(base)).items()}


def run(*words: Any) -> None:
    assert main([str(word) for word in words]) == 0


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=1e-4, atol=1e-5, msg=name)


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def stock_with(base: Path, folder: Path, file: str) -> Tensors:
    """The stock model's weights with a file that its own pipeline loads, and fuses."""
    stock = StockPipeline.from_pretrained(base, vae=None, text_encoder=None, text_encoder_2=None)
    stock.load_lora_weights(folder, weight_name=file)
    stock.fuse_lora()
    stock.unload_lora_weights()
    return dict(stock.transformer.state_dict())


def in_comfyui(base: Path, file: Path) -> Tensors:
    return merged(load_file(file), weights_of(base), BFL_LAYOUT, True)


def plus(weights: Tensors, added: Tensors) -> Tensors:
    return {name: weight + added.get(name, 0.0) for name, weight in weights.items()}


# Merging


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_adapters_are_merged_exactly(base: Path, adapters: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    words = ("--weights", 1, -0.5, "--out", tmp_path / "out", "--layout", layout, "--base", base)
    run("merge", adapters(ONE), adapters(OTHER) / COMFYUI_FILE, *words)
    added = deltas(adapters(ONE), base)
    for name, delta in deltas(adapters(OTHER), base).items():
        added[name] = added[name] - 0.5 * delta
    whole = plus(weights_of(base), added)
    if layout == "diffusers":
        assert_close(stock_with(base, tmp_path / "out", ADAPTER_FILE), whole)
    else:
        assert_close(in_comfyui(base, tmp_path / "out" / COMFYUI_FILE), BFL_LAYOUT.to_original(whole))
    ranks = {len(update.down) for update in read_updates(tmp_path / "out", names_of(base)).values()}
    assert ranks == {4, 6}
    header = header_of(next((tmp_path / "out").glob("*.safetensors")))
    assert (header["model_type"], header["modelspec.architecture"]) == ("flux", "flux-1-dev/lora")
    assert header["modelspec.hash_sha256"] == f"0x{header['sshs_model_hash']}"


def test_adapters_become_a_part_of_the_base(base: Path, adapters: Callable[..., Path], tmp_path: Path) -> None:
    lokr = LokrSettings(type="lokr", factor=4, rank=2)
    run(
        "merge",
        adapters(ONE),
        adapters(lokr),
        "--weights",
        0.7,
        2,
        "--into_base",
        "--out",
        tmp_path / "m",
        "--base",
        base,
    )
    added = [deltas(adapters(one), base) for one in (ONE, lokr)]
    whole = plus(weights_of(base), {name: 0.7 * delta + 2 * added[1][name] for name, delta in added[0].items()})
    stock = FluxTransformer2DModel.from_pretrained(tmp_path / "m" / "transformer")
    assert_close(dict(stock.state_dict()), whole)
    assert_close(load_file(tmp_path / "m" / "model_comfyui.safetensors"), BFL_LAYOUT.to_original(whole))
    assert {path.name for path in tmp_path.iterdir()} == {"m"}
    assert header_of(tmp_path / "m" / "model_comfyui.safetensors")["modelspec.architecture"] == "flux-1-dev"


def test_the_nearest_lora_of_a_rank(base: Path, adapters: Callable[..., Path], tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    run("resize", adapters(ONE), "--rank", 2, "--out", tmp_path / "2.safetensors", "--base", base)
    made, whole = deltas(tmp_path / "2.safetensors", base), deltas(adapters(ONE), base)
    kept = 0.0
    for name, delta in whole.items():
        values = torch.linalg.svdvals(delta)
        # Of all of this rank none is nearer (Eckart and Young).
        assert (made[name] - delta).norm().item() == pytest.approx(values[2:].norm().item(), rel=1e-3)
        kept += (values[:2] ** 2).sum().item()
    share = 100 * kept / sum(delta.square().sum().item() for delta in whole.values())
    assert f"{len(whole)} layers of rank 2, with {share:.2f}% of the update's square" in caplog.text
    assert header_of(tmp_path / "2.safetensors")["ss_network_dim"] == "2"
    # As many ranks as are needed: of a LoRA no more than it has.
    run("resize", adapters(ONE), "--energy", 1, "--out", tmp_path / "all.safetensors", "--base", base)
    updates = read_updates(tmp_path / "all.safetensors", names_of(base))
    assert {len(update.down) for update in updates.values()} == {4}
    assert_close(deltas(tmp_path / "all.safetensors", base), whole)


def test_what_is_no_lora_becomes_one(base: Path, adapters: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    dora = LoraSettings(type="lora", rank=2, dora=True, include=["attn.to_q"])
    words = ("--base", base, "--out", tmp_path / "out.safetensors")
    assert main([str(word) for word in ("merge", adapters(ONE), adapters(dora), *words)]) == 1
    assert "the updates of 4 of 40 layers are no product of two factors" in capsys.readouterr().err
    # A difference of full rank, in float32.
    run("resize", adapters(dora), "--rank", 64, *words)
    made, whole = deltas(tmp_path / "out.safetensors", base), deltas(adapters(dora), base)
    for name, delta in whole.items():
        assert (made[name] - delta).norm() < 1e-4 * delta.norm()


# Layouts


@pytest.mark.parametrize("start", [ADAPTER_FILE, COMFYUI_FILE])
def test_a_lora_in_every_layout(base: Path, adapters: Callable[..., Path], tmp_path: Path, start: str) -> None:
    source, whole = adapters(ONE) / start, deltas(adapters(ONE), base)
    expected = plus(weights_of(base), whole)
    for layout in ("diffusers", "comfyui", "peft", "lycoris"):
        # Names and sizes are enough: nothing of the base is read.
        words = ("--base", base) if start == ADAPTER_FILE else ("--config", config_of(base, tmp_path))
        run("convert", source, "--layout", layout, "--out", tmp_path / layout, *words)
        assert_close(deltas(tmp_path / layout, base), whole)
    assert_close(stock_with(base, tmp_path / "diffusers", ADAPTER_FILE), expected)
    assert_close(in_comfyui(base, tmp_path / "comfyui" / COMFYUI_FILE), BFL_LAYOUT.to_original(expected))
    assert_close(in_comfyui(base, tmp_path / "lycoris" / ADAPTER_FILE), BFL_LAYOUT.to_original(expected))
    # What is said of the training stays, and what is said of the file is its own.
    first, again = header_of(source), header_of(tmp_path / "lycoris" / ADAPTER_FILE)
    for key in ("base_model", "step", "ss_steps", "ss_training_finished_at"):
        assert again[key] == first[key]
    assert again["layout"] == "lycoris" and again["sshs_model_hash"] != first["sshs_model_hash"]
    stock = FluxTransformer2DModel.from_pretrained(base / "transformer")
    wrapped = PeftModel.from_pretrained(stock, tmp_path / "peft")
    assert_close(dict(wrapped.merge_and_unload().state_dict()), expected)


def config_of(base: Path, place: Path) -> Path:
    model = {"type": "flux", "diffusers_path": str(base), "dtype": "float32"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in model.items()]
    text = 'output_dir = "runs"\ndataset = "data.toml"\n[optimizer]\ntype = "adamw"\nlr = 1e-3\n[model]\n'
    (place / "run.toml").write_text(text + "\n".join(lines))
    return place / "run.toml"


@pytest.mark.parametrize(
    "adapter",
    [
        LoraSettings(type="lora", rank=2, dora=True),
        LohaSettings(type="loha", rank=2, alpha=1.0),
        LokrSettings(type="lokr", factor=4, rank=2, alpha=1.0),
        OftSettings(type="oft", block_size=4),
    ],
    ids=lambda adapter: f"{adapter.type}",
)
def test_other_kinds_go_from_layout_to_layout(
    base: Path, adapters: Callable[..., Path], tmp_path: Path, adapter: AdapterSettings
) -> None:
    source, names = adapters(adapter), ("diffusers", "comfyui")
    whole = deltas(source, base)
    files = {"diffusers": ADAPTER_FILE, "comfyui": COMFYUI_FILE}
    for start, end in (names, names[::-1]):
        place = tmp_path / f"{end}.safetensors"
        run("convert", source / files[start], "--layout", end, "--out", place, "--base", base)
        assert_close(deltas(place, base), whole)
        again, first = load_file(place), load_file(source / files[end])
        assert again.keys() == first.keys()


# Two checkpoints


def test_an_adapter_is_extracted_from_two_checkpoints(base: Path, tmp_path: Path, caplog: Any) -> None:
    weights, added = weights_of(base), {}
    for name in ("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.1.proj_mlp.weight"):
        rows, columns = weights[name].shape
        added[name] = normal((rows, 3), 0, name, "up") @ normal((3, columns), 0, name, "down") * 0.1
    tuned = plus(weights, added) | {"proj_out.bias": weights["proj_out.bias"] + 1}
    (tmp_path / "epoch1" / "transformer").mkdir(parents=True)
    save_file(tuned, tmp_path / "epoch1" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(BFL_LAYOUT.to_original(tuned), tmp_path / "model_comfyui.safetensors")
    (tmp_path / "epoch1" / "text_encoder").mkdir()
    for number, given in enumerate(("epoch1", "model_comfyui.safetensors")):
        caplog.clear()
        words = ("--energy", 0.9999, "--type", "flux", "--base", base)
        run("extract", tmp_path / given, *words, "--out", tmp_path / f"out{number}")
        assert ("transformer is compared; not text_encoder" in caplog.text) == (given == "epoch1")
        assert "1 parameters differ that a LoRA does not change" in caplog.text and "proj_out.bias" in caplog.text
        made = read_updates(tmp_path / f"out{number}", names_of(base))
        assert {len(update.down) for update in made.values()} == {3}
        assert_close(stock_with(base, tmp_path / f"out{number}", ADAPTER_FILE), plus(weights, added))


# Means


def test_the_mean_of_exports(base: Path, adapters: Callable[..., Path], tmp_path: Path) -> None:
    again = LoraSettings(type="lora", rank=4, alpha=1.5, dropout=0.1)
    first, second = (load_file(adapters(one) / ADAPTER_FILE) for one in (ONE, again))
    second = {name: tensor + 1 for name, tensor in second.items()}
    (tmp_path / "second").mkdir()
    save_file(second, tmp_path / "second" / ADAPTER_FILE, header_of(adapters(ONE) / ADAPTER_FILE))
    run("average", adapters(ONE), tmp_path / "second", "--out", tmp_path / "mean", "--weights", 1, 3)
    made = load_file(tmp_path / "mean" / ADAPTER_FILE)
    assert_close(made, {name: 0.25 * tensor + 0.75 * second[name] for name, tensor in first.items()})
    assert (tmp_path / "mean" / "adapter_config.json").read_text() == (
        adapters(ONE) / "adapter_config.json"
    ).read_text()
    stock_with(base, tmp_path / "mean", ADAPTER_FILE)
    header = header_of(tmp_path / "mean" / ADAPTER_FILE)
    assert header["weights"] == "average of 0.25, 0.75"


def test_the_mean_of_whole_models_is_taken_shard_by_shard(base: Path, tmp_path: Path) -> None:
    stock = FluxTransformer2DModel.from_pretrained(base / "transformer")
    stock.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(3)
    stock.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    run("average", tmp_path / "a", tmp_path / "b", "--ema", 0.5, "--out", tmp_path / "mean")
    made = FluxTransformer2DModel.from_pretrained(tmp_path / "mean")
    assert_close(dict(made.state_dict()), {name: 2 * tensor for name, tensor in weights_of(base).items()})


def test_the_weights_of_a_moving_average() -> None:
    average, decay, values = 5.0, 0.8, [5.0, 1.0, 7.0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    weights = weights_of_ema(3, decay)
    assert sum(weights) == pytest.approx(1.0)
    assert sum(weight * value for weight, value in zip(weights, values, strict=True)) == pytest.approx(average)


# Models with text encoders, and others


def test_text_encoders_are_a_part_of_the_model(
    pipelines: Callable[[str], BasePipeline],  # noqa: F811
    tmp_path: Path,
) -> None:
    pipeline = pipelines("sdxl_texts")
    exported(pipeline, tmp_path / "lora", ONE)
    base = pipeline.options.diffusers_path
    run("convert", tmp_path / "lora" / COMFYUI_FILE, "--out", tmp_path / "out", "--type", "sdxl", "--base", base)
    again, first = (load_file(tmp_path / place / ADAPTER_FILE) for place in ("out", "lora"))
    assert again.keys() == first.keys() and any(name.startswith("text_encoder_2.") for name in again)
    for name in (name for name in first if ".lora_A." in name):
        other = name.replace(".lora_A.", ".lora_B.")
        made, theirs = (tensors[other].flatten(1) @ tensors[name].flatten(1) for tensors in (again, first))
        torch.testing.assert_close(made, theirs, rtol=1e-4, atol=1e-5)


# Looking


def test_what_a_file_is_told(adapters: Callable[..., Path], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("info", adapters(ONE), adapters(LokrSettings(type="lokr", factor=4, rank=2)) / COMFYUI_FILE)
    ours, kohyas, lokr = capsys.readouterr().out.split("\n\n")
    assert "  kind:      LoRA of 40 modules" in ours and "  model:     flux, " in ours
    assert (
        "  names:     diffusers' names\n  rank:      4\n" in ours and "  modelspec.implementation = diffusers" in ours
    )
    assert "  rank:      4 (20 times), 12 (4 times), 16 (2 times)\n" in kohyas
    assert (
        "  alpha:     1.5 (20 times), 4.5 (4 times), 6 (2 times)\n" in kohyas and "names:     kohya's names" in kohyas
    )
    assert "  kind:      LoKr of 40 modules" in lokr and "LyCORIS's names" in lokr and "  alpha:     2\n" in lokr
    run("info", adapters(LoraSettings(type="lora", rank=2, dora=True)))
    assert capsys.readouterr().out.count("kind:      LoRA with DoRA of") == 2, "as PEFT has it, and as ComfyUI has it"
    run("info", base / "transformer")
    told = capsys.readouterr().out
    assert "kind:      weights of a model, no adapter" in told and "format = pt" in told


# Bad input


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resize", "{one}", "--base", "{base}"], "say how large the LoRA is to be: --rank, as in 16, or --energy"),
        (["resize", "{one}", "--rank", "0", "--base", "{base}"], "--rank: is 0, and is to be 1 or more"),
        (
            ["resize", "{one}", "--energy", "2", "--base", "{base}"],
            "--energy: is 2, and is to be above 0 and at most 1",
        ),
        (["merge", "{one}", "--weights", "1", "2", "--base", "{base}"], "--weights: are 2 for 1 files"),
        (["merge", "{one}", "--into_base", "--rank", "2", "--base", "{base}"], "--into_base: writes a whole model"),
        (["convert", "{one}", "--base", "/nowhere"], "/nowhere\n  --base: no such file or folder"),
        (["convert", "{unknown}"], "which model it is for is not known: add --type"),
        (["convert", "{unknown}", "--type", "nothing"], "unknown model type 'nothing'"),
        (["convert", "{unknown}", "--type", "flux", "--base", "{base}"], "1 of its 1 modules are not this model's"),
        (["convert", "{one}", "--type", "wan", "--base", "{base}"], "one of WanTransformer3DModel belongs here"),
        (["average", "{one}"], "average: name two exports or more"),
        (["average", "{one}", "{other}"], "tensors are in one of"),
        (["average", "{one}", "{one}", "--weights", "1", "-1"], "--weights: have the sum 0"),
        (
            ["extract", "{base}", "--rank", "4", "--type", "flux", "--base", "{base}"],
            "has the same weights as the base",
        ),
        (["info", "/nowhere"], "/nowhere\n  no such file or folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    base: Path, adapters: Callable[..., Path], tmp_path: Path, capsys: Any, words: list[str], told: str
) -> None:
    save_file({"nothing.known.lora_A.weight": torch.ones(2, 2)}, tmp_path / "unknown.safetensors")
    places = {
        "one": adapters(ONE) / ADAPTER_FILE,
        "other": adapters(OTHER) / ADAPTER_FILE,
        "base": base,
        "unknown": tmp_path / "unknown.safetensors",
    }
    out = [] if words[0] == "info" else ["--out", str(tmp_path / "out")]
    assert main([word.format(**places) for word in words] + out) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_there_is_lost(base: Path, adapters: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out.safetensors").write_text("mine")
    words = ["convert", adapters(ONE), "--base", base, "--out", tmp_path / "out.safetensors"]
    assert main([str(word) for word in words]) == 1
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_text() == "mine"
