"""Rows -> batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from refreward_trl.errors import DataError
from refreward_trl.types import Batch, stack_if_equal

_IMAGES = ("lr_image", "hr_image")


def collate_pairs(rows: Sequence[dict[str, Any]]) -> Batch:
    """Collates rows of a `PairDataset`, or of any dataset with the same columns.

    Args:
        rows: At least one row; all have the same columns, among them `sample_id` and `lr_image`.

    Returns:
        `lr_image` and `hr_image` (if present) stacked to uint8 `(B, 3, h, w)`, or as lists where sizes differ; every
        other column as a list, in the order of the rows.

    Raises:
        DataError: Rows have different columns, or lack `sample_id` or `lr_image`; the message names both.
    """
    columns = list(rows[0])
    if missing := [name for name in ("sample_id", "lr_image") if name not in columns]:
        raise DataError(
            f"the rows have no column {' and '.join(missing)}; there are: {', '.join(columns)}", where="dataset"
        )
    for row in rows:
        if different := sorted(set(columns) ^ set(row)):
            raise DataError(
                f"column {different[0]} is in some rows of the batch only",
                where=f"sample {row.get('sample_id', '?')}",
                fix="give all rows the same columns",
            )
    batch = {
        name: stack_if_equal([row[name] for row in rows]) if name in _IMAGES else [row[name] for row in rows]
        for name in columns
    }
    return cast(Batch, batch)
