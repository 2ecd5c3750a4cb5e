"""What torch has pickled in a checkpoint (optimizer, scheduler, random states) is read as data, or refused by name.

The manifest of a checkpoint protects against damage, not against an attacker, who can write it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_pt_utils import safe_globals

from refreward_trl.errors import CheckpointError
from refreward_trl.torch_files import DAMAGED, read_torch_data

FIX = "use another checkpoint of the run, from someone you trust"


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Inside, an error about the content of a file or folder becomes a `CheckpointError` that names it."""
    try:
        yield
    except DAMAGED as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"it does not hold what a run writes ({type(error).__name__}: {reason[:200]})", where=str(path), fix=FIX
        ) from error


def check_torch_file(path: Path) -> None:
    """Makes sure that a file is as `torch.save` writes it and holds tensors and plain values only.

    Raises:
        CheckpointError: It holds anything else, or would take more memory than its size.
    """
    with reading(path), safe_globals():
        read_torch_data(path)
