"""`refreward rm-distill`: let a large or reasoning judge label candidates, for a small judge to learn from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import ConfigError

if TYPE_CHECKING:
    from refreward_trl.data.preferences import PreferenceChoice, PreferenceRecord
    from refreward_trl.reward_model.distribution import Spread


def main(argv: list[str]) -> None:
    """Writes a copy of a preference dataset whose order is a judge's."""
    parser = CommandParser(
        "rm-distill",
        "Let a teacher, a large judge or one that reasons, say which candidate is better, and how sure it is by the\n"
        "spread of its answers. `refreward rm --preferences OUT` then teaches that to a small judge that rates in\n"
        "one differentiable forward pass.",
        "refreward rm-distill runs/qwen2_5_vl_7b/rm_grpo/judge prefs labelled --ask reason --samples 8",
    )
    parser.add_argument("teacher", metavar="TEACHER", help="default, a judge's folder, or a hub name")
    parser.add_argument("data", metavar="DATA", help="preference dataset; its own labels are not looked at")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the labelled dataset")
    parser.add_argument("--split", help="label this split only, or several: train+val")
    parser.add_argument("--ask", choices=("rate", "reason"), default="rate", help="how the teacher is asked")
    parser.add_argument("--samples", type=int, default=8, help="answers per image, with --ask reason (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling, with --ask reason (default 1)")
    parser.add_argument("--device", help="e.g. cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the teacher's weights")
    parser.add_argument("--quantization", choices=("8bit", "4bit"), help="of the teacher; needs bitsandbytes")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="how the teacher is asked, if it does not say")
    parser.add_argument("--format", choices=("imagefolder", "parquet"), default="imagefolder", help="of OUT")
    arguments = parser.parse_words(argv)
    if arguments.samples < 1 or (arguments.ask == "reason" and arguments.temperature <= 0):
        raise ConfigError("a spread needs samples, and those a temperature above 0", where="--samples, --temperature")
    from refreward_trl.data.preferences import read_preferences, write_preferences

    records = read_preferences(arguments.data, split=arguments.split)
    teacher = open_teacher(arguments)
    labelled, unread = label(records, teacher, f"judge {arguments.teacher}")
    write_preferences(labelled, arguments.out, format=arguments.format)
    pairs = sum(len(record.choices) for record in labelled)
    print(f"wrote {arguments.out}: {len(labelled)} groups, {pairs} pairs in the teacher's order")
    print("It is a judge's order, and no opinion of people.")
    if unread:
        print(f"{unread} candidates got no readable answer and take part in no pair")


def open_teacher(arguments: Any) -> Any:
    """Returns the teacher that the words name. Raises as `load_judge_as`."""
    import torch

    from refreward_trl.reward_model.loading import load_judge_as
    from refreward_trl.reward_model.reasoning import ReasonJudge
    from refreward_trl.reward_model.scoring import RateJudge

    kind: Any = ReasonJudge if arguments.ask == "reason" else RateJudge
    sampling = {"num_samples": arguments.samples, "temperature": arguments.temperature}
    return load_judge_as(
        kind,
        arguments.teacher,
        spec=arguments.spec,
        dtype=getattr(torch, arguments.dtype),
        quantization=arguments.quantization,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        **(sampling if arguments.ask == "reason" else {}),
    )


def label(records: Sequence[PreferenceRecord], teacher: Any, source: str) -> tuple[list[PreferenceRecord], int]:
    """Returns the records with the teacher's order in the place of their own, and how many candidates got no score."""
    from tqdm import tqdm

    from refreward_trl.data.images import to_float
    from refreward_trl.reward_model.distribution import score_spread

    labelled, unread = [], 0
    for record in tqdm(records, desc="label", unit="group"):
        group = record.load()
        lr_image = to_float(group.lr_image)
        spreads = [score_spread(teacher, lr_image, to_float(image)) for image in group.candidates]
        unread += sum(math.isnan(spread.mean) for spread in spreads)
        labelled.append(replace(record, ranks={}, choices=choices_of(spreads), source=source))
    return labelled, unread


def choices_of(spreads: Sequence[Spread]) -> tuple[PreferenceChoice, ...]:
    """Returns an answer for every two candidates with a score: which is likely better, weighing `|2 p - 1|`."""
    from refreward_trl.data.preferences import PreferenceChoice
    from refreward_trl.reward_model.distribution import probability_better

    choices = []
    for first, second in itertools.combinations(range(len(spreads)), 2):
        likely = probability_better(spreads[first], spreads[second])
        sure = abs(2 * likely - 1)
        if sure > 0:  # not for NaN
            choices.append(PreferenceChoice(first, second, "first" if likely > 0.5 else "second", weight=sure))
    return tuple(choices)
