"""`refreward finetune`: supervised training of a one-step generator on LR/HR pairs."""

from __future__ import annotations

from refreward_trl.cli.settings import DATA_KEYS, RUN_KEYS, TrainingHelp, settings

ABOUT = TrainingHelp(
    method="finetune",
    description="Trains a one-step generator on pairs of LR and HR images: its denoiser, or first its VAE.",
    groups={
        "generator": ("generator", "train_part", "use_peft", "ema_decay"),
        "data": DATA_KEYS,
        "objective": (
            "pixel_loss",
            "pixel_weight",
            "latent_weight",
            "gradient_weight",
            "perceptual",
            "perceptual_weight",
        ),
        "run": (*RUN_KEYS, "resume"),
    },
    examples=(
        "refreward finetune --config recipes/tiny/finetune.yaml",
        "refreward finetune --config tiny/finetune --dataset my_photos --max_steps 500 --output_dir runs/mine",
    ),
)


def main(argv: list[str]) -> None:
    """Trains, saves and measures a generator."""
    recipe = settings(argv, ABOUT)
    if recipe is None:
        return
    from refreward_trl.cli.training import finetune

    finetune(recipe)
