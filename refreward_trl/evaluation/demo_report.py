"""The demo's page: what was measured, told so that it can be checked. Every number comes from the evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

from torch import Tensor

from refreward_trl.evaluation.alignment_benchmark import AlignmentResult, spread_of, telling_photos
from refreward_trl.evaluation.charts import DotPlot, DotRow, Line, LineChart, Mark
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
from refreward_trl.evaluation.reward_benchmark import (
    PROJECTED,
    UNSEEN,
    ColumnResult,
    JudgeReport,
    plain_columns,
    projected_columns,
    unseen_columns,
)
from refreward_trl.evaluation.sr_benchmark import PROTOCOL, GeneratorReport, Row, mean_of
from refreward_trl.evaluation.statistics import Estimate

History = Sequence[Mapping[str, Any]]

QUESTIONS = {
    "artefact": "HR image against an artefact on it",
    "severity": "mild against severe artefact",
    "other_crop": "slight blur against another crop",
    "pasted_detail": "slight blur against foreign detail",
}
BASELINE_LABELS = {
    "psnr_down_sr_to_lr": "PSNR of reduced SR to LR",
    "psnr_to_upsampled_lr": "PSNR to enlarged LR",
    "laplacian_variance": "sharpness (Laplacian variance)",
}
REWARD_DIGITS = 3
GUARD_LIMIT = 0.5
"""Fall of LR- or HR-PSNR in dB beyond which a gain in reward counts as bought with fidelity."""
REWARD_LABELS = {"refreward": "judge", "heldout_judge": "held-out judge", "lr_consistency": "LR consistency"}


@dataclass(frozen=True)
class Run:
    """A generator after one run: its figures and images on the held-out photos, and the run's log.

    Attributes:
        label: What people call it.
        rows: Rows of `evaluate_generator`.
        images: SR image of each photo, float `(3, H, W)`.
        history: The trainer's log entries, each with `step`.
        command: A command line that does the same run.
    """

    label: str
    rows: Sequence[Row]
    images: Mapping[str, Tensor]
    history: History = ()
    command: str = ""


@dataclass(frozen=True)
class Alignment:
    """A method's run, its control, and what the comparison says. `control_note` says what the control lacked."""

    result: AlignmentResult
    run: Run
    control: Run
    control_note: str


@dataclass(frozen=True)
class Evidence:
    """Everything the page is made of.

    Attributes:
        photos: Rows of the held-out photos, with `lr_image` and `hr_image`.
        judge: The judge on constructed pairs.
        generator: The generator beside its baselines.
        before: The generator before alignment.
        alignments: Methods with their controls; the first is told first.
        hacking: The first method once more without its anchor; None where it was not run.
        facts: Names and values about the run.
    """

    photos: Sequence[Row]
    judge: JudgeReport
    generator: GeneratorReport
    before: Run
    alignments: Sequence[Alignment]
    hacking: Run | None = None
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)

    @property
    def reward(self) -> str:
        """Name of the optimised reward."""
        return self.alignments[0].result.reward

    @property
    def heldout(self) -> str:
        """Name of the reward that only watched."""
        return self.alignments[0].result.heldout


def demo_report(evidence: Evidence) -> Report:
    """Writes the page's words and arranges its figures."""
    sections = [pictures(evidence), alignment(evidence)]
    if evidence.hacking is not None:
        sections.append(hacking(evidence, evidence.hacking))
    sections += [generator(evidence), judge(evidence)]
    return Report(
        title="A one-step super-resolution generator, aligned with a judge that sees its input",
        lead=_lead(evidence),
        headlines=list(headlines(evidence)),
        caveats=_caveats(evidence),
        sections=sections,
        facts=evidence.facts,
    )


