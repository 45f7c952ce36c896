"""What is told of a run's data before anything of it is encoded."""

from __future__ import annotations

import pytest

from models.assembly.data import check_epochs
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.utils.dataset.conftest import plain_sample
from utils.errors import UserError
from utils.ranks import Ranks

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
