"""What every saved generator folder has: a header naming its format and class, and files that are read with care.

Only JSON and safetensors are read, so that no folder can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from refreward_trl.errors import CheckpointError

FORMAT_VERSION = 1
HEADER_FILE = "generator_config.json"
PROMPT_FILE = "prompt_embeds.safetensors"


def write_header(folder: Path, class_name: str, numbers: Mapping[str, Any]) -> None:
    """Writes the format version, the generator's class and its numbers (JSON values)."""
    values = {"format_version": FORMAT_VERSION, "class": class_name, **numbers}
    (folder / HEADER_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_class_name(folder: Path) -> str:
    """Returns the generator class that a folder names. Raises `CheckpointError` for an unreadable header or another
    version."""
    path = folder / HEADER_FILE
    values = read_json(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version is {version!r}, this package reads {FORMAT_VERSION}",
            where=str(path),
            fix="use the version of refreward_trl that wrote the generator, or save it again",
        )
    if not isinstance(values.get("class"), str):
        raise damaged(path, "it names no class")
    return values["class"]


def read_numbers(folder: Path, class_name: str) -> dict[str, Any]:
    """Returns the numbers in the header. Raises `CheckpointError` as `read_class_name`, or if the class is not
    `class_name`."""
    found = read_class_name(folder)
    if found != class_name:
        raise CheckpointError(
            f"the folder holds a {found}, not a {class_name}",
            where=str(folder / HEADER_FILE),
            fix="load it with load_generator, which picks the class",
        )
    values = read_json(folder / HEADER_FILE)
    return {name: value for name, value in values.items() if name not in ("format_version", "class")}


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object. Raises `CheckpointError` if the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(values, dict):
        raise damaged(path, "it is not a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file, on the CPU. Raises `CheckpointError` if it is missing or corrupt."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def check_safetensors(path: Path) -> None:
    """Raises `CheckpointError` if a file is truncated or no safetensors file; reads its header alone."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def last_line(error: Exception) -> str:
    """Returns the last line of a message: the one that names the tensor in errors of torch's `load_state_dict`."""
    return str(error).strip().splitlines()[-1].strip()


def damaged(path: Path, reason: str) -> CheckpointError:
    """Returns the error for a file or folder that is there but cannot be used."""
    return CheckpointError(
        f"it cannot be used: {reason}",
        where=str(path),
        fix="copy the generator folder again, or load an earlier checkpoint",
    )


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(
        "the file is missing", where=str(path), fix="pass the folder that save_pretrained wrote, and copy it whole"
    )
