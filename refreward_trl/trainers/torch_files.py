"""What torch has pickled in a checkpoint (optimizer, scheduler, random states) is read as data, or refused by name.

The manifest of a checkpoint protects against damage, not against an attacker, who can write it anew.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

from refreward_trl.errors import CheckpointError

FIX = "use another checkpoint of the run, from someone you trust"

_WRONG = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    EOFError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
"""What libraries raise where the content of a file is not what they have written."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Inside, an error about the content of a file or folder becomes a `CheckpointError` that names it."""
    try:
        yield
    except _WRONG as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"it does not hold what a run writes ({type(error).__name__}: {reason[:200]})", where=str(path), fix=FIX
        ) from error


def check_torch_file(path: Path) -> None:
    """Makes sure that a file is as `torch.save` writes it and holds tensors and plain values only.

    Nothing of it runs: torch reads its pickle with a list of harmless types, and the numbers stay on the disk.

    Raises:
        CheckpointError: It holds anything else, or would take more memory than its size.
    """
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{packed[0]} is compressed")
        with safe_globals():
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for tensor in _tensors(content, set()):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor {tuple(tensor.shape)} has fewer numbers than it claims")


def _tensors(content: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yields every tensor once, however often and deep it is held."""
    if id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value, seen)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value, seen)
