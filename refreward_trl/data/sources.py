"""Where pairs come from: the default photos, folders, and Hugging Face datasets on disk.

`find_pairs` lists what there is; it reads no pixels and decides nothing about crops or degradations.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import DecompressionBombError

from refreward_trl.data.image_sources import ImageCell, ImageFile, ImageSource, check_path
from refreward_trl.data.images import list_images
from refreward_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

PHOTOS = Path(__file__).resolve().parents[1] / "assets" / "photos"
"""The folder of the default photos, their licences and their split."""

IMAGE_COLUMNS = ("hr_image", "lr_image")
MAX_LISTED = 10
MOST_UNPACKED = 20
"""Bytes that one byte of a parquet file may unpack to."""
LARGEST_UNSEEN = 64 * 2**20
"""Bytes that any parquet file may unpack to."""

_LAYOUTS = (
    "use `hr/` and/or `lr/` subfolders with equal names, a flat folder of HR images, `lr:FOLDER` for a flat folder of "
    "LR images, or a Hugging Face dataset with the columns hr_image and/or lr_image"
)


@dataclass(frozen=True)
class OtherColumns:
    """What a row of a Hugging Face dataset holds besides the pair, or nothing."""

    table: Dataset | None = None
    dataset: str = ""
    row: int = 0

    def read(self) -> dict[str, Any]:
        """Returns the values by column; images are decoded by `datasets`."""
        if self.table is None:
            return {}
        where = f"{self.dataset}: row {self.row}, columns {', '.join(self.table.column_names)}"
        # `datasets` would open any file, and fetch any address, that a cell names.
        stored: Any = self.table.with_format("arrow")[self.row : self.row + 1]
        for path in _paths(stored.to_pylist()):
            check_path(path, self.dataset, where)
        try:
            return dict(self.table[self.row])
        except (OSError, ValueError, SyntaxError, TypeError, DecompressionBombError) as error:
            raise DataError(
                f"a column besides the pair cannot be read ({error})",
                where=where,
                fix="mend it, or drop the column",
            ) from error


def _paths(value: Any) -> Iterator[str]:
    """Yields the files that stand in for the bytes of images, sounds and the like, however deep in a cell."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"} and value["bytes"] is None and value["path"]:
            yield value["path"]
        value = list(value.values())
    for entry in value if isinstance(value, list) else ():
        yield from _paths(entry)


@dataclass(frozen=True)
class PairSource:
    """One photo: its HR image, its LR image, or both; and whatever else its row holds."""

    photo: str
    hr_image: ImageSource | None
    lr_image: ImageSource | None
    others: OtherColumns = OtherColumns()


def find_pairs(source: str | Path, split: str | None) -> list[PairSource]:
    """Lists the photos of a source, in a fixed order; `refreward_trl.data.pairs.load_pairs` explains both arguments.

    Raises:
        ConfigError: The split does not exist.
        DataError: Nothing is there, or files do not match; all of them are named at once.
    """
    if source == "default":
        return _default_photos(split or "train")
    text = str(source)
    kind, folder = (text[:2], text[3:]) if text.startswith(("hr:", "lr:")) else (None, text)
    path = Path(folder)
    if not path.exists():
        raise DataError("the dataset does not exist", where=folder, fix=f"give a local path: {_LAYOUTS}")
    if kind is None and _is_huggingface(path):
        return _huggingface_pairs(path, split)
    if split and (path / split).is_dir():
        path = path / split
        if kind is None and _is_huggingface(path):
            return _huggingface_pairs(path, None)
    if kind is None and ((path / "hr").is_dir() or (path / "lr").is_dir()):
        return _paired_folder(path)
    return _flat_folder(path, is_lr=kind == "lr")


class DataProblems(DataError):
    """Several things that are wrong with a source; `problems` has all of them, also those that are not listed."""

    def __init__(self, problems: Sequence[DataError], checked: int, where: str, listed: int) -> None:
        self.problems = list(problems)
        lines = [f"\n  {problem.where}: {problem.what}" for problem in problems[:listed]]
        if len(problems) > listed:
            lines.append(f"\n  ... and {len(problems) - listed} more")
        fixes = dict.fromkeys(problem.fix for problem in problems if problem.fix)
        super().__init__(
            f"{len(problems)} of {checked} entries cannot be used:{''.join(lines)}",
            where=where,
            fix="; ".join(list(fixes)[:3]) or None,
        )


def report_problems(problems: Sequence[DataError], checked: int, where: str, *, listed: int = MAX_LISTED) -> None:
    """Raises one error that lists the first problems and counts all; returns when there are none."""
    if problems:
        raise DataProblems(problems, checked, where, listed)


def default_photos(split: str) -> list[Path]:
    """Returns the default photos of a split ("train", "heldout", "val", "test"), or of several: "train+heldout"."""
    manifest = json.loads((PHOTOS / "split.json").read_text())
    splits: dict[str, str] = manifest["splits"]
    names = sorted(set(splits.values()))
    wanted = split.split("+")
    for part in wanted:
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"the default photos have no split {part!r}", where="split", fix=f"{hint}Splits: {', '.join(names)}"
            )
    return [PHOTOS / f"{name}.webp" for name in sorted(splits) if splits[name] in wanted]


