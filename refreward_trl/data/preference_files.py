"""Preference datasets on disk: an imagefolder whose `metadata.jsonl` names the images, or parquet that holds them.

Columns: `sample_id`, `photo`, `lr_file_name`, `hr_file_name`, `candidates_file_names`, `generators`, `kinds`, `ranks`,
`consistency_ranks`, `naturalness_ranks`, `choices`, `source`, `degradation`, `split`. In parquet the images are in the
columns `lr`, `hr` and `candidates`: `datasets` makes the same of the imagefolder, so both are ordinary Hugging Face
datasets. Only `sample_id`, the LR image and the candidates must be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refreward_trl.data.image_sources import ImageCell, ImageFile, ImageSource, check_path
from refreward_trl.data.preference_records import PreferenceRecord
from refreward_trl.data.preference_rows import RowImages, check_unique, parse_row
from refreward_trl.data.preference_writers import write_imagefolder, write_parquet
from refreward_trl.data.sources import image_cells, load_table, parquet_files, report_problems, split_files
from refreward_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["imagefolder", "parquet"]

METADATA_FILE = "metadata.jsonl"
_ROWS_AT_ONCE = 256
_LAYOUTS = (
    "name a folder with metadata.jsonl (or with such a folder for each split), a parquet file, a folder of them, or a "
    "dataset of `save_to_disk`; `refreward data convert` reads other layouts"
)


@dataclass
class Scan:
    """What a dataset holds, after all rows have been looked at and no pixels.

    Attributes:
        records: The rows that are in order.
        places: Where each of them stands.
        problems: Everything that is wrong with the others.
        rows: How many there are.
    """

    records: list[PreferenceRecord] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)
    rows: int = 0

    def add(
        self, values: Mapping[str, Any], images: RowImages | None, count: int | None, where: str, split: str
    ) -> None:
        """Takes one row, see `parse_row`; `split` is where it lies, unless the row says itself."""
        self.rows += 1
        record, problems = parse_row(values, images, count, where)
        self.problems += problems
        if record is not None:
            self.records.append(record if record.split else replace(record, split=split))
            self.places.append(where)


def read_preferences(source: str | Path, *, split: str | None = None) -> list[PreferenceRecord]:
    """Lists the groups of a preference dataset in their order; no pixels are read.

    Args:
        source: A folder with `metadata.jsonl`, or with subfolders for the splits that have one each; a `.jsonl` file;
            a parquet file, or a folder of them; or a dataset that `save_to_disk` wrote.
        split: One of its splits, or several: "train+val". None takes all.

    Raises:
        ConfigError: There is no such split.
        DataError: Nothing is there, or rows are wrong; the first ten are named and all counted.
    """
    scan = scan_preferences(source, split=split)
    report_problems(scan.problems, max(scan.rows, len(scan.problems)), str(source))
    return scan.records


def scan_preferences(source: str | Path, *, split: str | None = None) -> Scan:
    """Does what `read_preferences` does, and returns what is wrong instead of raising it.

    Raises:
        ConfigError: There is no such split.
        DataError: Nothing is there.
    """
    path = Path(source)
    if not path.exists():
        raise DataError("the dataset does not exist", where=str(path), fix=_LAYOUTS)
    scan = Scan()
    if metadata := metadata_files(path):
        for name, file in metadata.items():
            _scan_metadata(file, name, scan)
    else:
        for name in table_splits(path):
            _scan_table(load_table(path, name or None), str(path), name, scan)
    if scan.rows == 0:
        raise DataError("the dataset has no rows", where=str(path), fix=_LAYOUTS)
    scan.problems += check_unique([record.sample_id for record in scan.records], scan.places)
    return scan if split is None else _only(scan, split, str(path))


def _only(scan: Scan, split: str, where: str) -> Scan:
    present = sorted({record.split for record in scan.records} - {""})
    for name in split.split("+"):
        if name not in present and not scan.problems:
            raise ConfigError(
                f"{where} has no split {name!r}",
                where="split",
                fix=f"Splits: {', '.join(present)}" if present else "make some: refreward data split",
            )
    chosen = [number for number, record in enumerate(scan.records) if record.split in split.split("+")]
    records = [scan.records[number] for number in chosen]
    return Scan(records, [scan.places[number] for number in chosen], scan.problems, scan.rows)


def metadata_files(path: Path) -> dict[str, Path]:
    """Returns the metadata files of an imagefolder by split; none for other datasets."""
    if path.is_file():
        return {"": path} if path.suffix == ".jsonl" else {}
    if (path / METADATA_FILE).is_file():
        return {"": path / METADATA_FILE}
    return {file.parent.name: file for file in sorted(path.glob(f"*/{METADATA_FILE}"))}


def _scan_metadata(file: Path, split: str, scan: Scan) -> None:
    for where, values in read_json_lines(file):
        if isinstance(values, DataError):
            scan.problems.append(values)
            scan.rows += 1
            continue
        images, problems = _image_files(values, file.parent, where)
        scan.problems += problems
        names = values.get("candidates_file_names")
        scan.add(values, images, len(names) if isinstance(names, list) else None, where, split)


def read_json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Yields where each line of a JSON Lines file stands, and the object that it holds or what is wrong with it.

    Raises:
        DataError: The file is no text, or cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text ({error})", where=str(file)) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, DataError(f"not valid JSON ({error})", where=where, fix="write one JSON object a line")
            continue
        if isinstance(values, dict):
            yield where, values
        else:
            yield where, DataError("not a JSON object", where=where, fix="write one JSON object a line")


def _image_files(values: Mapping[str, Any], folder: Path, where: str) -> tuple[RowImages | None, list[DataError]]:
    problems: list[DataError] = []

    def found(name: Any, column: str) -> ImageFile | None:
        try:
            return image_file(name, folder, where, column)
        except DataError as error:
            problems.append(error)
            return None

    names = values.get("candidates_file_names")
    if not isinstance(names, list):
        text = "is missing" if names is None else f"is {names!r}, not a list of files"
        problems.append(DataError(f"candidates_file_names {text}", where=where, fix="list the candidates' files"))
        names = []
    lr_image = found(values.get("lr_file_name"), "lr_file_name")
    hr_name = values.get("hr_file_name")
    hr_image = None if hr_name is None else found(hr_name, "hr_file_name")
    candidates = [found(name, f"candidates_file_names[{number}]") for number, name in enumerate(names)]
    if problems or lr_image is None:
        return None, problems
    return RowImages(lr_image, tuple(file for file in candidates if file is not None), hr_image), []


def image_file(name: Any, folder: Path, where: str, column: str) -> ImageFile:
    """Returns the file that a cell names, which must lie in `folder`.

    Raises:
        DataError: It does not, it is not there, or the cell is no text.
    """
    if not isinstance(name, str) or not name:
        text = "is missing" if name is None else f"is {name!r}, not the name of a file"
        raise DataError(f"{column} {text}", where=where, fix="write a path relative to the metadata file")
    path = folder / name
    check_path(str(path), str(folder), f"{where}, {column}")
    if not path.is_file():
        raise DataError(f"{column}: there is no file {name}", where=where, fix="add it, or drop the row")
    return ImageFile(path)


def table_splits(path: Path) -> list[str]:
    """Returns the names by which `load_table` knows the splits of a dataset; "" where it has none."""
    if path.is_file():
        return [""]
    if files := parquet_files(path):
        return list(split_files(files)) if any("-of-" in file.stem for file in files) else [""]
    if (path / "dataset_dict.json").is_file():
        try:
            return [str(name) for name in json.loads((path / "dataset_dict.json").read_text())["splits"]]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"dataset_dict.json cannot be read ({error})", where=str(path)) from error
    if (path / "dataset_info.json").is_file():
        return [""]
    raise DataError("there is no preference dataset here", where=str(path), fix=_LAYOUTS)


def _scan_table(table: Dataset, where: str, split: str, scan: Scan) -> None:
    if missing := [name for name in ("sample_id", "lr", "candidates") if name not in table.column_names]:
        raise DataError(
            f"no column {' and '.join(missing)}; there are: {', '.join(table.column_names)}",
            where=where,
            fix="`refreward data convert` reads other layouts",
        )
    lr_images = filled_image_cells(table, "lr", where)
    hr_images = filled_image_cells(table, "hr", where) if "hr" in table.column_names else [None] * len(table)
    candidates = listed_image_cells(table, "candidates", where)
    rest = table.remove_columns([name for name in ("lr", "hr", "candidates") if name in table.column_names])
    label = f"{where}, split {split}" if split else where
    own_split = "" if "split" in table.column_names else split
    for row, values in enumerate(plain_rows(rest)):
        lr_image, hr_image, place = lr_images[row], hr_images[row], f"{label}: row {row}"
        if lr_image is None:
            scan.problems.append(DataError("the LR image is missing", where=place, fix="fill it, or drop the row"))
        images = None if lr_image is None else RowImages(lr_image, tuple(candidates[row]), hr_image)
        scan.add(values, images, len(candidates[row]), place, own_split)


def listed_image_cells(table: Dataset, column: str, where: str) -> list[list[ImageSource]]:
    """Returns the images of a column of lists of images.

    Raises:
        DataError: The column holds no lists of images.
    """
    import pyarrow.types as kinds

    single = table.select_columns([column]).with_format("arrow")
    found = single.data.schema.field(column).type
    entry = found.value_type if kinds.is_list(found) or kinds.is_large_list(found) else None
    has_bytes = entry is not None and kinds.is_struct(entry) and {"bytes", "path"} <= {f.name for f in entry}
    if not has_bytes and not (entry is not None and (kinds.is_binary(entry) or kinds.is_large_binary(entry))):
        raise DataError(f"column {column} holds no lists of images ({table.features[column]})", where=where)
    counts = [len(cell) if cell.is_valid else 0 for cell in _arrow_cells(single)]
    return [
        [ImageCell(single, where, column, row, position) for position in range(count)]
        for row, count in enumerate(counts)
    ]


def filled_image_cells(table: Dataset, column: str, where: str) -> list[ImageCell | None]:
    """Returns the images of a column; None where a cell is empty. Raises `DataError` if it holds no images."""
    cells = image_cells(table, column, where)
    if not cells:
        return []
    filled = (
        cell.is_valid and (cell["bytes"].is_valid or cell["path"].is_valid) for cell in _arrow_cells(cells[0].table)
    )
    return [cell if is_there else None for cell, is_there in zip(cells, filled, strict=True)]


def plain_rows(table: Dataset) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table as they are stored. `datasets` itself would decode what a column says it holds, and
    open any file, and fetch any address, that a cell names."""
    for part in table.with_format("arrow").iter(_ROWS_AT_ONCE):
        rows: Any = part
        yield from rows.to_pylist()


