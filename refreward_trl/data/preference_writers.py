"""Writes preference datasets: images first, what makes the dataset visible last."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.images import read_size
from refreward_trl.data.preference_records import PreferenceRecord
from refreward_trl.data.preference_rows import RANK_COLUMNS, row_of
from refreward_trl.errors import SetupError

if TYPE_CHECKING:
    from datasets import Features

IMAGE_FOLDER = "images"
SHARD_BYTES = 400 * 2**20
"""Encoded images in one parquet file; the Hub likes files below half a gigabyte."""
GROUP_BYTES = 32 * 2**20
"""Encoded images in one row group, which is held in memory while it is written."""

_ENDINGS = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"RIFF": "webp", b"II": "tif", b"MM": "tif", b"BM": "bmp"}


def write_imagefolder(records: Sequence[PreferenceRecord], folder: Path) -> None:
    """Writes `images/<sample_id>/{lr,hr,0,1,...}.<ending>`, then `metadata.jsonl` in one rename."""
    taken: set[str] = set()
    rows = []
    for record in records:
        place = f"{IMAGE_FOLDER}/{_folder_name(record.sample_id, taken)}"
        names = {"lr": record.lr_image} | ({} if record.hr_image is None else {"hr": record.hr_image})
        names |= {str(number): candidate.image for number, candidate in enumerate(record.candidates)}
        files = {name: _write_image(folder, f"{place}/{name}", source) for name, source in names.items()}
        rows.append(
            {
                "lr_file_name": files["lr"],
                "hr_file_name": files.get("hr"),
                "candidates_file_names": [files[str(number)] for number in range(len(record.candidates))],
                **row_of(record),
            }
        )
    write_metadata(folder / "metadata.jsonl", rows)


def write_metadata(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a JSON Lines file in one rename; columns that are null in all rows are left out.

    Raises:
        SetupError: It cannot be written.
    """
    used = {column for row in rows for column, value in row.items() if value is not None}
    lines = [
        json.dumps({column: value for column, value in row.items() if column in used}, ensure_ascii=False)
        for row in rows
    ]
    _write_bytes(file, ("\n".join(lines) + "\n").encode())


def write_split_column(file: Path, splits: Mapping[str, str]) -> None:
    """Gives each row of a `metadata.jsonl` its split; all else in it stays as it is.

    Args:
        file: All of its rows are in order (`read_preferences`).
        splits: By `sample_id`.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    write_metadata(file, [{**row, "split": splits[row["sample_id"]]} for row in rows])


def _folder_name(sample_id: str, taken: set[str]) -> str:
    """Returns a name that any file system takes, and that no other sample has."""
    plain = re.sub(r"[^A-Za-z0-9_@+-]", "_", sample_id)[:80]
    name, number = plain, 1
    while name.lower() in taken:
        number += 1
        name = f"{plain}.{number}"
    taken.add(name.lower())
    return name


def _write_image(folder: Path, name: str, source: ImageSource) -> str:
    content = _checked(source)
    ending = next(ending for head, ending in _ENDINGS.items() if content.startswith(head))
    _write_bytes(folder / f"{name}.{ending}", content)
    return f"{name}.{ending}"


def _checked(source: ImageSource) -> bytes:
    """Returns an image's bytes after a look at their header, which raises `DataError` for what is no image."""
    content = source.encoded()
    read_size(content, where=source.where)
    return content


def _write_bytes(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(content)
        staged.replace(path)
    except OSError as error:
        raise SetupError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    finally:
        staged.unlink(missing_ok=True)


def features() -> Features:
    """Returns the columns of a preference dataset as `datasets` knows them."""
    from datasets import Features, Image, List, Value

    text, number = Value("string"), Value("int64")
    choice = {"first": number, "second": number, "preferred": text, "aspect": text, "annotator": text}
    return Features(
        {
            "lr": Image(),
            "hr": Image(),
            "candidates": List(Image()),
            **dict.fromkeys(("sample_id", "photo", "source", "degradation", "split"), text),
            **dict.fromkeys(("generators", "kinds"), List(text)),
            **dict.fromkeys(RANK_COLUMNS.values(), List(number)),
            "choices": List({**choice, "weight": Value("float64")}),
        }
    )


def write_parquet(records: Sequence[PreferenceRecord], folder: Path) -> None:
    """Writes `<split>-00000-of-0000n.parquet` files, or `preferences.parquet` where there are no splits."""
    splits: dict[str, list[PreferenceRecord]] = {}
    for record in records:
        splits.setdefault(record.split, []).append(record)
    has_splits = set(splits) != {""}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, members in splits.items():
            _write_shards(members, folder, (split or "unsplit") if has_splits else "")
    except OSError as error:
        raise SetupError(f"cannot be written: {error.strerror or error}", where=str(folder)) from error


def _write_shards(records: Sequence[PreferenceRecord], folder: Path, split: str) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = features().arrow_schema
    staged: list[Path] = []
    writer: ParquetWriter | None = None
    written = 0
    for rows, size in _row_groups(records):
        if writer is None or written + size > SHARD_BYTES:
            if writer is not None:
                writer.close()
            staged.append(folder / f".{split}{len(staged)}.tmp")
            # Images are compressed already.
            writer, written = ParquetWriter(staged[-1], schema, compression="none"), 0
        writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
        written += size
    if writer is not None:
        writer.close()
    for number, file in enumerate(staged):
        single = len(staged) == 1 and not split
        name = "preferences" if single else f"{split or 'preferences'}-{number:05d}-of-{len(staged):05d}"
        file.replace(folder / f"{name}.parquet")


def _row_groups(records: Sequence[PreferenceRecord]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for record in records:
        row, row_size = _table_row(record)
        if rows and size + row_size > GROUP_BYTES:
            yield rows, size
            rows, size = [], 0
        rows.append(row)
        size += row_size
    if rows:
        yield rows, size


def _table_row(record: PreferenceRecord) -> tuple[dict[str, Any], int]:
    candidates = [_checked(candidate.image) for candidate in record.candidates]
    lr_image = _checked(record.lr_image)
    hr_image = None if record.hr_image is None else _checked(record.hr_image)
    row = {
        "lr": _cell(lr_image),
        "hr": None if hr_image is None else _cell(hr_image),
        "candidates": [_cell(content) for content in candidates],
        **row_of(record),
    }
    return row, sum(map(len, candidates)) + len(lr_image) + len(hr_image or b"")


def _cell(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}
