"""JSON files for people's scripts: complete or not there at all, and readable by every parser."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refreward_trl.errors import SetupError


def write_json(path: Path, content: Any) -> None:
    """Writes `content` in one rename; a number that is not finite becomes null.

    Raises:
        SetupError: The file cannot be written.
    """
    staged = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        fix = "check space and permissions, or choose another output_dir"
        raise SetupError(f"cannot be written: {error.strerror}", where=str(path), fix=fix) from error


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
