"""`refreward eval`: compare generators and folders of images, every figure with its protocol."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from refreward_trl.cli.json_file import write_json
from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import DataError
from refreward_trl.evaluation.protocols import METRICS, WITH_HR, WITHOUT_HR, package_version

if TYPE_CHECKING:
    from refreward_trl.evaluation.model_benchmark import Measured
    from refreward_trl.evaluation.model_inputs import ImageSet, LoadGenerator
    from refreward_trl.evaluation.model_results import Evaluation

RESULT_FILE, REPORT_FILE, IMAGE_FOLDER = "eval.json", "eval.html", "images"
DEFAULT_OUTPUT = Path("runs/eval")
PACKAGES = ("torch", "numpy", "pillow", "transformers", "diffusers")
"""Packages whose versions are saved with the figures."""


def main(argv: list[str]) -> None:
    """Prints tables and writes `eval.json` and `eval.html`."""
    arguments = read_arguments(argv)
    if arguments.compare:
        evaluation, measured = compare(arguments.compare), None
    else:
        measured = evaluate(arguments)
        evaluation = measured.evaluation
    show(evaluation, measured, arguments.output_dir)


def read_arguments(argv: list[str]) -> Namespace:
    """Reads the words.

    Raises:
        ConfigError: They are wrong, or contradict each other.
    """
    parser = CommandParser(
        "eval",
        "Compare generators and folders of images on the same inputs; figures of unlike protocols are never mixed.",
        "refreward eval --dataset default --split test --models bicubic default --output-dir runs/eval\n"
        "  refreward eval --lr photos/lr --hr photos/hr --models before=default after=runs/tiny/refl/generator \\\n"
        "      osediff=folder/of/pngs --metrics psnr_y ssim_y lr_consistency refreward\n"
        "  refreward eval --compare runs/a/eval.json runs/b/eval.json",
    )
    images = parser.add_argument_group("images (or --compare)")
    images.add_argument("--lr", type=Path, metavar="DIR", help="folder of LR images")
    images.add_argument(
        "--hr", type=Path, metavar="DIR", help="folder of HR images of the same names, if there are any"
    )
    images.add_argument(
        "--dataset", metavar="SOURCE", help="instead of --lr: 'default' (shipped photos), or as recipes"
    )
    images.add_argument("--split", help="split of the dataset (default: test for the shipped photos)")
    images.add_argument(
        "--degradation", default="seesr", metavar="PRESET", help="makes missing LR images (default seesr)"
    )
    images.add_argument("--scale", type=int, default=4, help="HR size over LR size (default 4)")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="[LABEL=]MODEL",
        help="the first is the baseline: default, bicubic, a generator, or a folder of SR images matched by name",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(METRICS)}, or a reward of your own, my_file.my_reward; psnr_y:4 crops a border of 4 pixels, "
        "refreward:FOLDER is your own judge",
    )
    parser.add_argument("--compare", nargs="+", type=Path, metavar="JSON", help="join saved results, if they may be")
    parser.add_argument("--output-dir", type=Path, help=f"where {RESULT_FILE}, {REPORT_FILE} and images go")
    parser.add_argument("--seed", type=int, default=0, help="of degradations and of the bootstrap (default 0)")
    parser.add_argument("--device", help="where generators run, e.g. cuda (default: cuda if there is one, else cpu)")
    arguments = parser.parse_words(argv)
    _check(arguments, parser)
    return arguments


def _check(arguments: Namespace, parser: CommandParser) -> None:
    if arguments.compare:
        others = ("lr", "hr", "dataset", "split", "models", "metrics")
        if given := [f"--{name}" for name in others if getattr(arguments, name) is not None]:
            parser.error(f"--compare joins saved results and does not go with {', '.join(given)}")
        if len(arguments.compare) < 2:
            parser.error("--compare needs at least two files")
        return
    if (arguments.lr is None) == (arguments.dataset is None):
        parser.error("give the images: either --lr DIR or --dataset SOURCE")
    if arguments.lr is not None and arguments.split is not None:
        parser.error("--split belongs to --dataset")
    if arguments.lr is None and arguments.hr is not None:
        parser.error("--hr belongs to --lr; a dataset brings its HR images along")
    if not arguments.models:
        parser.error("name the --models, the baseline first")
    if arguments.dataset == "default" and arguments.split is None:
        arguments.split = "test"
    arguments.output_dir = arguments.output_dir or DEFAULT_OUTPUT


def evaluate(arguments: Namespace) -> Measured:
    """Checks everything, then measures."""
    import torch
    from tqdm import tqdm

    from refreward_trl.evaluation.metrics import load_metric
    from refreward_trl.evaluation.model_benchmark import measure_models
    from refreward_trl.evaluation.model_inputs import check_generators, read_inputs, read_models

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    models, image_set = read_models(arguments.models), _image_set(arguments)
    words = list(dict.fromkeys(arguments.metrics or (WITH_HR if image_set.has_hr else WITHOUT_HR)))
    metrics = [load_metric(word, device=device) for word in words]
    inputs = read_inputs(image_set, models, metrics)
    loader = _generator_loader(arguments.scale)
    check_generators(models, inputs, loader)
    return measure_models(
        models,
        inputs,
        metrics,
        loader,
        arguments.output_dir / IMAGE_FOLDER,
        device=device,
        seed=arguments.seed,
        facts={
            "seed": f"{arguments.seed}, of degradations made on the fly and of the bootstrap",
            "device": device,
            "versions": ", ".join(map(package_version, PACKAGES)),
        },
        progress=lambda numbers, label: tqdm(numbers, desc=label, unit="image"),
    )


def _image_set(arguments: Namespace) -> ImageSet:
    from refreward_trl.evaluation.model_inputs import ImageSet

    return ImageSet(
        lr=arguments.lr,
        hr=arguments.hr,
        dataset=arguments.dataset,
        split=arguments.split,
        degradation=arguments.degradation,
        scale=arguments.scale,
        seed=arguments.seed,
    )


def _generator_loader(scale: int) -> LoadGenerator:
    from refreward_trl.cli.building import build_generator
    from refreward_trl.trainers.arguments import GeneratorArguments

    return lambda source: build_generator(GeneratorArguments(generator=source), scale=scale, seed=0)


def compare(files: list[Path]) -> Evaluation:
    """Joins saved results.

    Raises:
        DataError: A file is none, is named twice, or was measured on other images or by other protocols.
    """
    from refreward_trl.evaluation.model_results import join_evaluations, read_evaluation

    if len(set(files)) < len(files):
        raise DataError("a file is named twice", where="--compare", fix="name different results")
    return join_evaluations({str(file): read_evaluation(file) for file in files})


def show(evaluation: Evaluation, measured: Measured | None, output_dir: Path | None) -> None:
    """Prints the tables, and writes the JSON and the page where there is a folder for them."""
    from refreward_trl.evaluation.model_report import as_text, evaluation_report
    from refreward_trl.evaluation.report import write_report

    print(as_text(evaluation))
    for text in evaluation.left_out:
        print(f"\nnot joined: {text}")
    if output_dir is None:
        return
    write_json(output_dir / RESULT_FILE, evaluation.as_dict())
    write_report(output_dir / REPORT_FILE, evaluation_report(evaluation, measured))
    print(f"\nwrote {output_dir / RESULT_FILE} and {output_dir / REPORT_FILE}")
