"""`refreward eval-rm`: how well judges order candidates, beside every baseline on the same pairs."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from refreward_trl.cli.json_file import write_json
from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import ConfigError
from refreward_trl.evaluation.protocols import OWN_PACKAGE, package_version

if TYPE_CHECKING:
    from refreward_trl.data.preferences import PreferenceRecord
    from refreward_trl.evaluation.preference_judges import JudgeOptions
    from refreward_trl.evaluation.preference_results import PreferenceEvaluation

RESULT_FILE, REPORT_FILE = "summary.json", "report.html"
DEFAULT_OUTPUT = Path("runs/eval-rm")
PACKAGES = ("torch", "transformers", "numpy", "pillow")
"""Packages whose versions are saved with the figures."""


def main(argv: list[str]) -> None:
    """Prints a table and writes `summary.json` and `report.html`."""
    arguments = read_arguments(argv)
    show(evaluate(arguments), arguments.output_dir)


def read_arguments(argv: list[str]) -> Namespace:
    """Reads the words.

    Raises:
        ConfigError: They are wrong.
    """
    parser = CommandParser(
        "eval-rm",
        "How well judges order the candidates of labelled groups: accuracy, calibration, what the LR image is worth,\n"
        "slices and the worst errors, beside every baseline on the same pairs, the generators' identity among them.",
        "refreward eval-rm --model default --data prefs --split test --output-dir runs/eval-rm\n"
        "  refreward eval-rm --model before=default --model after=runs/rm/final --data prefs --aspect consistency\n"
        "  refreward eval-rm --model Qwen/Qwen2.5-VL-3B-Instruct:compare --data prefs --dtype bfloat16 --device cuda\n"
        "  refreward eval-rm --model my_rewards.sharpness --model heldout_judge --data prefs --metrics pyiqa:maniqa",
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]JUDGE[:WAY]",
        help="default, a judge's folder, a hub name, heldout_judge, or a reward such as my_file.my_reward; WAY is "
        "rate (default), compare, reason or reason_compare; may be repeated",
    )
    parser.add_argument("--data", type=Path, required=True, help="preference dataset, see `refreward data --help`")
    parser.add_argument("--split", help="split to use, or several: val+test (default: test if there is one, else all)")
    parser.add_argument("--aspect", default="overall", help="overall (default), consistency or naturalness")
    parser.add_argument("--output-dir", type=Path, default=DEFAULT_OUTPUT, help=f"default {DEFAULT_OUTPUT}")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="further baselines, named as in eval")
    parser.add_argument("--seed", type=int, default=0, help="of wrong LR images, folds and intervals (default 0)")
    parser.add_argument("--device", help="e.g. cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of judges (default float32)"
    )
    parser.add_argument("--quantization", choices=("8bit", "4bit"), help="of judges; needs bitsandbytes")
    parser.add_argument("--batch-size", type=int, default=16, help="the most images per forward (default 16)")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep scores of judges that rate or reason there")
    parser.add_argument(
        "--spec",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="how the model NAME is asked, where it brings no judge_spec.json",
    )
    arguments = parser.parse_words(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {arguments.batch_size}")
    return arguments


def evaluate(arguments: Namespace) -> PreferenceEvaluation:
    """Checks everything that can be checked at once, then measures."""
    from tqdm import tqdm

    from refreward_trl.evaluation.preference_baselines import open_baselines
    from refreward_trl.evaluation.preference_benchmark import evaluate_preferences
    from refreward_trl.evaluation.preference_judges import check_judge, open_judge, read_judges
    from refreward_trl.evaluation.preference_pairs import pair_table

    judges = read_judges(arguments.model)
    options = read_options(arguments, [judge.name for judge in judges])
    for judge in judges:
        check_judge(judge, options)
    records, split = read_records(arguments.data, arguments.split)
    table = pair_table(records, arguments.aspect)
    baselines = open_baselines(arguments.metrics, device=options.device)
    return evaluate_preferences(
        table,
        [partial(open_judge, judge, options) for judge in judges],
        baselines,
        seed=arguments.seed,
        facts={
            "data": str(arguments.data),
            "split": split,
            "device": options.device,
            "dtype": f"{options.dtype}{', ' + options.quantization if options.quantization else ''}",
            "versions": ", ".join([OWN_PACKAGE, *map(package_version, PACKAGES)]),
        },
        progress=lambda groups, label: tqdm(groups, desc=label, unit="group"),
    )


def show(evaluation: PreferenceEvaluation, folder: Path) -> None:
    """Prints the table, and writes the JSON and the page."""
    from refreward_trl.evaluation.preference_benchmark import as_dict
    from refreward_trl.evaluation.preference_report import as_text, preference_report
    from refreward_trl.evaluation.report import write_report

    write_json(folder / RESULT_FILE, as_dict(evaluation))
    write_report(folder / REPORT_FILE, preference_report(evaluation))
    print(as_text(evaluation))
    print(f"\nwrote {folder / RESULT_FILE} and {folder / REPORT_FILE}")


def read_records(data: Path, split: str | None) -> tuple[list[PreferenceRecord], str]:
    """Returns the groups to evaluate on, and what to call them: those of `split`, else of "test", else all.

    Raises:
        ConfigError: There is no such split.
        DataError: Nothing is there, or rows are wrong.
    """
    from refreward_trl.data.preferences import read_preferences

    records = read_preferences(data, split=split)
    if split is not None:
        return records, split
    tests = [record for record in records if record.split == "test"]
    return (tests, "test") if tests else (records, "all groups")


def read_options(arguments: Namespace, names: list[str]) -> JudgeOptions:
    """Gathers how judges are opened.

    Raises:
        ConfigError: A spec is no `NAME=FILE` of a model, or there is no such file or device.
    """
    import torch

    from refreward_trl.evaluation.preference_judges import JudgeOptions
    from refreward_trl.reward_model.loading import find_spec_file

    specs = {}
    for word in arguments.spec:
        name, _, file = word.partition("=")
        if name not in names or not find_spec_file(file).is_file():
            raise ConfigError(
                f"{word!r} is no NAME=FILE with the name of a model and a file, or a packaged spec",
                where="--spec",
                fix=f"the models are called {', '.join(names)}",
            )
        specs[name] = find_spec_file(file)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such word; no such device, or a torch without it
        raise ConfigError(f"there is no device {device!r}", where="--device", fix="e.g. cpu or cuda") from error
    return JudgeOptions(
        device=device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        batch_size=arguments.batch_size,
        cache=arguments.cache,
        specs=specs,
    )
