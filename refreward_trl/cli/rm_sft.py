"""`refreward rm-sft`: give a judge that is to reason a start, on constructed answers."""

from __future__ import annotations

from refreward_trl.cli.rm_grpo import DATA_KEYS, REASONING_KEYS
from refreward_trl.cli.settings import RUN_KEYS, TrainingHelp, settings

ABOUT = TrainingHelp(
    method="rm-sft",
    description="Teaches a multimodal LLM the form of an answer, <think>..</think><answer>..</answer>, by TRL's SFT "
    "on answers that are built from the labels: the start that rm-grpo needs.",
    groups={"judge": REASONING_KEYS, "data": DATA_KEYS, "run": RUN_KEYS},
    examples=(
        "refreward rm-sft --config recipes/tiny/rm_sft.yaml",
        "refreward rm-sft --config tiny/rm_sft --style pairwise --output_dir runs/tiny/rm_sft_pairwise",
    ),
)


def main(argv: list[str]) -> None:
    """Trains, saves and measures a judge that has learned to answer."""
    recipe = settings(argv, ABOUT)
    if recipe is None:
        return
    from refreward_trl.cli.reasoning import train_reasoning_judge

    train_reasoning_judge(recipe)
