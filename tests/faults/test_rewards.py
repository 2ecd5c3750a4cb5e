"""Rewards that fail in every way, in both trainers and under both policies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refreward_trl.errors import RewardError

pytestmark = pytest.mark.faults


def raises(scores: torch.Tensor) -> Any:
    raise ConnectionError("the server is gone")


def hangs(scores: torch.Tensor) -> Any:
    time.sleep(600)


BAD: dict[str, Callable[[torch.Tensor], Any]] = {
    "infinity": lambda scores: scores + math.inf,
    "minus infinity": lambda scores: scores - math.inf,
    "one infinity": lambda scores: torch.cat([scores[:-1], scores[-1:] + math.inf]),
    "nothing": lambda scores: None,
    "text": lambda scores: ["high"] * len(scores),
    "complex": lambda scores: scores.to(torch.complex64),
    "one too few": lambda scores: scores[:-1],
    "one too many": lambda scores: torch.cat([scores, scores[:1]]),
    "empty": lambda scores: [],
    "a column": lambda scores: scores[:, None],
    "a mean": lambda scores: scores.mean(),
    "booleans": lambda scores: scores > 0,
    "nested lists": lambda scores: [[score] for score in scores.tolist()],
    "raises": raises,
    "hangs": hangs,
}


class BadAt:
    """The brightness of an image; at some calls something else."""

    __name__ = "server"

    def __init__(self, wrong: Callable[[torch.Tensor], Any], calls: set[int]) -> None:
        self.wrong, self.calls, self.count = wrong, calls, 0

    def __call__(self, *, completions: torch.Tensor, **columns: Any) -> Any:
        self.count += 1
        scores = 10 * completions.mean(dim=(1, 2, 3))
        return self.wrong(scores) if self.count in self.calls else scores


def all_finite(trainer: Any) -> bool:
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return all(bool(torch.as_tensor(value).isfinite().all()) for value in [*trainer.model.parameters(), *moments])


@pytest.mark.parametrize("policy", ["stop", "drop"])
@pytest.mark.parametrize("kind", ["refl-lora", "ddpo-lora"])
def test_bad_rewards(
    harness: SimpleNamespace, tally: Callable[[str], Any], tmp_path: Path, kind: str, policy: str
) -> None:
    for number, (name, wrong) in enumerate(BAD.items()):
        changes: dict[str, Any] = {"on_bad_reward": policy, "reward_timeout": 1.0, "eval_strategy": "no"}
        if kind == "ddpo-lora":
            changes["num_iterations"] = 1
        trainer = harness.make_trainer(kind, tmp_path / str(number), self_check=False, max_steps=4, **changes)
        trainer.reward_funcs = [BadAt(wrong, {2})]
        trainer.reward_names = ["server"]
        with tally("bad-reward").trial():
            if policy == "stop":
                with pytest.raises(RewardError, match="reward 'server'"):
                    trainer.train()
                assert trainer.state.global_step == 1, name
            else:
                trainer.train()
                assert trainer.state.global_step == 4, name
                lines = [line for line in trainer.state.log_history if "rewards/server/failed" in line]
                assert sum(line["rewards/server/failed"] for line in lines) > 0, name
            assert all_finite(trainer), name