def headlines(evidence: Evidence) -> Iterator[Headline]:
    """The figures to take away, good ones and bad ones alike."""
    for item in evidence.alignments:
        excess = item.result.gain_minus_control()
        yield Headline(
            f"{item.result.name}: gain in reward minus control",
            _gain(excess.mean),
            _gain_interval(excess),
            _tone(excess),
        )
    first = evidence.alignments[0].result
    heldout = first.change(first.heldout_column)
    yield Headline(
        f"{_label(evidence.heldout)} after {first.name}",
        _gain(heldout.mean),
        _gain_interval(heldout),
        _tone(heldout),
    )
    psnrs = [first.change(name).mean for name in ("lr_psnr", "hr_psnr")]
    yield Headline(
        f"fidelity after {first.name}: LR-PSNR, HR-PSNR",
        f"{number(psnrs[0], sign=True)}, {number(psnrs[1], sign=True)} dB",
        f"more than {number(GUARD_LIMIT, 1)} dB lost would be too much",
        "bad" if min(psnrs) < -GUARD_LIMIT else "",
    )
    projected = evidence.judge.accuracy(projected_columns)
    baseline, best = evidence.judge.best_baseline(projected_columns)
    yield Headline(
        "judge on back-projected pairs",
        number(projected.mean),
        f"best baseline {number(best)} ({BASELINE_LABELS.get(baseline, baseline)}); chance 0.50",
        "bad" if projected.mean < best else "",
    )
    yield Headline(
        "generator over the better bicubic",
        f"{number(evidence.generator.margin, sign=True)} dB",
        f"HR-PSNR; gradient energy {number(evidence.generator.detail)} times bicubic's",
        "good" if evidence.generator.margin > 0 else "bad",
    )


def pictures(evidence: Evidence) -> Section:
    """The photos that gained most and least and changed most, for each method."""
    galleries = [
        _gallery(evidence, item.run, item.result, f"{item.result.name} on held-out photos")
        for item in evidence.alignments
    ]
    return Section(
        "pictures",
        "Pictures",
        [
            "Drag the handle to compare. The square marks the region that is enlarged below; it starts where most "
            "changed. Move it with the mouse, or over the LR image with a finger or the arrow keys."
        ],
        galleries,
    )


def alignment(evidence: Evidence) -> Section:
    """Gains against controls, guards, and curves."""
    paragraphs = [_verdict(item) for item in evidence.alignments]
    rows = [row for item in evidence.alignments for row in _gain_rows(item)]
    plot = DotPlot(
        f"Change of the {_label(evidence.reward)}'s reward on held-out photos",
        ["mean of the photos with 95 % interval"],
        rows,
        reference=0.0,
        reference_label="no change",
        note="Deployed path before and after: no sampling, same decoder, same colour fix. Intervals resample photos.",
    )
    charts = [chart for item in evidence.alignments for chart in _curves(evidence, item.run, item.control)]
    return Section("alignment", "What alignment changed", paragraphs, [plot, _guard_table(evidence), *charts])


def hacking(evidence: Evidence, run: Run) -> Section:
    """The same training without the anchor, shown as what it is."""
    result = evidence.alignments[0].result
    without = _against(result, run)
    reward, heldout = without.change(result.reward_column), without.change(result.heldout_column)
    lr_psnr, hr_psnr = without.change("lr_psnr"), without.change("hr_psnr")
    told = (
        f"Without the anchor the judge's reward moved by {_gain(reward.mean)}, the {_label(evidence.heldout)} by "
        f"{_gain(heldout.mean)}, LR-PSNR by {number(lr_psnr.mean, sign=True)} dB and HR-PSNR by "
        f"{number(hr_psnr.mean, sign=True)} dB. "
    )
    guards = {_label(evidence.heldout): heldout, "LR-PSNR": lr_psnr, "HR-PSNR": hr_psnr}
    fallen = [name for name, change in guards.items() if change.high < 0]
    if reward.low > 0 and fallen:
        told += (
            f"The reward rose while {' and '.join(fallen)} fell, each with a 95 % interval clear of zero: the "
            "generator learnt to please the judge, not to restore the image."
        )
    else:
        told += "In this short run no guard fell clearly while the reward rose clearly, so it shows no hacking."
    return Section(
        "hacking",
        "What reward hacking looks like",
        [
            "Any learned reward can be fooled by a generator that is free to look for its blind spots. This is the "
            "same run with its fidelity anchor switched off. It is here as a warning, not as a result.",
            told,
        ],
        [_gallery(evidence, run, without, "Without the anchor"), *_curves(evidence, run)],
    )


