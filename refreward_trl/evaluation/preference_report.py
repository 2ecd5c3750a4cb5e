"""An evaluation of judges told: every scorer in one table, what the LR image is worth, calibration, slices, errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

from refreward_trl.data.preference_stats import UNKNOWN
from refreward_trl.evaluation.charts import DotPlot, DotRow, Line, LineChart, Mark
from refreward_trl.evaluation.model_report import text_table
from refreward_trl.evaluation.preference_benchmark import DEFINITIONS
from refreward_trl.evaluation.preference_errors import errors_section
from refreward_trl.evaluation.preference_results import SLICES, PreferenceEvaluation, ScorerResult
from refreward_trl.evaluation.report import (
    Cell,
    Headline,
    Report,
    Section,
    Table,
    Tone,
    interval,
    number,
)
from refreward_trl.evaluation.statistics import Estimate

MOST_CURVES = 5
MOST_VALUES = 40
FEW_PHOTOS = 20
SLICE_NAMES = {
    "kind": "artefact",
    "degradation": "degradation",
    "generators": "pair of generators",
    "source": "who labelled",
}


def preference_report(evaluation: PreferenceEvaluation) -> Report:
    """Returns the page; reads the images of the worst errors.

    Raises:
        DataError: One of them cannot be read any more.
    """
    names = " and ".join(model.name for model in evaluation.models)
    return Report(
        title=f"How well {names} order{'s' if len(evaluation.models) == 1 else ''} super-resolved images",
        lead=_lead(evaluation),
        headlines=list(_headlines(evaluation)),
        caveats=list(_caveats(evaluation)),
        sections=[
            _figures(evaluation),
            _lr_image(evaluation),
            _calibration(evaluation),
            _slices(evaluation),
            errors_section(evaluation),
        ],
        facts=[
            *evaluation.facts.items(),
            ("aspect", evaluation.table.aspect),
            ("seed", str(evaluation.seed)),
            ("dataset digest", evaluation.dataset),
            *((f"model {model.name}", _about(model)) for model in evaluation.models),
            *((f"not computed: {name}", why) for name, why in evaluation.not_computed.items()),
        ],
    )


def as_text(evaluation: PreferenceEvaluation) -> str:
    """The main figures for a terminal."""
    header = ["scorer", "accuracy", "AUC", "ECE", "tau-b", "LR shuffled"]
    rows = []
    for result in _all(evaluation):
        if result.is_known:
            shuffled = result.ablations.get("shuffled")
            drop = f"{_points(-shuffled.drop.mean)}" if shuffled else "not read"
            figures = [number(result.auc, 3), number(result.calibration.ece, 3), number(result.kendall.value.mean, 3)]
            rows.append([result.name, Cell(_percent(result.accuracy.mean), _brief(result.accuracy)), *figures, drop])
        else:
            rows.append([result.name, f"cannot be computed: {result.problem}", *[""] * 4])
    missing = [f"{r.name} {r.answers.missing}" for r in _all(evaluation) if r.is_known and r.answers.missing]
    notes = [f"Pairs without an answer (never counted as one): {', '.join(missing)}."] if missing else []
    first, *later = evaluation.models
    for model in later:
        if first.is_known and model.is_known:
            change = evaluation.difference(model, first)
            notes.append(f"{model.name} minus {first.name}: {_points(change.mean)} ({_brief(change, points=True)}).")
    return text_table(Table(_lead(evaluation), header, rows, note=" ".join(notes)))


def _all(evaluation: PreferenceEvaluation) -> list[ScorerResult]:
    return [*evaluation.models, *evaluation.baselines]


def _lead(evaluation: PreferenceEvaluation) -> str:
    counts = evaluation.table.counts()
    ties = f" and {counts['ties']} ties" if counts["ties"] else ""
    return (
        f"{counts['pairs']} ordered pairs{ties} in {counts['groups']} groups of {counts['photos']} photos, "
        f"compared in {evaluation.table.aspect}; every scorer on the same pairs."
    )


def _headlines(evaluation: PreferenceEvaluation) -> Iterator[Headline]:
    model, best = evaluation.models[0], evaluation.best_baseline
    yield Headline(f"accuracy of {model.name}", _percent(model.accuracy.mean), _brief(model.accuracy))
    for identity, what in zip(evaluation.identities, ("generators", "generators and artefacts"), strict=False):
        if identity.is_known:
            yield Headline(f"knowing the {what} alone", _percent(identity.accuracy.mean), _brief(identity.accuracy))
        else:
            yield Headline(f"knowing the {what} alone", "\N{EN DASH}", f"cannot be computed: {identity.problem}")
    if best is not None:
        lead = evaluation.difference(model, best)
        detail = f"{_brief(lead, points=True)}; on the pairs that both answered"
        yield Headline(f"minus the best baseline without HR, {best.name}", _points(lead.mean), detail, _tone(lead))
    if "shuffled" in model.ablations:
        drop = model.ablations["shuffled"].drop
        text = "lost with another photo's LR image"
        yield Headline(text, _points(drop.mean, sign=False), _brief(drop, points=True), _weight(drop))


def _caveats(evaluation: PreferenceEvaluation) -> Iterator[str]:
    for identity, what in zip(evaluation.identities, ("generator", "generator and artefact"), strict=False):
        if identity.is_known:
            yield (
                f"Knowing the {what} of each image, and seeing none, predicts {_percent(identity.accuracy.mean)} of "
                "the pairs that it says anything about. A scorer that does no better may have learnt to recognise it."
            )
        else:
            yield (
                f"The baseline that knows the {what} of each image cannot be computed: {identity.problem}. Nothing "
                "here shows that a model does not merely recognise who made an image."
            )
    sources = sorted({pair.source for pair in evaluation.table.pairs})
    yield (
        f"The labels come from: {', '.join(sources)}. Labels that were constructed or given by a metric are no human "
        "opinion; a scorer that agrees with them agrees with their construction."
    )
    if evaluation.table.counts()["photos"] < FEW_PHOTOS:
        yield (
            f"There are only {evaluation.table.counts()['photos']} photos. Pairs of one photo are not independent, so "
            "the intervals are wide however many pairs there are."
        )
    for result in evaluation.models:
        if result.answers.missing:
            reason = f" ({result.problem})" if result.problem else ""
            yield (
                f"{result.name} gave no answer to {result.answers.missing} of {len(evaluation.table)} pairs{reason}. "
                "They are left out of its figures, not counted as wrong or right."
            )


def _figures(evaluation: PreferenceEvaluation) -> Section:
    words = (
        "Accuracy is the share of ordered pairs that a scorer puts in the labelled order; 50 % is chance. With ties "
        "it may also say 'tie', by a threshold found on other photos. AUC asks whether right margins are larger than "
        "wrong ones anywhere, ECE whether sigmoid(margin / temperature) keeps its promise, with the temperature found "
        "on other photos; tau-b and rho look inside groups. A dash: not defined here."
    )
    header = ["scorer", "accuracy", "with ties", "AUC", "ECE", "tau-b", "rho", "same in both orders", "no answer"]
    table = Table(
        "All scorers on the same pairs",
        header,
        [_row(result) for result in _all(evaluation)],
        note=f"Intervals: {DEFINITIONS['intervals']}.",
    )
    return Section("figures", "Figures", [words], [_dots(evaluation), table, _differences(evaluation)])


def _row(result: ScorerResult) -> list[Cell | str]:
    if not result.is_known:
        return [result.name, Cell("cannot be computed", result.problem, "muted"), *[""] * 7]
    tied, swap = result.with_ties, result.swap
    return [
        Cell(result.name, f"sees {result.sees}", "strong" if result.role == "model" else ""),
        Cell(_percent(result.accuracy.mean), _brief(result.accuracy)),
        "no ties" if tied is None else Cell(_percent(tied.mean), _brief(tied)),
        number(result.auc, 3),
        Cell(number(result.calibration.ece, 3), f"temperature {result.calibration.temperature:.3g}"),
        Cell(number(result.kendall.value.mean, 3), _groups(result.kendall.value, result.kendall.groups)),
        Cell(number(result.spearman.value.mean, 3), _groups(result.spearman.value, result.spearman.groups)),
        Cell(_percent(swap.mean), _brief(swap)) if result.compares else Cell("100 %", "by definition", "muted"),
        Cell(str(result.answers.missing), result.problem if result.answers.missing else ""),
    ]


def _groups(value: Estimate, groups: int) -> str:
    return f"{interval(value)}; {groups} groups" if groups else "no group ranked completely"


def _dots(evaluation: PreferenceEvaluation) -> DotPlot:
    rows = [
        DotRow(
            result.name,
            [
                Mark(
                    0 if result.role == "model" else 1,
                    result.accuracy.mean,
                    _percent(result.accuracy.mean),
                    result.accuracy.low,
                    result.accuracy.high,
                )
            ],
        )
        for result in _all(evaluation)
        if result.is_known
    ]
    return DotPlot(
        "Accuracy with 95 % intervals", ["model", "baseline"], rows, reference=0.5, reference_label="chance"
    )


def _differences(evaluation: PreferenceEvaluation) -> Table:
    rows: list[list[Cell | str]] = []
    compared = {model.name: {o.name: o for o in evaluation.compared_with(model)} for model in evaluation.models}
    others = {name: other for found in compared.values() for name, other in found.items()}
    for other in others.values():
        cells: list[Cell | str] = [other.name]
        for model in evaluation.models:
            if other.name in compared[model.name]:
                change = evaluation.difference(model, other)
                cells.append(Cell(_points(change.mean), _brief(change, points=True), _tone(change)))
            else:
                cells.append("")
        rows.append(cells)
    return Table(
        "Accuracy minus that of a baseline or of a model named before, on the pairs that both answered",
        ["minus", *(model.name for model in evaluation.models)],
        rows,
        note="An interval that holds 0 means: not shown to be better or worse.",
    )


def _lr_image(evaluation: PreferenceEvaluation) -> Section:
    words = (
        "Each scorer is asked again with the LR image of another photo, and with one of the true one's mean colour. "
        "One that judges consistency must lose; one that loses nothing does not look. What never reads the LR image "
        "is left out."
    )
    rows: list[list[Cell | str]] = []
    for result in _all(evaluation):
        if not result.is_known or not result.ablations:
            continue
        cells: list[Cell | str] = [result.name, _percent(result.accuracy.mean)]
        for ablation in result.ablations.values():
            cells.append(Cell(_percent(ablation.accuracy.mean), _brief(ablation.accuracy)))
            cells.append(Cell(_points(-ablation.drop.mean), _drop(ablation.drop), _weight(ablation.drop)))
        rows.append(cells)
    header = ["scorer", "own LR image", "another photo's", "change", "blank", "change"]
    return Section("lr-image", "What the LR image is worth", [words], [Table("LR ablation", header, rows)])


def _drop(drop: Estimate) -> str:
    return _brief(Estimate(-drop.mean, -drop.high, -drop.low), points=True)


def _calibration(evaluation: PreferenceEvaluation) -> Section:
    best = evaluation.best_baseline
    shown = [*evaluation.models[: MOST_CURVES - 1], *([best] if best else [])]
    lines = [
        Line(r.name, [part.confidence for part in r.calibration.bins], [part.accuracy for part in r.calibration.bins])
        for r in shown
        if r.calibration.bins
    ]
    if not lines:
        return Section("calibration", "Calibration", ["It takes at least two photos to measure calibration."])
    chart = LineChart(
        "Reliability",
        [Line("perfect", [0.5, 1.0], [0.5, 1.0]), *lines],
        unit="share that is right",
        x_label="confidence",
        note="Each point is the pairs of one of ten bins of confidence; below the diagonal too much is promised.",
    )
    header = ["scorer", "confidence", "right", "pairs"]
    rows = [
        [r.name if number_ == 0 else "", number(part.confidence, 3), number(part.accuracy, 3), str(part.count)]
        for r in shown
        for number_, part in enumerate(r.calibration.bins)
    ]
    words = (
        "sigmoid(|margin| / temperature) is how sure a scorer is of an answer. It is calibrated if of the answers "
        "with 80 % confidence 80 % are right. The temperature of each photo is found on the other ones."
    )
    return Section("calibration", "Calibration", [words], [chart, Table("Bins", header, rows)])


def _slices(evaluation: PreferenceEvaluation) -> Section:
    best = evaluation.best_baseline
    others = [*evaluation.identities, *([best] if best else [])]
    shown = [*evaluation.models, *(result for result in others if result.is_known)]
    tables = [table for by in SLICES if (table := _slice_table(by, shown)) is not None]
    words = "The smaller a slice, the less its figure says; with many slices some stand out by chance."
    if not tables:
        words = "Neither artefacts, degradations, generators nor sources are told apart in this dataset."
    return Section("slices", "Slices", [words], tables)


def _slice_table(by: str, shown: Sequence[ScorerResult]) -> Table | None:
    parts = shown[0].slices[by]
    if not set(parts) - {UNKNOWN}:
        return None
    values = sorted(parts, key=lambda value: parts[value].accuracy.mean)
    rows: list[list[Cell | str]] = []
    for value in values[:MOST_VALUES]:
        cells = [result.slices[by].get(value) for result in shown]
        rows.append(
            [
                value,
                str(parts[value].pairs),
                *(Cell(_percent(c.accuracy.mean), _brief(c.accuracy)) if c else "\N{EN DASH}" for c in cells),
            ]
        )
    more = len(values) - len(rows)
    return Table(
        f"By {SLICE_NAMES[by]}",
        [SLICE_NAMES[by], "pairs", *(result.name for result in shown)],
        rows,
        note=f"{more} more values are in summary.json." if more > 0 else "",
    )


def _about(model: ScorerResult) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in model.facts.items())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if isfinite(share) else number(share)


def _points(change: float, *, sign: bool = True) -> str:
    return f"{number(100 * change, 1, sign=sign)} points" if isfinite(change) else number(change)


def _brief(value: Estimate, *, points: bool = False) -> str:
    if not (isfinite(value.low) and isfinite(value.high)):
        return interval(value)
    low, high = (number(100 * end, 1, sign=points) for end in (value.low, value.high))
    return f"95 % CI {low} to {high}{'' if points else ' %'}"


def _tone(change: Estimate) -> Tone:
    return "good" if change.low > 0 else "bad" if change.high < 0 else "muted"


def _weight(drop: Estimate) -> Tone:
    """A drop is neither good nor bad, but may be shown or not."""
    return "strong" if drop.low > 0 or drop.high < 0 else "muted"
