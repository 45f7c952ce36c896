"""JSON files written by programs, which a broken download or a full disk may have damaged."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError


def read_json(path: Path, hint: str = "download it again") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        hint: what the user should do if the file is damaged.

    Raises:
        UserError: the file cannot be read, is not JSON, or contains something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError.of(f"cannot be read ({error.strerror}); {hint}", str(path)) from error
    except ValueError as error:
        raise UserError.of(f"is not JSON ({error}); {hint}", str(path)) from error
    if not isinstance(content, dict):
        raise UserError.of(f"holds no JSON object; {hint}", str(path))
    return content
