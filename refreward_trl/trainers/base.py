"""The common base of the alignment trainers: one Trainer, three hooks.

`rollout(batch)` prepares a batch without gradient, `objective(model, batch)` computes the loss through the prepared
model, and `evaluate_batch(model, batch)` measures the deployed path. Everything else here is bookkeeping that every
method needs.
"""

from __future__ import annotations

import functools
import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from refreward_trl import callbacks as our_callbacks
from refreward_trl.data.collators import collate_pairs
from refreward_trl.errors import CheckpointError, ConfigError, DataError, RefRewardError, RewardError, SetupError
from refreward_trl.generators import load_generator
from refreward_trl.generators.base import Condition, Generator
from refreward_trl.generators.latent import LatentGenerator
from refreward_trl.generators.latent_cache import LatentCache
from refreward_trl.objectives.anchors import fidelity_anchor, lr_consistency_anchor, lr_drift_anchor, reference_anchor
from refreward_trl.randomness import stateless_generator, stateless_seed
from refreward_trl.resampling import downscale
from refreward_trl.rewards import load_reward
from refreward_trl.rewards.composite import MAX_NAMED_SAMPLES, RewardSpec, RewardTable, reward_names, score_all
from refreward_trl.rewards.fidelity import SSIM_WINDOW, image_psnr, image_ssim
from refreward_trl.trainers.alignment_config import AlignmentConfig
from refreward_trl.trainers.checkpoint_hooks import package_versions
from refreward_trl.trainers.ema import WeightAverage, WeightAverageCallback
from refreward_trl.trainers.ordering import BlockBatchSampler, MarkerAwareCollator, OncePerRollout
from refreward_trl.trainers.preemption import EvaluationStoppedError
from refreward_trl.trainers.recorder import MetricRecorder
from refreward_trl.trainers.resumable import ResumableTrainer
from refreward_trl.trainers.self_check import (
    DeepSpeedStepGuard,
    PreparedModelWatch,
    check_gradient,
    largest_gradient,
)
from refreward_trl.trainers.torch_files import FIX
from refreward_trl.types import LossOutput, Metrics, RewardFunction

if TYPE_CHECKING:
    from peft import LoraConfig

IMAGE_COLUMNS = ("lr_image", "hr_image")
REFERENCE_ANCHORS = ("reference", "reference_lr")
AVERAGE_FILE = "ema.safetensors"
GENERATOR_FOLDER = "generator"
FAILURE_WINDOW = 50
"""Updates over which failed calls of rewards are counted."""

RewardLike = RewardFunction | RewardSpec | str | Mapping[str, Any]


