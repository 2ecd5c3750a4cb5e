"""Several rewards called, checked and combined into one number per completion, with TRL's semantics.

Nothing that a reward returns is trusted: the length, the type and the finiteness of every value are checked, what was
not scored is masked and counted, and nothing that failed becomes a score.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import ConfigError, DataError, RewardError
from refreward_trl.rewards.batching import sample_labels
from refreward_trl.rewards.calling import OnStuck, call_reward, call_together, is_async
from refreward_trl.types import Images, Metrics, RewardFunction

Aggregation: TypeAlias = Literal["sum_then_normalize", "normalize_then_sum"]

OnBad: TypeAlias = Literal["stop", "drop"]

STD_EPSILON = 1e-4
"""What TRL adds to a group's standard deviation before dividing by it."""

MAX_NAMED_SAMPLES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardSpec:
    """One entry of a recipe's `rewards:` list.

    Attributes:
        name: One of our names (`refreward_trl.rewards.REWARD_NAMES`) or a dotted path to a callable.
        weight: Its factor in the weighted sum.
        kwargs: Arguments of its class, or keyword arguments fixed on its function.
    """

    name: str
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"a reward's name must be a non-empty string, got {self.name!r}", where="key 'rewards'")
        where = f"reward {self.name!r}"
        if isinstance(self.weight, bool) or not isinstance(self.weight, Real) or not math.isfinite(self.weight):
            raise ConfigError(f"weight must be a finite number, got {self.weight!r}", where=where)
        if not isinstance(self.kwargs, Mapping) or not all(isinstance(key, str) for key in self.kwargs):
            raise ConfigError(f"kwargs must be a mapping with string keys, got {self.kwargs!r}", where=where)

    @classmethod
    def from_entry(cls, entry: RewardSpec | str | Mapping[str, Any]) -> RewardSpec:
        """Reads a recipe entry: a bare name, or a mapping with `name` and optionally `weight` and `kwargs`.

        Raises:
            ConfigError: For an unknown key, a missing name or a value of the wrong type.
        """
        if isinstance(entry, RewardSpec):
            return entry
        if isinstance(entry, str):
            return cls(entry)
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"a reward is a name or a mapping, got {entry!r}", where="key 'rewards'", fix="write {name: refreward}"
            )
        keys = ["name", "weight", "kwargs"]
        for key in entry:
            if key not in keys:
                nearest = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"unknown key {key!r} in a reward entry", where="key 'rewards'", fix=f"use {nearest!r}"
                )
        if "name" not in entry:
            raise ConfigError(f"the reward entry {dict(entry)!r} has no name", where="key 'rewards'")
        return cls(**entry)


def reward_name(func: Callable[..., Any]) -> str:
    """Returns a reward's name as TRL finds it: the `__name__` under any `partial`, else its class."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def reward_names(funcs: Sequence[Callable[..., Any]]) -> list[str]:
    """Returns one name per reward; a second `psnr` becomes `psnr_2`, since metrics are keyed by name."""
    names: list[str] = []
    for func in funcs:
        base = name = reward_name(func)
        number = 1
        while name in names:
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return names


@dataclass
class RewardTable:
    """What `score_all` found for B completions in groups of `group_size`. NaN means "not scored" throughout.

    Attributes:
        total: `(B,)` the combined reward, with its graph if any reward has one. Under `sum_then_normalize` the
            weighted sum, to be normalised in its group by the objective; under `normalize_then_sum` the weighted sum
            of rewards already normalised in their groups. NaN where no reward with a weight other than 0 scored the
            completion.
        per_reward: The raw `(B,)` values by name, unweighted, with their graphs.
        missing: How many completions each reward left unscored.
        failed: How many of them because its call failed and `on_bad` is "drop". Such a completion has no total,
            whatever other rewards say: its sum would lack a term that the candidates beside it have.
        weighted_sum: `(B,)` the weighted sum of the raw values without graph, which TRL logs as `reward`.
        group_std: Per reward the `(groups,)` standard deviation inside each group (n - 1); NaN below two scored
            candidates.
    """

    total: Float[Tensor, " b"]
    per_reward: dict[str, Float[Tensor, " b"]]
    missing: dict[str, int]
    failed: dict[str, int]
    weighted_sum: Float[Tensor, " b"]
    group_std: dict[str, Float[Tensor, " g"]]

    def metrics(self) -> Metrics:
        """Returns the numbers to log under TRL's names. The keys never depend on the values; undefined is NaN."""
        metrics = {"reward": _mean(self.weighted_sum), "reward_std": nan_std(self.weighted_sum).item()}
        for name, values in self.per_reward.items():
            metrics[f"rewards/{name}/mean"] = _mean(values.detach())
            metrics[f"rewards/{name}/std"] = nan_std(values.detach()).item()
            metrics[f"rewards/{name}/group_std"] = _mean(self.group_std[name])
            metrics[f"rewards/{name}/missing"] = float(self.missing[name])
            metrics[f"rewards/{name}/failed"] = float(self.failed[name])
        return metrics


