"""What is told of a run's data before anything of it is encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.assembly.data import check_data, check_epochs
from models.assembly.prompts import sample_bucket
from tests.models import tiny_flux, tiny_lumina2, tiny_sd3, tiny_wan, tiny_z_image
from tests.models.tiny_folder import settings_of
from tests.utils.dataset.conftest import plain_sample
from utils.dataset.buckets import Bucket
from utils.dataset.collection import Collection, Source
from utils.errors import UserError
from utils.ranks import Ranks
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.run_tables import SamplingSettings


def collected(samples):
    data = DatasetSettings(directory=[{"path": "pictures"}])
    return Collection(Source("train", Path("dataset.toml"), data), samples, [], [], 0)


FIRST = plain_sample("a", end_epoch=2)
LATER = plain_sample("b", start_epoch=4)
BY_STEPS = plain_sample("c", end_step=3)
HALF = plain_sample("d", repeats=0.5)


@pytest.mark.parametrize(
    ("samples", "lengths", "empty"),
    [
        ([FIRST, LATER], {"epochs": 5}, 3),
        ([FIRST, LATER], {"epochs": 2}, None),
        # A step an epoch.
        ([FIRST, LATER], {"max_steps": 2}, None),
        ([FIRST, LATER], {"max_steps": 3}, 3),
        ([BY_STEPS], {"max_steps": 10**9}, 4),
        ([BY_STEPS, LATER], {"max_steps": 10**9}, None),
        # Which of two epochs has the half is drawn.
        ([HALF], {"max_steps": 10**9}, "[12]"),
        ([HALF, plain_sample("e")], {"max_steps": 10**9}, None),
        ([plain_sample("e")], {"epochs": 10**9}, None),
    ],
)
def test_an_epoch_without_samples_is_told_before_it_comes(samples, lengths, empty):
    settings = settings_of(tiny_flux.pipeline(tiny_flux.MINI_FLUX), **lengths)
    if empty is None:
        check_epochs(settings, Ranks(), samples)
        return
    with pytest.raises(UserError, match=rf"epoch {empty} has no sample"):
        check_epochs(settings, Ranks(), samples)


WITH_PLACES = {
    # Rows and columns of the table, in pixels.
    "sd3": (tiny_sd3, {"pos_embed_max_size": 12}, (192, 192)),
    "lumina2": (tiny_lumina2, {"axes_lens": [300, 6, 9]}, (96, 144)),
    "z_image": (tiny_z_image, {"axes_lens": [128, 6, 9]}, (96, 144)),
    "wan": (tiny_wan, {"rope_max_seq_len": 8}, (128, 128)),
}


@pytest.mark.parametrize(("module", "changes", "largest"), WITH_PLACES.values(), ids=WITH_PLACES)
def test_a_size_beyond_the_table_of_positions_is_told(tmp_path: Path, module, changes, largest) -> None:
    rows, columns = largest
    model = module.pipeline(module.write_folder(tmp_path, **changes))
    taller, wider = Bucket(columns, rows + 16, 1), Bucket(columns + 16, rows, 1)
    check_data(model, [collected([plain_sample("a", Bucket(columns, rows, 1))])])
    assert sample_bucket(model, SamplingSettings(width=columns, height=rows)) == Bucket(columns, rows, 1)
    for bucket in (taller, wider):
        told = rf"{bucket.width} x {bucket.height} is larger than the model's table .* ends at {columns} x {rows}"
        with pytest.raises(UserError, match=rf"(?s)dataset.toml.*`resolutions`: {told}; .*first such file is /data/b"):
            check_data(model, [collected([plain_sample("a", Bucket(64, 64, 1)), plain_sample("b", bucket)])])
        with pytest.raises(UserError, match=rf"\[sampling\] width, height: {told}"):
            sample_bucket(model, SamplingSettings(width=bucket.width, height=bucket.height))


def test_the_table_of_positions_ends_where_the_stock_model_says(tmp_path: Path) -> None:
    model = tiny_sd3.pipeline(tiny_sd3.write_folder(tmp_path), from_scratch=True)
    table, cells = model.build_denoiser().pos_embed, 2 * model.places[0]
    assert table.cropped_pos_embed(cells, cells).shape[1] == model.places[0] ** 2
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        table.cropped_pos_embed(cells + 2, cells)


def test_a_model_whose_positions_are_computed_takes_any_size() -> None:
    assert tiny_flux.pipeline(tiny_flux.MINI_FLUX).too_large(16384, 16384) is None


@pytest.mark.parametrize(
    ("sides", "told"),
    [
        # Flux has a token for 16 x 16 pixels: 256 for 256 x 256, 4096 for 1024 x 1024.
        ([256, 1024], []),
        ([128, 512], ["128 x 128 has 64 image tokens, and the rule was made for 256 to 4096; the shift there is 1.60"]),
        ([1536, 2048, 512], ["2048 x 2048 has 16384 image tokens, and the rule was made for 256 to 4096; the shift"]),
        ([128, 2048], ["128 x 128", "2048 x 2048"]),
    ],
)
def test_sizes_beyond_the_rule_of_the_shift_are_told(caplog, sides, told) -> None:
    samples = [plain_sample(str(side), Bucket(side, side, 1)) for side in sides]
    check_data(tiny_flux.pipeline(tiny_flux.MINI_FLUX), [collected(samples)])
    assert caplog.messages == []
    check_data(tiny_flux.pipeline(tiny_flux.MINI_FLUX, flux_shift=True), [collected(samples)])
    assert len(caplog.messages) == len(told)
    assert all(words in line for words, line in zip(told, caplog.messages, strict=True))


def test_a_clip_is_shifted_as_one_frame_of_it(tmp_path: Path) -> None:
    wan = tiny_wan.pipeline(tiny_wan.write_folder(tmp_path), flux_shift=True)
    tokens = wan.tokens(wan.latent_shape(832, 480, 81))
    assert tokens == wan.tokens(wan.latent_shape(832, 480, 1)) == 52 * 30
    assert wan.resolution_shift.factor(tokens) == pytest.approx(2.056, abs=1e-3)
    assert wan.maths.timesteps.timestep(0.1, tokens) == pytest.approx(0.3634, abs=1e-3)
