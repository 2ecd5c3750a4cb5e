"""One preference group as a row of plain values, checked column by column."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.preference_records import ANSWERS, ASPECTS, Candidate, PreferenceChoice, PreferenceRecord
from refreward_trl.errors import DataError

T = TypeVar("T")

RANK_COLUMNS = {aspect: "ranks" if aspect == "overall" else f"{aspect}_ranks" for aspect in ASPECTS}
LEAST_CANDIDATES = 2

_TEXTS = ("sample_id", "photo", "source", "degradation", "split")
_CHOICE_KEYS = tuple(field.name for field in fields(PreferenceChoice))
COLUMNS = (*_TEXTS, "generators", "kinds", *RANK_COLUMNS.values(), "choices")
"""The columns of a row besides its images."""


@dataclass(frozen=True)
class RowImages:
    """The images of a row."""

    lr_image: ImageSource
    candidates: tuple[ImageSource, ...]
    hr_image: ImageSource | None = None


def parse_row(
    values: Mapping[str, Any], images: RowImages | None, count: int | None, where: str
) -> tuple[PreferenceRecord | None, list[DataError]]:
    """Makes a record of a row.

    Args:
        values: By column; null and an absent column mean the same.
        images: None if they are known to be wrong: the other columns are checked all the same.
        count: Number of candidates; None if it is not known.
        where: Names the row.

    Returns:
        The record, or None if anything is wrong, and all that is wrong.
    """
    name = values.get("sample_id")
    place = f"{where} ({name})" if isinstance(name, str) and name else where
    problems: list[DataError] = []

    def checked(column: str, check: Callable[[Any], T], absent: T) -> T:
        value = values.get(column)
        if value is None:
            return absent
        try:
            return check(value)
        except DataError as error:
            problems.append(DataError(f"{column}: {error.what}", where=place, fix=error.fix))
            return absent

    problems += [DataError(text, where=place, fix=_MISSPELT_FIX) for text in _misspelt(values)]
    texts = {column: checked(column, _text, "") for column in _TEXTS}
    if not texts["sample_id"] and not any(problem.what.startswith("sample_id") for problem in problems):
        problems.append(DataError("sample_id is missing", where=place, fix="give every row a name of its own"))
    if count is not None and count < LEAST_CANDIDATES:
        text = f"{count} candidate{'s' if count != 1 else ''}, and there is nothing to compare"
        problems.append(DataError(text, where=place, fix="add another candidate, or drop the row"))
    generators, kinds = (checked(column, lambda value: _names(value, count), ()) for column in ("generators", "kinds"))
    ranks = {aspect: checked(column, lambda v: _ranks(v, count), ()) for aspect, column in RANK_COLUMNS.items()}
    choices = checked("choices", lambda value: _choices(value, count), ())
    if problems or images is None:
        return None, problems
    blank = ("",) * len(images.candidates)
    made = zip(images.candidates, generators or blank, kinds or blank, strict=True)
    record = PreferenceRecord(
        sample_id=texts["sample_id"],
        photo=texts["photo"] or texts["sample_id"].rpartition("@")[0] or texts["sample_id"],
        lr_image=images.lr_image,
        candidates=tuple(Candidate(*parts) for parts in made),
        ranks={aspect: found for aspect, found in ranks.items() if any(rank is not None for rank in found)},
        choices=choices,
        source=texts["source"] or "unknown",
        hr_image=images.hr_image,
        degradation=texts["degradation"],
        split=texts["split"],
    )
    return record, []


def row_of(record: PreferenceRecord) -> dict[str, Any]:
    """Returns the columns of a record besides its images; what is not known is null."""
    return {
        **{column: getattr(record, column) or None for column in _TEXTS},
        "generators": [candidate.generator for candidate in record.candidates],
        "kinds": [candidate.kind for candidate in record.candidates],
        **{
            column: list(record.ranks[aspect]) if aspect in record.ranks else None
            for aspect, column in RANK_COLUMNS.items()
        },
        "choices": [asdict(choice) for choice in record.choices],
    }


_MISSPELT_FIX = "rename the column: what it holds would not be read"


def _misspelt(values: Mapping[str, Any]) -> list[str]:
    """Names columns that are nearly, but not quite, ones that this row lacks: nobody would miss their labels."""
    absent = tuple(column for column in COLUMNS if values.get(column) is None)
    unknown = sorted(values.keys() - set(COLUMNS))
    return [text for column in unknown if (text := _misspelling(column, absent))]


@functools.cache
def _misspelling(column: str, absent: tuple[str, ...]) -> str | None:
    if column.endswith("_ranks"):
        return f"{column}: unknown aspect {column.removesuffix('_ranks')!r}, there are {', '.join(ASPECTS)}"
    near = difflib.get_close_matches(column, absent, n=1, cutoff=0.85)
    return f"unknown column {column!r}; did you mean {near[0]!r}?" if near else None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"expected text, got {value!r}", fix="write it in quotes")
    return value


def _list(value: Any, count: int | None, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"expected a list, got {value!r}")
    if count is not None and what and len(value) != count:
        raise DataError(
            f"{len(value)} {what} for {count} candidates", fix="give one for each candidate, in their order"
        )
    return value


def _names(value: Any, count: int | None) -> tuple[str, ...]:
    return tuple("" if entry is None else _text(entry) for entry in _list(value, count, "names"))


def _ranks(value: Any, count: int | None) -> tuple[int | None, ...]:
    return tuple(None if entry is None else _rank(entry) for entry in _list(value, count, "ranks"))


def _rank(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value % 1:
        raise DataError(
            f"rank {value!r} is no whole number", fix="use 1 for the best, equal numbers for ties, null for unranked"
        )
    return int(value)


def _choices(value: Any, count: int | None) -> tuple[PreferenceChoice, ...]:
    return tuple(_choice(entry, number, count) for number, entry in enumerate(_list(value, None, "")))


def _choice(value: Any, number: int, count: int | None) -> PreferenceChoice:
    where = f"choice {number}"
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {value!r}, not an object with first, second and preferred")
    if unknown := sorted(value.keys() - set(_CHOICE_KEYS)):
        raise DataError(f"{where} has an unknown key {unknown[0]!r}", fix=f"there are {', '.join(_CHOICE_KEYS)}")
    first, second = (_index(value.get(key), f"{where}: {key}", count) for key in ("first", "second"))
    if first == second:
        raise DataError(f"{where} compares candidate {first} with itself")
    preferred, aspect = value.get("preferred"), value.get("aspect") or "overall"
    if preferred not in ANSWERS:
        raise DataError(f"{where}: preferred is {preferred!r}", fix=f"use one of {', '.join(ANSWERS)}")
    if aspect not in ASPECTS:
        raise DataError(f"{where}: unknown aspect {aspect!r}", fix=f"use one of {', '.join(ASPECTS)}")
    annotator = value.get("annotator")
    return PreferenceChoice(
        first,
        second,
        preferred,
        aspect,
        "" if annotator is None else _text(annotator),
        _weight(value.get("weight"), where),
    )


def _index(value: Any, where: str, count: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where} is {value!r}, not the index of a candidate")
    if value < 0 or (count is not None and value >= count):
        upper = "" if count is None else f"; there are candidates 0 to {count - 1}"
        raise DataError(f"{where} is {value}, which is out of range{upper}")
    return value


def _weight(value: Any, where: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise DataError(f"{where}: weight is {value!r}", fix="use a number above 0, or leave the choice out")
    return float(value)


def check_unique(sample_ids: Sequence[str], places: Sequence[str]) -> list[DataError]:
    """Returns an error for each `sample_id` that an earlier row has, too."""
    first: dict[str, str] = {}
    problems = []
    for sample_id, place in zip(sample_ids, places, strict=True):
        if sample_id in first:
            text = f"sample_id {sample_id!r} repeats {first[sample_id]}"
            problems.append(DataError(text, where=place, fix="make sample_id unique"))
        first.setdefault(sample_id, place)
    return problems
