"""Run by `test_parallel.py` under the launcher: trains toy scenarios and writes what rank 0 saw.

parallel_worker.py OUTPUT_FOLDER SCENARIO...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import DistributedType
from conftest import ToyPairs, brightness, grey_generator, toy_lora
from torch import Tensor, nn

from refreward_trl.errors import RefRewardError
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.finetune_config import SRFinetuneConfig
from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer
from refreward_trl.types import LossOutput

GLOBAL_BATCH = 4


class Watching(AlignmentTrainer):
    """Keeps the full gradients of the first update, averaged over ranks as the optimizer sees them."""

    first_gradients: dict[str, Tensor] | None = None

    def _keep(self, gradient_of: Any) -> None:
        if self.first_gradients is None:
            self.first_gradients = {
                name: gradient_of(parameter).detach().float().cpu().clone()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self._keep(lambda parameter: parameter.grad)
        return super()._get_grad_norm(model, grad_norm)

    def _check_deepspeed_gradient(self, largest: Tensor) -> None:
        from deepspeed.utils import safe_get_full_grad

        self._keep(safe_get_full_grad)
        super()._check_deepspeed_gradient(largest)


class WatchedReFL(Watching, SRReFLTrainer):
    pass


class WatchedDDPO(Watching, SRDDPOTrainer):
    pass


class WatchedFinetune(Watching, SRFinetuneTrainer):
    pass


class Unwrapped(WatchedReFL):
    """The mistake: the loss goes through the bare module, so nothing averages its gradients."""

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        return super().objective(self.model, batch)


class NotANumber(WatchedReFL):
    """One rank's loss is not a number at the second update."""

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        output = super().objective(model, batch)
        if self.state.global_step == 1 and "photo3" in batch["sample_id"]:
            output.loss = output.loss * float("nan")
        return output


class NotANumberGradient(WatchedReFL):
    """One rank's loss is finite, its gradient is not."""

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        output = super().objective(model, batch)
        if self.state.global_step == 1 and self.args.process_index == self.args.world_size - 1:
            output.loss = output.loss + (output.loss - output.loss.detach()).abs().sqrt()
        return output


class Drifting(WatchedReFL):
    """After the second update one bit of one weight of the last rank is another."""

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        if self.state.global_step == 2 and self.args.process_index == self.args.world_size - 1:
            with torch.no_grad():
                self.generator_parameters()[1].flatten()[0].view(torch.int32).bitwise_xor_(1)
        return super().training_step(*arguments, **keywords)


class Preempting(WatchedDDPO):
    """The scheduler's signal reaches the last rank only, in the fourth update."""

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        if self.state.global_step == 3 and self.args.process_index == self.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(*arguments, **keywords)


class Failing:
    """A reward that raises on one rank only."""

    __name__ = "failing"

    def __call__(self, *, completions: Tensor, sample_id: list[str], **columns: Any) -> Tensor:
        if "photo3" in sample_id:
            raise ValueError("the server is gone")
        return brightness(completions=completions)


# Noise that does not depend on what the untrained network adds: a small direction would magnify rounding errors.
DDPO = {
    "num_generations": 4,
    "sigma": 0.5,
    "noise": "lowfreq",
    "noise_cell": 4,
    "log_prob_reduction": "mean",
    "scale_rewards": "batch",
    "num_iterations": 2,
    "anchor_weight": 0.1,
}
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 3}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 6}
RESUMABLE = {
    **ADAMW,
    **DDPO,
    "ema_decay": 0.9,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
}
SCENARIOS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "refl-sgd": (WatchedReFL, SRReFLConfig, SGD),
    "ddpo-sgd": (WatchedDDPO, SRDDPOConfig, {**SGD, **DDPO}),
    "refl-adamw": (WatchedReFL, SRReFLConfig, ADAMW),
    "ddpo-adamw": (WatchedDDPO, SRDDPOConfig, {**ADAMW, **DDPO}),
    "vae-sgd": (WatchedFinetune, SRFinetuneConfig, {**SGD, "train_part": "vae", "learning_rate": 0.1}),
    "unwrapped": (Unwrapped, SRReFLConfig, SGD),
    "unwrapped-unchecked": (Unwrapped, SRReFLConfig, {**SGD, "self_check": False}),
    "nan": (NotANumber, SRReFLConfig, SGD),
    "nan-gradient": (NotANumberGradient, SRReFLConfig, SGD),
    "failing-reward": (WatchedReFL, SRReFLConfig, SGD),
    "drift": (Drifting, SRReFLConfig, {**SGD, "learning_rate": 1e-3, "max_steps": 5, "rank_check_steps": 2}),
    "preempted": (Preempting, SRDDPOConfig, RESUMABLE),
    "resumable": (WatchedDDPO, SRDDPOConfig, RESUMABLE),
}


def backend() -> dict[str, Any]:
    """Several CPU processes talk over gloo; use_cpu makes accelerate wrap for DDP, and would switch DeepSpeed off."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {"use_cpu": True}
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    return {"ddp_backend": "gloo"} if deepspeed else {"ddp_backend": "gloo", "use_cpu": True}


def build(name: str, folder: Path) -> Any:
    kind, config, changes = SCENARIOS[name]
    settings = {"eval_steps": 3, "eval_on_start": True, "save_strategy": "no", **changes}
    args = config(
        output_dir=str(folder / name / "run"),
        disable_tqdm=True,
        **backend(),
        lr_scheduler_type="constant",
        logging_steps=1,
        max_grad_norm=1e9,
        **settings,
    )
    args.per_device_train_batch_size = GLOBAL_BATCH // args.world_size
    rewards = {"failing-reward": Failing()}.get(name, brightness)
    return kind(
        grey_generator(),
        **({} if kind is WatchedFinetune else {"reward_funcs": rewards}),
        args=args,
        train_dataset=ToyPairs(4 if name in ("nan", "failing-reward") else 12),
        eval_dataset=ToyPairs(3),
        peft_config=None if kind is WatchedFinetune else toy_lora(),
    )


def run(name: str, output: Path) -> None:
    trainer = build(name, output)
    start = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    error = None
    try:
        trainer.train()
    except RefRewardError as caught:
        error = {"kind": type(caught).__name__, "message": str(caught)}
    trainable = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    end = trainer.model.state_dict()
    facts = {
        "error": error,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "world_size": trainer.args.world_size,
        "step": trainer.state.global_step,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "evaluations": [line["eval_reward"] for line in trainer.state.log_history if "eval_reward" in line],
    }
    tensors = {f"gradient/{key}": tensor for key, tensor in (trainer.first_gradients or {}).items()}
    tensors |= {f"start/{key}": start[key].cpu() for key in trainable}
    tensors |= {f"end/{key}": end[key].detach().cpu() for key in trainable}
    if trainer.average is not None:
        tensors |= {f"average/{key}": tensor for key, tensor in trainer.average.state_dict().items()}
    rank = trainer.args.process_index
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(copies, folder / f"tensors-{rank}.safetensors")


if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        run(scenario, Path(sys.argv[1]))
