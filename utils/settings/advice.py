"""Whether what a message advises could be set at all beside the run's other keys."""

from typing import Any

from utils.settings.rules import check_rules
from utils.settings.schema import Settings

IN_TURN = {"schedule": "1f1b", "pieces_per_stage": Settings.model_fields["pieces_per_stage"].default}
"""The keys of a schedule with one piece of the model for each stage, which holds fewer micro-batches at once."""


def allows(settings: Settings, **changes: Any) -> bool:
    """Whether no rule has anything against a run's keys with these values that it has not against them as they are."""
    changed = settings.model_copy(update=changes)
    return not set(check_rules(changed, None)) - set(check_rules(settings, None))
