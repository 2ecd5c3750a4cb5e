"""What a preference dataset holds, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from refreward_trl.data.preference_records import ASPECTS, Candidate, PreferenceRecord

UNKNOWN = "(unknown)"


def preference_stats(records: Sequence[PreferenceRecord]) -> dict[str, Any]:
    """Returns figures of a dataset, ready for JSON; reads the headers of all images.

    `aspects` counts what the merged votes say (`PreferenceRecord.pairs`); `generators` says how often the candidates
    of a method win against those of others, a tie being half a win; `annotators` how often one agrees with what the
    others who were asked the same question say together.

    Raises:
        DataError: An image is missing or is none.
    """
    return {
        "groups": len(records),
        "photos": len({record.photo for record in records}),
        "splits": _counts(record.split or UNKNOWN for record in records),
        "sources": _counts(record.source for record in records),
        "degradations": _counts(record.degradation or UNKNOWN for record in records),
        "candidates": _counts(len(record.candidates) for record in records),
        "unlabelled_groups": sum(not record.aspects for record in records),
        "groups_with_hr": sum(record.hr_image is not None for record in records),
        "aspects": {aspect: found for aspect in ASPECTS if (found := _aspect(records, aspect))},
        "generators": {aspect: found for aspect in ASPECTS if (found := win_rates(records, aspect))},
        "annotators": agreements(records),
        **_sizes(records),
    }


def _counts(values: Iterable[Any]) -> dict[str, int]:
    counted = Counter(values)
    return {str(value): counted[value] for value in sorted(counted)}


def _aspect(records: Sequence[PreferenceRecord], aspect: str) -> dict[str, Any]:
    groups = [pairs for record in records if (pairs := record.pairs(aspect))]
    if not groups:
        return {}
    ties = sum(pair.tie for pairs in groups for pair in pairs)
    return {"groups": len(groups), "ordered_pairs": sum(map(len, groups)) - ties, "ties": ties}


def method_of(candidate: Candidate) -> str:
    """Names the method that made a candidate, with the artefact on it: `"bicubic + blur"`."""
    name = candidate.generator or UNKNOWN
    return f"{name} + {candidate.kind}" if candidate.kind else name


def win_rates(records: Sequence[PreferenceRecord], aspect: str) -> dict[str, dict[str, Any]]:
    """Returns how often each method wins, ties and loses against others, the best first."""
    tallies: dict[str, Counter[str]] = {}
    for record in records:
        methods = [method_of(candidate) for candidate in record.candidates]
        for pair in record.pairs(aspect):
            better, worse = methods[pair.better], methods[pair.worse]
            if better != worse:
                tallies.setdefault(better, Counter())["ties" if pair.tie else "wins"] += 1
                tallies.setdefault(worse, Counter())["ties" if pair.tie else "losses"] += 1
    rows = {
        name: {
            **{key: tally[key] for key in ("wins", "ties", "losses")},
            "win_rate": (tally["wins"] + tally["ties"] / 2) / tally.total(),
        }
        for name, tally in tallies.items()
    }
    return dict(sorted(rows.items(), key=lambda row: (-row[1]["win_rate"], row[0])))


def agreements(records: Sequence[PreferenceRecord]) -> dict[str, dict[str, Any]]:
    """Returns for each annotator who is known the number of answers, how many of them others gave an answer to as
    well, and the share of these in which the merged answer of the others is the same (None if there are none)."""
    tallies: dict[str, Counter[str]] = {}
    for record in records:
        for annotator in {choice.annotator for choice in record.choices} - {""}:
            tally = tallies.setdefault(annotator, Counter())
            others = tuple(choice for choice in record.choices if choice.annotator != annotator)
            merged = replace(record, ranks={}, choices=others)
            answers = {aspect: _answers(merged, aspect) for aspect in ASPECTS}
            for choice in record.choices:
                if choice.annotator == annotator:
                    tally["answers"] += 1
                    if choice.pair in answers[choice.aspect]:
                        tally["compared"] += 1
                        tally["agreed"] += answers[choice.aspect][choice.pair] == choice.better
    return {
        name: {
            "answers": tally["answers"],
            "compared": tally["compared"],
            "agreement": tally["agreed"] / tally["compared"] if tally["compared"] else None,
        }
        for name, tally in sorted(tallies.items())
    }


def _answers(record: PreferenceRecord, aspect: str) -> dict[tuple[int, int], int | None]:
    """Returns the better one of each pair, None for a tie."""
    return {
        (min(pair.better, pair.worse), max(pair.better, pair.worse)): None if pair.tie else pair.better
        for pair in record.pairs(aspect)
    }


def _sizes(records: Sequence[PreferenceRecord]) -> dict[str, Any]:
    lr_sizes, scales = Counter(), Counter()
    for record in records:
        height, width = record.lr_image.size()
        lr_sizes[f"{width}x{height}"] += 1
        # Halves, not whole numbers, where an SR image does not fit: `refreward data validate` tells which.
        scales.update(f"x{candidate.image.size()[0] / height:g}" for candidate in record.candidates)
    return {"lr_sizes": dict(lr_sizes.most_common()), "scales": dict(scales.most_common())}
