"""`refreward score LR SR`: score super-resolved images against their low-resolution inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from refreward_trl.types import RewardFunction


class Triple(NamedTuple):
    """The files of one image."""

    name: str
    lr_file: Path
    sr_file: Path
    hr_file: Path | None


def main(argv: list[str]) -> None:
    """Prints a table of scores, or JSON."""
    parser = CommandParser(
        "score",
        "Score super-resolved images against their low-resolution inputs: two files, or two folders matched by name.",
        "refreward score photos/lr photos/sr --reward refreward lr_consistency --json",
    )
    parser.add_argument("lr", type=Path, metavar="LR", help="low-resolution image, or a folder of them")
    parser.add_argument("sr", type=Path, metavar="SR", help="super-resolved image, or a folder of the same names")
    parser.add_argument("--hr", type=Path, help="ground truth, for rewards that need it (psnr, ssim)")
    parser.add_argument(
        "--reward",
        nargs="+",
        default=["refreward"],
        metavar="NAME",
        help="refreward (default), heldout_judge, lr_consistency, psnr, ssim, or a path like my_file.my_reward",
    )
    parser.add_argument("--judge", metavar="FOLDER", help="the judge of refreward: a folder or a hub name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--explain", type=Path, metavar="FOLDER", help="draw there which regions moved the first reward's score"
    )
    arguments = parser.parse_words(argv)
    triples = match_files(arguments.lr, arguments.sr, arguments.hr)
    rewards = load_rewards(arguments.reward, arguments.judge)
    rows = score_files(triples, rewards)
    if arguments.explain is not None:
        explain_files(triples, arguments.reward[0], rewards[arguments.reward[0]], arguments.explain)
    print(as_json(rows, arguments.reward) if arguments.json else as_table(rows, arguments.reward))


def match_files(lr: Path, sr: Path, hr: Path | None = None) -> list[Triple]:
    """Pairs files by name, whatever their endings.

    Args:
        lr: An image or a folder.
        sr: Of the same kind as `lr`.
        hr: Of the same kind as `lr`, or None.

    Raises:
        DataError: The kinds differ; or everything that is missing, double or without a partner, in one.
    """
    sides = {"LR": lr, "SR": sr} | ({"HR": hr} if hr is not None else {})
    for label, path in sides.items():
        if not path.exists():
            raise DataError(f"the {label} image or folder does not exist", where=str(path), fix="check the path")
    if len({path.is_dir() for path in sides.values()}) > 1:
        raise DataError(
            "one is a folder and another a file",
            where=", ".join(map(str, sides.values())),
            fix="give files, or folders",
        )
    if not lr.is_dir():
        return [Triple(sr.name, lr, sr, hr)]
    from refreward_trl.data.sources import images_by_name, missing_partners, report_problems

    files: dict[str, dict[str, Path]] = {}
    problems: list[DataError] = []
    for label, path in sides.items():
        files[label], found = images_by_name(path, recursive=False)
        problems += found
    if all(files.values()):  # else the empty folder is what is wrong
        for label in [label for label in sides if label != "SR"]:
            problems += missing_partners(files["SR"], files[label], sr, sides[label])
    report_problems(problems, sum(map(len, files.values())), str(sr))
    names = files["SR"]
    return [
        Triple(names[stem].name, files["LR"][stem], names[stem], files["HR"][stem] if hr is not None else None)
        for stem in sorted(names)
    ]


def load_rewards(names: Sequence[str], judge: str | None) -> dict[str, RewardFunction]:
    """Returns the rewards by name.

    Args:
        names: Of the rewards.
        judge: Folder or hub name of the judge that `refreward` asks; None for the default.

    Raises:
        ConfigError: A reward that does not exist, or a judge for none that would ask it.
    """
    from refreward_trl.rewards import RewardSpec, load_reward

    if judge is not None and "refreward" not in names:
        raise ConfigError("no reward asks it", where="--judge", fix="add refreward to --reward")
    kwargs = {"refreward": {"source": judge}} if judge is not None else {}
    return {name: load_reward(RewardSpec(name, kwargs=kwargs.get(name, {}))) for name in names}


def explain_files(triples: list[Triple], name: str, reward: RewardFunction, folder: Path) -> None:
    """Draws for each image what moved its score, into `folder/<name>.png`.

    Raises:
        DataError: The reward gives no score for some variant of an image.
    """
    import torch
    from tqdm import tqdm

    from refreward_trl.data.images import read_image, to_float, write_png
    from refreward_trl.evaluation.explanation import draw_explanation, explain

    for triple in tqdm(triples, desc="explain", unit="image", disable=len(triples) < 2):
        hr_image = None if triple.hr_file is None else to_float(read_image(triple.hr_file))

        def score(lr_images: torch.Tensor, sr_images: torch.Tensor, hr_image: Any = hr_image) -> torch.Tensor:
            columns = {} if hr_image is None else {"hr_image": [hr_image] * len(sr_images)}
            given = reward(prompts=None, completions=sr_images, lr_image=lr_images, **columns)
            if any(value is None for value in given):
                raise DataError("the reward gives no score for a variant of the image", where=f"--explain, {name}")
            return torch.as_tensor(given, dtype=torch.float32)

        lr_image, sr_image = (to_float(read_image(path)) for path in (triple.lr_file, triple.sr_file))
        picture = draw_explanation(explain(score, lr_image, sr_image), lr_image, sr_image, title=name)
        write_png(folder / f"{Path(triple.name).stem}.png", picture)


def score_files(triples: list[Triple], rewards: Mapping[str, RewardFunction]) -> list[dict[str, float | str]]:
    """Returns one row per image: `name`, and a number per reward (NaN where the reward gave none)."""
    import torch
    from tqdm import tqdm

    from refreward_trl.data.images import read_image, to_float
    from refreward_trl.rewards import score_all

    names = list(rewards)
    rows: list[dict[str, float | str]] = []
    for triple in tqdm(triples, desc="score", unit="image", disable=len(triples) < 2):
        columns: dict[str, list] = {"sample_id": [triple.name]}
        if triple.hr_file is not None:
            columns["hr_image"] = [to_float(read_image(triple.hr_file))]
        with torch.no_grad():
            table = score_all(
                list(rewards.values()),
                names,
                None,
                completions=[to_float(read_image(triple.sr_file))],
                lr_image=[to_float(read_image(triple.lr_file))],
                columns=columns,
            )
        rows.append({"name": triple.name} | {name: table.per_reward[name].item() for name in names})
    return rows


def as_table(rows: list[dict[str, float | str]], names: list[str]) -> str:
    """Lays the rows out in columns, the means last."""
    width = max(len("name"), len("mean"), *(len(str(row["name"])) for row in rows))
    widths = [max(len(name), 9) for name in names]
    lines = ["  ".join([f"{'name':<{width}}", *(f"{name:>{w}}" for name, w in zip(names, widths, strict=True))])]
    shown = [*rows, {"name": "mean", **means(rows, names)}] if len(rows) > 1 else rows
    for row in shown:
        cells = [f"{row[name]:>{w}.4f}" for name, w in zip(names, widths, strict=True)]
        lines.append("  ".join([f"{row['name']:<{width}}", *cells]))
    return "\n".join(lines)


def as_json(rows: list[dict[str, float | str]], names: list[str]) -> str:
    """Returns `{"rewards": [...], "images": [{"name": ..., <reward>: ...}], "mean": {...}}`; not scored is null."""
    clean = [{key: _null_if_nan(value) for key, value in row.items()} for row in rows]
    mean = {name: _null_if_nan(value) for name, value in means(rows, names).items()}
    return json.dumps({"rewards": names, "images": clean, "mean": mean}, indent=2)


def means(rows: list[dict[str, float | str]], names: list[str]) -> dict[str, float]:
    """Returns each reward's mean over the images it scored; NaN where it scored none."""
    found = {}
    for name in names:
        values = [value for row in rows if isinstance(value := row[name], float) and not math.isnan(value)]
        found[name] = sum(values) / len(values) if values else math.nan
    return found


def _null_if_nan(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and math.isnan(value) else value
