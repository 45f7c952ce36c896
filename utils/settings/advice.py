"""Whether what a message advises could be set at all beside the run's other keys."""

from typing import Any

from utils.settings.rules import check_rules
from utils.settings.schema import Settings


def allows(settings: Settings, **changes: Any) -> bool:
    """Whether no rule has anything against a run's keys with these values that it has not against them as they are."""
    changed = settings.model_copy(update=changes)
    return not set(check_rules(changed, None)) - set(check_rules(settings, None))
