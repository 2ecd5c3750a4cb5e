"""`refreward demo`: measure the judge and the generator, align by ReFL and DDPO, and show what came of it.

Each run is a packaged recipe with a few settings changed, trained, and measured on photos that nothing was trained on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.json_file import write_json
from refreward_trl.cli.parser import CommandParser
from refreward_trl.cli.recipe import read_recipe
from refreward_trl.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from refreward_trl.evaluation.alignment_benchmark import AlignmentResult
    from refreward_trl.evaluation.demo_report import Evidence
    from refreward_trl.evaluation.reward_benchmark import JudgeReport
    from refreward_trl.evaluation.sr_benchmark import GeneratorReport

REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
FIGURES_FILE = "figures.json"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs on and how long. The defaults fit into eight minutes on two CPU cores.

    Attributes:
        output_dir: Where everything is written.
        seed: Seed of trainings, degradations, pairs and intervals.
        pairs: Constructed pairs in each column of the judge's table.
        photos: Most held-out photos to measure on; None takes all.
        steps_refl: Optimizer steps of ReFL and of its control.
        steps_ddpo: Optimizer steps of DDPO and of its control.
        steps_hacking: Optimizer steps of ReFL without its anchor; 0 leaves it out.
        refl_recipe: Recipe of the ReFL runs. Its rewards, held-out rewards, generator and test photos serve all runs;
            the first reward is the judge of the report, the first held-out reward its held-out judge.
        ddpo_recipe: Recipe of the DDPO runs.
        crop_size: Side in HR pixels of the judge's pairs.
        evaluations: Evaluations on validation photos during a run, for its curves, beside the one at the start.
        eval_photos: Validation photos of each.
        flags: Further settings for every run, such as `("--per_device_train_batch_size", "2")`.
    """

    output_dir: Path
    seed: int = 0
    pairs: int = 60
    photos: int | None = None
    steps_refl: int = 32
    steps_ddpo: int = 10
    steps_hacking: int = 18
    refl_recipe: str = "tiny/refl"
    ddpo_recipe: str = "tiny/ddpo"
    crop_size: int = 128
    evaluations: int = 4
    eval_photos: int = 3
    flags: tuple[str, ...] = ()

    @property
    def recipes(self) -> dict[str, str]:
        """Recipe by method."""
        return {"refl": self.refl_recipe, "ddpo": self.ddpo_recipe}


