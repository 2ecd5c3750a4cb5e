"""Label Studio's JSON export (the full one, not JSON-MIN) of pairwise tasks.

A task's `data` names the images: `lr`, `left` and `right`, or other names given by `--columns`. Each annotation is one
answer: a result of type "pairwise" whose value's `selected` is "left" or "right", or a result of type "choices" whose
one choice is left, right or tie (the Pairwise tag itself knows no ties). The tag's name is the aspect if it is one of
ours. Cancelled annotations and predictions are left out. Files of local storage (`/data/local-files/?d=PATH`) and
uploads (`/data/upload/...`) are looked for in the folder of images; nothing is downloaded.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refreward_trl.data.image_sources import ImageFile
from refreward_trl.data.preference_converters.options import ConvertOptions
from refreward_trl.data.preference_converters.pooling import Comparison, GroupPool
from refreward_trl.data.preference_converters.tables import read_json
from refreward_trl.data.preference_files import image_file
from refreward_trl.data.preference_records import ASPECTS, Answer, Candidate, PreferenceRecord
from refreward_trl.data.sources import report_problems
from refreward_trl.errors import DataError

KEYS = ("lr", "hr", "left", "right", "left_generator", "right_generator", "sample_id", "photo", "split")

_ANSWERS: dict[str, Answer] = {
    "left": "first",
    "right": "second",
    **dict.fromkeys(("tie", "equal", "same", "both", "neither"), "tie"),
}


def detects(path: Path) -> bool:
    """Tells whether a path looks like it."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        tasks = read_json(path)
    except DataError:
        return False
    first = tasks[0] if isinstance(tasks, list) and tasks else None
    return isinstance(first, dict) and isinstance(first.get("data"), dict) and "annotations" in first


def read(path: Path, options: ConvertOptions) -> list[PreferenceRecord]:
    """Reads the groups. Raises `DataError` that names every bad task."""
    tasks = read_json(path)
    if not isinstance(tasks, list):
        raise DataError("the file holds no list of tasks", where=str(path), fix="export from Label Studio as JSON")
    pool = GroupPool(options.source or "human")
    problems: list[DataError] = []
    for number, task in enumerate(tasks):
        where = f"{path}: task {task.get('id', number) if isinstance(task, Mapping) else number}"
        try:
            _add(task, where, options.images or path.parent, options, pool)
        except DataError as error:
            problems.append(error)
    report_problems(problems, len(tasks), str(path))
    return pool.records()


def _add(task: Any, where: str, folder: Path, options: ConvertOptions, pool: GroupPool) -> None:
    data = task.get("data") if isinstance(task, Mapping) else None
    annotations = task.get("annotations") if isinstance(task, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(annotations, list):
        raise DataError("not a task with data and annotations", where=where, fix="export from Label Studio as JSON")
    lr_image, left, right = (_image(data, key, folder, where, options) for key in ("lr", "left", "right"))
    has_hr = data.get(options.name("hr")) is not None
    hr_image = _image(data, "hr", folder, where, options) if has_hr else None
    texts = {key: str(data.get(options.name(key)) or "") for key in KEYS}
    first, second = Candidate(left, texts["left_generator"]), Candidate(right, texts["right_generator"])
    answers = [answer for annotation in annotations for answer in _answers(annotation, where)]
    for preferred, aspect, annotator in answers or [(None, "overall", "")]:
        pool.add(
            Comparison(lr_image, first, second, preferred, aspect, annotator),
            where=where,
            sample_id=texts["sample_id"],
            photo=texts["photo"],
            split=texts["split"],
            hr_image=hr_image,
        )


def _image(data: Mapping[str, Any], key: str, folder: Path, where: str, options: ConvertOptions) -> ImageFile:
    name = data.get(options.name(key))
    if name is None:
        raise DataError(
            f"the task's data has no {options.name(key)!r}; there are: {', '.join(data)}",
            where=where,
            fix=f"say what it is called: --columns {key}=NAME",
        )
    return image_file(_local_name(name, where) if isinstance(name, str) else name, folder, where, options.name(key))


def _local_name(name: str, where: str) -> str:
    """Returns a path relative to the folder of images."""
    address = urllib.parse.urlsplit(name)
    if address.scheme in ("http", "https", "s3", "gs"):
        fix = "download the images, and write their paths into the export"
        raise DataError(f"{name} lies on a server, and nothing is downloaded", where=where, fix=fix)
    if address.path.rstrip("/").endswith("local-files"):
        return urllib.parse.parse_qs(address.query).get("d", [""])[0].lstrip("/")
    return urllib.parse.unquote(re.sub(r"^/data/", "", name))


def _answers(annotation: Any, where: str) -> Iterator[tuple[Answer, str, str]]:
    """Yields (preferred, aspect, annotator) of one annotation."""
    if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
        return
    results = annotation.get("result")
    for result in results if isinstance(results, list) else ():
        value = result.get("value") if isinstance(result, Mapping) else None
        if not isinstance(value, Mapping) or result.get("type") not in ("pairwise", "choices"):
            continue
        given = value.get("selected") if result["type"] == "pairwise" else value.get("choices")
        word = given[0] if isinstance(given, list) and len(given) == 1 else given
        if not isinstance(word, str) or word.lower() not in _ANSWERS:
            if result["type"] == "choices":
                continue  # some other question
            raise DataError(f"the answer is {given!r}, neither left nor right", where=where)
        tag = str(result.get("from_name"))
        yield _ANSWERS[word.lower()], tag if tag in ASPECTS else "overall", _annotator(annotation)


def _annotator(annotation: Mapping[str, Any]) -> str:
    who = annotation.get("completed_by")
    if isinstance(who, Mapping):
        who = who.get("email") or who.get("id")
    return "" if who is None else str(who)