def _default_photos(split: str) -> list[PairSource]:
    return [PairSource(path.stem, ImageFile(path), None) for path in default_photos(split)]


def _flat_folder(folder: Path, *, is_lr: bool) -> list[PairSource]:
    images = _images_by_name(folder, recursive=False)
    files = {name: ImageFile(path) for name, path in images.items()}
    return [PairSource(name, None if is_lr else file, file if is_lr else None) for name, file in files.items()]


def _paired_folder(folder: Path) -> list[PairSource]:
    sides = {side: _images_by_name(folder / side) for side in ("hr", "lr") if (folder / side).is_dir()}
    if len(sides) == 1:
        side, images = next(iter(sides.items()))
        files = [(name, ImageFile(path)) for name, path in images.items()]
        return [PairSource(n, f if side == "hr" else None, f if side == "lr" else None) for n, f in files]
    problems = missing_partners(sides["hr"], sides["lr"], folder / "hr", folder / "lr")
    report_problems(problems, sum(map(len, sides.values())), str(folder))
    hr, lr = sides["hr"], sides["lr"]
    return [PairSource(name, ImageFile(hr[name]), ImageFile(lr[name])) for name in hr]


def pair_folders(lr: Path, hr: Path | None) -> tuple[list[PairSource], list[DataError]]:
    """Pairs the images of two folders by their names, for a caller that goes on to look for more that is wrong.

    Args:
        lr: Folder of LR images.
        hr: Folder of HR images, or None.

    Returns:
        The photos that have all their images, in the order of their names, and everything that is wrong.
    """
    lr_files, problems = images_by_name(lr)
    if hr is None:
        return [PairSource(name, None, ImageFile(path)) for name, path in lr_files.items()], problems
    hr_files, found = images_by_name(hr)
    problems += found
    if lr_files and hr_files:
        problems += missing_partners(hr_files, lr_files, hr, lr)
    whole = [name for name in lr_files if name in hr_files]
    return [PairSource(name, ImageFile(hr_files[name]), ImageFile(lr_files[name])) for name in whole], problems


def missing_partners(
    first: Mapping[str, Path], second: Mapping[str, Path], first_folder: Path, second_folder: Path
) -> list[DataError]:
    """Names the images of either folder that the other has no image of the same name for."""
    return [
        DataError(f"no image of this name in {other}", where=str(path), fix="add the other image, or remove it")
        for files, partners, other in ((first, second, second_folder), (second, first, first_folder))
        for name, path in files.items()
        if name not in partners
    ]


def _images_by_name(folder: Path, *, recursive: bool = True) -> dict[str, Path]:
    """Returns the images of a folder by relative path without suffix, which must be unique."""
    list_images(folder)  # a folder that is not there is an error of its own
    images, problems = images_by_name(folder, recursive=recursive)
    if not images:
        raise DataError("the folder holds no images", where=str(folder), fix=_LAYOUTS)
    report_problems(problems, len(images) + len(problems), str(folder))
    return images


def images_by_name(folder: Path, *, recursive: bool = True) -> tuple[dict[str, Path], list[DataError]]:
    """Returns the images of a folder by relative path without suffix, and what is wrong with the folder: it is not
    there, it is empty, or names repeat."""
    try:
        paths = list_images(folder, recursive=recursive)
    except DataError as error:
        return {}, [error]
    images: dict[str, Path] = {}
    problems: list[DataError] = []
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in images:
            problems.append(DataError(f"same name as {images[name].name}", where=str(path), fix="rename one of them"))
        images.setdefault(name, path)
    if not images:
        problems.append(DataError("the folder holds no images", where=str(folder), fix="name a folder of images"))
    return images, problems


def _is_huggingface(path: Path) -> bool:
    if path.is_file():
        return True
    names = ("dataset_info.json", "dataset_dict.json", "metadata.csv", "metadata.jsonl", "metadata.parquet")
    return any((path / name).is_file() for name in names) or bool(parquet_files(path))