def score_all(
    reward_funcs: Sequence[RewardFunction],
    names: Sequence[str] | None,
    weights: Sequence[float] | None,
    *,
    completions: Images,
    lr_image: Any,
    columns: Mapping[str, Any] | None = None,
    group_size: int = 1,
    aggregation: Aggregation = "sum_then_normalize",
    trainer_state: Any = None,
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    timeout: float | None = None,
    on_bad: OnBad = "stop",
    on_stuck: OnStuck | None = None,
) -> RewardTable:
    """Calls every reward on a batch and combines what they return.

    Async rewards (`async def`, or a class whose `__call__` is) come after the others, all together, as in TRL.

    Args:
        reward_funcs: The rewards.
        names: Their names in metrics and errors; None for `reward_names(reward_funcs)`.
        weights: Their weights; None for all 1.
        completions: B images: `(B, 3, H, W)` in [0, 1] or a list of `(3, H, W)`. Candidates of one LR image lie
            together.
        lr_image: Their B LR images, each repeated for every candidate.
        columns: The other dataset columns, one entry per completion. `prompt`, where present, is passed as `prompts`.
        group_size: Candidates per LR image (`num_generations`).
        aggregation: TRL's `multi_objective_aggregation`, see `RewardTable.total`. Unlike TRL, what follows the
            weighted sum (advantages, and the batch normalisation after `normalize_then_sum`) is left to the objective,
            and a row that only rewards of weight 0 scored counts as not scored.
        trainer_state: Passed to the rewards as in TRL.
        log_metric: Passed to the rewards as in TRL: `log_metric(name, value)`.
        log_extra: Passed to the rewards as in TRL: `log_extra(column, values)`.
        timeout: Seconds that one call of a reward may take; None for no limit. See `rewards.deadline`.
        on_bad: What happens when a reward raises, takes too long or returns something that is not a reward: "stop"
            raises, "drop" counts the completions as failed.
        on_stuck: Called from another thread with the name of a reward that `timeout` could not end.

    Returns:
        The `RewardTable`, on the completions' device.

    Raises:
        ConfigError: For lists of unequal length, equal names, or groups that do not fit.
        DataError: For a column whose length is not B; and whatever our own rewards raise.
        RewardError: Naming the reward that raised, or that returned something that is not a reward.
    """
    names = reward_names(reward_funcs) if names is None else list(names)
    weights = [1.0] * len(reward_funcs) if weights is None else [float(weight) for weight in weights]
    count = len(completions)
    _check_plan(reward_funcs, names, weights, count, group_size, aggregation)
    others = dict(columns or {})
    prompts = others.pop("prompt", [""] * count)
    arguments = {
        **others,
        "prompts": prompts,
        "completions": completions,
        "completion_ids": None,
        "lr_image": lr_image,
        "trainer_state": trainer_state,
        "log_metric": log_metric or _ignore,
        "log_extra": log_extra or _ignore,
    }
    _check_columns(arguments, count)
    labels = sample_labels(others, count)
    device = completions[0].device
    funcs = dict(zip(names, reward_funcs, strict=True))
    per_reward, failed = {}, {}

    def enter(name: str, call: Callable[[], Any]) -> None:
        failed[name] = torch.zeros(count, dtype=torch.bool, device=device)
        try:
            values = read_rewards(call(), name=name, labels=labels)
        except RewardError as error:
            if on_bad == "stop":
                raise
            logger.warning("%s\n%d completions are left out", error, count)
            values = torch.full((count,), torch.nan)
            failed[name][:] = True
        per_reward[name] = values.to(device)

    together = {name: func for name, func in funcs.items() if is_async(func)}
    for name, func in funcs.items():
        if name not in together:
            enter(name, functools.partial(call_reward, func, name, arguments, timeout, on_stuck))
    outcomes = call_together(together, arguments, timeout, stop_early=on_bad == "stop", on_stuck=on_stuck)
    for name, outcome in outcomes.items():
        enter(name, functools.partial(_returned, outcome))
    per_reward = {name: per_reward[name] for name in names}
    failed = {name: failed[name] for name in names}
    return _table(per_reward, failed, torch.tensor(weights, device=device), group_size, aggregation)


