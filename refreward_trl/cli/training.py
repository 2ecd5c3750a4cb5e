"""What the four training commands do with a checked recipe: build, train, save, measure, write `summary.json`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.building import (
    EVALUATION_SEED,
    build_arguments,
    build_config,
    build_eval_rows,
    build_generator,
    build_lora,
    build_rewards,
    build_test_rows,
    build_train_dataset,
    check_prompts,
    constructed_groups,
    is_module,
    load_photos,
)
from refreward_trl.cli.json_file import write_json
from refreward_trl.errors import ConfigError

if TYPE_CHECKING:
    from refreward_trl.cli.building import Row
    from refreward_trl.cli.recipe import Recipe
    from refreward_trl.generators.base import Generator
    from refreward_trl.trainers.alignment_config import AlignmentConfig
    from refreward_trl.trainers.arguments import DataArguments, GeneratorArguments
    from refreward_trl.trainers.base import AlignmentTrainer
    from refreward_trl.types import RewardFunction

SUMMARY_FILE = "summary.json"
ROWS_FILE = "measured.json"
JUDGE_FOLDER = "judge"

TOTAL = "total"
"""Name of the weighted sum where a recipe has several rewards."""


def align(recipe: Recipe, config_class: type[AlignmentConfig], trainer_class: type[AlignmentTrainer]) -> None:
    """Runs `refl` or `ddpo`.

    Writes into `output_dir`: the aligned generator in `generator/`, `measured.json` with the figures of every test
    image before and after, and `summary.json`, with the gain over a control run where the recipe names one.
    """
    from refreward_trl.trainers.arguments import CropArguments, DataArguments, GeneratorArguments, RewardArguments

    config = build_config(config_class, recipe.values)
    data = build_arguments(DataArguments, recipe.values)
    source = build_arguments(GeneratorArguments, recipe.values)
    wanted = build_arguments(RewardArguments, recipe.values)
    control = None if wanted.control is None else read_rows(Path(wanted.control))
    rewards, names, weights = build_rewards(wanted.rewards)
    heldout, heldout_names, _ = build_rewards(wanted.heldout_rewards)
    watched = dict(zip([*names, *heldout_names], [*rewards, *heldout], strict=True))
    train_dataset = build_train_dataset(data, build_arguments(CropArguments, recipe.values), config.seed)
    test_rows = build_test_rows(data)
    generator = build_generator(source, scale=data.scale, seed=config.seed)
    check_prompts(generator, data)
    before = measure(generator, test_rows, watched, config, "before")
    trainer = trainer_class(
        generator,
        reward_funcs=list(rewards),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=build_eval_rows(data),
        peft_config=build_lora(source, generator),
        reward_weights=weights,
        heldout_rewards=list(heldout),
    )
    trainer.train()
    folder = save_generator(trainer)
    after = measure(reopen(source, data, folder), test_rows, watched, config, "after")
    if before is None or after is None:
        return
    reward = names[0] if len(names) == 1 else TOTAL
    for row in (*before, *after) if reward == TOTAL else ():
        row[f"reward/{TOTAL}"] = sum(w * row[f"reward/{n}"] for n, w in zip(names, weights, strict=True))
    write_json(folder.parent / ROWS_FILE, {"before": before, "after": after})
    facts = trainer.summary()
    write_summary(
        folder.parent,
        recipe,
        compare(recipe.method, reward, heldout_names[0] if heldout_names else reward, facts, before, after, control),
        facts,
    )


def compare(
    method: str,
    reward: str,
    heldout: str,
    facts: Mapping[str, Any],
    before: list[Row],
    after: list[Row],
    control: list[Row] | None,
) -> dict[str, Any]:
    """Returns the figures of an alignment; those against a control are None where there is none.

    Raises:
        DataError: The control was measured on other images.
    """
    from refreward_trl.evaluation.alignment_benchmark import AlignmentResult

    result = AlignmentResult(
        name=method,
        reward=reward,
        heldout=heldout,
        steps=facts["steps"],
        images=facts["images"],
        seconds=facts["seconds"],
        before=before,
        after=after,
        control=before if control is None else control,
    )
    change = result.change(result.reward_column)
    figures = {**result.summary(), "gain_ci95": [change.low, change.high], "reward_std": result.spread}
    if control is None:
        figures |= {"control_gain": None, "gain_minus_control_ci95": None}
    return figures


def finetune(recipe: Recipe) -> None:
    """Runs `finetune`: writes the generator to `output_dir/generator` and its figures to `summary.json`."""
    from refreward_trl.evaluation.sr_benchmark import benchmark_generator
    from refreward_trl.trainers.arguments import CropArguments, DataArguments, GeneratorArguments
    from refreward_trl.trainers.finetune_config import SRFinetuneConfig
    from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer

    config = build_config(SRFinetuneConfig, recipe.values)
    data = build_arguments(DataArguments, recipe.values)
    source = build_arguments(GeneratorArguments, recipe.values)
    generator = build_generator(source, scale=data.scale, seed=config.seed)
    check_prompts(generator, data)
    trainer = SRFinetuneTrainer(
        generator,
        args=config,
        train_dataset=build_train_dataset(data, build_arguments(CropArguments, recipe.values), config.seed),
        eval_dataset=build_eval_rows(data),
        peft_config=build_lora(source, generator),
    )
    trainer.train()
    folder = save_generator(trainer)
    if not config.should_save:
        return
    report = benchmark_generator(reopen(source, data, folder).to(config.device), build_test_rows(data), {})
    write_summary(folder.parent, recipe, report.summary(), trainer.summary())


def train_judge(recipe: Recipe) -> None:
    """Runs `rm`: writes the judge to `output_dir/judge` and its table's figures to `summary.json`."""
    from refreward_trl.data.candidates import (
        EVALUATION_COLUMNS,
        HELDOUT_KINDS,
        JUDGE_KINDS,
        PAINTED_KIND,
        PAINTED_SHARE,
        constructed_pairs,
    )
    from refreward_trl.evaluation.reward_benchmark import benchmark_judge
    from refreward_trl.reward_model.conv import ConvJudge
    from refreward_trl.trainers.arguments import DataArguments, JudgeArguments
    from refreward_trl.trainers.ref_reward_config import RefRewardConfig
    from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer

    config = build_config(RefRewardConfig, recipe.values)
    data = build_arguments(DataArguments, recipe.values)
    judged = build_arguments(JudgeArguments, recipe.values)
    kinds = HELDOUT_KINDS if judged.artefacts == "heldout" else JUDGE_KINDS
    taught, painted_share = kinds, PAINTED_SHARE
    if judged.artefacts == "unpainted":
        taught, painted_share = tuple(kind for kind in kinds if kind != PAINTED_KIND), 0.0
    if judged.preferences is None:
        make_groups = functools.partial(_groups, data, taught, painted_share)
        train_groups = make_groups(data.dataset, data.dataset_split, config.max_groups, config.seed)
        eval_groups = make_groups(data.eval_dataset, data.eval_dataset_split, config.eval_groups, EVALUATION_SEED)
    else:
        make_groups = functools.partial(_stored_groups, judged.preferences, data.crop_size, config.aspect)
        train_groups = make_groups(data.dataset_split, config.max_groups, seed=config.seed, visits=None)
        eval_groups = make_groups(data.eval_dataset_split, config.eval_groups, seed=EVALUATION_SEED, visits=1)
    trainer = RefRewardTrainer(args=config, train_dataset=train_groups, eval_dataset=eval_groups)
    trainer.train()
    folder = Path(str(config.output_dir))
    trainer.save_model(str(folder / JUDGE_FOLDER))
    if not config.should_save:
        return
    figures: dict[str, Any] = {}
    if judged.preferences is not None:
        figures = {"judge": _last_evaluation(trainer.state.log_history)}
    elif judged.test_pairs:
        photos = load_photos(data.test_dataset or data.eval_dataset, data.test_dataset_split)
        judge = trainer.judge
        make_pairs = functools.partial(
            constructed_pairs, photos, count=judged.test_pairs, crop_size=data.crop_size, scale=data.scale, kinds=kinds
        )
        report = benchmark_judge(
            judge if isinstance(judge, ConvJudge) else judge.rate,
            (make_pairs(column) for column in progress(EVALUATION_COLUMNS, "measure the judge", "question")),
            device=config.device,
        )
        figures = {"judge": report.summary()}
    write_summary(folder, recipe, figures, run_facts(trainer))


