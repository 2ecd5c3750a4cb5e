"""Training a judge from preference groups: the K candidates of one LR image and which of them is better."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from refreward_trl.data.images import to_float
from refreward_trl.errors import CheckpointError, SetupError
from refreward_trl.objectives.preference import centering_penalty, fidelity_loss, listwise_loss, pairwise_loss
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.preprocess import split_tiles
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.vision_attention import batched_vision_attention
from refreward_trl.trainers.distillation import Teachers
from refreward_trl.trainers.judge_adapter import has_adapter, save_adapted
from refreward_trl.trainers.judge_setup import asked_aspect, choose_weights, open_judge
from refreward_trl.trainers.ref_reward_batches import (
    GroupBatch,
    augment_groups,
    collate_groups,
    ends_of_order,
    flat_pairs,
    labelled_pairs,
    one_group,
    ranks_from_pairs,
)
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.resumable import ResumableTrainer
from refreward_trl.trainers.self_check import DeepSpeedStepGuard
from refreward_trl.types import LossOutput

if TYPE_CHECKING:
    from peft import PeftConfig


class PreferenceModel(nn.Module):
    """The module that is trained: a judge's network together with the temperature of its preferences.

    Both take part in `forward`, so that every way of wrapping it synchronises both gradients.

    Args:
        judge: The judge whose network is trained in place.
        temperature: Its start, above 0.
        learn_temperature: Whether it is trained.
        aspect: What a judge that is asked per aspect is asked for; None for all of them.
    """

    def __init__(
        self,
        judge: RateJudge | ConvJudge,
        *,
        temperature: float,
        learn_temperature: bool,
        aspect: str | None = None,
    ) -> None:
        super().__init__()
        self._aspect = aspect
        self.network: nn.Module = judge if isinstance(judge, ConvJudge) else judge.model
        # In a tuple, because a ConvJudge is a module and would be registered twice.
        self._judge = (judge,)
        # One element and not a scalar: DeepSpeed cannot broadcast a tensor without dimensions.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]), requires_grad=learn_temperature)

    def forward(
        self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, ""]]:
        """Returns one score per image and the temperature."""
        judge = self._judge[0]
        if isinstance(judge, RateJudge):
            lr_tiles, sr_tiles, count = split_tiles(lr_image, sr_image, judge.spec, square=judge.family.square)
            ratings = judge.expected_rating(lr_tiles, sr_tiles, aspect=self._aspect, model=self.network)
            scores = ratings.view(-1, count).mean(dim=1)
        else:
            scores = self.network(lr_image, sr_image)
        return scores.float(), self.log_temperature.float().exp().squeeze()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Called by the Trainer for `activation_checkpointing: true`.

        Raises:
            SetupError: The network is a `ConvJudge`, which has no checkpoints.
        """
        judge = self._judge[0]
        if isinstance(judge, ConvJudge):
            raise SetupError(
                "a ConvJudge has no activation checkpointing",
                where="activation_checkpointing",
                fix="leave it false: the network is small",
            )
        judge.model.activation_checkpointing_enable(**options)