def read_rewards(returned: Any, *, name: str, labels: Sequence[str]) -> Float[Tensor, " b"]:
    """Checks what a reward returned and makes it a tensor.

    Args:
        returned: A list or tuple of real numbers, `None` and 0-dimensional tensors, or a tensor or array of shape
            `(B,)`.
        name: The reward's name.
        labels: What errors call each row; their number is B.

    Returns:
        float32 `(B,)`, NaN where not scored, with the graph of a returned tensor.

    Raises:
        RewardError: For any other type or length, and for an infinite value.
    """
    if isinstance(returned, (Tensor, np.ndarray)):
        values = _read_tensor(returned, name, len(labels))
    elif isinstance(returned, (list, tuple)):
        values = _read_list(returned, name, labels)
    else:
        raise _not_rewards(returned, name)
    infinite = values.detach().isinf().nonzero().flatten().tolist()
    if infinite:
        named = ", ".join(f"{labels[row]} ({values[row].item()})" for row in infinite[:MAX_NAMED_SAMPLES])
        more = f" and {len(infinite) - MAX_NAMED_SAMPLES} more" if len(infinite) > MAX_NAMED_SAMPLES else ""
        raise RewardError(
            f"returned an infinite value for {named}{more}",
            where=f"reward {name!r}",
            fix="cap the reward, or return None for a completion that cannot be scored",
        )
    return values


