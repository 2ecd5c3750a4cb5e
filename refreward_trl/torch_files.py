"""What torch has pickled is read as data or not at all: nothing of it runs, nor takes more memory than its size."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DAMAGED = (
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


def read_torch_data(path: Path) -> Any:
    """Returns what a file holds that `torch.save` wrote: tensors, mapped into memory, and plain values.

    torch reads the pickle with a list of harmless types; `torch.serialization.safe_globals` adds to it.

    Raises:
        One of `DAMAGED`: The file is missing or damaged, holds anything else, or would take more memory than its size.
    """
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{packed[0]} is compressed")
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for tensor in _tensors(content, set()):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor {tuple(tensor.shape)} has fewer numbers than it claims")
    return content


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
