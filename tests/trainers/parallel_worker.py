"""Run by `test_parallel.py` under the launcher: trains toy scenarios and writes what each rank saw.

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
from transformers import TrainerCallback

from refreward_trl import RefReward
from refreward_trl.errors import RefRewardError
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.finetune_config import SRFinetuneConfig
from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer
from refreward_trl.trainers.sharding import whole
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


class NotANumberJudge(RefRewardTrainer):
    """The same for a judge."""

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        loss = super().compute_loss(*arguments, **keywords)
        if self.state.global_step == 1 and self.args.process_index == self.args.world_size - 1:
            loss = loss + (loss - loss.detach()).abs().sqrt()
        return loss


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


class Killed(WatchedDDPO):
    """SIGKILL ends the last rank in the fifth update, unless the run goes on from a checkpoint."""

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        last = self.args.process_index == self.args.world_size - 1
        if self.state.global_step == 4 and last and self._resumed_from is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*arguments, **keywords)


class Sharding(TrainerCallback):
    """Notes between two updates what a rank holds: how many weights are whole, and its share of the moments."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.facts: dict[str, Any] = {}
        self._size = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = list(self.trainer.model.parameters())
        states = [getattr(parameter, "ds_status", None) for parameter in parameters]
        moments = self._moments()
        self.facts = {
            "parameters": len(parameters),
            "not_available": sum(status is not None and status.name == "NOT_AVAILABLE" for status in states),
            "empty": sum(parameter.numel() == 0 for parameter in parameters),
            "share_of_moments": sum(moment.numel() for moment in moments) / self._size,
            "outside": [name for name, parameter in self._outside() if hasattr(parameter, "ds_status")],
            "outside_parameters": len(self._outside()),
            "outside_empty": [name for name, parameter in self._outside() if parameter.numel() == 0],
        }

    def _moments(self) -> list[Tensor]:
        deepspeed = self.trainer.is_deepspeed_enabled
        optimizer = self.trainer.model_wrapped.optimizer.optimizer if deepspeed else self.trainer.optimizer
        return [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]

    def _outside(self) -> list[tuple[str, nn.Parameter]]:
        """The frozen networks beside the denoiser: VAE, reference, judges."""
        generator = getattr(self.trainer, "generator", None)
        if generator is None:
            return []
        judges = [reward.judge.model for reward in self.trainer.heldout_rewards if isinstance(reward, RefReward)]
        networks = [generator.vae, generator.reference_model(), *judges]
        return [named for network in networks if network is not None for named in network.named_parameters()]


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
ALIGNED = {
    **ADAMW,
    **DDPO,
    "max_steps": 4,
    "beta": 0.1,
    "ema_decay": 0.5,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
    "log_image_steps": 4,
    "num_log_images": 1,
}
"""All that touches the weights besides the step: KL, average, evaluation, pictures, best model, saving."""
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
    "killed": (Killed, SRDDPOConfig, RESUMABLE),
    "aligned": (WatchedDDPO, SRDDPOConfig, ALIGNED),
    "full-sgd": (WatchedReFL, SRReFLConfig, {**SGD, "learning_rate": 1e-3}),
    "full-kl-sgd": (WatchedDDPO, SRDDPOConfig, {**SGD, **DDPO, "beta": 0.1, "learning_rate": 1e-2}),
    "judge-sgd": (RefRewardTrainer, RefRewardConfig, {**SGD, "learning_rate": 1e-2, "save_strategy": "steps"}),
    "judge-nan-gradient": (NotANumberJudge, RefRewardConfig, SGD),
}
for seed in (1, 2):
    for name in ("refl-sgd", "ddpo-sgd"):
        kind, config, changes = SCENARIOS[name]
        SCENARIOS[f"{name}-{seed}"] = (kind, config, {**changes, "seed": seed})


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
    if issubclass(kind, RefRewardTrainer):
        return kind(toy_judge(), args, ToyGroups(12), eval_dataset=ToyGroups(3))
    parts: dict[str, Any] = {}
    if kind is not WatchedFinetune:
        parts["reward_funcs"] = Failing() if name == "failing-reward" else brightness
        parts["peft_config"] = None if name.startswith("full") else toy_lora()
    if name == "aligned":
        parts["heldout_rewards"] = [RefReward.from_pretrained("default")]
    return kind(
        grey_generator(),
        args=args,
        train_dataset=ToyPairs(4 if name in ("nan", "failing-reward") else 12),
        eval_dataset=ToyPairs(3),
        **parts,
    )


class ToyGroups(ToyPairs):
    """Preference groups of two candidates: the HR image and a noisy one."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        noise = 60 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        worse = (row["hr_image"].float() + noise).clamp(0, 255).byte()
        return {
            "sample_id": row["sample_id"],
            "lr_image": row["lr_image"],
            "candidates": torch.stack([row["hr_image"], worse]),
            "better_worse": torch.tensor([[0, 1]]),
            "kinds": ["hr", "noise"],
        }


def toy_judge() -> RateJudge:
    size = {"vision_dim": 32, "vision_depth": 1, "vision_heads": 2, "text_dim": 64, "text_layers": 1, "text_heads": 2}
    return build_tiny_judge(**size, spec=JudgeSpec(tile=32))


def trained_weights(trainer: Any) -> dict[str, Tensor]:
    """Returns copies of the trained weights, whole on every rank."""
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    with whole(trained.values()):
        return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def run(name: str, output: Path) -> None:
    trainer = build(name, output)
    start = trained_weights(trainer)
    sharding = Sharding(trainer)
    trainer.add_callback(sharding)
    error = None
    try:
        trainer.train()
    except RefRewardError as caught:
        error = {"kind": type(caught).__name__, "message": str(caught)}
    if name == "judge-sgd":
        trainer.save_model(str(output / name / "judge"))
    history = trainer.state.log_history
    facts = {
        "error": error,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "zero_stage": trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else None,
        "sharding": sharding.facts,
        "world_size": trainer.args.world_size,
        "step": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "losses": [line["loss"] for line in history if "loss" in line],
        "evaluations": [line["eval_reward"] for line in history if "eval_reward" in line],
        "heldout": [line["eval_heldout/refreward"] for line in history if "eval_heldout/refreward" in line],
    }
    tensors = {f"gradient/{key}": tensor for key, tensor in (getattr(trainer, "first_gradients", None) or {}).items()}
    tensors |= {f"start/{key}": tensor for key, tensor in start.items()}
    tensors |= {f"end/{key}": tensor for key, tensor in trained_weights(trainer).items()}
    if getattr(trainer, "average", None) is not None:
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