def _arrow_cells(single: Dataset) -> Iterator[Any]:
    """Yields the cells of a table of one column without copying their bytes."""
    for part in single.with_format("arrow").iter(_ROWS_AT_ONCE):
        table: Any = part
        yield from table.column(0)


def write_preferences(
    records: Sequence[PreferenceRecord], folder: str | Path, *, format: Format = "imagefolder"
) -> None:
    """Writes a preference dataset; images that are stored in files keep their bytes.

    Args:
        records: In the order of the rows.
        folder: Made here, or empty.
        format: "imagefolder" (`metadata.jsonl` and `images/`) or "parquet" (a file for each split).

    Raises:
        ConfigError: The folder holds something, or there is no such format.
        DataError: An image cannot be read, or a `sample_id` repeats.
        SetupError: A file cannot be written.
    """
    target = Path(folder)
    check_new_folder(target)
    if format not in ("imagefolder", "parquet"):
        raise ConfigError(f"there is no format {format!r}", where="format", fix="imagefolder or parquet")
    names = [record.sample_id for record in records]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"sample_id {repeated!r} repeats", where=str(target), fix="make sample_id unique")
    write = write_imagefolder if format == "imagefolder" else write_parquet
    write(records, target)


def check_new_folder(folder: Path) -> None:
    """Raises `ConfigError` if a dataset cannot be written to a folder because there is something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("something is there already", where=str(folder), fix="name a new folder")
