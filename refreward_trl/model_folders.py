"""What is checked in the folder of a model before a library opens it: nothing in it may lead out of the folder, name
weights that are pickled, or claim a network that its weights cannot fill.

Weights that are links are fine: the cache of the Hugging Face Hub is made of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from refreward_trl.errors import CheckpointError

REPEATED_PARTS = (
    "depth",
    "layers_per_block",
    "num_decoder_blocks",
    "num_encoder_blocks",
    "num_hidden_layers",
    "num_layers",
    "transformer_layers_per_block",
)
"""Names under which configurations say how often a part is built."""


def check_index(path: Path) -> None:
    """Checks the index of weights in several files (`*.index.json`).

    Raises:
        CheckpointError: It names anything but a safetensors file beside it.
    """
    shards = read_object(path).get("weight_map", {})
    for name in shards.values() if isinstance(shards, dict) else [shards]:
        if not isinstance(name, str) or "\0" in name or name != Path(name).name or not name.endswith(".safetensors"):
            raise _damaged(path, f"{name!r} is no safetensors file of this folder")


def check_size(path: Path) -> None:
    """Checks that a model's configuration does not repeat a part more often than there are weights beside it: without
    weights, but as Python objects, such a network would fill the memory.

    Raises:
        CheckpointError: It does, or the configuration or the header of a weights file cannot be read.
    """
    count = sum(_tensors(weights) for weights in path.parent.glob("*.safetensors"))
    for name, number in _numbers(read_object(path)):
        if number > count > 0:  # without any weights no library builds the network
            raise _damaged(path, f"{name} is {number}, but there are only {count} weights")


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises `CheckpointError` if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "must hold one JSON object")
    return content


def _tensors(weights: Path) -> int:
    try:
        with safe_open(weights, framework="pt") as file:
            return len(list(file.keys()))
    except (OSError, SafetensorError) as error:
        raise _damaged(weights, f"safetensors cannot open it ({error})") from error


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yields how often a part is repeated, by the part's name; also the lengths of lists, which name parts too."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, key)
    elif isinstance(content, list):
        yield f"the length of {name}", len(content)
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, int) and name in REPEATED_PARTS:
        yield name, content


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(path), fix="copy the folder again, from someone you trust")
