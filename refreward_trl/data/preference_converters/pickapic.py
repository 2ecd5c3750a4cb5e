"""Pick-a-Pic's columns with an LR image beside them.

`jpg_0` and `jpg_1` are the images, `label_0` and `label_1` are 1 and 0, 0 and 1, or both 0.5 for a tie; where
`has_label` is false nobody answered. `model_0` and `model_1` name the methods, `user_id` the annotator. The LR image
is in `lr_image` or `lr`. Rows about one LR image become one group.
"""

from __future__ import annotations

from pathlib import Path

from refreward_trl.data.preference_converters.options import ConvertOptions
from refreward_trl.data.preference_converters.pooling import Comparison, GroupPool, as_weight, pool_rows
from refreward_trl.data.preference_converters.tables import TableRow, peek_columns
from refreward_trl.data.preference_records import Answer, Candidate, PreferenceRecord
from refreward_trl.errors import DataError

KEYS = (
    *("lr", "hr", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "model_0", "model_1", "user_id"),
    *("sample_id", "photo", "aspect", "weight"),
)
LR_COLUMNS = ("lr_image", "lr")

_ANSWERS: dict[tuple[float, float], Answer] = {(1, 0): "first", (0, 1): "second", (0.5, 0.5): "tie"}


def detects(path: Path) -> bool:
    """Tells whether a path looks like it."""
    return {"jpg_0", "jpg_1", "label_0", "label_1"} <= peek_columns(path)


def read(path: Path, options: ConvertOptions) -> list[PreferenceRecord]:
    """Reads the groups. Raises `DataError` that names every bad row."""
    return pool_rows(path, options, _add)


def _add(row: TableRow, options: ConvertOptions, pool: GroupPool) -> None:
    name = options.name
    columns = [options.columns["lr"]] if "lr" in options.columns else list(LR_COLUMNS)
    column = next((column for column in columns if row.has(column)), None)
    if column is None:
        text = f"there is no LR image in {' or '.join(columns)}"
        raise DataError(text, where=row.where, fix="name its column: --columns lr=COLUMN")
    first, second = (
        Candidate(row.image(name(f"jpg_{number}")), row.text(name(f"model_{number}"))) for number in (0, 1)
    )
    pool.add(
        Comparison(
            row.image(column),
            first,
            second,
            _preferred(row, options),
            row.text(name("aspect")) or "overall",
            row.text(name("user_id")),
            as_weight(row.values.get(name("weight")), row.where),
        ),
        where=row.where,
        sample_id=row.text(name("sample_id")),
        photo=row.text(name("photo")),
        split=row.split,
        hr_image=row.image(name("hr")) if row.has(name("hr")) else None,
    )


def _preferred(row: TableRow, options: ConvertOptions) -> Answer | None:
    if str(row.values.get(options.name("has_label"), True)).lower() in ("false", "0"):
        return None
    labels = [row.values.get(options.name(key)) for key in ("label_0", "label_1")]
    try:
        return _ANSWERS[float(labels[0]), float(labels[1])]  # type: ignore[arg-type]
    except (LookupError, TypeError, ValueError) as error:
        text = f"the labels are {labels[0]} and {labels[1]}"
        raise DataError(text, where=row.where, fix="use 1 and 0, 0 and 1, or 0.5 and 0.5 for a tie") from error