def parquet_files(folder: Path) -> list[Path]:
    """Finds parquet files where `datasets` and the Hub put them: in the folder, or in its `data` subfolder."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def _huggingface_pairs(path: Path, split: str | None) -> list[PairSource]:
    table = load_table(path, split)
    present = [name for name in IMAGE_COLUMNS if name in table.column_names]
    if not present:
        near = difflib.get_close_matches("hr_image", table.column_names, n=1, cutoff=0.4)
        hint = (
            f"rename column {near[0]!r} to hr_image or lr_image" if near else "name the columns hr_image or lr_image"
        )
        raise DataError(
            f"neither column hr_image nor lr_image; there are: {', '.join(table.column_names)}",
            where=str(path),
            fix=f"{hint} (in an imagefolder's metadata: hr_image_file_name, lr_image_file_name)",
        )
    names = [f"{name}_file_name" for name in IMAGE_COLUMNS]
    if unread := [name for name in table.column_names if name in names]:
        raise DataError(
            f"column {unread[0]} holds {table.features[unread[0]].dtype}, not names of files",
            where=str(path),
            fix="write a path relative to the metadata file into every row",
        )
    if len(table) == 0:
        raise DataError("the dataset has no rows", where=str(path))
    cells: dict[str, Sequence[ImageCell | None]] = {name: image_cells(table, name, str(path)) for name in present}
    if "sample_id" in table.column_names:
        _check_ids(table["sample_id"], str(path))
        photos = [str(name) for name in table["sample_id"]]
    else:
        photos = [f"{row:06d}" for row in range(len(table))]
    own = [name for name in (*IMAGE_COLUMNS, "sample_id") if name in table.column_names]
    rest = table.remove_columns(own) if len(own) < len(table.column_names) else None
    absent: list[ImageCell | None] = [None] * len(table)
    hr_cells, lr_cells = (cells.get(name, absent) for name in IMAGE_COLUMNS)
    return [
        PairSource(photo, hr_image, lr_image, OtherColumns(rest, str(path), row))
        for row, (photo, hr_image, lr_image) in enumerate(zip(photos, hr_cells, lr_cells, strict=True))
    ]


def _check_ids(names: Sequence[Any], where: str) -> None:
    first: dict[str, int] = {}
    problems = []
    for row, name in enumerate(names):
        if name is None:
            problems.append(
                DataError("sample_id is empty", where=f"row {row}", fix="give every row a sample_id, or none")
            )
        elif first.setdefault(str(name), row) != row:
            text = f"sample_id {str(name)!r} repeats row {first[str(name)]}"
            problems.append(DataError(text, where=f"row {row}", fix="make sample_id unique"))
    report_problems(problems, len(names), where)


def image_cells(table: Dataset, column: str, where: str) -> list[ImageCell]:
    """Returns the images of a column, one for each row. Raises `DataError` if it holds no images."""
    from datasets import Image, Value

    feature = table.features[column]
    if isinstance(feature, Value) and "binary" not in feature.dtype:
        raise DataError(
            f"column {column} holds {feature.dtype}, not images",
            where=where,
            fix="store it as an Image column (`cast_column(name, datasets.Image())`)",
        )
    try:
        single = table.select_columns([column]).cast_column(column, Image(decode=False))
    except (ValueError, TypeError) as error:
        raise DataError(f"column {column} holds no images ({feature})", where=where) from error
    return [ImageCell(single, where, column, row) for row in range(len(single))]


def load_table(path: Path, split: str | None) -> Dataset:
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        if path.is_file() or parquet_files(path):
            files = [path] if path.is_file() else parquet_files(path)
            _check_unpacked_size(files)
            loaded: Any = datasets.load_dataset("parquet", data_files=split_files(files))
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            _check_saved_files(path)
            loaded = datasets.load_from_disk(str(path))
        else:
            _check_unpacked_size(list(path.glob("*.parquet")))
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
    except IndexError as error:  # what `datasets` says of metadata that list nothing
        raise DataError("the dataset has no rows", where=str(path), fix=_LAYOUTS) from error
    except (
        *(DatasetsError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError),
        pyarrow.ArrowException,
    ) as error:
        cause = error.__cause__ or error
        raise DataError(f"the dataset cannot be read ({cause})", where=str(path), fix=_LAYOUTS) from error
    if not isinstance(loaded, dict):
        return loaded
    name = split or ("train" if "train" in loaded else next(iter(loaded)))
    if name not in loaded:
        raise ConfigError(f"{path} has no split {name!r}", where="split", fix=f"Splits: {', '.join(loaded)}")
    return loaded[name]


def _check_unpacked_size(files: Sequence[Path]) -> None:
    """Raises `DataError` for parquet files that unpack to far more than their size, which tables of images never do;
    `datasets` unpacks them onto the disk, through the memory."""
    import pyarrow.parquet

    for file in files:
        facts = pyarrow.parquet.read_metadata(file)
        unpacked = sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))
        if unpacked > max(LARGEST_UNSEEN, MOST_UNPACKED * file.stat().st_size):
            raise DataError(
                f"it unpacks from {file.stat().st_size} to {unpacked} bytes, as no table of images does",
                where=str(file),
                fix="write the table again without compression, if it is your own",
            )


def _check_saved_files(folder: Path) -> None:
    """Raises `DataError` if a dataset of `save_to_disk` names files or splits outside its folder."""
    splits = _saved(folder / "dataset_dict.json").get("splits", [])
    states = [_saved(part / "state.json") for part in (folder, *(folder / str(split) for split in splits))]
    files = [file["filename"] for state in states for file in state.get("_data_files", [])]
    for name in (*splits, *files):
        if "\0" in name or name != Path(name).name:
            raise DataError(f"{name!r} leads out of the dataset", where=str(folder), fix="save the dataset again")


def _saved(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def split_files(files: list[Path]) -> dict[str, list[str]]:
    """Groups parquet files by split, which the Hub writes before the first dash: `train-00000-of-00002.parquet`."""
    splits: dict[str, list[str]] = {}
    for file in files:
        split = file.stem.split("-")[0] if "-of-" in file.stem else "train"
        splits.setdefault(split, []).append(str(file))
    return splits