class RefRewardTrainer(ResumableTrainer):
    """Trains a judge so that its scores order the candidates of an LR image as the preferences do.

    Rows of a dataset are preference groups: `sample_id`, `lr_image` uint8 `(3, h, w)`, `candidates` uint8
    `(K, 3, H, W)`, `better_worse` index pairs `(P, 2)`, `kinds` K names, and optionally `weights` and `margins`
    `(P,)`, `ties` `(T, 2)` and `tie_weights` `(T,)`. The candidates of one batch have one size; the judge sees them
    tile by tile.

    `save_model` writes a judge folder (`load_judge` and stock transformers open it); checkpoints hold the trainer's
    own state, temperature included.

    Args:
        model: The judge to train in place, or what `RefRewardConfig.judge` names; None takes `args.judge`.
        args: The configuration.
        train_dataset: Groups to train on.
        eval_dataset: Groups to evaluate on.
        peft_config: Trains an adapter instead of all weights; None does so if `args.use_peft`, with its LoRA settings.
        callbacks: As in `transformers.Trainer`.

    With `RefRewardConfig.teachers` the judge learns the scores of trained ones as well; see `Teachers`.

    Raises:
        SetupError: Several GPUs without a launcher, or a teacher whose scores do not differ.
    """

    args: RefRewardConfig

    def __init__(
        self,
        model: RateJudge | ConvJudge | str | None = None,
        args: RefRewardConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = args or RefRewardConfig()
        if args.n_gpu > 1:
            raise SetupError(
                f"one process sees {args.n_gpu} GPUs",
                where="launch",
                fix="use `accelerate launch`, or show the process one GPU (CUDA_VISIBLE_DEVICES=0)",
            )
        self.judge = open_judge(args.judge if model is None else model, seed=args.seed, args=args)
        choose_weights(self.judge, args, peft_config)
        self.preference_model = PreferenceModel(
            self.judge,
            temperature=args.temperature,
            learn_temperature=args.learn_temperature,
            aspect=asked_aspect(self.judge, args.aspect),
        )
        super().__init__(
            model=self.preference_model,
            args=args,
            data_collator=cast(Any, collate_groups),  # a TypedDict is not a dict to type checkers
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.teachers = self._open_teachers(args, train_dataset)
        self._guard: DeepSpeedStepGuard | None = None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Trains, from the checkpoint that `args.resume` (or `resume_from_checkpoint`, if given) chooses."""
        with self._fast_attention():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.preference_model.eval()
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: GroupBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Scores all candidates with the prepared module and compares them inside their groups.

        Raises:
            TrainingError: A score or the loss is not finite on any rank; nothing has been stepped.
            SetupError: Several processes, but the module is not wrapped, so that gradients would not be synchronised.
        """
        if model.training:
            self._refuse_unwrapped(model)
            self._guard_steps(model)
            self._step_sample_ids.extend(inputs["sample_id"])
            inputs = self._augmented(inputs)
        scores, temperature = score_groups(model, inputs)
        output = self._objective(scores, temperature, inputs)
        if model.training and self.teachers is not None:
            distance = self.teachers.loss(scores, inputs)
            output.loss = output.loss + self.args.distillation_weight * distance
            output.metrics["distillation_loss"] = distance.detach()
        self._require_finite("score or loss", torch.stack([output.loss, scores.sum()]), inputs["sample_id"])
        if model.training:
            self._recorder.record(output.metrics | {"loss": output.loss, "temperature": temperature})
        return (output.loss, {"scores": scores}) if return_outputs else output.loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates group by group: see `summarize_groups` for the metrics."""
        model = cast(nn.Module, self.model_wrapped)
        model.eval()
        results: list[dict[str, Any]] = []
        with self._fast_attention(), torch.no_grad():
            for batch in dataloader:
                self._stop_evaluation_if_asked()
                inputs = cast(GroupBatch, self._prepare_inputs(batch))
                scores, temperature = score_groups(model, inputs)
                rows = [self._evaluate_group(scores, temperature, inputs, index) for index in range(len(scores))]
                results.extend(self.accelerator.gather_for_metrics(rows, use_gather_object=True))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summarize_groups(results).items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(results))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Keeps weight decay away from the temperature: it would pull it towards 1."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("log_temperature")]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a judge folder; inside of checkpoints, where the Trainer calls it itself, the module's state."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        # On all ranks, because ZeRO-3 gathers here.
        state = cast(dict[str, Tensor], self.accelerator.get_state_dict(cast(nn.Module, self.model_wrapped)))
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            prefix = "network."
            weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if isinstance(self.judge, RateJudge) and has_adapter(self.judge):
                save_adapted(self.judge, folder, weights)
            else:
                self.judge.save_pretrained(folder, state_dict=weights)

    def _open_teachers(self, args: RefRewardConfig, groups: Dataset | None) -> Teachers | None:
        if not args.teachers:
            return None
        if groups is None:
            raise SetupError("teachers need training groups", where="train_dataset", fix="pass a train_dataset")
        try:
            judges = [open_judge(source, seed=args.seed) for source in args.teachers]
        except CheckpointError as error:
            raise CheckpointError(
                f"a teacher cannot be read: {error.where}: {error.what}",
                where="teachers",
                fix="train it first (recipes/tiny/teacher_rm.yaml and unpainted_rm.yaml write those of tiny/rm), or "
                "set teachers and teacher_weights to null",
            ) from error
        return Teachers(judges, groups, weights=args.teacher_weights, student=self.judge, device=args.device)

    def _fast_attention(self) -> Any:
        network = self.judge.model if isinstance(self.judge, RateJudge) else None
        return batched_vision_attention(network)

    def _augmented(self, inputs: GroupBatch) -> GroupBatch:
        if not self.args.augment:
            return inputs
        lr_image, candidates = augment_groups(
            inputs["lr_image"],
            inputs["candidates"],
            sample_ids=inputs["sample_id"],
            seed=self.args.seed,
            epoch=int(self.state.epoch or 0),
        )
        return cast(GroupBatch, {**inputs, "lr_image": lr_image, "candidates": candidates})

    def _objective(self, scores: Tensor, temperature: Tensor, inputs: GroupBatch) -> LossOutput:
        pairs, candidates = inputs["better_worse"], scores.shape[1]
        scores = scores.masked_fill(~inputs["present"], math.nan)
        if self.args.loss_type == "listwise":
            ranks = ranks_from_pairs(pairs, candidates, sample_ids=inputs["sample_id"])
            output = listwise_loss(scores, ranks, temperature=temperature)
        else:
            labels = labelled_pairs(inputs, candidates)
            facts: dict[str, Any] = {"targets": labels.targets, "weights": labels.weights, "temperature": temperature}
            if self.args.loss_type == "fidelity":
                output = fidelity_loss(scores, labels.pairs, **facts)
            else:
                output = pairwise_loss(scores, labels.pairs, margins=labels.margins, **facts)
        if self.args.center_rewards_coefficient > 0:
            output.loss = output.loss + self.args.center_rewards_coefficient * self._centering(scores, pairs)
        return output

    def _centering(self, scores: Tensor, pairs: Tensor) -> Tensor:
        if isinstance(self.judge, ConvJudge):  # no bounds that the ends could be pulled to
            return centering_penalty(scores)
        low, high = self.judge.spec.rating_range
        best, worst = ends_of_order(pairs, scores.shape[1])
        if len(best) == 0:  # nothing but ties
            return scores.new_zeros(())
        flat = scores.flatten()
        return (flat[best] - high).square().mean() + (flat[worst] - low).square().mean()

    def _evaluate_group(self, scores: Tensor, temperature: Tensor, inputs: GroupBatch, index: int) -> dict[str, Any]:
        row = one_group(inputs, index)
        output = self._objective(scores[index : index + 1], temperature, row)
        outcomes: dict[str, list[float]] = defaultdict(list)
        values = scores[index].tolist()
        for better, worse in flat_pairs(row["better_worse"], len(values)).tolist():
            margin = values[better] - values[worse]
            outcomes[row["kinds"][0][worse]].append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
        return {"loss": float(output.loss), "outcomes": dict(outcomes), **output.scalar_metrics()}

    def _guard_steps(self, model: nn.Module) -> None:
        """Looks at the gradients before DeepSpeed steps, which it does inside backward."""
        if self.is_deepspeed_enabled and self._guard is None:
            trained = [parameter for parameter in self.preference_model.parameters() if parameter.requires_grad]
            self._guard = DeepSpeedStepGuard(model, trained, self._require_finite_gradient)

    def _refuse_unwrapped(self, model: nn.Module) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1 and model is self.preference_model:
            raise SetupError(
                "there are several processes, but the judge is not wrapped: gradients would not be synchronised",
                where="launch",
                fix="on CPUs set use_cpu: true; see the launch table in the README",
            )


def score_groups(model: nn.Module, inputs: GroupBatch) -> tuple[Float[Tensor, "g k"], Float[Tensor, ""]]:
    """Scores the candidates of all groups in one forward of `model`, a (wrapped) `PreferenceModel`."""
    candidates = inputs["candidates"]
    groups, count = candidates.shape[:2]
    lr_image = to_float(inputs["lr_image"]).repeat_interleave(count, dim=0)
    scores, temperature = model(lr_image, to_float(candidates.flatten(0, 1)))
    return scores.view(groups, count), temperature


def summarize_groups(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Averages what `RefRewardTrainer` found for single groups; accuracies are over pairs.

    Returns:
        `loss`, `margin`, `mean_reward` (means over groups), `accuracy`, and `accuracy/<kind>` of the worse candidate.
    """
    outcomes: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for kind, values in result["outcomes"].items():
            outcomes[kind].extend(values)
    summary = {name: _mean([result[name] for result in results]) for name in ("loss", "margin", "mean_reward")}
    summary["accuracy"] = _mean([value for values in outcomes.values() for value in values])
    return summary | {f"accuracy/{kind}": _mean(values) for kind, values in sorted(outcomes.items())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
