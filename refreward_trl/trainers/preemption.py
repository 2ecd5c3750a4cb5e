"""Polite stops: a signal is noted, all ranks agree on it after the step, the run is saved, the exit code says so.

Schedulers send SIGTERM (or SIGUSR2, where asked to) some seconds before they kill; a person sends SIGINT. None of them
may interrupt a step or a save, so that a handler only sets a flag. Evaluations can take longer than the scheduler
waits: they are broken off, and made up for when the run goes on.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refreward_trl.errors import Preempted
from refreward_trl.signals import StopRequest

STOPPED_FILE = "stopped.json"
"""In the folder of a run that a signal stopped, until it goes on: launchers report every end but success as 1."""


class EvaluationStoppedError(Exception):
    """An evaluation was broken off because the run has to stop."""


class PreemptibleTrainer(Trainer):
    """A Trainer that stops at the next step after a signal on any rank, with a checkpoint and `Preempted`.

    A subclass keeps `_evaluation_due` with its checkpoints and calls `_stop_evaluation_if_asked` between the rows of
    its evaluations.
    """

    args: Any
    state: Any
    accelerator: Any
    callback_handler: Any
    model_wrapped: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._request: StopRequest | None = None
        self._stopped_by = 0
        self._evaluation_due = False
        super().__init__(*arguments, **keywords)
        self.add_callback(_StopAtStepEnd(self))

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """Trains, and raises `Preempted` once a run that a signal asked to stop is saved."""
        self._stopped_by = 0
        self._mark_stopped(False)
        with StopRequest() as self._request:
            try:
                output = super().train(*arguments, **keywords)
            except EvaluationStoppedError:  # that before the first step: there is nothing to save
                output = None
            finally:
                self._request = None
        if self._stopped_by:
            raise self._preempted()
        return output

    def _mark_stopped(self, stopped: bool) -> None:
        if not self.args.should_save:
            return
        path = Path(self.args.output_dir) / STOPPED_FILE
        if stopped:
            facts = {"signal": signal.Signals(self._stopped_by).name, "step": self.state.global_step}
            path.write_text(json.dumps(facts), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)

    def _asked_to_stop(self) -> bool:
        """Whether a signal has come on any rank; a collective call."""
        if self._request is None:
            return False
        number = self._request.signal
        if self.args.world_size > 1:
            own = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(own).max())
        self._stopped_by = self._stopped_by or number
        return bool(self._stopped_by)

    def _stop_evaluation_if_asked(self) -> None:
        """Breaks an evaluation off between two rows; on all ranks."""
        if self._asked_to_stop():
            raise EvaluationStoppedError

    def _run_epoch(self, *, resume_from_checkpoint: Any = None, **keywords: Any) -> None:
        """Leaves a run alone that has finished, or that its callbacks have just stopped: the Trainer would take one
        more step before it looked."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            if resume_from_checkpoint is not None:
                self._load_rng_state(resume_from_checkpoint)
            return
        super()._run_epoch(resume_from_checkpoint=resume_from_checkpoint, **keywords)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, *others: Any, **keywords: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *others, **keywords)
        except EvaluationStoppedError:
            self._evaluation_due = True
            self.control.should_training_stop = True
            if self.args.save_strategy != "no":
                self._save_checkpoint(model, None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _make_up_for_evaluation(self) -> None:
        """Runs the evaluation that the part of the run before left out."""
        if not self._evaluation_due:
            return
        self._evaluation_due = False
        metrics = self._evaluate(None, None)
        if self._determine_best_metric(metrics=metrics, trial=None) and self.args.save_strategy == "best":
            self._save_checkpoint(self.model_wrapped, None)

    def _preempted(self) -> Preempted:
        step, name = self.state.global_step, signal.Signals(self._stopped_by).name
        if step == 0:
            return Preempted(f"{name} came before the first step", fix="run the same command again")
        if self.args.save_strategy == "no":
            return Preempted(
                f"{name} stopped the run after step {step}; nothing is kept, because save_strategy is no",
                where=str(self.args.output_dir),
            )
        self._mark_stopped(True)
        return Preempted(
            f"{name} stopped the run after step {step}; checkpoint-{step} is complete",
            where=str(self.args.output_dir),
            fix="run the same command again: it goes on from there",
        )


class _StopAtStepEnd(TrainerCallback):
    def __init__(self, trainer: PreemptibleTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._make_up_for_evaluation()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        if trainer._asked_to_stop():
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
            trainer._evaluation_due = control.should_evaluate
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called in the middle of an epoch too, when the run stops there; the epoch's own work belongs to its end."""
        trainer = self._trainer
        if not trainer._stopped_by:
            return
        at_the_end = state.epoch == round(state.epoch or 0)
        trainer._evaluation_due = trainer._evaluation_due or (at_the_end and control.should_evaluate)
        control.should_evaluate = False
        control.should_log = control.should_log and at_the_end
        # Again where the checkpoint of this step does not know yet what is due.
        control.should_save = at_the_end and args.save_strategy != "no"
