"""DDPO and GRPO for one-step generators: candidates from a Gaussian around the prediction, a black-box reward, a
clipped policy gradient."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError, ConfigError, TrainingError
from refreward_trl.generators import straight_through_clamp
from refreward_trl.generators.base import Condition
from refreward_trl.generators.policies import GaussianLatentPolicy
from refreward_trl.objectives.policy_gradient import RunningAdvantage, clipped_policy_loss, group_advantages
from refreward_trl.randomness import stateless_generator
from refreward_trl.rewards.composite import RewardTable
from refreward_trl.trainers.alignment_config import AlignmentConfig
from refreward_trl.trainers.base import AlignmentTrainer, eval_mode
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ordering import REUSED
from refreward_trl.trainers.self_check import check_ratio, check_spread
from refreward_trl.trainers.torch_files import FIX
from refreward_trl.types import LossOutput

LEAST_CORRECTION = 1e-3
"""What the generator must add for residual noise, in standard deviations of the encoded LR image."""
ROLLOUT_FILE = "rollout-rank{rank}.safetensors"
ROLLOUT_SETTINGS = (
    *("noise", "noise_cell", "sigma", "num_generations", "num_iterations", "log_prob_reduction"),
    *("anchor", "anchor_weight", "beta", "per_device_train_batch_size", "gradient_accumulation_steps"),
)
"""What the candidates of a rollout were drawn with, and what was stored with them."""


class SRDDPOTrainer(AlignmentTrainer):
    """Aligns a generator by policy gradient: group-relative advantages are GRPO, running ones DDPO. The reward is a
    black box.

    A rollout covers the micro-batches of one update and serves `num_iterations` updates. Its candidates, old
    log-probabilities and advantages are part of every checkpoint, so a run resumes in the middle of a rollout. The
    constructor is that of `AlignmentTrainer`.
    """

    config_class = SRDDPOConfig
    args: SRDDPOConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.running_advantage = RunningAdvantage()
        self._rollout_buffer: list[dict[str, Any]] = []

    def rollout(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Samples and rewards K candidates per LR image.

        Adds `encoded`, `candidates` `(B * K, c, h, w)`, `old_log_prob` `(B * K,)`, `rewards` `(B, K)`, with noise
        "residual" `noise_direction`, and the reference where needed.
        """
        cond = self.condition(batch)
        batch["encoded"] = self.generator.encode(cond)
        # The deployed mode, so that what is rewarded is what is deployed; the self-check makes sure that training
        # predicts the same.
        with eval_mode(self.model_wrapped):
            mean = self.generator.predict(batch["encoded"], cond, model=self.model_wrapped)
        if self.args.noise == "residual":
            batch["noise_direction"] = self.generator.correction(mean, batch["encoded"], cond)
        policy = self._policy(mean, batch)
        batch["candidates"] = policy.sample(self._noise_sources(batch), antithetic=self.args.antithetic)
        batch["old_log_prob"] = policy.log_prob(batch["candidates"], self.args.log_prob_reduction)
        table = self._reward(batch["candidates"], cond, batch)
        self.record(table.metrics())
        batch["rewards"] = table.total.unflatten(0, (-1, self.args.num_generations))
        self.add_reference(batch, batch["encoded"], cond)
        return batch

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        cond = self.condition(batch)
        mean = self.generator.predict(batch["encoded"], cond, model=model)
        policy = self._policy(mean, batch)
        log_prob = policy.log_prob(batch["candidates"], self.args.log_prob_reduction)
        output = clipped_policy_loss(
            log_prob, batch["old_log_prob"], batch["advantages"].flatten(), self.args.effective_clip_range
        )
        loss = output.loss
        if "reference_mean" in batch:
            divergence = policy.kl(batch["reference_mean"], self.args.log_prob_reduction).mean()
            output.metrics["kl"] = divergence.detach()
            if self.args.beta:
                loss = loss + self.args.beta * divergence
        if self.args.anchored:
            image = self.generator.postprocess(self.generator.decode(mean, cond, checkpoint=True), cond)
            loss = loss + self.anchor(straight_through_clamp(image), batch)
        return LossOutput(loss, output.metrics)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Returns the micro-batches of one update: a new rollout, or the current one again."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and REUSED in batches[0]:
            if len(self._rollout_buffer) != len(batches):
                raise TrainingError(
                    f"the rollout has {len(self._rollout_buffer)} micro-batches, the update needs {len(batches)}",
                    where=f"step {self.state.global_step + 1}",
                    fix="keep num_iterations and the batch sizes of the run that is resumed",
                )
        else:
            self._rollout_buffer = self._roll_out(batches)
        return list(self._rollout_buffer), num_items

    def _roll_out(self, batches: Sequence[Any]) -> list[dict[str, Any]]:
        rolled = []
        with torch.no_grad():
            for batch in batches:
                rolled.append(self.rollout(self._images_to_float(batch)))
            for batch, advantages in zip(rolled, self._advantages(rolled), strict=True):
                batch["advantages"] = self._shuffled(advantages, batch) if self.args.shuffle_advantages else advantages
        return rolled

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Rolled out already, for all micro-batches of the update at once; a shallow copy, since the batch is used
        # again.
        self._step_sample_ids.extend(inputs["sample_id"])
        return dict(inputs)

    def _advantages(self, batches: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Returns `(B, K)` advantages per micro-batch, from the rewards of the whole rollout on all ranks."""
        own = torch.cat([batch["rewards"] for batch in batches])
        rewards = own
        if self.args.world_size > 1:
            rewards = self.accelerator.gather(own)
        if self.args.advantage == "running":
            advantages, metrics = self.running_advantage(rewards)
        else:
            advantages, metrics = group_advantages(rewards, scale=self.args.scale_rewards)
        # Mean and deviation of the raw rewards come from the reward table; under "normalize_then_sum" these are
        # others.
        self.record({name: value for name, value in metrics.items() if name == "frac_reward_zero_std"})
        start = self.args.process_index * len(own)
        advantages = advantages[start : start + len(own)].clamp(-self.args.advantage_clip, self.args.advantage_clip)
        return list(advantages.split([len(batch["rewards"]) for batch in batches]))

    def _shuffled(self, advantages: Tensor, batch: dict[str, Any]) -> Tensor:
        rows = []
        for row, sample_id in zip(advantages, batch["sample_id"], strict=True):
            source = stateless_generator(self.args.seed, "shuffle", self._rollout_index(), sample_id)
            rows.append(row[torch.randperm(len(row), generator=source).to(row.device)])
        return torch.stack(rows)

    def _reward(self, candidates: Tensor, cond: Condition, batch: dict[str, Any]) -> RewardTable:
        """Decodes candidates by the deployed path and rewards them, whole groups at a time."""
        size = self.args.num_generations
        groups_at_once = max(1, self.args.reward_batch_size // size)
        tables = []
        for start in range(0, len(cond), groups_at_once):
            part = slice(start, start + groups_at_once)
            some = cond.select(part).repeat(size)
            latents = candidates[start * size : (start + groups_at_once) * size]
            image = self.generator.postprocess(self.generator.decode(latents, some), some).clamp(0, 1)
            rows = {name: values[part] for name, values in batch.items() if name in ("hr_image", "lr_image")}
            rows |= {name: values[part] for name, values in batch.items() if isinstance(values, list)}
            tables.append(self.score(image, rows, group_size=size))
        return _joined(tables)

    def _policy(self, mean: Tensor, batch: Mapping[str, Any]) -> GaussianLatentPolicy:
        return self.generator.policy(
            mean,
            sigma=self.args.sigma,
            noise=self.args.noise,
            cell=self.args.noise_cell,
            direction=batch.get("noise_direction"),
        )

    def _noise_sources(self, batch: dict[str, Any]) -> list[torch.Generator]:
        return [
            stateless_generator(self.args.seed, "rollout", self._rollout_index(), sample_id, k)
            for sample_id in batch["sample_id"]
            for k in range(self.args.num_generations)
        ]

    def _rollout_index(self) -> int:
        return self.state.global_step // self.args.num_iterations

    def _updates_per_block(self) -> int:
        return self.args.num_iterations

    def _wants_reference(self, args: AlignmentConfig) -> bool:
        return super()._wants_reference(args) or (isinstance(args, SRDDPOConfig) and args.beta > 0)

    def _check_ready(self) -> None:
        super()._check_ready()
        if not self.reward_funcs:
            raise ConfigError("there is no reward to climb", where="reward_funcs", fix="name at least one reward")

    def _check_first_batch(self, model: nn.Module, batch: dict[str, Any]) -> None:
        with torch.no_grad():
            cond = self.condition(batch)
            again = self._reward(batch["candidates"], cond, batch).total.view_as(batch["rewards"])
            mean = self.generator.predict(batch["encoded"], cond, model=model)
            log_prob = self._policy(mean, batch).log_prob(batch["candidates"], self.args.log_prob_reduction)
        gathered = [batch["rewards"], again, log_prob, batch["old_log_prob"]]
        if self.args.world_size > 1:
            gathered = [self.accelerator.gather(tensor.contiguous()) for tensor in gathered]
        rewards, again, log_prob, old_log_prob = gathered
        self._check_direction(batch)
        check_spread(rewards, again)
        check_ratio(log_prob, old_log_prob)

    def _check_direction(self, batch: Mapping[str, Any]) -> None:
        """Residual noise along a correction of zero would train on rounding errors."""
        if "noise_direction" not in batch:
            return
        size, latent = batch["noise_direction"].float().square().mean().sqrt(), batch["encoded"].float().std()
        if self._any_rank(size < LEAST_CORRECTION * latent):
            raise ConfigError(
                "the generator adds next to nothing to the upsampled LR image, so there is nothing to explore along",
                where="noise: residual",
                fix="train the generator first (finetune), or set noise: lowfreq",
            )

    def _check_changes(self, folder: Path, step: int, changed: Mapping[str, tuple[Any, Any]]) -> None:
        iterations, _ = changed.get("num_iterations", (self.args.num_iterations, None))
        fixed = [name for name in ROLLOUT_SETTINGS if name in changed]
        if step % iterations and fixed:
            before, now = changed[fixed[0]]
            raise ConfigError(
                f"{folder.name} lies in the middle of a rollout, whose candidates were drawn with "
                f"{fixed[0]}: {before!r}, not {now!r}",
                where=fixed[0],
                fix="resume with the settings of the run that wrote it, or from a checkpoint between two rollouts",
            )
        super()._check_changes(folder, step, changed)

    def _write_extra_state(self, folder: Path) -> dict[str, Any]:
        state = super()._write_extra_state(folder)
        tensors, columns = {}, []
        for number, batch in enumerate(self._rollout_buffer):
            columns.append({name: value for name, value in batch.items() if not isinstance(value, Tensor)})
            tensors |= {
                f"{number}/{name}": value.contiguous() for name, value in batch.items() if isinstance(value, Tensor)
            }
        try:
            json.dumps(columns)
        except TypeError as error:
            raise CheckpointError(
                f"a column of the dataset cannot be kept with the rollout: {error}",
                where=f"step {self.state.global_step}",
                fix="drop the column, or make it text or numbers",
            ) from error
        safetensors.torch.save_file(tensors, folder / ROLLOUT_FILE.format(rank=self.args.process_index))
        return {**state, "rollout_columns": columns, "running_advantage": self.running_advantage.state_dict()}

    def _read_extra_state(self, folder: Path, state: dict[str, Any]) -> None:
        super()._read_extra_state(folder, state)
        path = folder / ROLLOUT_FILE.format(rank=self.args.process_index)
        try:
            tensors = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(path), fix=FIX) from error
        self._rollout_buffer = [dict(columns) for columns in state["rollout_columns"]]
        for key, tensor in tensors.items():
            number, _, name = key.partition("/")
            self._rollout_buffer[int(number)][name] = tensor.to(self.accelerator.device)
        self.running_advantage.load_state_dict(state["running_advantage"])


def _joined(tables: Sequence[RewardTable]) -> RewardTable:
    """Puts the tables of consecutive candidates together."""
    if len(tables) == 1:
        return tables[0]
    names = tables[0].per_reward
    return RewardTable(
        total=torch.cat([table.total for table in tables]),
        per_reward={name: torch.cat([table.per_reward[name] for table in tables]) for name in names},
        missing={name: sum(table.missing[name] for table in tables) for name in names},
        failed={name: sum(table.failed[name] for table in tables) for name in names},
        weighted_sum=torch.cat([table.weighted_sum for table in tables]),
        group_std={name: torch.cat([table.group_std[name] for table in tables]) for name in names},
    )
