"""What `rm-sft` and `rm-grpo` do with a checked recipe: build the questions, train, save, ask, `summary.json`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.building import EVALUATION_SEED, build_arguments, build_config, constructed_groups
from refreward_trl.cli.training import JUDGE_FOLDER, progress, run_facts, write_summary

if TYPE_CHECKING:
    from refreward_trl.cli.recipe import Recipe
    from refreward_trl.data.preferences import PreferenceGroup
    from refreward_trl.reward_model.spec import JudgeSpec
    from refreward_trl.trainers.arguments import DataArguments
    from refreward_trl.trainers.reasoning_judge import ReasoningArguments
    from refreward_trl.trainers.reasoning_rows import ReasoningRows


def train_reasoning_judge(recipe: Recipe) -> None:
    """Runs `rm-sft` or `rm-grpo`.

    Writes the judge to `output_dir/judge` and to `summary.json` how its answers are rewarded on held-out groups, after
    `rm-grpo` beside those of the judge it began with.
    """
    from refreward_trl.trainers.arguments import DataArguments, JudgeArguments

    config_class, trainer_class = _classes(recipe.method)
    config = build_config(config_class, recipe.values)
    data = build_arguments(DataArguments, recipe.values)
    source = build_arguments(JudgeArguments, recipe.values).preferences
    questions = functools.partial(make_questions, config, data, source)
    trainer = trainer_class(config, questions(data.dataset, data.dataset_split, config.max_groups, seed=config.seed))
    trainer.train(resume_from_checkpoint=_last_checkpoint(config))
    folder = Path(str(config.output_dir))
    trainer.save_judge(folder / JUDGE_FOLDER)
    if not config.should_save:
        return
    split, count = data.eval_dataset_split, config.eval_groups
    held_out = questions(data.eval_dataset, split, count, seed=EVALUATION_SEED, once=True)
    start = config.judge if recipe.method == "rm-grpo" else None
    figures = measure(config, held_out, folder / JUDGE_FOLDER, start=start)
    write_summary(folder, recipe, {"judge": figures}, run_facts(trainer))


def make_questions(
    config: ReasoningArguments,
    data: DataArguments,
    preferences: str | None,
    photos: str,
    split: str,
    count: int,
    *,
    seed: int,
    once: bool = False,
) -> Callable[[JudgeSpec], ReasoningRows]:
    """Returns what makes the questions once it is known how the judge is asked.

    Args:
        config: Style and number of mates.
        data: Crops and degradation.
        preferences: A preference dataset; None constructs groups from `photos`.
        photos: A source of HR images.
        split: Its split, or that of the preferences.
        count: The most groups.
        seed: Of crops and choices.
        once: Ask about a stored group once only.
    """
    from refreward_trl.trainers.reasoning_rows import ReasoningRows

    if preferences is None:
        # Building a group costs more than asking about it, and each is asked about several times.
        group: Callable[[int], PreferenceGroup] = functools.cache(constructed_groups(data, photos, split, seed))
    else:
        from refreward_trl.data.preference_groups import RecordGroups
        from refreward_trl.data.preferences import read_preferences

        records = read_preferences(preferences, split=split)
        if config.style == "pointwise":
            records = [record for record in records if len(record.candidates) >= config.mates]
        stored = RecordGroups(records, crop_size=data.crop_size, seed=seed)
        total = len(stored)
        count = min(count, total) if once else count

        def visit(number: int) -> PreferenceGroup:
            return stored.group(number % total, number // total)

        group = visit

    return lambda spec: ReasoningRows(group, count, spec=spec, style=config.style, mates=config.mates, seed=seed)


def measure(
    config: Any, questions: Callable[[JudgeSpec], ReasoningRows], judge: Path, *, start: str | None
) -> dict[str, Any]:
    """Returns how a judge's answers are rewarded on held-out groups, and by how much more than those at the start."""
    from refreward_trl.evaluation.reasoning_benchmark import gains, reward_answers
    from refreward_trl.reward_model.judge import MLLMJudge
    from refreward_trl.reward_model.loading import load_judge_as
    from refreward_trl.trainers.reasoning_judge import style_rewards
    from refreward_trl.trainers.sharding import keep_new_networks_whole

    # The Trainer has told transformers of ZeRO-3 once more; here one rank opens judges alone.
    keep_new_networks_whole()

    def ask(source: str | Path, title: str) -> Any:
        opened = load_judge_as(MLLMJudge, source, spec=config.judge_spec, device=config.device)
        rewards, weights = style_rewards(config, opened.spec)
        return reward_answers(
            opened,
            questions(opened.spec),
            rewards,
            weights,
            block=config.block,
            num_samples=config.eval_samples,
            watch=lambda groups: progress(list(groups), title, "group"),
        )

    after = ask(judge, "ask the judge")
    figures: dict[str, Any] = {"groups": len(after.photos), "samples": config.eval_samples, "after": after.summary()}
    if start is not None:
        before = ask(start, "ask the judge at the start")
        risen = gains(before, after)
        figures |= {
            "before": before.summary(),
            "gain": {name: found.mean for name, found in risen.items()},
            "gain_ci95": {name: [found.low, found.high] for name, found in risen.items()},
        }
    return figures


def _classes(method: str) -> tuple[Any, Any]:
    if method == "rm-sft":
        from refreward_trl.trainers.judge_sft import JudgeSFTConfig, JudgeSFTTrainer

        return JudgeSFTConfig, JudgeSFTTrainer
    from refreward_trl.trainers.judge_grpo import JudgeGRPOConfig, JudgeGRPOTrainer

    return JudgeGRPOConfig, JudgeGRPOTrainer


def _last_checkpoint(config: Any) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(str(config.output_dir))
    return get_last_checkpoint(str(folder)) if config.resume == "auto" and folder.is_dir() else None
