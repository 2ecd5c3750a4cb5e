"""Align one-step super-resolution generators with rewards that see the low-resolution image.

Public names are imported on first use, so that `import refreward_trl` loads no model code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refreward_trl.data.degradations import degrade
    from refreward_trl.data.pairs import PairDataset, load_pairs
    from refreward_trl.errors import RefRewardError
    from refreward_trl.generators import load_generator
    from refreward_trl.generators.base import Generator
    from refreward_trl.generators.epsilon import EpsLatentConfig, EpsLatentGenerator
    from refreward_trl.generators.module import ModuleGenerator
    from refreward_trl.reward_model.spec import JudgeSpec
    from refreward_trl.rewards import load_reward
    from refreward_trl.rewards.adapters import from_ddpo, from_pil, to_trl
    from refreward_trl.rewards.composite import RewardSpec
    from refreward_trl.rewards.metrics_adapter import from_metric
    from refreward_trl.rewards.refreward import RefReward
    from refreward_trl.trainers.alignment_config import AlignmentConfig
    from refreward_trl.trainers.base import AlignmentTrainer
    from refreward_trl.trainers.ddpo_config import SRDDPOConfig
    from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
    from refreward_trl.trainers.finetune_config import SRFinetuneConfig
    from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer
    from refreward_trl.trainers.ref_reward_config import RefRewardConfig
    from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer
    from refreward_trl.trainers.refl_config import SRReFLConfig
    from refreward_trl.trainers.refl_trainer import SRReFLTrainer
    from refreward_trl.types import Batch, LossOutput, RewardFunction

__version__ = "0.1.0"

_HOMES = {
    "AlignmentConfig": "trainers.alignment_config",
    "AlignmentTrainer": "trainers.base",
    "Batch": "types",
    "EpsLatentConfig": "generators.epsilon",
    "EpsLatentGenerator": "generators.epsilon",
    "Generator": "generators.base",
    "JudgeSpec": "reward_model.spec",
    "LossOutput": "types",
    "ModuleGenerator": "generators.module",
    "PairDataset": "data.pairs",
    "RefReward": "rewards.refreward",
    "RefRewardConfig": "trainers.ref_reward_config",
    "RefRewardError": "errors",
    "RefRewardTrainer": "trainers.ref_reward_trainer",
    "RewardFunction": "types",
    "RewardSpec": "rewards.composite",
    "SRDDPOConfig": "trainers.ddpo_config",
    "SRDDPOTrainer": "trainers.ddpo_trainer",
    "SRFinetuneConfig": "trainers.finetune_config",
    "SRFinetuneTrainer": "trainers.finetune_trainer",
    "SRReFLConfig": "trainers.refl_config",
    "SRReFLTrainer": "trainers.refl_trainer",
    "degrade": "data.degradations",
    "from_ddpo": "rewards.adapters",
    "from_metric": "rewards.metrics_adapter",
    "from_pil": "rewards.adapters",
    "load_generator": "generators",
    "load_pairs": "data.pairs",
    "load_reward": "rewards",
    "to_trl": "rewards.adapters",
}

__all__ = [
    "AlignmentConfig",
    "AlignmentTrainer",
    "Batch",
    "EpsLatentConfig",
    "EpsLatentGenerator",
    "Generator",
    "JudgeSpec",
    "LossOutput",
    "ModuleGenerator",
    "PairDataset",
    "RefReward",
    "RefRewardConfig",
    "RefRewardError",
    "RefRewardTrainer",
    "RewardFunction",
    "RewardSpec",
    "SRDDPOConfig",
    "SRDDPOTrainer",
    "SRFinetuneConfig",
    "SRFinetuneTrainer",
    "SRReFLConfig",
    "SRReFLTrainer",
    "degrade",
    "from_ddpo",
    "from_metric",
    "from_pil",
    "load_generator",
    "load_pairs",
    "load_reward",
    "to_trl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'refreward_trl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"refreward_trl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