class AlignmentTrainer(ResumableTrainer, ABC):
    """Trains a one-step SR generator. Subclasses write `objective`, and where they need to the other two hooks.

    Promised to subclasses: the hooks `rollout`, `objective` and `evaluate_batch`; the services `reference()`,
    `record(metrics)`, `condition(batch)`, `score(images, batch)`, `anchor(image, batch)` and
    `add_reference(batch, z, cond)`; the
    attributes `generator`, `reward_funcs` and `heldout_rewards`; the constructor's keywords.

    Images arrive in every hook as float32 in [0, 1] on the device: `batch["lr_image"]` `(B, 3, h, w)` and, where the
    data has it, `batch["hr_image"]` `(B, 3, H, W)`. `batch["sample_id"]` and all other columns are lists.

    Args:
        model: A generator, or what `load_generator` takes: "default", a folder, or "package.module:attribute".
        reward_funcs: A reward or several: callables, names, recipe entries or `RewardSpec`. None where the method
            needs no reward.
        args: The configuration; the defaults of the method's config class when None.
        train_dataset: A map-style dataset with the columns `sample_id` and `lr_image`, mostly also `hr_image`.
        eval_dataset: The same with whole images, or a dict of them.
        peft_config: LoRA adapter to train. None trains the generator's own adapter if it has one, else all weights.
        callbacks: Further Trainer callbacks.
        reward_weights: One weight per reward, instead of those of the specs.
        heldout_rewards: Rewards that are only evaluated, never optimised; given like `reward_funcs`.
        data_collator: Makes a batch of rows; `collate_pairs` by default.
        optimizers: Optimizer and scheduler to use instead of those of the arguments.

    Raises:
        ConfigError: For settings that do not fit each other.
    """

    config_class: type[AlignmentConfig] = AlignmentConfig
    needs_reference = False
    """Set it in a subclass that calls `reference()`: full fine-tuning then keeps a frozen copy."""

    def __init__(
        self,
        model: Generator | str,
        reward_funcs: RewardLike | Sequence[RewardLike] | None = None,
        args: AlignmentConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        reward_weights: Sequence[float] | None = None,
        heldout_rewards: RewardLike | Sequence[RewardLike] | None = None,
        data_collator: Callable[[Sequence[Any]], Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = self.config_class() if args is None else args
        model_dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.generator = load_generator(model) if isinstance(model, str) else model
        self.generator.check_dtype(model_dtype)
        self.reward_funcs, self.reward_names, self.reward_weights = _read_rewards(reward_funcs, reward_weights)
        self.heldout_rewards, self.heldout_names, _ = _read_rewards(heldout_rewards, None)
        network = self._network_to_train(args, peft_config)
        _enable_activation_checkpointing(network, args)
        _cache_latents(self.generator, args)
        self._eval_recorder = MetricRecorder()
        self._failed_at: deque[int] = deque()
        self._evaluating = False
        super().__init__(
            model=network,
            args=args,
            data_collator=data_collator or collate_pairs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: AlignmentConfig = args
        # Each loss is a mean over its micro-batch, which the Trainer divides by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.generator.to(self.accelerator.device)
        self.average = WeightAverage(self.model, args.ema_decay) if args.ema_decay is not None else None
        self._add_own_callbacks()
        self._guard: DeepSpeedStepGuard | None = None
        self._first_update_checked = not args.self_check

    # The three hooks

    def rollout(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds to a batch what its loss needs but gets no gradient: references, candidates, rewards. Runs without
        gradient."""
        return batch

    @abstractmethod
    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        """Returns the loss of a batch, a mean over its samples, and metrics to log.

        Args:
            model: The prepared denoiser. Pass it on (`generator.predict(z, cond, model=model)`), never call
                `self.model`.
            batch: What `rollout` returned.
        """

    def evaluate_batch(self, model: nn.Module, batch: dict[str, Any]) -> Metrics:
        """Measures the deployed path on one evaluation batch; the means over the dataset are logged with the prefix
        `eval_`.

        Returns:
            `reward`, `rewards/<name>`, `heldout/<name>`, `lr_psnr` and, with HR images, `hr_psnr` and `ssim`.
        """
        image = self.generator.generate(batch["lr_image"], self._prompts(batch), model=model)
        metrics = _fidelity(image, batch, self.generator.scale)
        if self.reward_funcs:
            table = self.score(image, batch)
            metrics["reward"] = float(table.weighted_sum.nanmean())
            metrics |= {f"rewards/{name}": float(values.nanmean()) for name, values in table.per_reward.items()}
        if self.heldout_rewards:
            table = self._score(self.heldout_rewards, self.heldout_names, None, image, batch, group_size=1)
            metrics |= {f"heldout/{name}": float(values.nanmean()) for name, values in table.per_reward.items()}
        return metrics

    # Services

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `generator.predict` is the frozen policy: the adapter is off, or the frozen copy stands in."""
        return self.generator.reference()

    def record(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Adds metrics to the next log line: their mean over steps and ranks, with the prefix `eval_` during
        evaluation."""
        (self._eval_recorder if self._evaluating else self._recorder).record(metrics)

    def score(self, images: Tensor, batch: Mapping[str, Any], *, group_size: int = 1) -> RewardTable:
        """Scores images with the training rewards; the graph is kept where a reward has one.

        Args:
            images: `(B * group_size, 3, H, W)` in [0, 1]; the candidates of an LR image lie together.
            batch: The batch of the B LR images.
            group_size: Candidates per LR image.

        Raises:
            RewardError: What a reward did wrong, on all ranks, naming it.
        """
        return self._score(self.reward_funcs, self.reward_names, self.reward_weights, images, batch, group_size)

    def anchor(self, image: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Returns the weighted fidelity anchor of `image` `(B, 3, H, W)`, with its graph, and records `anchor`; 0
        without an anchor.

        The anchors "reference" and "reference_lr" need `batch["reference_image"]`, which `add_reference` puts there
        during the rollout.
        """
        if not self.args.anchored:
            return image.new_zeros(())
        if self.args.anchor == "reference":
            distance = reference_anchor(image, batch["reference_image"])
        elif self.args.anchor == "reference_lr":
            distance = lr_drift_anchor(image, batch["reference_image"], batch["lr_image"])
        elif self.args.anchor == "hr":
            distance = fidelity_anchor(image, _required_hr(batch))
        else:
            distance = lr_consistency_anchor(image, batch["lr_image"])
        self.record({"anchor": distance})
        return self.args.anchor_weight * distance

    def condition(self, batch: Mapping[str, Any]) -> Condition:
        """Returns what conditions the prediction: LR images, and the column `prompt` for generators that read text."""
        return self.generator.prepare(batch["lr_image"], self._prompts(batch))

    def add_reference(self, batch: dict[str, Any], z: Tensor, cond: Condition) -> None:
        """Puts the frozen policy's latent and clamped image into the batch, if the configuration needs them."""
        if not self._wants_reference(self.args):
            return
        with eval_mode(self.model_wrapped):
            batch["reference_mean"] = self.generator.reference_mean(z, cond, model=self.model_wrapped)
        if self.args.anchored and self.args.anchor in REFERENCE_ANCHORS:
            image = self.generator.decode(batch["reference_mean"], cond)
            batch["reference_image"] = self.generator.postprocess(image, cond).clamp(0, 1)

    def summary(self) -> dict[str, Any]:
        """Returns what the run did, as JSON: steps, images, the evaluated numbers before and after, time and versions.

        "Before" is the evaluation at step 0 (`eval_on_start`), "after" that of the weights that were kept at the end;
        None where there was none. `images` counts LR images with repetition, once per rollout.
        """
        before = self._evaluation_at(0) or {}
        best = self.args.load_best_model_at_end and self.state.best_global_step
        after = self._evaluation_at(best or self.state.global_step) or {}
        summary: dict[str, Any] = {"steps": self.state.global_step, "images": self._images_seen()}
        for name in ("reward", "lr_psnr", "hr_psnr"):
            summary[f"{name}_before"] = before.get(f"eval_{name}")
            summary[f"{name}_after"] = after.get(f"eval_{name}")
        for when, numbers in (("before", before), ("after", after)):
            summary[f"heldout_{when}"] = {name: numbers.get(f"eval_heldout/{name}") for name in self.heldout_names}
        return {**summary, "seconds": self._seconds, "seed": self.args.seed, "versions": package_versions()}

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Trains, from the checkpoint that `args.resume` (or `resume_from_checkpoint`, if given) chooses.

        Afterwards the policy lies in `output_dir/generator` (averaged weights if there is an average, the best
        checkpoint's with `load_best_model_at_end`), unless `save_strategy` is "no", and has been evaluated if there is
        an `eval_dataset`.
        """
        self._check_ready()
        with self._naming_lost_ranks():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            if self.args.eval_strategy != "no" and self.eval_dataset is not None and self._finished_unevaluated():
                self.evaluate()
            if self.args.save_strategy != "no":
                self.save_model(str(self._run_folder / GENERATOR_FOLDER))
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the policy as a generator folder that `load_generator` and stock diffusers open; on all ranks.

        Args:
            output_dir: The folder, `args.output_dir` by default.
            _internal_call: Set by the Trainer: writes the changing weights of a checkpoint instead.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        with self.averaged_weights():
            weights = None if not self.is_deepspeed_enabled else self.accelerator.get_state_dict(self.model_wrapped)
            if self.args.should_save:
                self._save_policy(Path(output_dir or self._run_folder), weights)
        self.accelerator.wait_for_everyone()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that are evaluated and saved: the average, if there is one."""
        return nullcontext() if self.average is None else self.average.swapped_in()

    def get_train_dataloader(self) -> DataLoader:
        """Returns this rank's micro-batches, in an order that depends on seed and epoch only."""
        try:
            num_samples = len(self.train_dataset)
        except TypeError as error:
            raise ConfigError(
                "the training dataset has no length: order and resume need a map-style dataset",
                where="train_dataset",
                fix="use a dataset with __len__ and __getitem__",
            ) from error
        if num_samples == 0:
            raise DataError("the training dataset is empty", where="train_dataset")
        return DataLoader(
            OncePerRollout(self.train_dataset),
            batch_sampler=self._batch_sampler(num_samples),
            collate_fn=MarkerAwareCollator(self.data_collator),
            **self._loader_settings("train"),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Returns this rank's share of the evaluation images, one at a time, since whole photos differ in size."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ConfigError("there is nothing to evaluate on", where="eval_dataset", fix="pass an eval_dataset")
        world_size, rank = self.args.world_size, self.args.process_index
        # Every rank makes the same number of forward passes, which sharded parameters need; the surplus is dropped
        # again.
        rounds = math.ceil(len(dataset) / world_size)
        own = [(turn * world_size + rank) % len(dataset) for turn in range(rounds)]
        return DataLoader(
            dataset, batch_size=1, sampler=own, collate_fn=self.data_collator, **self._loader_settings("eval")
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Runs `evaluate_batch` on every image with the averaged weights, and averages over images and ranks."""
        dataset: Any = dataloader.dataset
        dataset_size = len(dataset)
        self.callback_handler.eval_dataloader = dataloader
        rows: list[Metrics] = []
        self._evaluating = True
        try:
            with torch.no_grad(), self.averaged_weights(), eval_mode(self.model_wrapped):
                for batch in dataloader:
                    self._stop_evaluation_if_asked()
                    rows.append(self.evaluate_batch(self.model_wrapped, self._images_to_float(batch)))
                    self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        except EvaluationStoppedError:
            self._eval_recorder.flush(self._gather)
            raise
        finally:
            self._evaluating = False
        means = _mean_rows(_interleaved(self._gather(rows), len(rows), dataset_size))
        means |= self._eval_recorder.flush(self._gather)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        nothing: Any = None
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=metrics, num_samples=dataset_size)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the objective's loss, after making sure on all ranks that it is a number."""
        self._check_prepared(model)
        first = not self._first_update_checked
        watch = PreparedModelWatch(model) if first and model is not self.model else None
        if first:
            self._check_first_batch(model, inputs)
        output = self.objective(model, inputs)
        if watch is not None:
            watch.finish()
        self._require_finite("loss", output.loss, inputs.get("sample_id", []))
        self.record({**output.metrics, "loss": output.loss})
        return (output.loss, output) if return_outputs else output.loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: rollout, loss, backward. The first update's gradient is checked before the optimizer sees
        it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if not self._first_update_checked and self._guard is None:
                self._check_first_gradient(largest_gradient(self.generator_parameters()))
            self._first_update_checked = True
        return loss

    def generator_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # Inside

    def _prompts(self, batch: Mapping[str, Any]) -> Sequence[str] | None:
        return batch.get("prompt") if self.generator.takes_prompts else None

    def _network_to_train(self, args: AlignmentConfig, peft_config: LoraConfig | None) -> nn.Module:
        """Freezes and unfreezes the generator's parts and returns the module that the Trainer prepares."""
        if peft_config is not None:
            with torch.random.fork_rng():
                # The adapter's start must not depend on what ran before.
                torch.manual_seed(stateless_seed(args.seed, "adapter"))
                self.generator.add_policy_adapter(peft_config)
        elif not self.generator.has_policy_adapter:
            self.generator.denoiser.requires_grad_(True)
            if self._wants_reference(args):
                self.generator.freeze_reference()
        return self.generator.denoiser

    def _wants_reference(self, args: AlignmentConfig) -> bool:
        return self.needs_reference or (args.anchored and args.anchor in REFERENCE_ANCHORS)

    def _updates_per_block(self) -> int:
        """How many updates one block of samples is used for."""
        return 1

    def _check_first_batch(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Checks of the method before the first loss; runs on all ranks."""

    def _expects_gradient(self) -> bool:
        """Whether a first gradient of zero is a mistake."""
        return True

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = self._images_to_float(inputs)
        self._step_sample_ids.extend(batch.get("sample_id", []))
        with torch.no_grad():
            return self.rollout(batch)

    def _images_to_float(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Moves a batch to the device and makes its images float32 in [0, 1], whatever dtype DeepSpeed computes in."""
        moved: Any = self._prepare_input(batch)  # pyright: ignore[reportArgumentType] (it takes mappings too)
        batch = dict(moved)
        for name in IMAGE_COLUMNS:
            images = batch.get(name)
            if isinstance(images, list):
                raise DataError(
                    f"the images of a batch have different sizes: {[tuple(image.shape[-2:]) for image in images]}",
                    where=f"column {name!r}",
                    fix="set crop_size, or use a batch size of 1",
                )
            if isinstance(images, Tensor) and images.dtype == torch.uint8:
                batch[name] = images.float() / 255
        return batch

    def _score(
        self,
        funcs: Sequence[RewardFunction],
        names: Sequence[str],
        weights: Sequence[float] | None,
        images: Tensor,
        batch: Mapping[str, Any],
        group_size: int,
    ) -> RewardTable:
        columns = {
            name: _repeated(values, group_size)
            for name, values in batch.items()
            if name in ("hr_image", "lr_image") or isinstance(values, list)
        }
        error: RefRewardError | None = None
        try:
            table = score_all(
                funcs,
                names,
                weights,
                completions=images,
                lr_image=columns.pop("lr_image"),
                columns=columns,
                group_size=group_size,
                aggregation="sum_then_normalize" if group_size == 1 else self.args.reward_aggregation,
                trainer_state=self.state,
                log_metric=lambda name, value: self.record({name: value}),
                timeout=self.args.reward_timeout,
                on_bad=self.args.on_bad_reward,
                on_stuck=None if self.args.world_size == 1 else functools.partial(self._end_stuck, batch),
            )
            self._count_failures(table)
            return table
        except RefRewardError as caught:
            error = caught
            error.where = self._place_of(error, batch)
            raise
        finally:
            self._raise_together(error)

    def _place_of(self, error: RefRewardError, batch: Mapping[str, Any]) -> str:
        step = self.state.global_step
        when = f"evaluation after step {step}" if self._evaluating else f"step {step + 1}"
        return f"{when}, {_named_samples(batch)}: {error.where or 'rewards'}"

    def _end_stuck(self, batch: Mapping[str, Any], name: str) -> None:
        """Ends this process, for which the other ranks would wait. Called from another thread."""
        error = RewardError(
            f"did not return within {self.args.reward_timeout:g} seconds, and cannot be interrupted",
            where=f"reward {name!r}",
            fix="see what it waits for, or raise reward_timeout; a run goes on from its newest checkpoint",
        )
        error.where = self._place_of(error, batch)
        os.write(2, f"[rank {self.args.process_index}] error: {error}\n".encode())
        os._exit(error.exit_code)

    def _count_failures(self, table: RewardTable) -> None:
        """Failed calls are left out, but not for ever."""
        step = self.state.global_step
        self._failed_at.extend([step] * sum(count > 0 for count in table.failed.values()))
        while self._failed_at and self._failed_at[0] <= step - FAILURE_WINDOW:
            self._failed_at.popleft()
        if len(self._failed_at) > self.args.max_failed_rewards:
            raise RewardError(
                f"{len(self._failed_at)} calls failed in the last {FAILURE_WINDOW} updates; "
                f"max_failed_rewards allows {self.args.max_failed_rewards}",
                where="rewards",
                fix="see the warnings above; a run goes on from its newest checkpoint",
            )

    def _raise_together(self, own: RefRewardError | None) -> None:
        """Stops all ranks when one has an error, so that none waits for another that is gone; the first reports it."""
        if self.args.world_size == 1:
            return
        errors = self._gather([None if own is None else (type(own), own.what, own.where, own.fix)])
        first = next((rank for rank, error in enumerate(errors) if error is not None), None)
        if first is None:
            return
        kind, what, where, fix = errors[first]
        error: RefRewardError = own or kind(f"rank {first} stopped: {what}", where=where, fix=fix)
        error.reported_by = None if first == self.args.process_index else first
        raise error

    def _check_prepared(self, model: nn.Module) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if distributed else 1
        if world_size > 1 and model is self.model:
            raise SetupError(
                f"{world_size} processes run, but the model is not wrapped: their weights would drift apart silently",
                where="launch",
                fix="on CPUs set use_cpu: true and ddp_backend: gloo in the configuration",
            )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self._guard is None:
            self._guard = DeepSpeedStepGuard(model, self.generator_parameters(), self._check_deepspeed_gradient)

    def _check_deepspeed_gradient(self, largest: Tensor) -> None:
        if not self._first_update_checked:
            self._check_first_gradient(largest)
        self._require_finite_gradient(largest)

    def _check_first_gradient(self, largest: Tensor) -> None:
        if self._expects_gradient():
            check_gradient(max(self._gather([float(largest)])))

    def _check_ready(self) -> None:
        """Finds settings that cannot work before anything is loaded or written."""
        if self.args.anchored and self.args.anchor == "hr" and self.train_dataset is not None:
            _required_hr(self.train_dataset[0])

    def _batch_sampler(self, num_samples: int) -> BlockBatchSampler:
        return BlockBatchSampler(
            num_samples,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            repeats=self._updates_per_block(),
            shuffle=self.args.train_sampling_strategy != "sequential",
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda updates_per_epoch: self.state.global_step // updates_per_epoch,
        )

    def _loader_settings(self, purpose: str) -> dict[str, Any]:
        return {
            # A generator of its own: DataLoader draws its workers' seed from the global one otherwise.
            "generator": stateless_generator(self.args.seed, "workers", purpose),
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "persistent_workers": self.args.dataloader_persistent_workers,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }

    def _add_own_callbacks(self) -> None:
        if self.average is not None:
            self.add_callback(WeightAverageCallback(self.average))
        if self.args.log_image_steps > 0 and self.eval_dataset is not None:
            self.add_callback(our_callbacks.ImageGridCallback(self))
        if self.args.hacking_patience > 0:
            self.add_callback(our_callbacks.HackingAlarm())

    def _save_policy(self, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        self.generator.save_pretrained(folder, state_dict=weights)

    def _write_extra_state(self, folder: Path) -> dict[str, Any]:
        if self.average is not None and self.args.should_save:
            safetensors.torch.save_file(self.average.state_dict(), folder / AVERAGE_FILE)
        return super()._write_extra_state(folder)

    def _read_further_weights(self, folder: Path) -> None:
        if self.average is None:
            return
        path = folder / AVERAGE_FILE
        if not path.is_file():
            raise ConfigError(
                f"{folder.name} holds no averaged weights, but ema_decay is {self.args.ema_decay}",
                where="ema_decay",
                fix="resume with the settings of the run that wrote it",
            )
        try:
            weights = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(path), fix=FIX) from error
        self.average.load_state_dict(weights, where=str(path))

    def _read_extra_state(self, folder: Path, state: dict[str, Any]) -> None:
        super()._read_extra_state(folder, state)
        # The checks belong to the first update of a run.
        self._first_update_checked = True

    def _finished_unevaluated(self) -> bool:
        finished = self.state.global_step >= self.state.max_steps
        best = self.args.load_best_model_at_end and self.state.best_global_step
        return finished and self._evaluation_at(best or self.state.global_step) is None

    def _evaluation_at(self, step: int) -> dict[str, float] | None:
        found = [
            line
            for line in self.state.log_history
            if line["step"] == step and any(name.startswith("eval_") for name in line)
        ]
        return found[-1] if found else None

    def _images_seen(self) -> int:
        updates = self.state.global_step / self._updates_per_block()
        return round(updates * self.get_total_train_batch_size(self.args))


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode: rollouts and evaluations see no dropout. Its mode comes back whatever
    happens."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _read_rewards(
    rewards: RewardLike | Sequence[RewardLike] | None, weights: Sequence[float] | None
) -> tuple[list[RewardFunction], list[str], list[float]]:
    """Returns callables, their names in metrics, and their weights."""
    if rewards is None:
        return [], [], []
    entries: list[Any] = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    funcs, own_weights = [], []
    for entry in entries:
        spec = None if callable(entry) else RewardSpec.from_entry(entry)
        funcs.append(entry if spec is None else load_reward(spec))
        own_weights.append(1.0 if spec is None else spec.weight)
    if weights is not None and len(weights) != len(funcs):
        raise ConfigError(
            f"{len(weights)} weights for {len(funcs)} rewards", where="reward_weights", fix="give one per reward"
        )
    return funcs, reward_names(funcs), own_weights if weights is None else [float(weight) for weight in weights]


def _cache_latents(generator: Generator, args: AlignmentConfig) -> None:
    """Keeps latents of LR images, if the run wants that."""
    if not args.cache_lr_latents:
        return
    if not isinstance(generator, LatentGenerator):
        raise ConfigError(
            f"a {type(generator).__name__} has no VAE", where="cache_lr_latents", fix="set it to 0, its default"
        )
    generator.latent_cache = LatentCache(args.cache_lr_latents * 2**20)


def _enable_activation_checkpointing(network: nn.Module, args: AlignmentConfig) -> None:
    """Gives a diffusers module the method that the Trainer calls on transformers models."""
    if not args.activation_checkpointing:
        return
    from diffusers import ModelMixin

    if not isinstance(network, ModelMixin):
        raise ConfigError(
            f"a {type(network).__name__} does not know activation checkpointing",
            where="activation_checkpointing",
            fix="set it to false, or checkpoint inside the module's forward",
        )
    enable: Any = lambda **options: network.enable_gradient_checkpointing()  # noqa: E731
    network.activation_checkpointing_enable = enable


def _named_samples(batch: Mapping[str, Any]) -> str:
    names = [str(name) for name in batch.get("sample_id", [])]
    more = f" and {len(names) - MAX_NAMED_SAMPLES} more" if len(names) > MAX_NAMED_SAMPLES else ""
    return f"samples {', '.join(names[:MAX_NAMED_SAMPLES])}{more}"


def _required_hr(batch: Mapping[str, Any]) -> Any:
    if "hr_image" not in batch:
        raise ConfigError(
            "there are no HR images to hold the SR image to",
            where="anchor",
            fix="use anchor: reference or lr_consistency, or a dataset with hr_image",
        )
    return batch["hr_image"]


def _fidelity(image: Tensor, batch: Mapping[str, Any], scale: int) -> Metrics:
    metrics = {"lr_psnr": float(image_psnr(downscale(image, scale), batch["lr_image"]).mean())}
    if "hr_image" in batch:
        metrics["hr_psnr"] = float(image_psnr(image, batch["hr_image"]).mean())
        if min(image.shape[-2:]) >= SSIM_WINDOW:
            metrics["ssim"] = float(image_ssim(image, batch["hr_image"]).mean())
    return metrics


def _repeated(values: Any, count: int) -> Any:
    if count == 1:
        return values
    if isinstance(values, Tensor):
        return values.repeat_interleave(count, 0)
    return [value for value in values for _ in range(count)]


def _interleaved(rows: Sequence[Metrics], per_rank: int, count: int) -> list[Metrics]:
    """Puts the rows of all ranks back into the dataset's order and drops the surplus of the last round."""
    ranks = len(rows) // per_rank if per_rank else 0
    return [rows[rank * per_rank + turn] for turn in range(per_rank) for rank in range(ranks)][:count]


def _mean_rows(rows: Sequence[Metrics]) -> Metrics:
    """Averages each metric over the rows that define it; NaN if none does."""
    means: Metrics = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        defined = [row[name] for row in rows if name in row and not math.isnan(row[name])]
        means[name] = sum(defined) / len(defined) if defined else math.nan
    return means
