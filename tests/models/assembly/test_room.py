"""What is told of phases for which a card has no room, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train as train_py
from models.assembly import data, room
from models.assembly.encoder_needs import Need
from models.assembly.memory import GIB, Planner, StagePlan
from models.assembly.room import MARGIN, NO_LIMIT, SHARE, check_caching, check_plans, of_encoder
from models.assembly.stage import partition
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.runs import launch
from tests.utils.dataset.conftest import plain_sample
from utils.adapters.lora import LoraSettings
from utils.dataset.encoding import CacheJob, lacks
from utils.dataset.samples import Bucket
from utils.errors import UserError
from utils.ranks import Ranks, disconnect
from utils.run.signals import StopRequests
from utils.settings.dataset_schema import DatasetSettings

PICTURE = Bucket(64, 64, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"), num_single_layers=3)


def card_for(planned: float) -> float:
    """The memory of a card on which this much just fits."""
    return (planned + MARGIN * GIB) / (1 - SHARE)


def told_of(folder: Path, need: Need, memory: float, card: float, **keys: Any) -> tuple[str, bool] | None:
    """Of the encoder of this name, what is told, and whether it is sure."""
    options = {key: keys.pop(key) for key in ("text_encoder_dtype",) if key in keys}
    flux = tiny_flux.pipeline(folder, **options)
    encoder = next(one for one in flux.encoders() if one.name == need.name)
    found = list(of_encoder(need, encoder, settings_of(flux, **keys), memory, card, PICTURE))
    if not found:
        return None
    ((problem, is_sure),) = found
    return f"{problem.where}: {problem.message}", is_sure


def test_an_encoder_that_does_not_fit_is_told_with_what_to_set(folder: Path) -> None:
    need = Need("t5", 9 * GIB, GIB)
    assert told_of(folder, need, card_for(10 * GIB) + 1, NO_LIMIT) is None
    told, is_sure = told_of(folder, need, card_for(9.5 * GIB), NO_LIMIT, caching_batch_size=4)
    assert not is_sure and told.startswith("caching, t5: takes 10.00 GiB, 9.00 GiB of them weights; of the 10.9")
    assert "9.50 GiB can be planned with, 0.50 GiB too few; what would take less: " in told
    assert '[model] text_encoder_dtype = "nf4", or "float8"' in told
    assert "caching_batch_size = 1" in told and "resolutions" not in told
    # A card with less than the weights is too small, one in which they leave no room for anything may not be.
    for card, sure in ((8.9 * GIB, True), (9.1 * GIB, False)):
        told, is_sure = told_of(folder, need, card, card, caching_batch_size=4)
        assert is_sure is sure and "its weights alone" in told and "caching_batch_size" not in told
    # What settings name in the place of a card is no card.
    assert told_of(folder, need, 8 * GIB, 24 * GIB)[1] is False
    for kept, asked in (("nf4", False), ("float8", True)):
        told, _ = told_of(folder, need, 8 * GIB, NO_LIMIT, text_encoder_dtype=kept)
        assert ("text_encoder_dtype" in told) is asked and '"float8"' not in told and "--cache_only" in told


def test_a_vae_is_told_only_if_tiles_are_too_large(folder: Path) -> None:
    need = Need("vae", GIB // 2, 20 * GIB, 4 * GIB)
    assert told_of(folder, need, card_for(4.5 * GIB) + 1, NO_LIMIT) is None
    told, is_sure = told_of(folder, need, card_for(4 * GIB), NO_LIMIT)
    assert not is_sure and "takes 4.50 GiB" in told and "smaller `resolutions` in the dataset's file" in told


def planner_of(folder: Path, **keys: Any) -> tuple[Planner, list[StagePlan]]:
    """Of a tiny Flux, as if it were of other sizes."""
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, LoraSettings(type="lora", rank=2), **keys)
    staged = partition(flux, settings, flux.weights.build_empty())
    planner = Planner(settings, flux, staged, flux.encoders(), {PICTURE: 1})
    (plan,) = planner.plans(settings, [0])
    return planner, [replace(plan, weights=10 * GIB, state=GIB, activations=4 * GIB, evaluation=13 * GIB)]


def test_phases_that_do_not_fit_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    planner, plans = planner_of(folder)

    def told(memory: float, card: float | None = None, **keys: Any) -> list[str]:
        caplog.clear()
        check_plans(planner, planner.settings.model_copy(update=keys), plans, memory, card)
        return caplog.messages

    caplog.set_level(logging.WARNING)
    assert told(card_for(15 * GIB) + 1) == []
    (training,) = told(card_for(14 * GIB))
    assert (
        training.startswith("training: takes 15.00 GiB, 10.00 GiB of them weights; ") and "1.00 GiB too few" in training
    )
    for key in ('activation_checkpointing = "auto"', 'blocks_to_swap = "auto"', "transformer_dtype = "):
        assert key in training
    chosen = {"activation_checkpointing": "offload", "blocks_to_swap": "auto", "cache_text_embeddings": False}
    (training,) = told(card_for(14 * GIB), **chosen)
    assert "checkpointing" not in training and "blocks_to_swap" not in training
    assert "cache_text_embeddings = true" in training
    assert [one.split(":")[0] for one in told(card_for(12 * GIB))] == ["training", "evaluation"]
    # A budget is what a user would like to have.
    (training,) = told(9 * GIB)
    assert "its weights alone" in training and training.startswith("training: takes 10.00 GiB")
    assert told(9 * GIB, 10.1 * GIB) == [training]
    with pytest.raises(UserError, match="training: takes 10.00 GiB, its weights alone"):
        told(9 * GIB, 9 * GIB)


def test_a_plan_warns_of_caching_and_a_run_that_has_cached_does_not(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, plans = planner_of(folder)
    monkeypatch.setitem(vars(planner.phases), "caching_needs", [Need("t5", 30 * GIB, 0)])
    caplog.set_level(logging.WARNING)
    # All of it may be in the cache.
    check_plans(planner, planner.settings, plans, 24 * GIB, 24 * GIB, caches=True)
    (told,) = caplog.messages
    assert told.startswith("caching, t5: takes 30.00 GiB, its weights alone")
    caplog.clear()
    check_plans(planner, planner.settings, plans, 24 * GIB, 24 * GIB)
    assert not caplog.messages


def test_what_is_to_be_encoded_is_refused_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flux = tiny_flux.pipeline(folder)
    vae, _, t5 = flux.encoders()
    samples = [plain_sample("a", PICTURE)]
    wanted = {one.name: (one, samples) for one in (vae, t5)}
    asked, settings = [], settings_of(flux)

    def lacking(encoder: Any, _: Any) -> bool:
        asked.append(encoder.name)
        return encoder.name in lost

    def check() -> None:
        asked.clear()
        check_caching(settings, Ranks(), wanted, lacking)

    lost: tuple[str, ...] = ("vae", "t5")
    # Without a card there is no limit.
    check()
    assert not asked
    needs = {"vae": Need("vae", GIB, GIB), "clip": Need("clip", 99 * GIB, 0), "t5": Need("t5", 9 * GIB, GIB)}
    monkeypatch.setattr(room, "caching_needs", lambda encoders, *_: [needs[one.name] for one in encoders])
    monkeypatch.setattr(room, "card_of", lambda _: 8 * GIB)
    with pytest.raises(UserError, match="caching, t5: takes 10.00 GiB, its weights alone"):
        check()
    # Whether anything is lacking is asked of those alone that do not fit; what the cache has is not encoded.
    assert asked == ["t5"] and t5.model is None
    lost = ()
    check()
    lost = ("t5",)
    monkeypatch.setattr(room, "card_of", lambda _: 10 * GIB)
    caplog.clear()
    check()
    assert any(told.startswith("caching, t5: takes 10.00 GiB") for told in caplog.messages)


def test_a_run_looks_for_room_only_if_it_has_something_to_encode(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = tiny_flux.pipeline(folder)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a picture")
    settings = settings_of(flux).model_copy(update={"output_dir": tmp_path})
    datasets = {"train": DatasetSettings(resolutions=[64], directory=[{"path": tmp_path / "pictures"}])}
    sources = data.sources_of(settings, datasets)

    def encoded() -> None:
        data.cached_data(settings, Ranks(), flux, sources, scan, owner=tmp_path / "run.toml")

    scan = data.scan_of(settings, sources, lambda: None)
    monkeypatch.setattr(room, "card_of", lambda _: 1024.0)
    with pytest.raises(UserError) as caught:
        encoded()
    assert [problem.where for problem in caught.value.problems] == ["caching, vae", "caching, clip", "caching, t5"]
    monkeypatch.undo()
    encoded()
    monkeypatch.setattr(room, "card_of", lambda _: 1024.0)
    encoded()
    assert lacks(flux.encoders()[1], [plain_sample("b", PICTURE)], CacheJob(tmp_path / "cache", tmp_path, Ranks()))


def test_what_cannot_be_trained_is_told_before_anything_is_encoded(
    write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever only fills the cache may train on another card."""
    keys = {"activation_checkpointing": "auto", "blocks_to_swap": "auto", "memory_budget_gb": 0.5}
    config = str(write_config(**keys))
    caplog.set_level(logging.INFO)

    def run(*words: str) -> None:
        try:
            train_py.run(train_py.parse_arguments(["--config", config, *words]), Ranks(), StopRequests(), 0.0)
        finally:
            disconnect()

    with pytest.raises(UserError, match="nothing can be planned with, since 1 GiB and 4% are left.*nothing fits"):
        run()
    assert not any("encoded=" in told for told in caplog.messages)
    run("--cache_only")
    assert any("encoded=" in told for told in caplog.messages)
    # With everything cached it is found with the plan, by the main rank, and all leave together.
    codes, log = launch(Path(config), processes=2)
    assert codes == [1, 1] and log.count("nothing fits") == 1 and "in vain" not in log
