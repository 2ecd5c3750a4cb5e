"""The pairs that a model is most certain of and wrong about, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import UInt8
from torch import Tensor

from refreward_trl.data.images import to_float
from refreward_trl.data.preference_stats import UNKNOWN
from refreward_trl.data.preferences import PreferenceGroup
from refreward_trl.evaluation.preference_answers import resized
from refreward_trl.evaluation.preference_results import PreferenceEvaluation, ScorerResult
from refreward_trl.evaluation.report import Comparison, Gallery, Section, number

WORST = 20
SHOWN_SIDE = 384
"""Pixels: of larger images a window of about this size is shown, where the two candidates differ most."""


def errors_section(evaluation: PreferenceEvaluation) -> Section:
    """Returns the chapter of the page; reads the images.

    Raises:
        DataError: One of them cannot be read any more.
    """
    galleries = [gallery for model in evaluation.models if (gallery := _gallery(evaluation, model)) is not None]
    words = (
        "The pairs that a model is most certain of and wrong about, the worst first, of each group one at first. Move "
        "the slider between the candidate that is labelled better and the one that is labelled worse."
    )
    return Section("errors", "Worst errors", [words if galleries else "No model made an error."], galleries)


def _gallery(evaluation: PreferenceEvaluation, model: ScorerResult) -> Gallery | None:
    rows = evaluation.worst_errors(model, WORST)
    if not rows:
        return None
    records = {record.sample_id: record for record in evaluation.table.records}
    comparisons = []
    for place, row in enumerate(rows, start=1):
        labelled = evaluation.table.pairs[row]
        group = records[labelled.sample_id].load(evaluation.table.aspect)
        margin = number(float(model.answers.margins[row]), 3, sign=True)
        comparison = _comparison(group, labelled.pair.better, labelled.pair.worse)
        comparisons.append(
            replace(comparison, remark=f"{place}: margin {margin}", figures=_captions(evaluation, model, row))
        )
    return Gallery(f"Errors of {model.name}", comparisons, "labelled better", "labelled worse")


def _captions(evaluation: PreferenceEvaluation, model: ScorerResult, row: int) -> list[tuple[str, str, str]]:
    labelled = evaluation.table.pairs[row]
    margin, (better, worse) = float(model.answers.margins[row]), model.answers.scores[row].tolist()
    captions = [
        ("log odds of being the better one", number(margin, 3, sign=True), number(-margin, 3, sign=True))
        if model.compares
        else ("score", number(better, 3), number(worse, 3))
    ]
    if any(labelled.methods):
        made_by = [name or UNKNOWN for name in labelled.methods]
        captions.append(("made by", made_by[0], made_by[1]))
    return captions


def _comparison(group: PreferenceGroup, better: int, worse: int) -> Comparison:
    """The pair with its LR and HR image; of large images the window in which the two differ most."""
    before = group.candidates[better]
    after = resized(group.candidates[worse], before)
    lr_image, hr_image = group.lr_image, group.hr_image
    whole = Comparison(group.sample_id, "", lr_image, to_float(before), to_float(after), hr_image)
    scale = before.shape[-1] // lr_image.shape[-1]
    cut = [_window(whole, axis, max(1, SHOWN_SIDE // scale), lr_image.shape[axis + 1]) for axis in (0, 1)]
    if hr_image is not None and hr_image.shape[-1] % lr_image.shape[-1]:
        hr_image = None
    return Comparison(
        group.sample_id,
        "",
        _cut(lr_image, cut, 1),
        to_float(_cut(before, cut, scale)),
        to_float(_cut(after, cut, scale)),
        None if hr_image is None else _cut(hr_image, cut, hr_image.shape[-1] // lr_image.shape[-1]),
    )


def _window(whole: Comparison, axis: int, side: int, length: int) -> tuple[int, int]:
    """Start and end in LR pixels of at most `side` of them along an axis, around where the pair differs most."""
    side = min(side, length)
    centre = whole.focus[1 - axis] / 100 * length
    start = min(max(0, round(centre - side / 2)), length - side)
    return start, start + side


def _cut(image: UInt8[Tensor, "3 _ _"], cut: Sequence[tuple[int, int]], scale: int) -> UInt8[Tensor, "3 _ _"]:
    (top, bottom), (left, right) = cut
    return image[:, scale * top : scale * bottom, scale * left : scale * right].contiguous()
