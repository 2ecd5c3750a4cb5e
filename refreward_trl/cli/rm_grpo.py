"""`refreward rm-grpo`: train a judge that reasons, by TRL's GRPO on ranking rewards."""

from __future__ import annotations

from refreward_trl.cli.settings import RUN_KEYS, TrainingHelp, settings

REASONING_KEYS = ("judge", "judge_spec", "style", "mates", "use_peft", "freeze_vision", "judge_dtype")
DATA_KEYS = ("preferences", "dataset", "eval_dataset", "degradation", "crop_size", "max_groups", "eval_groups")

ABOUT = TrainingHelp(
    method="rm-grpo",
    description="Trains a multimodal LLM that thinks before it rates or chooses, by TRL's GRPO: its answers are "
    "rewarded for ranking the candidates of an LR image as the preferences do.",
    groups={
        "judge": REASONING_KEYS,
        "data": DATA_KEYS,
        "rewards": ("num_generations", "max_completion_length", "format_weight", "swap_weight", "beta", "use_vllm"),
        "run": RUN_KEYS,
    },
    examples=(
        "refreward rm-grpo --config recipes/tiny/rm_grpo_pointwise.yaml",
        "refreward rm-grpo --config tiny/rm_grpo_pairwise --max_steps 50",
    ),
)


def main(argv: list[str]) -> None:
    """Trains, saves and measures a judge that reasons."""
    recipe = settings(argv, ABOUT)
    if recipe is None:
        return
    from refreward_trl.cli.reasoning import train_reasoning_judge

    train_reasoning_judge(recipe)
