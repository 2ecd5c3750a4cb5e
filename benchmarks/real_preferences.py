"""What a judge learns from the outputs of published super-resolution networks, and what it makes of unseen networks.

    python benchmarks/real_preferences.py build --networks DIR --output-dir OUT
    python benchmarks/real_preferences.py train --output-dir OUT
    python benchmarks/real_preferences.py evaluate --output-dir OUT

`build` lets six published networks (how to fetch them: `judge_real_outputs.py --help`), bicubic enlargement and the
same with an unsharp mask enlarge crops of all the package's photos. Beside these outputs stand the HR image and three
images whose content is not that of the LR image: the output for another photo (`other_photo`), an output whose left
or right half is that of another photo (`other_half`), and one with another photo's detail above the LR image's
frequencies (`other_detail`). **The oracle is ST-LPIPS to the HR image**, no person: it ranks the candidates of a crop.

`train` fine-tunes a judge three times by `refreward rm`, each time without the outputs of two networks, on the photos
that the judge was first trained on. `evaluate` asks each of the three about other photos, and about pairs that have an
output of its two unseen networks in them; the figures are over all three. The same pairs are put to every baseline of
`refreward eval-rm`. Intervals are 95 %, resampled by photo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from judge_real_outputs import NETWORKS, SCALE, Crops, as_saved, read_upscalers
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.images import to_uint8
from refreward_trl.data.preference_building import HR, rank_by
from refreward_trl.data.preference_writers import write_imagefolder
from refreward_trl.data.preferences import Candidate, PreferenceRecord, read_preferences
from refreward_trl.evaluation.preference_answers import Answers, ask
from refreward_trl.evaluation.preference_baselines import (
    IDENTITY,
    METHOD_IDENTITY,
    identity_margins,
    open_baselines,
)
from refreward_trl.evaluation.preference_judges import JudgeOptions, JudgeWord, open_judge
from refreward_trl.evaluation.preference_pairs import LabelledPair, PairTable, dataset_digest, pair_table
from refreward_trl.evaluation.preference_scorers import Scorer, Sees
from refreward_trl.evaluation.statistics import Estimate, estimate, pairwise_outcomes
from refreward_trl.evaluation.stlpips import STLPIPS, WEIGHTS
from refreward_trl.resampling import downscale, upscale

FOLDS = (("x4plus", "esrgan-medium"), ("esrgan-thick", "animevideov3"), ("esrgan-slim", "x4plus-anime"))
"""The networks that the judge of each fold has not seen."""
TRAIN, TEST = "train", "test+heldout"
"""Photos that the default judge was trained on, and photos that it was not."""
EVAL_SPLITS = {"train": TRAIN, "val": "val", "test": TEST}
ORACLE = "stlpips"
WRONG_CONTENT = ("other_photo", "other_half", "other_detail")

Numbers = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------------------- build


def build(arguments: argparse.Namespace) -> None:
    """Writes `OUT/all` with all candidates, and `OUT/fold-<n>` without those of the fold's unseen networks."""
    oracle = STLPIPS(arguments.networks / "stlpips_pytorch" / WEIGHTS)
    upscalers = read_upscalers(arguments.networks, list(NETWORKS))
    counts = {"train": arguments.train_crops, "val": arguments.test_crops, "test": arguments.test_crops}
    records = []
    for split, photos in EVAL_SPLITS.items():
        crops = Crops.cut(photos, counts[split], arguments.crop_size, arguments.seed)
        records += _records(crops, upscalers, oracle, split)
    write_imagefolder(records, arguments.output_dir / "all")
    for number, unseen in enumerate(FOLDS):
        seen = [_without(record, unseen) for record in records if record.split != "test"]
        write_imagefolder(seen, _fold(arguments.output_dir, number))


