"""An evaluation told: one table per protocol, curves of reward against fidelity, and pictures with a slider."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from math import isfinite, isnan

import numpy as np

from refreward_trl.evaluation.alignment_benchmark import pick_telling
from refreward_trl.evaluation.charts import Line, LineChart
from refreward_trl.evaluation.model_benchmark import Measured
from refreward_trl.evaluation.model_results import Evaluation, Figure
from refreward_trl.evaluation.report import (
    Cell,
    Comparison,
    Gallery,
    Headline,
    Report,
    Section,
    Table,
    Tone,
    interval,
    number,
)
from refreward_trl.evaluation.statistics import Estimate

MOST_LINES = 6
TEXT_WIDTH = 118
MOST_HEADLINES = 6
DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", "neither": "neither direction is better"}


def evaluation_report(evaluation: Evaluation, measured: Measured | None = None) -> Report:
    """Returns the page; with `measured` it has pictures."""
    sections = [
        Section("figures", "Figures", [_reading(evaluation)], [_table(evaluation, f) for f in evaluation.figures])
    ]
    if charts := list(trade_offs(evaluation)):
        words = (
            "Each point is a model, joined in the order in which they were given. To the right an image is closer to "
            "what it is held against, upwards the reward likes it better. A curve that rises to the left buys reward "
            "with fidelity."
        )
        sections.append(Section("curves", "Reward against fidelity", [words], charts))
    if measured is not None:
        protocols = ", ".join(f"{figure.name} {figure.protocol.hash}" for figure in evaluation.figures)
        words = f"The figures below each picture are of that image alone, by the protocols {protocols}."
        sections.append(Section("pictures", "Pictures", [words], galleries(measured)))
    return Report(
        title=f"{' and '.join(evaluation.labels[1:])} against {evaluation.baseline}",
        lead=f"{len(evaluation.labels)} models on the same {_count(evaluation)}. "
        f"Differences are paired, image by image, with {evaluation.baseline}.",
        headlines=_headlines(evaluation),
        caveats=_caveats(evaluation),
        sections=sections,
        facts=_facts(evaluation),
    )


def as_text(evaluation: Evaluation) -> str:
    """The tables for a terminal."""
    return "\n\n".join(text_table(_table(evaluation, figure)) for figure in evaluation.figures)


def trade_offs(evaluation: Evaluation) -> Iterator[LineChart]:
    """One chart per fidelity metric: its change along the models, against the gain of every reward.

    Gains are in standard deviations of the baseline's reward over the images, so that rewards of different units can
    share an axis; a reward that does not vary is left out. To the right is better, also where the metric falls.
    """
    rewards = [f for f in evaluation.figures if f.kind == "reward" and evaluation.spread(f) > 0][:MOST_LINES]
    for figure in evaluation.figures:
        if figure.kind != "fidelity" or not rewards:
            continue
        across = [_zero(figure.sign * evaluation.difference(figure, label).mean) for label in evaluation.labels]
        lines = [_gain_line(evaluation, reward, across) for reward in rewards]
        turned = ", sign turned: right is closer" if figure.better == "lower" else ""
        unit = f", {figure.unit}" if figure.unit else ""
        yield LineChart(
            f"Reward against {figure.name}",
            lines,
            unit=f"gain since {evaluation.baseline}, in its standard deviations over images",
            x_label=f"change of {figure.name}{unit}{turned}",
            zero=True,
            note=f"{figure.name}: protocol {figure.protocol.hash}. "
            + " ".join(f"{reward.name}: protocol {reward.protocol.hash}." for reward in rewards),
        )


def _gain_line(evaluation: Evaluation, reward: Figure, across: list[float]) -> Line:
    spread = evaluation.spread(reward)
    gains = [_zero(reward.sign * evaluation.difference(reward, label).mean / spread) for label in evaluation.labels]
    gains = [gain if isfinite(x) else float("nan") for x, gain in zip(across, gains, strict=True)]
    across = [x if isfinite(x) else 0.0 for x in across]
    return Line(reward.name, across, gains, names=evaluation.labels)


def galleries(measured: Measured) -> list[Gallery]:
    """For each model but the baseline: the photos with the largest and the smallest gain and the most changed one."""
    evaluation = measured.evaluation
    guide = _guide(evaluation)
    found = []
    for label in evaluation.labels[1:]:
        names = [image.sample_id for image in evaluation.images]
        changes = guide.sign * evaluation.changes(guide, label) if guide else np.full(len(names), np.nan)
        gains = dict(zip(names, changes.tolist(), strict=True))
        moved = {name: _moved(measured, label, name) for name in names}
        picked = [(name, _remark(text, guide)) for name, text in pick_telling(gains, moved)]
        comparisons = [_comparison(measured, label, name, remark) for name, remark in picked]
        found.append(Gallery(f"{evaluation.baseline} and {label}", comparisons, evaluation.baseline, label))
    return found


def _guide(evaluation: Evaluation) -> Figure | None:
    """The figure by whose gain pictures are chosen: the first reward, else the first that has a better direction."""
    directed = [figure for figure in evaluation.figures if figure.better != "neither"]
    return next((figure for figure in directed if figure.kind == "reward"), directed[0] if directed else None)


def _remark(text: str, guide: Figure | None) -> str:
    return text.replace("gain", f"gain in {guide.name}") if guide else text


def _moved(measured: Measured, label: str, name: str) -> float:
    images = (measured.sr_image(each, name).float() for each in (label, measured.evaluation.baseline))
    return (next(images) - next(images)).abs().mean().item()


def _comparison(measured: Measured, label: str, name: str, remark: str) -> Comparison:
    evaluation, row = measured.evaluation, measured.row(name)
    place = [image.sample_id for image in evaluation.images].index(name)
    figures = [
        (
            figure.name,
            _with_unit(figure.values[evaluation.baseline][place], figure),
            _with_unit(figure.values[label][place], figure),
        )
        for figure in evaluation.figures
    ]
    before, after = (measured.sr_image(each, name).float() / 255 for each in (evaluation.baseline, label))
    return Comparison(name, remark, row["lr_image"], before, after, row.get("hr_image"), figures)


def _table(evaluation: Evaluation, figure: Figure) -> Table:
    unit = f", {figure.unit}" if figure.unit else ""
    header = ["model", f"mean{unit}", f"minus {evaluation.baseline}"]
    header += [f"better than {evaluation.baseline} on"] if figure.better != "neither" else []
    rows = [_row(evaluation, figure, label) for label in evaluation.labels]
    return Table(f"{figure.name}: {DIRECTIONS[figure.better]}", header, rows, note=figure.protocol.text)


def _row(evaluation: Evaluation, figure: Figure, label: str) -> list[Cell | str]:
    mean = evaluation.mean(figure, label)
    scored = sum(not isnan(value) for value in figure.values[label])
    missing = f"; {scored} of {len(evaluation.images)} images scored" if scored < len(evaluation.images) else ""
    cells: list[Cell | str] = [label, Cell(number(mean.mean, figure.digits), interval(mean, figure.digits) + missing)]
    if label == evaluation.baseline:
        return [*cells, Cell("baseline", tone="muted"), *([""] if figure.better != "neither" else [])]
    change = evaluation.difference(figure, label)
    cells.append(
        Cell(
            number(change.mean, figure.digits, sign=True),
            interval(change, figure.digits, sign=True),
            _tone(change, figure.sign),
        )
    )
    if figure.better != "neither":
        wins = evaluation.win_rate(figure, label)
        cells.append(Cell(_percent(wins.mean), _percent_interval(wins), _tone(_centred(wins), 1.0)))
    return cells


def text_table(table: Table) -> str:
    grid = [[str(name) for name in table.header]]
    grid += [[f"{cell.text} ({cell.detail})" if cell.detail else cell.text for cell in row] for row in table.cells]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]
    note = textwrap.fill(table.note, TEXT_WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([table.title, *(f"  {line}" for line in lines), note])


def _headlines(evaluation: Evaluation) -> list[Headline]:
    if len(evaluation.labels) != 2:
        return []
    label = evaluation.labels[1]
    shown = [figure for figure in evaluation.figures if figure.better != "neither"][:MOST_HEADLINES]
    return [_headline(evaluation, figure, label) for figure in shown]


def _headline(evaluation: Evaluation, figure: Figure, label: str) -> Headline:
    change = evaluation.difference(figure, label)
    unit = f" {figure.unit}" if figure.unit else ""
    return Headline(
        f"{figure.name}: {label} minus {evaluation.baseline}",
        number(change.mean, figure.digits, sign=True) + unit,
        f"{interval(change, figure.digits, sign=True)}; {DIRECTIONS[figure.better]}; better on "
        f"{_percent(evaluation.win_rate(figure, label).mean)} of the images; protocol {figure.protocol.hash}",
        _tone(change, figure.sign),
    )


def _reading(evaluation: Evaluation) -> str:
    return (
        "One table for each protocol: figures of different tables must not be compared. Intervals are 95 %, from "
        f"{_count(evaluation)} by a bootstrap that draws whole images (seed {evaluation.seed}); one that holds zero, "
        "or 50 % for wins, means: not shown."
    )


def _caveats(evaluation: Evaluation) -> list[str]:
    caveats = [
        "A higher reward is not a better picture. Look at the pictures, and at the distance to the LR and HR images.",
        f"{len(evaluation.figures)} figures were compared: with many of them, one interval in twenty is clear of zero "
        "by chance.",
    ]
    if any(figure.name.startswith(("refreward", "heldout_judge")) for figure in evaluation.figures):
        caveats.append(
            "The judges that come with the package learnt constructed preferences, not human opinion; the same judge "
            "must not be both what a model was trained on and the proof that it got better."
        )
    return caveats + [f"Not joined: {text}." for text in evaluation.left_out]


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    models = [(f"model {model.label}", model.source) for model in evaluation.models]
    return [*models, ("image set", evaluation.image_set), *evaluation.facts.items()]


def _count(evaluation: Evaluation) -> str:
    return f"{len(evaluation.images)} image{'s' if len(evaluation.images) != 1 else ''}"


def _with_unit(value: float, figure: Figure) -> str:
    return f"{number(value, figure.digits)}{' ' + figure.unit if figure.unit else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if isfinite(share) else number(share)


def _percent_interval(wins: Estimate) -> str:
    if not (isfinite(wins.low) and isfinite(wins.high)):
        return interval(wins)
    return f"95 % CI {100 * wins.low:.0f} to {100 * wins.high:.0f} %"


def _centred(wins: Estimate) -> Estimate:
    return Estimate(wins.mean - 0.5, wins.low - 0.5, wins.high - 0.5)


def _tone(change: Estimate, sign: float) -> Tone:
    """How a difference is to be read; muted where its interval holds zero, or neither direction is better."""
    low, high = sorted((sign * change.low, sign * change.high))
    return "good" if low > 0 else "bad" if high < 0 else "muted"


def _zero(value: float) -> float:
    """The value; minus zero loses its sign."""
    return value + 0.0
