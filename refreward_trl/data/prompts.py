"""Prompts of photos: from text files beside them, from a table, or from a function."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from refreward_trl.data.sources import ImageFile, PairSource, report_problems
from refreward_trl.errors import ConfigError, DataError

SIDECAR = "sidecar"
TABLES = (".csv", ".json")
COLUMNS = ("photo", "prompt")


def read_prompts(source: str, pairs: Iterable[PairSource]) -> dict[str, str]:
    """Returns the prompt of every photo.

    Args:
        source: "sidecar" for a `.txt` file beside each image, of the same name; a `.csv` file with the columns `photo`
            and `prompt`; a `.json` file that maps photos to prompts; or the dotted path of a function that takes the
            photo's name.
        pairs: The photos.

    Raises:
        ConfigError: The source is none of these, or the function cannot be imported.
        DataError: Photos have no prompt; all are counted, the first named.
    """
    if source == SIDECAR:
        return _for_each(pairs, _sidecar, source)
    path = Path(source)
    if path.suffix in TABLES:
        table = _read_table(path)
        return _for_each(pairs, lambda pair: _of_table(pair, table, path), source)
    function = _function(source)
    return _for_each(pairs, lambda pair: _of_function(pair, function, source), source)


def _for_each(pairs: Iterable[PairSource], read: Callable[[PairSource], str], source: str) -> dict[str, str]:
    prompts, problems = {}, []
    for pair in pairs:
        try:
            prompts[pair.photo] = read(pair)
        except DataError as error:
            problems.append(error)
    report_problems(problems, len(prompts) + len(problems), f"prompts: {source}")
    return prompts


def _sidecar(pair: PairSource) -> str:
    files = [image.path for image in (pair.lr_image, pair.hr_image) if isinstance(image, ImageFile)]
    if not files:
        raise DataError("it is no image file", where=pair.photo, fix="give the dataset a column named prompt")
    for path in files:
        text = path.with_suffix(".txt")
        if text.is_file():
            try:
                return " ".join(text.read_text(encoding="utf-8").split())
            except (OSError, ValueError) as error:
                raise DataError(f"cannot be read: {error}", where=str(text), fix="save it as UTF-8 text") from error
    raise DataError("there is no prompt beside it", where=str(files[0]), fix="write one into a .txt of the same name")


def _read_table(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the prompts: {error}", where=str(path), fix="check the path") from error
    if path.suffix == ".json":
        return _checked(_parsed(text, path), path)
    reader = csv.DictReader(text.splitlines())
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise ConfigError(
            f"its columns are {', '.join(reader.fieldnames or ()) or 'missing'}",
            where=str(path),
            fix="name them photo and prompt",
        )
    return {row["photo"]: row["prompt"] or "" for row in reader}


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is no JSON: {error}", where=str(path), fix="map photos to prompts") from error


def _checked(content: Any, path: Path) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(prompt, str) for prompt in content.values()):
        raise ConfigError("it does not map photos to prompts", where=str(path), fix='write {"photo": "prompt", ...}')
    return content


def _of_table(pair: PairSource, table: Mapping[str, str], path: Path) -> str:
    if pair.photo not in table:
        raise DataError(f"no prompt in {path.name}", where=pair.photo, fix="add the photo, without its file's ending")
    return table[pair.photo]


def _function(source: str) -> Callable[[str], Any]:
    module, _, name = source.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import {source!r}: {error}",
            where="prompts",
            fix="use sidecar, a .csv or .json file, or package.module.function",
        ) from error
    if not callable(function):
        raise ConfigError(f"{source} is a {type(function).__name__}", where="prompts", fix="name a function")
    return function


def _of_function(pair: PairSource, function: Callable[[str], Any], source: str) -> str:
    prompt = function(pair.photo)
    if not isinstance(prompt, str):
        raise DataError(
            f"{source} returned a {type(prompt).__name__}", where=pair.photo, fix="return the prompt as text"
        )
    return prompt