def main(argv: list[str]) -> None:
    """Parses the words and runs the demo."""
    parser = CommandParser(
        "demo",
        "Measure the default judge and generator, align the generator by ReFL and by DDPO, each beside a control run, "
        "and write\na report with pictures. Takes minutes on two CPU cores.",
        "refreward demo --output-dir runs/demo",
    )
    defaults = DemoSettings(Path("runs/demo"))
    parser.add_argument("--output-dir", type=Path, default=defaults.output_dir, help="folder to write (runs/demo)")
    for name, text in (
        ("seed", "seed of everything that is drawn"),
        ("pairs", "constructed pairs in each column of the judge's table"),
        ("photos", "most held-out photos to measure on; all by default"),
        ("steps-refl", "optimizer steps of ReFL and of its control"),
        ("steps-ddpo", "optimizer steps of DDPO and of its control"),
        ("steps-hacking", "optimizer steps of ReFL without its anchor; 0 leaves it out"),
    ):
        default = vars(defaults)[name.replace("-", "_")]
        shown = "" if default is None else f" ({default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text + shown)
    settings = DemoSettings(**vars(parser.parse_words(argv)))
    _check(settings)
    from transformers.utils import logging

    logging.disable_progress_bar()  # the bars of loading weights say nothing here
    run_demo(settings)


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Runs the demo and writes `report.html`, `summary.json` and `figures.json` into `settings.output_dir`.

    Returns:
        The summary, as written.

    Raises:
        ConfigError: A setting or a recipe cannot work.
        SetupError: The folder cannot be written.
    """
    started = time.monotonic()
    _check(settings)
    from refreward_trl.cli.demo_runs import DemoRuns
    from refreward_trl.evaluation.demo_report import Evidence, demo_report
    from refreward_trl.evaluation.report import write_report

    runs = DemoRuns(settings)
    judge = runs.measure_judge()
    generator, before = runs.measure_generator()
    alignments = [runs.align("refl", settings.steps_refl, before), runs.align("ddpo", settings.steps_ddpo, before)]
    hacking = runs.without_anchor(settings.steps_hacking) if settings.steps_hacking else None
    seconds = time.monotonic() - started
    summary = summarise(judge, generator, [item.result for item in alignments], seconds, settings.seed)
    evidence = Evidence(
        runs.photos, judge, generator, before, alignments, hacking, list(_facts(settings, summary, len(runs.photos)))
    )
    write_report(settings.output_dir / REPORT_FILE, demo_report(evidence))
    write_json(settings.output_dir / FIGURES_FILE, figures(evidence))
    write_json(settings.output_dir / SUMMARY_FILE, summary)
    print(
        f"\n{seconds:.0f} s. Open {settings.output_dir / REPORT_FILE} in a browser; the figures are in {SUMMARY_FILE}."
    )
    return summary


def summarise(
    judge: JudgeReport, generator: GeneratorReport, results: Sequence[AlignmentResult], seconds: float, seed: int
) -> dict[str, Any]:
    """Returns the content of `summary.json`; results are keyed by their names in lower case."""
    from refreward_trl.trainers.checkpoint_hooks import package_versions

    return {
        "judge": judge.summary(),
        **generator.summary(),
        **{result.name.lower(): result.summary() for result in results},
        "seconds": seconds,
        "seed": seed,
        "versions": package_versions(),
    }


def figures(evidence: Evidence) -> dict[str, Any]:
    """Returns what the report's means were taken of: every run's rows and every column's accuracies."""
    runs = [evidence.before, *(run for item in evidence.alignments for run in (item.run, item.control))]
    runs += [evidence.hacking] if evidence.hacking else []
    scorers = {"judge": evidence.judge.own, "judge, LR shuffled": evidence.judge.shuffled, **evidence.judge.baselines}
    return {
        "runs": {run.label: {"command": run.command, "photos": list(run.rows)} for run in runs},
        "judge": {
            scorer: {
                column: {"pairs": len(found.outcomes), **found.accuracy.as_dict()} for column, found in table.items()
            }
            for scorer, table in scorers.items()
        },
    }


def _check(settings: DemoSettings) -> None:
    """Finds what cannot work in a second, before torch is imported."""
    least = {"pairs": 2, "steps_refl": 1, "steps_ddpo": 1, "steps_hacking": 0, "photos": 2, "evaluations": 0}
    for name, low in least.items():
        value = vars(settings)[name]
        if value is not None and value < low:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}", where="refreward demo", fix=f"use at least {low}"
            )
    for method, recipe in settings.recipes.items():
        read_recipe(recipe, method=method, flags=settings.flags)
    try:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"the folder cannot be made: {error.strerror}",
            where=str(settings.output_dir),
            fix="choose another --output-dir",
        ) from error


def _facts(settings: DemoSettings, summary: dict[str, Any], photos: int) -> Iterator[tuple[str, str]]:
    import torch

    yield "time", f"{summary['seconds'] / 60:.1f} minutes on {torch.get_num_threads()} CPU threads"
    yield "seed", str(settings.seed)
    yield "held-out photos", str(photos)
    yield "judge's pairs", f"{summary['judge']['pairs']} in all, {settings.pairs} a column"
    yield "ReFL", f"{settings.steps_refl} steps from {settings.refl_recipe}, as long as its control"
    yield "DDPO", f"{settings.steps_ddpo} steps from {settings.ddpo_recipe}, as long as its control"
    yield (
        "full runs",
        f"refreward refl --config {settings.refl_recipe}; refreward ddpo --config {settings.ddpo_recipe}",
    )
    yield "versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
