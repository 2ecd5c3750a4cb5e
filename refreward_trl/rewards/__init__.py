"""Rewards: ours by name, the user's by dotted path. Importing this package imports no torch and no model code."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from refreward_trl.errors import ConfigError, RefRewardError

if TYPE_CHECKING:
    from refreward_trl.rewards.adapters import completion_text, from_ddpo, from_pil, to_trl
    from refreward_trl.rewards.composite import RewardSpec, RewardTable, reward_name, reward_names, score_all
    from refreward_trl.rewards.fidelity import LRConsistency, psnr, ssim
    from refreward_trl.rewards.heldout import HeldOutJudge
    from refreward_trl.rewards.metrics_adapter import NamedMetric, from_metric
    from refreward_trl.rewards.refreward import RefReward
    from refreward_trl.types import RewardFunction

__all__ = [
    "REWARD_NAMES",
    "HeldOutJudge",
    "LRConsistency",
    "NamedMetric",
    "RefReward",
    "RewardSpec",
    "RewardTable",
    "completion_text",
    "from_ddpo",
    "from_metric",
    "from_pil",
    "load_reward",
    "psnr",
    "reward_name",
    "reward_names",
    "score_all",
    "ssim",
    "to_trl",
]

REWARD_NAMES = {
    "refreward": "refreward_trl.rewards.refreward.RefReward",
    "heldout_judge": "refreward_trl.rewards.heldout.HeldOutJudge",
    "lr_consistency": "refreward_trl.rewards.fidelity.LRConsistency",
    "psnr": "refreward_trl.rewards.fidelity.psnr",
    "ssim": "refreward_trl.rewards.fidelity.ssim",
    "metric": "refreward_trl.rewards.metrics_adapter.NamedMetric",
}
"""Our rewards: the name in a recipe, and where it lives."""

_MODULES = {
    "adapters": ["completion_text", "from_ddpo", "from_pil", "to_trl"],
    "composite": ["RewardSpec", "RewardTable", "reward_name", "reward_names", "score_all"],
    "fidelity": ["LRConsistency", "psnr", "ssim"],
    "heldout": ["HeldOutJudge"],
    "metrics_adapter": ["NamedMetric", "from_metric"],
    "refreward": ["RefReward"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

_KEYWORDS = ["prompts", "completions", "completion_ids", "lr_image", "trainer_state", "log_metric", "log_extra"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def load_reward(spec: RewardSpec | str | Mapping[str, Any]) -> RewardFunction:
    """Builds the reward that a recipe names.

    Args:
        spec: A `RewardSpec`, a recipe entry `{name, weight, kwargs}`, or a bare name. The name is a key of
            `REWARD_NAMES` or a dotted path `package.module.attribute`; modules in the current folder are found. A
            class is instantiated with `kwargs`; on any other callable they are fixed by `functools.partial`.

    Returns:
        A callable that accepts the keywords of the reward contract.

    Raises:
        ConfigError: For an unknown name, a module that cannot be imported, an attribute that is missing or not
            callable, arguments that do not fit, and a callable of another signature.
    """
    from refreward_trl.rewards.composite import RewardSpec

    spec = RewardSpec.from_entry(spec)
    where = f"reward {spec.name!r}"
    target = _find(spec.name, where)
    if inspect.isclass(target):
        reward = _instantiate(target, spec.kwargs, where)
    else:
        reward = functools.partial(target, **spec.kwargs) if spec.kwargs else target
    _check_signature(reward, where)
    return reward


def _find(name: str, where: str) -> Any:
    path = REWARD_NAMES.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        nearest = difflib.get_close_matches(name, REWARD_NAMES, n=1)
        known = f"the rewards are {', '.join(REWARD_NAMES)}; your own is a dotted path such as my_rewards.sharpness"
        raise ConfigError(
            "there is no such reward", where=where, fix=f"did you mean {nearest[0]!r}? {known}" if nearest else known
        )
    module = _import(module_name, where)
    try:
        target = getattr(module, attribute)
    except AttributeError as error:
        nearest = difflib.get_close_matches(attribute, [key for key in dir(module) if not key.startswith("_")], n=1)
        raise ConfigError(
            f"module {module_name!r} ({module.__file__}) has no {attribute!r}",
            where=where,
            fix=f"did you mean {module_name}.{nearest[0]}?" if nearest else None,
        ) from error
    if not callable(target):
        raise ConfigError(f"it is a {type(target).__name__}, which cannot be called", where=where)
    return target


def _import(module_name: str, where: str) -> ModuleType:
    # Last, so that a file of the user's cannot shadow an installed package. It stays there: workers unpickle by this
    # name.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no module {error.name!r} in {os.getcwd()} or among the installed packages",
                where=where,
                fix="run from the folder that holds it, install it, or use one of " + ", ".join(REWARD_NAMES),
            ) from error
        raise ConfigError(
            f"module {module_name!r} imports {error.name!r}, which is not installed",
            where=where,
            fix=f"install {error.name}",
        ) from error
    except Exception as error:  # whatever the user's module does at import
        raise ConfigError(
            f"importing {module_name!r} raised {type(error).__name__}: {error}",
            where=where,
            fix=f"try: python -c 'import {module_name}'",
        ) from error


def _instantiate(cls: type, kwargs: Mapping[str, Any], where: str) -> Any:
    try:
        inspect.signature(cls).bind(**kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"kwargs {dict(kwargs)} do not fit class {cls.__name__}: {error}",
            where=where,
            fix=f"see: python -c 'import pydoc; pydoc.help(\"{cls.__module__}.{cls.__qualname__}\")'",
        ) from error
    try:
        reward = cls(**kwargs)
    except RefRewardError:
        raise
    except Exception as error:  # whatever the user's constructor does
        raise ConfigError(
            f"{cls.__name__}(**{dict(kwargs)}) raised {type(error).__name__}: {error}", where=where
        ) from error
    if not callable(reward):
        raise ConfigError(f"instances of {cls.__name__} cannot be called", where=where, fix="give it a __call__")
    return reward


def _check_signature(reward: Callable[..., Any], where: str) -> None:
    try:
        inspect.signature(reward).bind(**dict.fromkeys([*_KEYWORDS, "any_dataset_column"]))
    except (TypeError, ValueError) as error:  # ValueError: kwargs that its function does not take
        raise ConfigError(
            f"it cannot be called as a reward: {error}",
            where=where,
            fix="define it as `def reward(*, prompts, completions, lr_image, **columns)`; wrap a function of "
            "(images, prompts, metadata) with refreward_trl.rewards.from_ddpo, one of PIL images with from_pil, a "
            "metric with from_metric",
        ) from error