def generator(evidence: Evidence) -> Section:
    """The generator beside what it must beat and what bounds it."""
    figures = evidence.generator
    share = (
        f" With the denoiser switched off HR-PSNR falls by {number(figures.denoiser_share)} dB."
        if isfinite(figures.denoiser_share)
        else ""
    )
    methods = [
        ("bicubic", "", figures.bicubic),
        ("bicubic, smoothed", f"sigma {figures.sigma:g} px, chosen on these photos", figures.smoothed),
        ("generator", "before alignment", figures.generator),
        ("denoiser switched off", "encode, decode", figures.bypass),
        ("VAE ceiling", "encodes the HR image: no method", figures.ceiling),
    ]
    base = mean_of(figures.bicubic, "gradient_energy")
    rows = [
        [
            Cell(name, detail, "strong" if name == "generator" else "muted" if name == "VAE ceiling" else ""),
            f"{number(mean_of(found, 'hr_psnr'))} dB",
            number(mean_of(found, "ssim"), 3),
            f"{number(mean_of(found, 'lr_psnr'))} dB",
            f"{number(mean_of(found, 'gradient_energy') / base)}",
        ]
        for name, detail, found in methods
        if found is not None
    ]
    words = (
        f"{number(figures.margin, sign=True)} dB against the better of bicubic and smoothed bicubic, with "
        f"{number(figures.detail)} times bicubic's gradient energy.{share} Smoothing lowers the noise of the LR image "
        "and is a stronger baseline than it looks; its width was chosen on these very photos."
    )
    table = Table(
        f"Mean of {len(evidence.photos)} held-out photos",
        ["method", "HR-PSNR", "SSIM", "LR-PSNR", "gradient energy (bicubic = 1)"],
        rows,
        note=PROTOCOL + ".",
    )
    return Section("generator", "The generator before alignment", [words], [table])


def judge(evidence: Evidence) -> Section:
    """The judge on pairs of known order, beside scores that need no judge."""
    report = evidence.judge
    plain, projected = report.accuracy(plain_columns), report.accuracy(projected_columns)
    wrong = report.summary()["accuracy_lr_shuffled"]
    baseline, best = report.best_baseline(plain_columns)
    projected_baseline, projected_best = report.best_baseline(projected_columns)
    paragraphs = [
        f"On plain constructed pairs the judge is right in {number(plain.mean)} of cases ({interval(plain)}), and in "
        f"{number(wrong)} when it is shown another photo's LR image. That test is easy: "
        f"{BASELINE_LABELS.get(baseline, baseline)} alone reaches {number(best)}.",
        "Back-projected pairs have the same low-resolution content on both sides, so consistency with the LR image "
        f"hardly tells them apart. There the judge reaches {number(projected.mean)} ({interval(projected)}) and the "
        f"best baseline {number(projected_best)} ({BASELINE_LABELS.get(projected_baseline, projected_baseline)}).",
    ]
    columns = [*plain_columns(report.own), *unseen_columns(report.own), *projected_columns(report.own)]
    counts = sorted({len(report.own[name].outcomes) for name in columns})
    names = list(report.baselines)
    plot = DotPlot(
        "Share of pairs in the known order",
        ["judge", "judge, another photo's LR", *(BASELINE_LABELS.get(name, name) for name in names)],
        [_judge_row(report, name, names) for name in columns],
        reference=0.5,
        reference_label="chance",
        limits=(0.0, 1.0),
        note=f"{' or '.join(map(str, counts))} pairs a row, from photos no judge was trained on. Whiskers: 95 % "
        "interval, resampled by photo; a whisker of no length means that all photos agree, not certainty.",
    )
    kinds = Table(
        "The judge by artefact, plain and unseen pairs, worst first",
        ["artefact", "accuracy", "pairs"],
        [
            [kind.replace("_", " "), number(accuracy), str(count)]
            for kind, (accuracy, count) in report.by_kind().items()
        ],
    )
    return Section("judge", "The judge", paragraphs, [plot, kinds])


def _lead(evidence: Evidence) -> str:
    verdicts = []
    for item in evidence.alignments:
        excess = item.result.gain_minus_control()
        verdicts.append(f"{item.result.name} {_effect(excess)} ({_gain(excess.mean)}).")
    seen = f"Measured on {len(evidence.photos)} photographs that neither the generator nor the judge was trained on. "
    return seen + " ".join(verdicts)


