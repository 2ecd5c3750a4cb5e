"""The labelled pairs of a preference dataset as one table, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.preference_records import size_problems
from refreward_trl.data.preference_stats import UNKNOWN, method_of
from refreward_trl.data.preferences import Candidate, OrderedPair, PreferenceRecord
from refreward_trl.data.sources import report_problems
from refreward_trl.errors import DataError


@dataclass(frozen=True)
class LabelledPair:
    """Two candidates of one group and what is said about them.

    Attributes:
        sample_id: The group.
        photo: Cluster for intervals, folds and leaving out.
        pair: Indices of the candidates, and whether they are tied.
        generators: Who made the better and the worse one; "" if unknown.
        methods: The same with the artefact that was put on it; "" if neither is known.
        kind: The artefact of the worse one, or else of the better one.
        degradation: What made the LR image.
        source: Who labelled.
    """

    sample_id: str
    photo: str
    pair: OrderedPair
    generators: tuple[str, str]
    methods: tuple[str, str]
    kind: str
    degradation: str
    source: str

    @property
    def generator_pair(self) -> str:
        """The generators whatever the label: "a and b" in the order of their names."""
        return " and ".join(sorted(name or UNKNOWN for name in self.generators))


@dataclass(frozen=True)
class PairTable:
    """All labelled pairs of an evaluation, those of one group together; its order does not depend on that of the data.

    Attributes:
        records: The groups that say something about the aspect, by `sample_id`.
        aspect: What was compared.
        pairs: Their pairs.
        unlabelled: Number of groups that were left out.
    """

    records: tuple[PreferenceRecord, ...]
    aspect: str
    pairs: tuple[LabelledPair, ...]
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def photos(self) -> tuple[str, ...]:
        """Photo of each pair."""
        return tuple(pair.photo for pair in self.pairs)

    @cached_property
    def ties(self) -> NDArray[np.bool_]:
        """Whether each pair is labelled a tie."""
        return np.array([pair.pair.tie for pair in self.pairs], dtype=bool)

    @cached_property
    def groups(self) -> dict[str, slice]:
        """Where the pairs of each group are, by `sample_id`."""
        places: dict[str, slice] = {}
        for place, pair in enumerate(self.pairs):
            start = places[pair.sample_id].start if pair.sample_id in places else place
            places[pair.sample_id] = slice(start, place + 1)
        return places

    def counts(self) -> dict[str, int]:
        """Returns the numbers of groups, photos, pairs and ties, and of groups that were left out as unlabelled."""
        return {
            "groups": len(self.records),
            "photos": len(set(self.photos)),
            "pairs": len(self) - int(self.ties.sum()),
            "ties": int(self.ties.sum()),
            "unlabelled_groups": self.unlabelled,
        }


def pair_table(records: Sequence[PreferenceRecord], aspect: str) -> PairTable:
    """Lists the pairs.

    Raises:
        ConfigError: There is no such aspect.
        DataError: Nothing is said about it, or images do not fit each other (all are named; headers are read).
    """
    labelled = sorted((record for record in records if record.pairs(aspect)), key=lambda record: record.sample_id)
    if not labelled:
        raise DataError(
            f"none of {len(records)} groups says anything about {aspect!r}",
            where="preferences",
            fix="name the aspect that they were compared in; `refreward data stats` lists them",
        )
    report_problems(list(_problems(labelled)), len(labelled), "preferences")
    pairs = tuple(pair for record in labelled for pair in _pairs(record, aspect))
    return PairTable(tuple(labelled), aspect, pairs, len(records) - len(labelled))


def dataset_digest(table: PairTable) -> str:
    """Returns the SHA-256 of all labels, names and encoded images of a table, whatever the order of its groups."""
    found = hashlib.sha256()
    for record in table.records:
        found.update(json.dumps(_identity(record, table.aspect), sort_keys=True).encode())
        for image in _images(record):
            found.update(b"none" if image is None else hashlib.sha256(image.encoded()).digest())
    return found.hexdigest()


def _problems(records: Sequence[PreferenceRecord]) -> Iterator[DataError]:
    for record in records:
        try:
            lr_image, hr_image, *candidates = (None if image is None else image.size() for image in _images(record))
        except DataError as error:
            yield error
            continue
        assert lr_image is not None
        yield from size_problems(record, lr_image, candidates, hr_image)


def _images(record: PreferenceRecord) -> list[ImageSource | None]:
    return [record.lr_image, record.hr_image, *(candidate.image for candidate in record.candidates)]


def _identity(record: PreferenceRecord, aspect: str) -> list[Any]:
    makers = [[candidate.generator, candidate.kind] for candidate in record.candidates]
    names = [record.sample_id, record.photo, record.source, record.degradation]
    return [*names, makers, [list(pair) for pair in record.pairs(aspect)]]


def _pairs(record: PreferenceRecord, aspect: str) -> Iterator[LabelledPair]:
    for pair in record.pairs(aspect):
        better, worse = record.candidates[pair.better], record.candidates[pair.worse]
        yield LabelledPair(
            sample_id=record.sample_id,
            photo=record.photo,
            pair=pair,
            generators=(better.generator, worse.generator),
            methods=(_method(better), _method(worse)),
            kind=worse.kind or better.kind,
            degradation=record.degradation,
            source=record.source,
        )


def _method(candidate: Candidate) -> str:
    return method_of(candidate) if candidate.generator or candidate.kind else ""
