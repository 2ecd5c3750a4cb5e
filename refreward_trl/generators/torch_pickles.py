"""Published checkpoints come as pickles. They are read without running any code in them, or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch import Tensor

from refreward_trl.errors import CheckpointError
from refreward_trl.torch_files import DAMAGED, read_torch_data

FIX = "download the checkpoint again, from its authors"


def read_torch_file(path: Path) -> dict[str, Any]:
    """Reads a dictionary that `torch.save` wrote, on the CPU, mapped into memory.

    Raises:
        CheckpointError: The file is missing, truncated, holds anything but tensors, numbers, texts, lists and
            dictionaries of them, or is no dictionary.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {type(content).__name__}, not a dictionary", where=str(path), fix=FIX)
    return content


def take_tensors(content: dict[str, Any], key: str, path: Path) -> dict[str, Tensor]:
    """Returns the state dict under a key. Raises `CheckpointError` if it is missing or holds anything but tensors."""
    state = content.get(key)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{key} is missing, or no state dict", where=str(path), fix=FIX)
    return state


def take_names(content: dict[str, Any], key: str, path: Path) -> list[str]:
    """Returns the list of layer names under a key. Raises `CheckpointError` if it is missing or something else."""
    names = content.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{key} is missing, or no list of names", where=str(path), fix=FIX)
    return names


def take_rank(content: dict[str, Any], key: str, path: Path) -> int:
    """Returns the rank under a key. Raises `CheckpointError` if it is missing or no whole number above 0."""
    rank = content.get(key)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{key} is {rank!r}, not a rank", where=str(path), fix=FIX)
    return rank


def read_torch_tensor(path: Path) -> Tensor:
    """Reads a file in which `torch.save` wrote one tensor. Raises `CheckpointError` as `read_torch_file`."""
    content = _read(path)
    if not isinstance(content, Tensor):
        raise CheckpointError(f"it holds a {type(content).__name__}, not a tensor", where=str(path), fix=FIX)
    return content


def _read(path: Path) -> Any:
    try:
        return read_torch_data(path)
    except FileNotFoundError as error:
        raise CheckpointError("the checkpoint is missing", where=str(path), fix="check the path") from error
    except pickle.UnpicklingError as error:
        # torch's message tells the reader how to run the code after all.
        named = next((line for line in str(error).splitlines() if "GLOBAL" in line), "not a pickle of tensors")
        raise CheckpointError(
            f"it holds more than tensors and plain values, and is not opened: {named.strip()}",
            where=str(path),
            fix="a pickle can run code when it is opened; get the weights as published, or as safetensors",
        ) from error
    except DAMAGED as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"it cannot be read: {first[:200]}", where=str(path), fix=FIX) from error
