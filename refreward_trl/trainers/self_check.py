"""The start-up self-check: what must hold on the first batch, before the first update, or training would be a waste of
time.

Every check says which condition failed and what to do. All ranks call them with gathered numbers, so that all stop
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from refreward_trl.errors import RewardError, SetupError, TrainingError
from refreward_trl.rewards.composite import nan_std

RATIO_TOLERANCE = 1e-4


def check_ratio(log_prob: Tensor, old_log_prob: Tensor) -> None:
    """Checks that the policy that is about to learn is the one that sampled.

    Args:
        log_prob: `(b,)`, recomputed through the prepared model in train mode.
        old_log_prob: `(b,)`, stored at the rollout.

    Raises:
        TrainingError: If a likelihood ratio is off 1 by more than 1e-4.
    """
    ratio = (log_prob.double() - old_log_prob.double()).exp()
    worst = float((ratio - 1).abs().max())
    # Written so that NaN fails.
    if not worst <= RATIO_TOLERANCE:
        raise TrainingError(
            f"the likelihood ratio at the first update is off 1 by {worst:.2g}, more than {RATIO_TOLERANCE:g}: the"
            " network predicts something else in training than at the rollout",
            where="self-check 'ratio'",
            fix="switch dropout off (lora_dropout: 0), keep weights and precision the same in rollout and update",
        )


def check_spread(rewards: Tensor, repeated: Tensor) -> None:
    """Checks that the candidates of a group get different rewards, and not just by the reward's own noise.

    Args:
        rewards: `(groups, candidates)`, NaN where not scored.
        repeated: The same candidates scored a second time.

    Raises:
        RewardError: If no candidate was scored, if all rewards within every group are equal, or if scoring the same
            images twice changes the rewards as much as another candidate does.
    """
    spread = nan_std(rewards.float())
    if bool(spread.isnan().all()):
        raise RewardError(
            "no group has two scored candidates",
            where="self-check 'reward'",
            fix="look at why the reward returns None or NaN for every image",
        )
    if float(spread.nan_to_num().max()) == 0:
        raise RewardError(
            f"every candidate of a group got the same reward (first: {float(rewards.flatten()[0]):g}), which teaches"
            " nothing",
            where="self-check 'reward'",
            fix="use a continuous reward, or a larger sigma so that the candidates differ",
        )
    noise = (repeated.float() - rewards.float()).square().nanmean().div(2).sqrt()
    typical = spread.nanmean()
    if not float(typical) > float(noise):
        raise RewardError(
            f"the reward's standard deviation within groups is {float(typical):.2g}, but scoring the same images twice"
            f" already gives {float(noise):.2g}",
            where="self-check 'reward'",
            fix="make the reward deterministic (no sampling, no dropout), or raise sigma",
        )


def check_gradient(largest: float) -> None:
    """Raises `TrainingError` if the largest absolute entry of the first gradient, over all ranks, is 0."""
    if largest == 0:
        raise TrainingError(
            "the gradient of the first update is zero in every trained parameter",
            where="self-check 'gradient'",
            fix="compute the loss from the output of the model that objective() is given, without no_grad or detach",
        )


def largest_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the largest absolute entry of the gradients, a scalar tensor; 0 where there is none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.stack([gradient.detach().abs().amax().float() for gradient in gradients]).amax()


class PreparedModelWatch:
    """Notices whether the prepared (wrapped) model ran while a loss was computed.

    DDP averages gradients only if its own `forward` ran. A loss computed on the bare module trains each rank alone,
    silently.
    """

    def __init__(self, model: nn.Module) -> None:
        self.called = False
        self._handle = model.register_forward_pre_hook(self._note)

    def finish(self) -> None:
        """Raises `SetupError` if the model did not run; call it after the loss was computed."""
        self._handle.remove()
        if not self.called:
            raise SetupError(
                "the loss was computed without the prepared model, so gradients would not be averaged over processes",
                where="objective",
                fix="call the `model` that objective() is given: generator.predict(..., model=model)",
            )

    def _note(self, module: nn.Module, inputs: Any) -> None:
        self.called = True


class DeepSpeedStepGuard:
    """Looks at the gradients before a DeepSpeed engine steps.

    Under DeepSpeed the optimizer steps inside `accelerator.backward`, before the Trainer sees a gradient norm. The
    guard notes gradients as they are computed and calls `check(largest absolute entry, NaN or inf included)` on every
    rank before the step.
    """

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter], check: Callable[[Tensor], None]) -> None:
        self._check = check
        self._step = engine.step
        self._largest: Tensor | None = None
        engine.step = self._guarded_step
        for parameter in parameters:
            parameter.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        largest = gradient.detach().abs().amax().float()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def _guarded_step(self, *args: Any, **kwargs: Any) -> Any:
        largest, self._largest = self._largest, None
        self._check(torch.zeros(()) if largest is None else largest)
        return self._step(*args, **kwargs)