def _stored_groups(
    source: str, crop_size: int, aspect: str, split: str, count: int, *, seed: int, visits: int | None
) -> Any:
    """Up to `count` groups of a preference dataset; each at most `visits` times."""
    from refreward_trl.data.preference_groups import RecordGroups
    from refreward_trl.data.preferences import read_preferences

    groups = RecordGroups(read_preferences(source, split=split), crop_size=crop_size, aspect=aspect, seed=seed)
    return groups.visited(count if visits is None else min(count, visits * len(groups)))


def _last_evaluation(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest figures on the evaluation groups; the Trainer takes none with `eval_strategy: no`."""
    prefix = "eval_"
    last = next((line for line in reversed(history) if f"{prefix}accuracy" in line), {})
    return {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}


def _groups(
    data: DataArguments, kinds: Sequence[str], painted_share: float, source: str, split: str, count: int, seed: int
) -> Any:
    from refreward_trl.data.preferences import GroupDataset

    build = constructed_groups(data, source, split, seed, kinds=kinds, painted_share=painted_share)
    # Building a group costs about as much as scoring it: each is built once.
    return GroupDataset(functools.cache(build), count)


def save_generator(trainer: AlignmentTrainer) -> Path:
    """Returns the folder of the trained generator, on all ranks, after writing it unless training did."""
    from refreward_trl.trainers.base import GENERATOR_FOLDER

    folder = Path(str(trainer.args.output_dir)) / GENERATOR_FOLDER
    if trainer.args.save_strategy == "no":
        trainer.save_model(str(folder))
    return folder


def reopen(source: GeneratorArguments, data: DataArguments, folder: Path) -> Generator:
    """Loads what was saved: what is measured is what a user will load."""
    from refreward_trl.generators import load_generator

    if is_module(source.generator):
        return build_generator(source, scale=data.scale, seed=0, weights=str(folder))
    return load_generator(folder)


def measure(
    generator: Generator, rows: list[Row], rewards: Mapping[str, RewardFunction], config: AlignmentConfig, label: str
) -> list[Row] | None:
    """Returns one row of figures per image on the rank that writes, None on the others."""
    from refreward_trl.evaluation.sr_benchmark import evaluate_generator

    if not config.should_save:
        return None
    generator.to(config.device)
    return evaluate_generator(
        generator, rows, rewards, progress=functools.partial(progress, label=f"measure {label}", unit="image")
    )


def progress(items: Any, label: str, unit: str) -> Any:
    """Shows a bar with the time left."""
    from tqdm import tqdm

    return tqdm(items, desc=label, unit=unit)


def read_rows(run: Path) -> list[Row]:
    """Returns the rows after a finished control run.

    Raises:
        ConfigError: The folder holds no such rows.
    """
    path = run / ROWS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["after"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"there are no figures of a control run ({type(error).__name__})",
            where=str(path),
            fix="run the control first: refl with --reward_weight 0, ddpo with --shuffle_advantages true",
        ) from error


def write_summary(folder: Path, recipe: Recipe, figures: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes `summary.json`: the measured figures, then what the trainer knows, then the recipe as it ran."""
    path = folder / SUMMARY_FILE
    rest = {
        name: value
        for name, value in facts.items()
        if name not in figures and not name.endswith(("_before", "_after"))
    }
    write_json(path, {"method": recipe.method, **figures, **rest, "recipe": recipe.values})
    print(f"wrote {path}")


def run_facts(trainer: Any) -> dict[str, Any]:
    """Returns what a summary says about a run of any Trainer."""
    facts = {"steps": trainer.state.global_step, "seconds": trainer.state.log_history[-1].get("train_runtime")}
    return {**facts, "seed": trainer.args.seed, "versions": _versions()}


def _versions() -> dict[str, str]:
    from refreward_trl.trainers.checkpoint_hooks import package_versions

    return package_versions()
