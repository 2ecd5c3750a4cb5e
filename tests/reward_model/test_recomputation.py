"""Blocks of a judge that are computed again in the backward pass."""

from typing import Any

import pytest
import torch
from tiny_judges import FAMILY_NAMES, family_judge
from transformers.modeling_layers import GradientCheckpointingLayer

from refreward_trl.reward_model.recomputation import recomputed_blocks
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.rewards import RefReward


def states(judge: RateJudge) -> list[tuple[bool, bool]]:
    blocks = [module for module in judge.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [(block.training, block.gradient_checkpointing) for block in blocks]


def gradient(reward: Any, lr_image: torch.Tensor, sr_image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns scores, their gradient on the pixels, and how many numbers the forward kept for it."""
    sr_image = sr_image.clone().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scores = reward(completions=sr_image, lr_image=lr_image)
    (found,) = torch.autograd.grad(scores.sum(), sr_image)
    return scores.detach(), found, sum(kept)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_blocks_give_the_same_gradient_and_keep_less(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = family_judge(family)
    judge.model.eval().requires_grad_(False)
    before = states(judge)
    # The two candidates of one LR image would share its keys and values, which a second computation must not.
    lr_image, sr_image = torch.rand(1, 3, 8, 8).expand(2, -1, -1, -1), torch.rand(2, 3, 32, 32)
    found = {}
    for checkpoint in (False, "blocks"):
        reward = RefReward("unused", checkpoint=checkpoint, share_lr=False)
        monkeypatch.setattr(reward, "_load", lambda: judge)
        found[checkpoint] = gradient(reward, lr_image, sr_image)
        assert states(judge) == before
    assert torch.equal(found["blocks"][0], found[False][0])
    assert torch.equal(found["blocks"][1], found[False][1])
    assert found[False][1].abs().max() > 0
    assert found["blocks"][2] < 0.5 * found[False][2]
    shared = RefReward("unused", checkpoint="blocks")
    monkeypatch.setattr(shared, "_load", lambda: judge)
    assert torch.equal(gradient(shared, lr_image, sr_image)[1], found[False][1])


def test_an_error_leaves_the_network_as_it_was() -> None:
    judge = family_judge(FAMILY_NAMES[0])
    before = states(judge)
    with pytest.raises(ZeroDivisionError), recomputed_blocks(judge.model):
        assert states(judge) != before
        _ = 1 / 0
    assert states(judge) == before