def _caveats(evidence: Evidence) -> list[str]:
    return [
        "The judge learnt constructed preferences: the order is known from how each image was made. "
        "Nobody was asked what looks better.",
        "Generator and judge are small default weights trained on a few dozen photos. They show how the method "
        "behaves, not how good it can get; nothing here is verified on the released RefReward-SR weights.",
        f"These are short runs and {len(evidence.photos)} photos. An interval that holds zero means: not shown.",
        "A higher reward is not a better picture. That is why every gain stands beside a control, a judge that was "
        "not optimised, and the distance to the LR and HR images.",
    ]


def _verdict(item: Alignment) -> str:
    result = item.result
    excess = result.gain_minus_control()
    heldout = result.change(result.heldout_column)
    lr_psnr, hr_psnr = (result.change(name).mean for name in ("lr_psnr", "hr_psnr"))
    lost = [name for name, change in (("LR-PSNR", lr_psnr), ("HR-PSNR", hr_psnr)) if change < -GUARD_LIMIT]
    bought = f" {' and '.join(lost)} fell too far: this gain was bought with fidelity." if lost else ""
    size = abs(excess.mean) / result.spread if result.spread > 0 else nan
    return (
        f"{result.name}, {result.steps} steps on {result.images} crops, {_effect(excess)}: gain minus control "
        f"{_gain(excess.mean)} ({_gain_interval(excess)}), which is {number(size)} standard deviations of the reward "
        f"over these photos. Control: the same run with {item.control_note}. The {_label(result.heldout)} moved by "
        f"{_gain(heldout.mean)} ({_gain_interval(heldout)}), LR-PSNR by "
        f"{number(lr_psnr, sign=True)} dB and HR-PSNR by {number(hr_psnr, sign=True)} dB.{bought}"
    )


def _effect(excess: Estimate) -> str:
    if excess.low > 0:
        return "raised the reward more than its control did"
    if excess.high < 0:
        return "raised the reward less than its control did"
    return "did not move the reward beyond what its control did"


def _gain(value: float) -> str:
    return number(value, REWARD_DIGITS, sign=True)


def _gain_interval(found: Estimate) -> str:
    return interval(found, REWARD_DIGITS, sign=True)


def _tone(found: Estimate) -> Tone:
    return "good" if found.low > 0 else "bad" if found.high < 0 else "muted"


def _gain_rows(item: Alignment) -> list[DotRow]:
    result = item.result
    return [
        DotRow(result.name, [_mark(result.change(result.reward_column))]),
        DotRow(
            f"{result.name}, control", [_mark(result.change(result.reward_column, control=True))], item.control_note
        ),
        DotRow(f"{result.name} minus control", [_mark(result.gain_minus_control())]),
    ]


def _mark(found: Estimate) -> Mark:
    return Mark(0, found.mean, _gain(found.mean), found.low, found.high)


def _guard_table(evidence: Evidence) -> Table:
    runs = [run for item in evidence.alignments for run in (item.run, item.control)]
    runs += [evidence.hacking] if evidence.hacking is not None else []
    reward, heldout = f"reward/{evidence.reward}", f"reward/{evidence.heldout}"
    figures = [
        (reward, REWARD_DIGITS),
        (heldout, REWARD_DIGITS),
        ("lr_psnr", 2),
        ("hr_psnr", 2),
        ("ssim", 3),
        ("gradient_energy", 5),
    ]
    first = [
        Cell(evidence.before.label, tone="strong"),
        *(number(mean_of(evidence.before.rows, f), d) for f, d in figures),
    ]
    rows: list[list[Cell | str]] = [first]
    for run in runs:
        cells: list[Cell | str] = [run.label]
        for name, digits in figures:
            change = mean_of(run.rows, name) - mean_of(evidence.before.rows, name)
            cells.append(Cell(number(mean_of(run.rows, name), digits), number(change, digits, sign=True)))
        rows.append(cells)
    return Table(
        f"All runs on the same {len(evidence.photos)} held-out photos, with the change since before",
        [
            "run",
            _label(evidence.reward),
            _label(evidence.heldout),
            "LR-PSNR, dB",
            "HR-PSNR, dB",
            "SSIM",
            "gradient energy",
        ],
        rows,
    )


