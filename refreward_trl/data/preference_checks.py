"""Everything that can be wrong with a preference dataset, found in one pass over all of its images."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.perceptual_hash import SAME_VIEW, near_pairs, perceptual_hash
from refreward_trl.data.preference_files import Scan
from refreward_trl.data.preference_records import ASPECTS, PreferenceRecord, size_problems
from refreward_trl.errors import DataError

KINDS = ("row", "image", "size", "equal", "contradiction", "leak")
"""A row that says something impossible; an image that cannot be read; an SR image that does not fit its LR image;
two candidates with the same pixels; answers that contradict each other; one view in two splits."""


class Finding(NamedTuple):
    """Something that is wrong: one of `KINDS`, and what and where it is."""

    kind: str
    error: DataError


def check_preferences(
    scan: Scan,
    *,
    skip: Collection[str] = (),
    hash_distance: int = SAME_VIEW,
    progress: Callable[[Sequence[PreferenceRecord]], Iterable[PreferenceRecord]] = iter,
) -> list[Finding]:
    """Reads every image of a dataset and returns all that is wrong with it.

    Args:
        scan: What `scan_preferences` found.
        skip: Those of `KINDS` that are not looked for; what cannot be read is always told.
        hash_distance: Bits within which two LR images are taken for the same view, see `perceptual_hash`.
        progress: Wraps the records that are gone through.
    """
    findings = [Finding("row", problem) for problem in scan.problems]
    hashes: list[Tensor | None] = []
    for place, record in zip(scan.places, progress(scan.records), strict=True):
        label = f"{place} ({record.sample_id})"
        lr_image, found = _check_images(record, label)
        findings += found
        findings += [Finding("contradiction", error) for error in contradictions(record, label)]
        hashes.append(None if lr_image is None else perceptual_hash(lr_image))
    findings += [Finding("leak", error) for error in leaks(scan.records, scan.places, hashes, hash_distance)]
    return [finding for finding in findings if finding.kind not in skip or finding.kind in ("row", "image")]


def _check_images(record: PreferenceRecord, place: str) -> tuple[Tensor | None, list[Finding]]:
    """Decodes the images of a group; returns the LR image, and what is wrong."""
    findings: list[Finding] = []

    def read(source: ImageSource | None, name: str) -> Tensor | None:
        if source is None:
            return None
        try:
            return source.read()
        except DataError as error:
            told = DataError(f"{name}: {error.what} ({error.where})", where=place, fix=error.fix)
            findings.append(Finding("image", told))
            return None

    lr_image, hr_image = read(record.lr_image, "the LR image"), read(record.hr_image, "the HR image")
    candidates = [read(candidate.image, f"candidate {n}") for n, candidate in enumerate(record.candidates)]
    if lr_image is not None:
        sizes = [None if image is None else (image.shape[1], image.shape[2]) for image in (*candidates, hr_image)]
        problems = size_problems(record, (lr_image.shape[1], lr_image.shape[2]), sizes[:-1], sizes[-1])
        findings += [Finding("size", DataError(p.what, where=place, fix=p.fix)) for p in problems]
    findings += [Finding("equal", error) for error in _equal_candidates(candidates, place)]
    return lr_image, findings


def _equal_candidates(candidates: Sequence[Tensor | None], place: str) -> Iterator[DataError]:
    first: dict[bytes, int] = {}
    for number, image in enumerate(candidates):
        if image is None:
            continue
        digest = hashlib.sha256(repr(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()).digest()
        if digest in first:
            text = f"candidates {first[digest]} and {number} have the same pixels"
            yield DataError(text, where=place, fix="drop one of them")
        first.setdefault(digest, number)


def contradictions(record: PreferenceRecord, place: str) -> Iterator[DataError]:
    """Yields what contradicts itself in a group: an annotator who answers one question in two ways, and an order that
    goes round in a circle when all votes are merged. Ties close no circle: looking equal need not be transitive."""
    for aspect in ASPECTS:
        answers: dict[tuple[str, tuple[int, int]], set[int | None]] = {}
        for choice in record.choices:
            if choice.aspect == aspect:
                answers.setdefault((choice.annotator, choice.pair), set()).add(choice.better)
        for (annotator, (first, second)), given in answers.items():
            # Answers of people unknown may be those of several.
            if annotator and len(given) > 1:
                text = f"annotator {annotator!r} answers in {len(given)} ways how candidates {first} and {second}"
                yield DataError(f"{text} compare in {aspect}", where=place, fix="keep one of the answers")
        orders = [(pair.better, pair.worse) for pair in record.pairs(aspect) if not pair.tie]
        if circle := find_circle(orders):
            text = " > ".join(map(str, circle))
            yield DataError(
                f"the {aspect} order of the candidates goes round in a circle: {text}",
                where=place,
                fix="drop one of the answers, or the group",
            )


def find_circle(orders: Iterable[tuple[int, int]]) -> list[int] | None:
    """Returns a circle `[a, b, ..., a]` of (better, worse) pairs, or None if there is none."""
    worse: dict[int, list[int]] = {}
    for better, other in orders:
        worse.setdefault(better, []).append(other)
    done: set[int] = set()

    def descend(path: list[int]) -> list[int] | None:
        for other in worse.get(path[-1], ()):
            if other in path:
                return [*path[path.index(other) :], other]
            if other not in done and (circle := descend([*path, other])):
                return circle
        done.add(path[-1])
        return None

    return next((circle for start in sorted(worse) if start not in done and (circle := descend([start]))), None)


def leaks(
    records: Sequence[PreferenceRecord], places: Sequence[str], hashes: Sequence[Tensor | None], distance: int
) -> Iterator[DataError]:
    """Yields the photos that are in several splits, by their names or because their LR images look alike; once for
    any two photos."""
    fix = "split again by photo: refreward data split"
    by_photo: dict[str, dict[str, str]] = {}
    for record, place in zip(records, places, strict=True):
        by_photo.setdefault(record.photo, {}).setdefault(record.split, f"{place} ({record.sample_id})")
    for photo, splits in by_photo.items():
        for (split, place), (other, other_place) in itertools.pairwise(splits.items()):
            yield DataError(f"photo {photo!r} is in split {other!r}, too: {other_place}, not only in {split!r}",
                            where=place, fix=fix)  # fmt: skip
    told: set[tuple[str, str]] = set()
    for first, second, bits in near_pairs(hashes, distance):
        one, two = records[first], records[second]
        photos = (one.photo, two.photo)
        if one.split != two.split and one.photo != two.photo and photos not in told:
            told.add(photos)
            yield DataError(
                f"the LR image in split {one.split!r} looks like {places[second]} ({two.sample_id}) in split "
                f"{two.split!r}: {bits} of 63 bits of their hashes differ",
                where=f"{places[first]} ({one.sample_id})",
                fix=fix,
            )
