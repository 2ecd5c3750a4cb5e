"""Optimizers of `TrainingArguments` that save memory, and `torch_compile`, through our trainers."""

from __future__ import annotations

import pytest
import torch

from refreward_trl.trainers.memory_estimate import optimizer_bytes
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer


def state_bytes(trainer):
    return sum(
        value.numel() * value.element_size()
        for state in trainer.optimizer.optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name.startswith(("state", "exp_avg"))
    )


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch"])
def test_it_trains_with_it_and_its_state_is_as_large_as_predicted(
    optim, settings, make_generator, pairs, reward, lora
):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    trainer = SRReFLTrainer(
        make_generator(),
        [reward],
        SRReFLConfig(**settings(optim=optim, anchor="none", learning_rate=1e-3)),
        pairs(4),
        peft_config=lora(r=64),
    )
    before = [parameter.detach().clone() for parameter in trainer.generator_parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.generator_parameters(), strict=True))
    assert state_bytes(trainer) == optimizer_bytes(optim, trainer.generator_parameters())


@pytest.mark.slow
def test_a_compiled_denoiser_trains_as_it_does_without(settings, make_generator, pairs, reward, lora):
    losses = {}
    for compiled in (False, True):
        # The whole path but the code generator, which needs a compiler and minutes.
        further = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        config = SRReFLConfig(**settings(**further, resume="never"))
        trainer = SRReFLTrainer(
            make_generator(), [reward], config, pairs(4), eval_dataset=pairs(1), peft_config=lora()
        )
        trainer.train()
        log = trainer.state.log_history
        losses[compiled] = [line[name] for name in ("loss", "anchor") for line in log if name in line]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert len(losses[True]) == 4 and losses[True][-1] > 0  # the reference has its adapter off in compiled code too
