"""Values that are written in more than one way."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from utils.settings.adapter_schema import AdapterSettings
from utils.settings.model_schema import ModelSettings
from utils.settings.run_tables import EMASettings, MonitoringSettings, SamplingSettings
from utils.settings.schema import OptimizerSettings, Settings
from utils.settings.values import Duration, SettingsTable

TABLES = (EMASettings, MonitoringSettings, SamplingSettings)
MINUTES = TypeAdapter(Duration)


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("3h50m", 230.0), ("90s", 1.5), ("1d 2H", 1560.0), (" 1.5h ", 90.0), ("2h 30s", 120.5), (12, 12.0), (0.5, 0.5)],
)
def test_a_time_is_minutes_or_a_text(written: Any, minutes: float) -> None:
    assert MINUTES.validate_python(written, strict=True) == minutes


@pytest.mark.parametrize("written", ["", "h", "230", "3x", "50m3h", "-3m", "1..2h", "0m", 0, -1, True, None, [3]])
def test_what_is_no_time_is_told(written: Any) -> None:
    with pytest.raises(ValidationError, match='must be a time as in "3h50m", or a number of minutes'):
        MINUTES.validate_python(written, strict=True)


@pytest.mark.parametrize("table", [Settings, ModelSettings, AdapterSettings, OptimizerSettings, *TABLES])
@pytest.mark.parametrize("wrong", ["no such value", 1.5, {"x": {"y": 1}}, [["a"]]])
def test_of_several_types_one_message_is_told(table: type[SettingsTable], wrong: Any) -> None:
    """And under the key's own name, not once for each type under a name that nobody has written."""
    for key in table.model_fields:
        try:
            table.__pydantic_validator__.validate_assignment(table.model_construct(), key, wrong)
        except ValidationError as error:
            told = [one["loc"] for one in error.errors()]
            assert not [part for place in told for part in place if "[" in str(part) or part in ("bool", "int")], told
