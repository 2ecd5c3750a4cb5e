"""Rows and images of a foreign table: JSON, JSON Lines and CSV that name image files, parquet and saved datasets."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.preference_files import (
    filled_image_cells,
    image_file,
    listed_image_cells,
    metadata_files,
    plain_rows,
    read_json_lines,
    table_splits,
)
from refreward_trl.data.sources import load_table, parquet_files
from refreward_trl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_FILE_ENDINGS = ("_file_names", "_file_name")


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        where: Names it in errors.
        values: Everything but images, by column.
        split: The split that it lies in; "" if there are none.
        cells: The images of a table that holds them, by column.
        folder: Where the files of a table that names them lie.
    """

    where: str
    values: Mapping[str, Any]
    split: str = ""
    cells: Mapping[str, Sequence[ImageSource]] | None = None
    folder: Path | None = None

    def has(self, column: str) -> bool:
        """Whether the row says anything in a column."""
        if self.cells is not None and column in self.cells:
            return bool(self.cells[column])
        return self._named(column) is not None

    def holds_images(self, column: str) -> bool:
        """Whether a column is one of images, and not one of texts that may or may not be names of files."""
        if self.cells is not None:
            return column in self.cells
        return any(column + ending in self.values for ending in _FILE_ENDINGS)

    def images(self, column: str) -> list[ImageSource]:
        """Returns the image, or the images, of a column.

        Raises:
            DataError: There is none, or a file is not there or lies outside the table's folder.
        """
        if self.cells is not None and column in self.cells:
            found: list[ImageSource] = list(self.cells[column])
        else:
            named = self._named(column)
            names = named if isinstance(named, list) else [] if named is None else [named]
            assert self.folder is not None or not names
            found = [image_file(name, self.folder or Path(), self.where, column) for name in names]
        if not found:
            raise DataError(f"there is no image in column {column}", where=self.where, fix="fill it, or drop the row")
        return found

    def image(self, column: str) -> ImageSource:
        """Returns the one image of a column. Raises `DataError` as `images` does, and if there are several."""
        found = self.images(column)
        if len(found) > 1:
            raise DataError(f"column {column} holds {len(found)} images, not one", where=self.where)
        return found[0]

    def text(self, column: str) -> str:
        """Returns a value as text, "" if there is none."""
        value = self.values.get(column)
        return "" if value is None else str(value)

    def _named(self, column: str) -> Any:
        if self.folder is None:
            return None
        return next(
            (v for name in (column, *(column + end for end in _FILE_ENDINGS)) if (v := self.values.get(name))), None
        )


def peek_columns(path: Path) -> set[str]:
    """Returns the columns of the first table at a path, file names counted as the images that they name; none if
    there is no table."""
    try:
        file = next(iter(metadata_files(path).values()), path)
        if file.is_dir():
            return _saved_columns(file)
        if file.suffix == ".parquet":
            return _parquet_columns(file)
        row = next(_file_rows(file, file.parent), None)
    except (DataError, OSError, ValueError):
        return set()
    names = set(row.values) if isinstance(row, TableRow) else set()
    return {name.removesuffix(_FILE_ENDINGS[0]).removesuffix(_FILE_ENDINGS[1]) for name in names}


def _saved_columns(folder: Path) -> set[str]:
    if files := parquet_files(folder):
        return _parquet_columns(files[0])
    infos = sorted(folder.glob("dataset_info.json")) or sorted(folder.glob("*/dataset_info.json"))
    return set(json.loads(infos[0].read_text(encoding="utf-8"))["features"]) if infos else set()


def _parquet_columns(file: Path) -> set[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return set(pyarrow.parquet.read_schema(file).names)
    except pyarrow.ArrowException:
        return set()


def read_rows(path: Path, images: Path | None = None) -> Iterator[TableRow | DataError]:
    """Yields the rows of a table, and what is wrong with those that cannot be read.

    Args:
        path: A `.json` (a list of objects), `.jsonl` or `.csv` file, a folder with `metadata.jsonl`, a parquet file, a
            folder of them, or a dataset of `save_to_disk`.
        images: Where the files lie that a table names; None is beside it.

    Raises:
        DataError: There is no table.
    """
    files = metadata_files(path) or ({"": path} if path.is_file() and path.suffix in (".json", ".csv") else {})
    for split, file in files.items():
        for row in _file_rows(file, images or file.parent):
            yield replace(row, split=row.split or split) if isinstance(row, TableRow) else row
    if files:
        return
    for split in table_splits(path):
        yield from _table_rows(load_table(path, split or None), str(path), split)


def _file_rows(file: Path, images: Path) -> Iterator[TableRow | DataError]:
    if file.suffix == ".jsonl":
        for where, values in read_json_lines(file):
            yield values if isinstance(values, DataError) else _file_row(where, values, images)
        return
    entries = read_csv(file) if file.suffix == ".csv" else read_json(file)
    if not isinstance(entries, list):
        raise DataError("the file holds no list of rows", where=str(file))
    for number, values in enumerate(entries):
        where = f"{file}: row {number}"
        is_row = isinstance(values, dict)
        yield _file_row(where, values, images) if is_row else DataError("not a JSON object", where=where)


def _file_row(where: str, values: dict[str, Any], images: Path) -> TableRow:
    split = values.get("split")
    return TableRow(where, values, split if isinstance(split, str) else "", folder=images)


def read_json(file: Path) -> Any:
    """Returns what a JSON file holds. Raises `DataError` if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"not readable as JSON ({error})", where=str(file)) from error


def read_csv(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a CSV file with a header, empty cells as None. Raises `DataError` if it cannot be read."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"not readable as CSV ({error})", where=str(file)) from error
    return [{key: value or None for key, value in row.items() if isinstance(key, str)} for row in rows]


def _table_rows(table: Dataset, where: str, split: str) -> Iterator[TableRow]:
    cells: dict[str, list[list[ImageSource]]] = {}
    for column, feature in table.features.items():
        if _is_image(feature):
            found = filled_image_cells(table, column, where)
            cells[column] = [[] if cell is None else [cell] for cell in found]
        else:
            with contextlib.suppress(DataError):  # not a list of images either: a column of other values
                cells[column] = listed_image_cells(table, column, where)
    rest = table.remove_columns(list(cells))
    label = f"{where}, split {split}" if split else where
    stored = plain_rows(rest) if rest.column_names else iter([{}] * len(table))
    for row, values in enumerate(stored):
        images = {column: found[row] for column, found in cells.items()}
        yield TableRow(f"{label}: row {row}", values, str(values.get("split") or split), cells=images)


def _is_image(feature: Any) -> bool:
    from datasets import Image, Value

    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, Image) or (isinstance(feature, Value) and "binary" in feature.dtype)