def _records(
    crops: Crops, upscalers: Mapping[str, Callable[[Tensor], Tensor]], oracle: STLPIPS, split: str
) -> Iterator[PreferenceRecord]:
    """One group per crop; wrong content comes from the crop in the middle of the rest, which is of another photo."""
    parts = tqdm(crops.lr_image.split(1), desc=f"enlarging {split}")
    enlarged = [{name: as_saved(upscaler(part)[0]) for name, upscaler in upscalers.items()} for part in parts]
    count = len(crops.photos)
    for number, photo in enumerate(crops.photos):
        other = (number + count // 2) % count
        assert crops.photos[other] != photo
        own, hr_image = enlarged[number], crops.hr_image[number]
        made = [(name, "", image) for name, image in own.items()] + [(HR, "", hr_image)]
        for place, kind in enumerate(WRONG_CONTENT):
            # Each fold has one kind of each group from its unseen networks.
            name = FOLDS[(number + place) % len(FOLDS)][number // len(FOLDS) % 2]
            made.append(
                (name, kind, as_saved(wrong_content(kind, own[name], enlarged[other][name], left=number % 2 == 0)))
            )
        images = torch.stack([image for *_, image in made])
        distances = torch.cat([oracle(image, hr_image[None]) for image in images.split(1)]).tolist()
        yield PreferenceRecord(
            sample_id=f"{photo}@{number}",
            photo=photo,
            lr_image=ImageTensor(to_uint8(crops.lr_image[number])),
            hr_image=ImageTensor(to_uint8(hr_image)),
            candidates=tuple(Candidate(ImageTensor(to_uint8(image)), name, kind) for name, kind, image in made),
            ranks={"overall": rank_by([-distance for distance in distances])},
            source=ORACLE,
            degradation="bicubic",
            split=split,
        )


def wrong_content(kind: str, own: Tensor, other: Tensor, *, left: bool) -> Tensor:
    """Returns an image that is not what the LR image shows.

    Args:
        kind: One of `WRONG_CONTENT`.
        own: A network's output for the LR image, `(3, H, W)` in [0, 1].
        other: Its output for another photo.
        left: Whether the left half is the wrong one, for `other_half`.
    """
    if kind == "other_photo":
        return other
    if kind == "other_half":
        middle = own.shape[-1] // 2
        parts = (other[..., :middle], own[..., middle:]) if left else (own[..., :middle], other[..., middle:])
        return torch.cat(parts, dim=-1)
    low, other_low = (upscale(downscale(image[None], SCALE), SCALE)[0] for image in (own, other))
    return low + other - other_low


def _without(record: PreferenceRecord, generators: Sequence[str]) -> PreferenceRecord:
    """The group without what these generators made; the order of the rest stays."""
    kept = [number for number, candidate in enumerate(record.candidates) if candidate.generator not in generators]
    return replace(
        record,
        candidates=tuple(record.candidates[number] for number in kept),
        ranks={aspect: tuple(ranks[number] for number in kept) for aspect, ranks in record.ranks.items()},
    )


def _fold(folder: Path, number: int) -> Path:
    return folder / f"fold-{number}"


# ------------------------------------------------------------------------------------------------------------- train


def train(arguments: argparse.Namespace) -> None:
    """Runs `refreward rm` for each fold that has no judge yet; a run that was stopped goes on."""
    for number in arguments.folds:
        run = arguments.output_dir / f"rm-{number}"
        recipe = arguments.output_dir / f"rm-{number}.yaml"
        recipe.write_text(json.dumps(_recipe(arguments, _fold(arguments.output_dir, number), run), indent=1))
        subprocess.run([sys.executable, "-m", "refreward_trl", "rm", "--config", str(recipe)], check=True)


def _recipe(arguments: argparse.Namespace, preferences: Path, run: Path) -> dict[str, Any]:
    return {
        "method": "rm",
        "output_dir": str(run),
        "seed": arguments.seed,
        "judge": arguments.judge,
        "preferences": str(preferences),
        "crop_size": arguments.crop_size,
        "loss_type": "pairwise",
        "center_rewards_coefficient": 0.0,
        "max_steps": arguments.steps,
        "max_groups": 4 * arguments.steps,
        "per_device_train_batch_size": 4,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "adam_beta2": 0.98,
        "weight_decay": 0.02,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "eval_groups": 32,
        "save_steps": 100,
    }


# ---------------------------------------------------------------------------------------------------------- evaluate


@dataclass(frozen=True)
class Part:
    """Some of the pairs, for a judge that has not seen some networks."""

    title: str
    holds: Callable[[LabelledPair, Sequence[str]], bool]


def _kinds(pair: LabelledPair) -> list[str]:
    """The wrong content of the better and the worse one; "" is none."""
    return [method.partition(" + ")[2] for method in pair.methods]


def _is_outputs(pair: LabelledPair) -> bool:
    return HR not in pair.generators and not any(_kinds(pair))


def _has_wrong_content(pair: LabelledPair, unseen: Sequence[str], kinds: Sequence[str] = WRONG_CONTENT) -> bool:
    """One of the two has wrong content, of a kind, and is of an unseen network; the other one shows what it should."""
    found = [
        kind and kind in kinds and name in unseen for kind, name in zip(_kinds(pair), pair.generators, strict=True)
    ]
    return any(found) and not all(_kinds(pair))


PARTS = (
    Part("an unseen network", lambda pair, unseen: _is_outputs(pair) and bool({*pair.generators} & {*unseen})),
    Part("both unseen", lambda pair, unseen: _is_outputs(pair) and {*pair.generators} <= {*unseen}),
    Part("both seen", lambda pair, unseen: _is_outputs(pair) and not {*pair.generators} & {*unseen}),
    Part("HR, unseen", lambda pair, unseen: HR in pair.generators and bool({*pair.generators} & {*unseen})),
    Part("wrong content", _has_wrong_content),
    *(Part(kind, lambda pair, unseen, kind=kind: _has_wrong_content(pair, unseen, [kind])) for kind in WRONG_CONTENT),
)


class Row(NamedTuple):
    """One scorer: what it looks at, and its margins about all pairs, one row for each fold."""

    name: str
    sees: Sees
    margins: Numbers
    shuffled: Numbers | None = None


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes `OUT/results.json`."""
    table = pair_table(read_preferences(arguments.output_dir / "all", split="test"), "overall")
    baselines = open_baselines()
    judges = [f"rm-{number}" for number in range(len(FOLDS))]
    words = [JudgeWord(name, str(arguments.output_dir / name / "judge")) for name in judges]
    words += [JudgeWord("not trained further", arguments.judge), JudgeWord("heldout_judge", "heldout_judge")]
    scorers = [open_judge(word, JudgeOptions()) for word in words]
    scorers += [scorer for scorer in baselines.scorers if scorer.name != ORACLE]
    answers = ask(scorers, table, label="asking", seed=arguments.seed, progress=lambda rows, label: tqdm(rows, label))
    rows = [_trained([answers[name] for name in judges])]
    rows += [_same_for_all(scorer, answers[scorer.name]) for scorer in scorers[len(judges) :]]
    masks = {part.title: _masks(part, table) for part in PARTS}
    rows += [_identity(name, table, methods) for name, methods in ((IDENTITY, False), (METHOD_IDENTITY, True))]
    figures = {row.name: _figures(row, table, masks) for row in rows}
    differences = {
        row.name: _difference(rows[0], row, table, masks[PARTS[0].title]).as_dict()
        for row in rows[1:]
        if row.sees in ("SR", "SR and LR")
    }
    results = {
        "oracle": "ST-LPIPS to the HR image (AlexNet, stlpips-pytorch 0.0.2), no person",
        "folds": FOLDS,
        "protocol": table.counts(),
        "dataset": dataset_digest(table),
        "pairs": {title: int(sum(mask.sum() for mask in part)) for title, part in masks.items()},
        "scorers": figures,
        "trained_minus": differences,
        "not_computed": {name: why for name, why in baselines.not_made.items() if name != ORACLE},
    }
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    print(as_text(results))


def _trained(answers: Sequence[Answers]) -> Row:
    """The judges of the folds, each of which speaks about its own fold."""
    margins = np.stack([answer.margins for answer in answers])
    shuffled = np.stack([answer.shuffled for answer in answers if answer.shuffled is not None])
    return Row("trained", "SR and LR", margins, shuffled)


def _same_for_all(scorer: Scorer, answers: Answers) -> Row:
    margins, shuffled = (
        None if part is None else np.broadcast_to(part, (len(FOLDS), len(part)))
        for part in (answers.margins, answers.shuffled)
    )
    assert margins is not None
    return Row(scorer.name, scorer.sees, margins, shuffled)


def _identity(name: str, table: PairTable, methods: bool) -> Row:
    """Knows how the makers of the two fared against each other in all other photos of the test, unseen ones too."""
    margins = identity_margins(table, methods=methods)
    return Row(name, "no image", np.broadcast_to(margins, (len(FOLDS), len(table))))


def _masks(part: Part, table: PairTable) -> NDArray[np.bool_]:
    """`(folds, pairs)`: which pairs belong to a part."""
    return np.array([[part.holds(pair, unseen) for pair in table.pairs] for unseen in FOLDS]) & ~table.ties


def _pooled(values: Numbers, table: PairTable, mask: NDArray[np.bool_]) -> Estimate:
    """Mean over the pairs of all folds; a photo is resampled with all of its pairs in all folds."""
    _, columns = np.nonzero(mask)
    return estimate(values[mask], [table.photos[column] for column in columns])


def _figures(row: Row, table: PairTable, masks: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    outcomes = pairwise_outcomes(row.margins, np.zeros_like(row.margins))
    found: dict[str, Any] = {
        "sees": row.sees,
        "accuracy": {title: _pooled(outcomes, table, mask).as_dict() for title, mask in masks.items()},
    }
    if row.shuffled is not None:
        change = outcomes - pairwise_outcomes(row.shuffled, np.zeros_like(row.shuffled))
        found["lr_shuffled_drop"] = {title: _pooled(change, table, mask).as_dict() for title, mask in masks.items()}
    return found


def _difference(first: Row, second: Row, table: PairTable, mask: NDArray[np.bool_]) -> Estimate:
    one, two = (pairwise_outcomes(row.margins, np.zeros_like(row.margins)) for row in (first, second))
    return _pooled(one - two, table, mask)


def as_text(results: Mapping[str, Any]) -> str:
    """Returns the tables: accuracy in per cent, and what another photo's LR image costs in points."""
    titles = list(results["pairs"])
    lines = [
        "Oracle: {oracle}. {protocol[groups]} crops of {protocol[photos]} photos.".format(**results),
        _line("accuracy, %", "sees", titles),
        _line("pairs", "", [str(count) for count in results["pairs"].values()]),
    ]
    for name, figures in results["scorers"].items():
        lines.append(_line(name, figures["sees"], [_cell(figures["accuracy"][title]) for title in titles]))
    lines += ["", _line("another LR image costs", "", titles)]
    for name, figures in results["scorers"].items():
        if drops := figures.get("lr_shuffled_drop"):
            lines.append(_line(name, figures["sees"], [_cell(drops[title]) for title in titles]))
    lines += ["", f"trained minus each baseline on pairs with {titles[0]}, points:"]
    lines += [f"  {name:<28}{_cell(difference)}" for name, difference in results["trained_minus"].items()]
    lines += [f"not computed: {name}: {why}" for name, why in results["not_computed"].items()]
    return "\n".join(lines)


def _cell(share: Mapping[str, float]) -> str:
    if not isfinite(share["mean"]):
        return "-"
    return f"{100 * share['mean']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def _line(name: str, sees: str, cells: Sequence[str]) -> str:
    return f"{name:<30}{sees:<11}" + "".join(f"{cell:>21}" for cell in cells)


# -------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["build", "train", "evaluate"])
    parser.add_argument("--output-dir", type=Path, required=True, metavar="OUT", help="for all files")
    parser.add_argument("--networks", type=Path, metavar="DIR", help="where the networks were unpacked")
    parser.add_argument("--train-crops", type=int, default=6, help="crops of each photo to train on")
    parser.add_argument("--test-crops", type=int, default=4, help="crops of each other photo")
    parser.add_argument("--crop-size", type=int, default=128, help="side of the HR crops in pixels")
    parser.add_argument("--judge", default="default", help='where training begins: "default" or a folder')
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(len(FOLDS))), help="folds to train")
    parser.add_argument("--steps", type=int, default=300, help="training steps of four crops")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0, help="of crops, training and wrong LR images")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; torch's default otherwise")
    arguments = parser.parse_args()
    if arguments.step == "build" and arguments.networks is None:
        parser.error("build needs --networks")
    return arguments


def main() -> None:
    """Runs one step."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    {"build": build, "train": train, "evaluate": evaluate}[arguments.step](arguments)
    print(f"{arguments.step}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
