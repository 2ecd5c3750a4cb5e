"""TRL's preference datasets: `prompt`, `chosen`, `rejected` and `images`, plain or conversational.

TRL has no way of saying that an *image* is the answer, so three conventions are understood, row by row:

1. `images` = [LR, A, B, ...], and `chosen` and `rejected` name two of the candidates: a letter (A is the first after
   the LR image), perhaps with "Image" or "Candidate" before it, or `<answer>A</answer>` at the end of a rationale.
2. `chosen` and `rejected` are columns of images themselves, and the LR image is in `lr_image`, `lr`, `image` or alone
   in `images`.
3. `images` = [LR, chosen, rejected], and the texts are empty or say no more than "chosen", "better", "good" and
   "rejected", "worse", "bad"; or the user says that it is so, and the texts are not read.

Other texts are refused: nobody should guess which image they prefer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.preference_converters.options import ConvertOptions
from refreward_trl.data.preference_converters.pooling import Comparison, GroupPool, as_weight, pool_rows
from refreward_trl.data.preference_converters.tables import TableRow, peek_columns
from refreward_trl.data.preference_records import Candidate, PreferenceRecord
from refreward_trl.errors import DataError

KEYS = (
    *("images", "chosen", "rejected", "lr", "hr", "sample_id", "photo", "generators", "chosen_generator"),
    *("rejected_generator", "aspect", "annotator", "weight"),
)
LR_COLUMNS = ("lr_image", "lr", "image")

_NAME = re.compile(
    r"(?:the\s+)?(?:image|candidate|option|picture|answer)?\s*[\s:(\[]*([A-Za-z])[)\].]*", re.IGNORECASE
)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_CHOSEN, _REJECTED = ("", "chosen", "better", "good"), ("", "rejected", "worse", "bad")


def detects(path: Path) -> bool:
    """Tells whether a path looks like it."""
    columns = peek_columns(path)
    return {"chosen", "rejected"} <= columns and bool(columns & {"images", *LR_COLUMNS})


def read(path: Path, options: ConvertOptions) -> list[PreferenceRecord]:
    """Reads the groups. Raises `DataError` that names every bad row."""
    return pool_rows(path, options, _add)


def _add(row: TableRow, options: ConvertOptions, pool: GroupPool) -> None:
    name = options.name
    lr_image, candidates, (first, second) = _images(row, options)
    generators = row.values.get(name("generators")) or [""] * len(candidates)
    if not isinstance(generators, list) or len(generators) != len(candidates):
        raise DataError(f"generators does not name {len(candidates)} candidates", where=row.where)
    made = [Candidate(image, str(g or "")) for image, g in zip(candidates, generators, strict=True)]
    for number, key in ((first, "chosen_generator"), (second, "rejected_generator")):
        if text := row.text(name(key)):
            made[number] = Candidate(made[number].image, text)
    pool.add(
        Comparison(
            lr_image,
            made[first],
            made[second],
            "first",
            row.text(name("aspect")) or "overall",
            row.text(name("annotator")),
            as_weight(row.values.get(name("weight")), row.where),
        ),
        where=row.where,
        sample_id=row.text(name("sample_id")),
        photo=row.text(name("photo")),
        split=row.split,
        hr_image=row.image(name("hr")) if row.has(name("hr")) else None,
        more=made,
    )


def _images(row: TableRow, options: ConvertOptions) -> tuple[ImageSource, list[ImageSource], tuple[int, int]]:
    """Returns the LR image, the candidates, and which two of them are chosen and rejected."""
    images, chosen, rejected = (options.name(key) for key in ("images", "chosen", "rejected"))
    if row.holds_images(chosen):
        return _lr_image(row, options, images), [row.image(chosen), row.image(rejected)], (0, 1)
    lr_image, *candidates = row.images(images)
    answers = [_answer(row.values.get(column)) for column in (chosen, rejected)]
    if options.chosen_first or (answers[0].lower() in _CHOSEN and answers[1].lower() in _REJECTED):
        if len(candidates) != 2:
            text = f"{len(candidates)} images after the LR image, and no text names two of them"
            raise DataError(text, where=row.where, fix="give [LR, chosen, rejected], or let both texts name a letter")
        return lr_image, candidates, (0, 1)
    letters = [_letter(answer) for answer in answers]
    numbers = [None if letter is None else ord(letter) - ord("A") for letter in letters]
    for column, answer, number in zip((chosen, rejected), answers, numbers, strict=True):
        if number is None or number >= len(candidates):
            text = f"{column} is {answer[:40]!r}, which is none of the {len(candidates)} candidates"
            fix = "answer with a letter (A is the first image after the LR image), or convert with --chosen-first"
            raise DataError(text, where=row.where, fix=fix)
    first, second = (number for number in numbers if number is not None)
    if first == second:
        raise DataError("chosen and rejected are the same candidate", where=row.where, fix="drop the row")
    return lr_image, candidates, (first, second)


def _lr_image(row: TableRow, options: ConvertOptions, images: str) -> ImageSource:
    named = options.columns.get("lr")
    for column in [named] if named else [*LR_COLUMNS, images]:
        if row.has(column):
            return row.image(column)
    raise DataError("there is no LR image", where=row.where, fix=f"name its column: --columns lr={LR_COLUMNS[0]}")


def _answer(value: Any) -> str:
    """Returns what an answer says: a text, or the text of the last message of a conversation."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if isinstance(value, list):
        value = " ".join(str(part.get("text") or "") for part in value if isinstance(part, Mapping))
    return "" if value is None else str(value).strip()


def _letter(answer: str) -> str | None:
    tagged = _TAGGED.findall(answer)
    found = _NAME.fullmatch(tagged[-1].strip() if tagged else answer)
    return found[1].upper() if found else None