def nan_std(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Standard deviation (n - 1) over the last dimension without its NaNs; NaN below two values. No gradient flows."""
    values = values.detach()
    count = (~values.isnan()).sum(-1)
    deviations = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1)
    return torch.where(count > 1, deviations / (count - 1).clamp(min=1), torch.nan).sqrt()


def _returned(outcome: Any) -> Any:
    """Returns what an async reward returned, or raises why it did not."""
    if isinstance(outcome, RewardError):
        raise outcome
    return outcome


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def _ignore(name: str, values: Any) -> None:
    """What `log_metric` and `log_extra` do where nobody logs."""


def _check_plan(
    reward_funcs: Sequence[Any],
    names: Sequence[str],
    weights: Sequence[float],
    count: int,
    group_size: int,
    aggregation: str,
) -> None:
    if not reward_funcs:
        raise ConfigError("no reward was given", where="key 'rewards'", fix="name at least one, such as refreward")
    if not len(reward_funcs) == len(names) == len(weights):
        raise ConfigError(f"{len(reward_funcs)} rewards came with {len(names)} names and {len(weights)} weights")
    if len(set(names)) != len(names):
        raise ConfigError(f"two rewards share a name: {names}", fix="give each its own; metrics are keyed by it")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"reward weights must be finite numbers, got {weights}", where="key 'reward_weights'")
    if count == 0 or group_size < 1 or count % group_size:
        raise ConfigError(
            f"{count} completions cannot be divided into groups of {group_size}",
            where="key 'num_generations'",
            fix="make the batch size per device a multiple of num_generations",
        )
    if aggregation not in get_args(Aggregation):
        nearest = difflib.get_close_matches(str(aggregation), get_args(Aggregation), n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown value {aggregation!r}", where="key 'reward_aggregation'", fix=f"use {nearest!r}")
    if aggregation == "normalize_then_sum" and group_size == 1:
        raise ConfigError(
            "'normalize_then_sum' compares candidates of one LR image, but there is only one of each",
            where="key 'reward_aggregation'",
            fix="use 'sum_then_normalize', or num_generations of at least 2",
        )


def _check_columns(arguments: Mapping[str, Any], count: int) -> None:
    for column, values in arguments.items():
        if isinstance(values, (list, tuple, Tensor)) and len(values) != count:
            raise DataError(f"{len(values)} entries for {count} completions", where=f"column {column!r}")


def _read_tensor(returned: Tensor | np.ndarray, name: str, count: int) -> Tensor:
    if isinstance(returned, np.ndarray):
        if returned.dtype.kind not in "fiu":
            raise _not_rewards(returned, name, f"an array of {returned.dtype}")
        returned = torch.from_numpy(returned.astype(np.float32))
    if returned.is_complex() or returned.dtype == torch.bool:
        raise _not_rewards(returned, name, f"a tensor of {returned.dtype}")
    if returned.ndim != 1:
        raise _not_rewards(returned, name, f"shape {tuple(returned.shape)}, expected ({count},)")
    _check_length(len(returned), name, count)
    return returned.float()


def _read_list(returned: Sequence[Any], name: str, labels: Sequence[str]) -> Tensor:
    _check_length(len(returned), name, len(labels))
    values = [_read_number(value, name, label) for value, label in zip(returned, labels, strict=True)]
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    if device is None:
        return torch.tensor(values, dtype=torch.float32)
    return torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])


def _read_number(value: Any, name: str, label: str) -> float | Tensor:
    if value is None:
        return math.nan
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool:
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an int beyond the range of floats; reported as infinite with its sample
            return math.inf
    raise _not_rewards(value, name, f"{_short(value)} for {label}")


def _check_length(got: int, name: str, expected: int) -> None:
    if got != expected:
        raise RewardError(
            f"returned {got} rewards, but {expected} were expected (one per completion)",
            where=f"reward {name!r}",
            fix="return one number per completion; None for one that cannot be scored",
        )


def _not_rewards(value: Any, name: str, description: str | None = None) -> RewardError:
    fix = "return a list of floats (None where not scored) or a float tensor (B,)"
    if inspect.iscoroutine(value):
        value.close()  # else Python warns that it was never awaited
        fix = "define the reward itself as `async def`, so that it is seen to be async and awaited"
    elif value is None and description is None:
        fix = "is there a `return`? " + fix
    return RewardError(f"returned {description or _short(value)}, not rewards", where=f"reward {name!r}", fix=fix)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _table(
    per_reward: dict[str, Tensor],
    failed: dict[str, Tensor],
    weights: Tensor,
    group_size: int,
    aggregation: Aggregation,
) -> RewardTable:
    raw = torch.stack(list(per_reward.values()), dim=1)  # (B, rewards)
    grouped = raw.unflatten(0, (-1, group_size))  # (groups, K, rewards)
    group_std = nan_std(grouped.transpose(1, 2))  # (groups, rewards)
    combined = raw
    if aggregation == "normalize_then_sum":
        # The statistics are a baseline, hence constants to the gradient. A lone scored candidate has no deviation and
        # says nothing about its group: divided by infinity it adds 0, as in TRL, and sends no NaN back.
        mean = grouped.detach().nanmean(1, keepdim=True)
        std = group_std.nan_to_num(nan=torch.inf).unsqueeze(1)
        combined = ((grouped - mean) / (std + STD_EPSILON)).flatten(0, 1)
    incomplete = (torch.stack(list(failed.values()), dim=1) & _counted(weights)).any(1)
    return RewardTable(
        total=_weighted_sum(combined, weights).masked_fill(incomplete, torch.nan),
        per_reward=per_reward,
        missing={name: int(values.isnan().sum()) for name, values in per_reward.items()},
        failed={name: int(rows.sum()) for name, rows in failed.items()},
        weighted_sum=_weighted_sum(raw.detach(), weights).masked_fill(incomplete, torch.nan),
        group_std=dict(zip(per_reward, group_std.unbind(1), strict=True)),
    )


def _counted(weights: Tensor) -> Tensor:
    """Which rewards decide whether a completion is scored: those with a weight; all of them if none has one."""
    return weights != 0 if bool(weights.any()) else torch.ones_like(weights, dtype=torch.bool)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sums over rewards; a value that is NaN adds nothing, and a row without any scored, weighted reward is NaN."""
    scored = (~values.isnan() & _counted(weights)).any(1)
    total = (torch.where(values.isnan(), 0.0, values) * weights).sum(1)
    return torch.where(scored, total, torch.nan)
