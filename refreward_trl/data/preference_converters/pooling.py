"""Collects answers about two images each into groups: those about one LR image belong together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.preference_converters.options import ConvertOptions
from refreward_trl.data.preference_converters.tables import TableRow, read_rows
from refreward_trl.data.preference_records import ASPECTS, Answer, Candidate, PreferenceChoice, PreferenceRecord
from refreward_trl.data.sources import report_problems
from refreward_trl.errors import DataError


class Comparison(NamedTuple):
    """One question that somebody was asked, and the answer, if there is one."""

    lr_image: ImageSource
    first: Candidate
    second: Candidate
    preferred: Answer | None
    aspect: str = "overall"
    annotator: str = ""
    weight: float = 1.0


@dataclass
class _Group:
    record: PreferenceRecord
    lr_digest: str
    numbers: dict[str, int] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    choices: list[PreferenceChoice] = field(default_factory=list)

    def number_of(self, candidate: Candidate, digest: str) -> int:
        """Returns the index of a candidate, which is the same for the same bytes."""
        if digest not in self.numbers:
            self.numbers[digest] = len(self.candidates)
            self.candidates.append(candidate)
        number = self.numbers[digest]
        if candidate.generator and not self.candidates[number].generator:
            self.candidates[number] = candidate
        return number


class GroupPool:
    """Groups of comparisons, in the order in which their LR images first came up.

    Args:
        source: What the records say about where their order comes from.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._groups: dict[tuple[str, str], _Group] = {}

    def add(
        self,
        comparison: Comparison,
        *,
        where: str,
        sample_id: str = "",
        photo: str = "",
        split: str = "",
        hr_image: ImageSource | None = None,
        more: Sequence[Candidate] = (),
    ) -> None:
        """Takes one comparison.

        Args:
            comparison: The question and the answer.
            where: Names the row.
            sample_id: Key of the group; by default made from the bytes of the LR image.
            photo: Name of the photo; by default the group's own.
            split: Of the row.
            hr_image: The ground truth, if there is one.
            more: Candidates of the group that the comparison is not about.

        Raises:
            DataError: The two are one image, or the aspect is none of ours, or an image cannot be read.
        """
        if comparison.aspect not in ASPECTS:
            text = f"unknown aspect {comparison.aspect!r}"
            raise DataError(text, where=where, fix=f"one of {', '.join(ASPECTS)}")
        if not (math.isfinite(comparison.weight) and comparison.weight > 0):
            raise DataError(f"weight {comparison.weight:g} is no finite number above 0", where=where)
        digests = [digest_of(candidate.image) for candidate in (comparison.first, comparison.second)]
        if digests[0] == digests[1]:
            raise DataError("the two images that are compared are the same", where=where, fix="drop the row")
        lr_digest = digest_of(comparison.lr_image)
        key = sample_id or lr_digest[:16]
        group = self._groups.get((split, key))
        if group is None:
            record = PreferenceRecord(
                key, photo or key, comparison.lr_image, (), source=self._source, hr_image=hr_image, split=split
            )
            group = self._groups[split, key] = _Group(record, lr_digest)
        elif group.lr_digest != lr_digest:
            text = f"sample_id {sample_id!r} has another LR image than before"
            raise DataError(text, where=where, fix="give each LR image a sample_id of its own")
        first = group.number_of(comparison.first, digests[0])
        second = group.number_of(comparison.second, digests[1])
        for candidate in more:
            group.number_of(candidate, digest_of(candidate.image))
        _, _, _, preferred, aspect, annotator, weight = comparison
        if preferred is not None:
            group.choices.append(PreferenceChoice(first, second, preferred, aspect, annotator, weight))

    def records(self) -> list[PreferenceRecord]:
        """Returns the groups; a key that is in several splits gets the split's name appended."""
        keys = [key for _, key in self._groups]
        return [
            replace(
                group.record,
                sample_id=f"{key}@{split}" if keys.count(key) > 1 and split else key,
                candidates=tuple(group.candidates),
                choices=tuple(group.choices),
            )
            for (split, key), group in self._groups.items()
        ]


def digest_of(image: ImageSource) -> str:
    """Returns a digest of an image's encoded bytes."""
    return hashlib.sha256(image.encoded()).hexdigest()


def as_weight(value: Any, where: str) -> float:
    """Reads a weight; none is 1. Raises `DataError` for what is no number."""
    try:
        return 1.0 if value is None or value == "" else float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"weight is {value!r}, not a number", where=where) from error


def pool_rows(
    path: Path, options: ConvertOptions, add: Callable[[TableRow, ConvertOptions, GroupPool], None]
) -> list[PreferenceRecord]:
    """Lets `add` put each row of a table into a pool, and returns its groups.

    Raises:
        DataError: Rows are wrong; the first ten are named and all counted.
    """
    pool = GroupPool(options.source or "unknown")
    problems: list[DataError] = []
    count = 0
    for row in read_rows(path, options.images):
        count += 1
        try:
            if isinstance(row, DataError):
                raise row
            add(row, options, pool)
        except DataError as error:
            problems.append(error)
    report_problems(problems, count, str(path))
    return pool.records()
