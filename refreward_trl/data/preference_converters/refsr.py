"""Groups as folders with a table of ranks, as RefSR-18K is described: NOT VERIFIED ON THE RELEASE.

Whoever wrote this could not see the release, so the layout is a guess that can be changed:

    DATA/ranks.csv (or .json, .jsonl; --ranks-table names another)
    DATA/<group>/lr.png            the LR image (--lr-name)
    DATA/<group>/hr.png            the HR image, if there is one (--hr-name)
    DATA/<group>/<candidate>.png   everything else; the file's name is taken for the method's

The table has one of three forms: a row for each candidate (columns `group`, `candidate`, `rank`, and `aspect` if
there are several); a row for each group with a column for each candidate; or JSON with the ranks of a group as
`{"group": ..., "ranks": {candidate: rank}}` or `{group: {candidate: rank}}`. A lower rank is better, equal is a tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refreward_trl.data.image_sources import ImageFile
from refreward_trl.data.images import list_images
from refreward_trl.data.preference_converters.options import ConvertOptions
from refreward_trl.data.preference_converters.tables import read_csv, read_json
from refreward_trl.data.preference_files import read_json_lines
from refreward_trl.data.preference_records import ASPECTS, Candidate, PreferenceRecord
from refreward_trl.data.preference_rows import LEAST_CANDIDATES
from refreward_trl.data.sources import report_problems
from refreward_trl.errors import DataError

KEYS = ("group", "candidate", "rank", "ranks", "aspect", "photo", "split")
TABLES = ("ranks.csv", "ranks.jsonl", "ranks.json")

Ranks = dict[str, dict[str, int]]
"""Aspect -> candidate -> rank."""


def detects(path: Path) -> bool:
    """Tells whether a path looks like it."""
    return path.is_dir() and any((path / name).is_file() for name in TABLES)


def read(path: Path, options: ConvertOptions) -> list[PreferenceRecord]:
    """Reads the groups. Raises `DataError` that names everything that is wrong."""
    if not path.is_dir():
        raise DataError("not a folder with a folder for each group", where=str(path))
    table = options.ranks_table or next((path / name for name in TABLES if (path / name).is_file()), None)
    if table is None:
        raise DataError(f"there is no {', '.join(TABLES)}", where=str(path), fix="name it: --ranks-table FILE")
    problems: list[DataError] = []
    ranks, texts = _read_table(table, options, problems)
    records = []
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    for folder in folders:
        try:
            records.append(_record(folder, ranks.pop(folder.name, None), texts.get(folder.name, {}), options))
        except DataError as error:
            problems.append(error)
    problems += [
        DataError(f"group {group!r} has no folder", where=str(table), fix="add it, or drop its rows")
        for group in ranks
    ]
    report_problems(problems, max(len(folders), len(problems)), str(path))
    return records


def _record(folder: Path, ranks: Ranks | None, texts: Mapping[str, str], options: ConvertOptions) -> PreferenceRecord:
    images = {file.stem: file for file in list_images(folder)}
    lr_file, hr_file = images.pop(options.lr_name, None), images.pop(options.hr_name, None)
    if lr_file is None:
        text = f"there is no LR image {options.lr_name}.*; there are: {', '.join(images) or 'no images'}"
        raise DataError(text, where=str(folder), fix="say what it is called: --lr-name NAME")
    if len(images) < LEAST_CANDIDATES:
        text = f"{len(images)} candidates, and there is nothing to compare"
        raise DataError(text, where=str(folder), fix="add another candidate, or drop the folder")
    if ranks is None:
        raise DataError("the table of ranks has no such group", where=str(folder), fix="add it, or drop the folder")
    names = list(images)
    for found in ranks.values():
        if unknown := sorted(found.keys() - images.keys()):
            text = f"the table ranks {', '.join(unknown)}, and there is no such image"
            raise DataError(text, where=str(folder), fix=f"there are {', '.join(names)}")
    return PreferenceRecord(
        sample_id=folder.name,
        photo=texts.get("photo") or folder.name,
        lr_image=ImageFile(lr_file),
        candidates=tuple(Candidate(ImageFile(images[name]), name) for name in names),
        ranks={aspect: tuple(found.get(name) for name in names) for aspect, found in ranks.items()},
        source=options.source or "unknown",
        hr_image=None if hr_file is None else ImageFile(hr_file),
        split=texts.get("split", ""),
    )


def _read_table(
    table: Path, options: ConvertOptions, problems: list[DataError]
) -> tuple[dict[str, Ranks], dict[str, dict[str, str]]]:
    """Returns the ranks by group, and what else the table says about a group."""
    ranks: dict[str, Ranks] = {}
    texts: dict[str, dict[str, str]] = {}
    for where, row in _table_rows(table, options):
        try:
            if isinstance(row, DataError):
                raise row
            group, aspect, found = _read_row(row, where, options)
            known = ranks.setdefault(group, {}).setdefault(aspect, {})
            if repeated := sorted(known.keys() & found.keys()):
                raise DataError(f"{repeated[0]} of group {group!r} has a rank already", where=where)
            known |= found
            values = {key: row.get(options.name(key)) for key in ("photo", "split")}
            texts.setdefault(group, {}).update({key: str(value) for key, value in values.items() if value})
        except DataError as error:
            problems.append(error)
    return ranks, texts


def _table_rows(table: Path, options: ConvertOptions) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    if table.suffix == ".jsonl":
        yield from read_json_lines(table)
        return
    content = read_json(table) if table.suffix == ".json" else read_csv(table)
    if isinstance(content, dict):
        content = [{options.name("group"): name, options.name("ranks"): ranks} for name, ranks in content.items()]
    if not isinstance(content, list):
        raise DataError("the file holds no ranks", where=str(table), fix="see `refreward data convert --help`")
    for number, row in enumerate(content):
        where = f"{table}: row {number}"
        yield where, row if isinstance(row, dict) else DataError("not a JSON object", where=where)


def _read_row(row: Mapping[str, Any], where: str, options: ConvertOptions) -> tuple[str, str, dict[str, int]]:
    """Returns the group, the aspect and the ranks by candidate."""
    group = row.get(options.name("group"))
    if not isinstance(group, str | int) or group == "":
        text = f"there is no {options.name('group')}; there are: {', '.join(row)}"
        raise DataError(text, where=where, fix="say what it is called: --columns group=NAME")
    aspect = str(row.get(options.name("aspect")) or "overall")
    if aspect not in ASPECTS:
        raise DataError(f"unknown aspect {aspect!r}", where=where, fix=f"one of {', '.join(ASPECTS)}")
    if options.name("candidate") in row:
        entries: Any = {str(row[options.name("candidate")]): row.get(options.name("rank"))}
    elif options.name("ranks") in row:
        entries = row[options.name("ranks")]
    else:
        others = {options.name(key) for key in KEYS}
        entries = {name: value for name, value in row.items() if name not in others}
    if not isinstance(entries, Mapping) or not entries:
        raise DataError(f"the ranks are {entries!r}, not {{candidate: rank}}", where=where)
    found = {Path(name).stem: _rank(value, name, where) for name, value in entries.items() if value is not None}
    return str(group), aspect, found


def _rank(value: Any, name: str, where: str) -> int:
    try:
        number = float(value)
        if isinstance(value, bool) or number % 1:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise DataError(f"the rank of {name} is {value!r}, no whole number", where=where) from error
    return int(number)