def _curves(evidence: Evidence, run: Run, control: Run | None = None) -> Iterator[LineChart]:
    reward = f"rewards/{evidence.reward}/mean"
    lines = [_line(name, one.history, reward) for name, one in ((run.label, run), ("its control", control)) if one]
    lines = [line for line in lines if line.x]
    if lines:
        yield LineChart(f"{run.label}: reward while training", lines, unit="mean of training crops")
    judges = {
        _label(evidence.reward): (f"eval_rewards/{evidence.reward}", f"reward/{evidence.reward}"),
        _label(evidence.heldout): (f"eval_heldout/{evidence.heldout}", f"reward/{evidence.heldout}"),
    }
    # Judges have scales of their own: on one axis the one with the wider scale would hide the other.
    watched = [
        _since_start(_line(f"{label}, sd", run.history, key), unit=spread)
        for label, (key, column) in judges.items()
        if (spread := spread_of(evidence.before.rows, column)) > 0
    ]
    fidelity = {"LR-PSNR, dB": "eval_lr_psnr", "HR-PSNR, dB": "eval_hr_psnr"}
    watched += [_since_start(_line(label, run.history, key)) for label, key in fidelity.items()]
    watched = [line for line in watched if len(line.x) > 1]
    if watched:
        yield LineChart(
            f"{run.label}: reward and guards",
            watched,
            unit="change on validation photos",
            zero=True,
            note="A reward that rises while its guards fall is being hacked. sd: standard deviations over the test "
            "photos before the run.",
        )


def _line(label: str, history: History, key: str) -> Line:
    entries = [entry for entry in history if key in entry]
    return Line(label, [float(entry["step"]) for entry in entries], [float(entry[key]) for entry in entries])


def _since_start(line: Line, *, unit: float = 1.0) -> Line:
    return Line(line.label, line.x, [(value - line.y[0]) / unit for value in line.y])


def _gallery(evidence: Evidence, run: Run, result: AlignmentResult, title: str) -> Gallery:
    rows = {row["sample_id"]: row for row in evidence.photos}
    comparisons = [
        Comparison(
            photo,
            remark,
            rows[photo]["lr_image"],
            evidence.before.images[photo],
            run.images[photo],
            rows[photo].get("hr_image"),
            _figures(result, photo),
        )
        for photo, remark in telling_photos(result, evidence.before.images, run.images)
    ]
    return Gallery(title, comparisons, "before", f"after {run.label}")


def _figures(result: AlignmentResult, photo: str) -> list[tuple[str, str, str]]:
    place = result.photos.index(photo)
    names = {
        _label(result.reward): (result.reward_column, REWARD_DIGITS, ""),
        _label(result.heldout): (result.heldout_column, REWARD_DIGITS, ""),
        "LR-PSNR": ("lr_psnr", 2, " dB"),
        "HR-PSNR": ("hr_psnr", 2, " dB"),
    }
    before, after = result.before[place], result.after[place]
    return [
        (label, f"{number(before[key], digits)}{unit}", f"{number(after[key], digits)}{unit}")
        for label, (key, digits, unit) in names.items()
    ]


def _against(result: AlignmentResult, run: Run) -> AlignmentResult:
    """The same comparison with another run in place of the method's own."""
    return AlignmentResult(
        name=run.label,
        reward=result.reward,
        heldout=result.heldout,
        steps=result.steps,
        images=result.images,
        seconds=nan,
        before=result.before,
        after=run.rows,
        control=result.control,
    )


def _judge_row(report: JudgeReport, name: str, baselines: Sequence[str]) -> DotRow:
    own = report.own[name].accuracy
    marks = [Mark(0, own.mean, number(own.mean), own.low, own.high)]
    if name in report.shuffled:
        marks.append(_point(report.shuffled[name], 1))
    marks += [_point(report.baselines[baseline][name], 2 + index) for index, baseline in enumerate(baselines)]
    question = name.removeprefix(PROJECTED)
    label = question.removeprefix(UNSEEN)
    sort = [text for prefix, text in ((PROJECTED, "back-projected"), (UNSEEN, "kind never seen")) if prefix in name]
    return DotRow(QUESTIONS.get(label, label.replace("_", " ")), marks, ", ".join(sort))


def _point(result: ColumnResult, series: int) -> Mark:
    return Mark(series, result.accuracy.mean, number(result.accuracy.mean))


def _label(reward: str) -> str:
    return REWARD_LABELS.get(reward, reward)
