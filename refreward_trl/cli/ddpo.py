"""`refreward ddpo`: align a generator by policy gradient, with a reward that may be a black box."""

from __future__ import annotations

from refreward_trl.cli.settings import ALIGNMENT_KEYS, DATA_KEYS, GENERATOR_KEYS, RUN_KEYS, TrainingHelp, settings

ABOUT = TrainingHelp(
    method="ddpo",
    description="Aligns a one-step generator by policy gradient on groups of candidates (DDPO, GRPO). "
    "The reward may be any callable.",
    groups={
        "generator": GENERATOR_KEYS,
        "data": DATA_KEYS,
        "objective": ("rewards", "heldout_rewards", "beta", *ALIGNMENT_KEYS),
        "policy": ("num_generations", "sigma", "noise", "noise_cell", "num_iterations", "clip_range", "advantage"),
        "run": RUN_KEYS,
    },
    examples=(
        "refreward ddpo --config recipes/tiny/ddpo.yaml --num_generations 16",
        """refreward ddpo --config tiny/ddpo --rewards '[{"name": "my_rewards.sharpness", "weight": 0.5}]'""",
        "accelerate launch --config_file deepspeed_configs/zero2.yaml -m refreward_trl ddpo --config tiny/ddpo",
    ),
)


def main(argv: list[str]) -> None:
    """Aligns, saves and measures a generator."""
    recipe = settings(argv, ABOUT)
    if recipe is None:
        return
    from refreward_trl.cli.training import align
    from refreward_trl.trainers.ddpo_config import SRDDPOConfig
    from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer

    align(recipe, SRDDPOConfig, SRDDPOTrainer)
