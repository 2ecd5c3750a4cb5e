"""`refreward refl`: align a generator by the gradient of a differentiable reward."""

from __future__ import annotations

from refreward_trl.cli.settings import ALIGNMENT_KEYS, DATA_KEYS, GENERATOR_KEYS, RUN_KEYS, TrainingHelp, settings

ABOUT = TrainingHelp(
    method="refl",
    description="Aligns a one-step generator by backpropagating a differentiable reward through its decoder (ReFL).",
    groups={
        "generator": GENERATOR_KEYS,
        "data": DATA_KEYS,
        "objective": ("rewards", "heldout_rewards", "reward_weight", "reward_cap", *ALIGNMENT_KEYS),
        "run": RUN_KEYS,
    },
    examples=(
        "refreward refl --config recipes/tiny/refl.yaml --learning_rate 1e-4",
        "refreward refl --config tiny/refl --reward_weight 0 --output_dir runs/tiny/refl_control",
        "accelerate launch --config_file deepspeed_configs/zero2.yaml -m refreward_trl refl --config tiny/refl",
    ),
)


def main(argv: list[str]) -> None:
    """Aligns, saves and measures a generator."""
    recipe = settings(argv, ABOUT)
    if recipe is None:
        return
    from refreward_trl.cli.training import align
    from refreward_trl.trainers.refl_config import SRReFLConfig
    from refreward_trl.trainers.refl_trainer import SRReFLTrainer

    align(recipe, SRReFLConfig, SRReFLTrainer)
