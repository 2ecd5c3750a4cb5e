"""What `RefRewardTrainer` trains: which judge, and which of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from refreward_trl.errors import ConfigError
from refreward_trl.reward_model.conv import CONFIG_FILE, ConvJudge
from refreward_trl.reward_model.loading import load_judge
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.trainers.judge_adapter import LORA_TARGETS, VISION_PARTS, add_adapter, train_weights
from refreward_trl.trainers.ref_reward_config import RefRewardConfig

if TYPE_CHECKING:
    from peft import PeftConfig

NEW_JUDGE_TILE = 64
"""Tile of the judge `"new"` in pixels: small enough to learn from thousands of groups on a CPU."""


def open_judge(
    source: RateJudge | ConvJudge | str, *, seed: int, args: RefRewardConfig | None = None
) -> RateJudge | ConvJudge:
    """Returns the judge to train.

    Args:
        source: A judge, `"new"`, `"conv"`, `"default"`, the folder of a saved judge of either class or of a multimodal
            LLM, or the name of one on the hub.
        seed: Seed of new weights.
        args: Says how a multimodal LLM is asked and loaded; None for float32 and its own spec.
    """
    if not isinstance(source, str):
        return source
    makers: dict[str, Callable[[], RateJudge | ConvJudge]] = {
        "new": lambda: build_tiny_judge(seed=seed, spec=JudgeSpec(tile=NEW_JUDGE_TILE)),
        "conv": lambda: ConvJudge(seed=seed),
    }
    if source in makers:
        return makers[source]()
    if (Path(source) / CONFIG_FILE).is_file():
        return ConvJudge.from_pretrained(source)
    if args is None:
        return load_judge(source)
    return load_judge(
        source,
        spec=args.judge_spec,
        dtype=getattr(torch, args.judge_dtype),
        quantization=args.quantization,
        device=args.device if args.quantization else "cpu",  # quantized weights stay where they were loaded
    )


def asked_aspect(judge: RateJudge | ConvJudge, aspect: str) -> str | None:
    """Returns what a judge is asked for; None for a judge with one question, and for all aspects together.

    Raises:
        ConfigError: The judge has no question for the aspect.
    """
    if isinstance(judge, ConvJudge) or aspect == "overall" or not judge.spec.asks_per_aspect:
        return None
    if aspect not in judge.prompts:
        raise ConfigError(
            f"the judge is not asked for {aspect}",
            where="aspect",
            fix=f"use one of: {', '.join(judge.prompts)}, overall",
        )
    return aspect


def _lora_config(args: RefRewardConfig) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules or LORA_TARGETS),
        exclude_modules=VISION_PARTS if args.freeze_vision else None,
    )


def choose_weights(judge: RateJudge | ConvJudge, args: RefRewardConfig, peft_config: PeftConfig | None) -> None:
    """Decides what is trained: all weights, all but the vision tower's, or an adapter."""
    if isinstance(judge, ConvJudge):
        judge.requires_grad_(True)
        return
    if peft_config is None and args.use_peft:
        peft_config = _lora_config(args)
    if peft_config is not None:
        add_adapter(judge, peft_config)
        return
    train_weights(judge.model, freeze_vision=args.freeze_vision)
