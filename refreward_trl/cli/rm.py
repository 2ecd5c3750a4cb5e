"""`refreward rm`: train a reward model on ranked candidates of one low-resolution image."""

from __future__ import annotations

from refreward_trl.cli.settings import RUN_KEYS, TrainingHelp, settings

ABOUT = TrainingHelp(
    method="rm",
    description="Trains a judge that sees the LR image: on your preferences, or on candidates whose order is known by "
    "construction.",
    groups={
        "judge": ("judge", "judge_spec", "loss_type", "aspect", "use_peft", "quantization"),
        "data": ("preferences", "dataset", "eval_dataset", "degradation", "crop_size"),
        "run": RUN_KEYS,
    },
    examples=(
        "refreward rm --config recipes/tiny/teacher_rm.yaml",
        "refreward rm --config tiny/teacher_rm --max_steps 200 --seed 1",
    ),
)


def main(argv: list[str]) -> None:
    """Trains, saves and measures a judge."""
    recipe = settings(argv, ABOUT)
    if recipe is None:
        return
    from refreward_trl.cli.training import train_judge

    train_judge(recipe)
