"""What a user can say about a foreign layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ConvertOptions:
    """The settings of `refreward data convert`.

    Attributes:
        columns: Our key -> the name that it has in the data; a key that is not in it has its own name.
        source: Who or what gave the order; None leaves it to the layout.
        images: Where image files lie, where a table names them; None is beside the table.
        chosen_first: Images are [LR, chosen, rejected], whatever the texts beside them say.
        lr_name: Name of the LR image in a group's folder, without its ending.
        hr_name: Name of the HR image in a group's folder, without its ending.
        ranks_table: The table of ranks, for layouts that have one; None looks for it.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    images: Path | None = None
    chosen_first: bool = False
    lr_name: str = "lr"
    hr_name: str = "hr"
    ranks_table: Path | None = None

    def name(self, key: str) -> str:
        """Returns what a key is called in the data."""
        return self.columns.get(key, key)
