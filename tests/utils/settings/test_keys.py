"""Keys of other trainers lead to keys that there are."""

import re

from tests.utils.settings.conftest import CHOICES
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings
from utils.settings.foreign import INSTEAD, NEEDLESS, advice
from utils.settings.keys import GROUPS, NESTED, SECTIONS, SPELLINGS, known_keys, run_keys
from utils.settings.model_schema import ModelSettings

DATASET = known_keys("dataset", DatasetSettings) | known_keys("directory", DirectorySettings)
RUN = {*run_keys(), *known_keys("model", ModelSettings)}
CLASSES = [cls for choice in CHOICES.values() for cls in choice.classes.values()]
RUN |= {key for cls in [*SECTIONS.values(), *CLASSES] for key in cls.model_fields}


def test_advice_names_keys_and_tables_that_there_are() -> None:
    for name in [*INSTEAD, *NEEDLESS]:
        said = advice(name)
        for key in re.findall(r"`([a-z_]+)(?: = [^`]+)?`", said):
            assert key in DATASET | RUN, (name, key)
        for title in re.findall(r"`\[+([a-z_]+)\]+`", said):
            assert title in {*SECTIONS, *GROUPS, *NESTED}, (name, title)


def test_a_key_that_there_is_needs_no_advice() -> None:
    # At the top of a file it would mean something else than elsewhere.
    assert (INSTEAD.keys() | NEEDLESS.keys()) & (DATASET | RUN) == {"prior_loss_weight"}
    assert "prior_loss_weight" not in known_keys("dataset", DatasetSettings)
    assert advice("resolutions") is None


def test_second_spellings_stand_for_keys_that_there_are() -> None:
    classes = {"model": ModelSettings, "dataset": DatasetSettings, "directory": DirectorySettings}
    for section, others in SPELLINGS.items():
        assert set(others.values()) <= classes[section].model_fields.keys()
        assert not others.keys() & classes[section].model_fields.keys()
