"""A run that is stopped and resumed ends in the same bits as one that was not."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from refreward_trl.checkpointing import list_checkpoints
from refreward_trl.errors import ConfigError, Preempted
from refreward_trl.signals import StopRequest
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.finetune_config import SRFinetuneConfig
from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer

STEPS = 6
DDPO = {
    "num_generations": 4,
    "noise": "residual",
    "num_iterations": 3,
    "advantage": "running",
    "gradient_accumulation_steps": 2,
    "beta": 0.1,
}


class StopAt(TrainerCallback):
    """Stops politely: saves, then leaves."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


@pytest.fixture
def run(
    make_generator: Any, reward: Any, black_box: Any, pairs: Any, lora: Any, settings: Any, tmp_path: Path
) -> Callable[..., AlignmentTrainer]:
    def make(
        kind: type,
        config: type,
        name: str,
        *,
        adapter: bool,
        stop: int | None = None,
        extra: Any = None,
        **changes: Any,
    ) -> Any:
        keywords = settings(
            **{
                "output_dir": str(tmp_path / name),
                "max_steps": STEPS,
                "save_strategy": "steps",
                "save_steps": 100,
                "logging_steps": 2,
                "ema_decay": 0.8,
                "lr_scheduler_type": "cosine",
                "eval_strategy": "steps",
                "eval_steps": 3,
                "eval_on_start": True,
                **changes,
            }
        )
        trainer = kind(
            make_generator(),
            **({} if kind is SRFinetuneTrainer else {"reward_funcs": black_box if kind is SRDDPOTrainer else reward}),
            args=config(**keywords),
            train_dataset=pairs(7),
            eval_dataset=pairs(2),
            peft_config=lora(lora_dropout=0.2 if kind is SRReFLTrainer else 0.0) if adapter else None,
            callbacks=[*([] if stop is None else [StopAt(stop)]), *([] if extra is None else [extra])],
        )
        trainer.train()
        return trainer

    return make


def assert_same_end(
    one: Any, other: Any, read_metrics: Callable[..., list[dict[str, Any]]], steps: int = STEPS
) -> None:
    assert one.state.global_step == other.state.global_step == steps
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    for name, tensor in one.average.state_dict().items():
        assert torch.equal(tensor, other.average.state_dict()[name]), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, moments in states[0].items():
        assert all(torch.equal(tensor, states[1][key][name]) for name, tensor in moments.items())
    assert one.lr_scheduler.state_dict() == other.lr_scheduler.state_dict()
    lines = [read_metrics(trainer.args.output_dir) for trainer in (one, other)]
    timing = {"time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    bare = [[{name: value for name, value in line.items() if name not in timing} for line in some] for some in lines]
    assert bare[0] == bare[1]


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [
        (SRReFLTrainer, SRReFLConfig, {"gradient_accumulation_steps": 2}),
        (SRDDPOTrainer, SRDDPOConfig, DDPO),
        (SRDDPOTrainer, SRDDPOConfig, DDPO | {"noise": "lowfreq"}),
    ],
    ids=["refl", "ddpo", "ddpo-lowfreq"],
)
def test_resume_is_bit_identical(
    run: Callable[..., Any], read_metrics: Any, kind: type, config: type, changes: dict, adapter: bool
) -> None:
    """Step 4 lies between two log lines, and in the middle of DDPO's second rollout."""
    whole = run(kind, config, "whole", adapter=adapter, **changes)
    stopped = run(kind, config, "parts", adapter=adapter, stop=4, **changes)
    assert stopped.state.global_step == 4
    resumed = run(kind, config, "parts", adapter=adapter, **changes)
    assert_same_end(whole, resumed, read_metrics)


@pytest.mark.parametrize(
    ("kind", "config"), [(SRReFLTrainer, SRReFLConfig), (SRDDPOTrainer, SRDDPOConfig)], ids=["refl", "ddpo"]
)
def test_a_finished_run_takes_no_further_step(
    run: Callable[..., Any], read_metrics: Any, kind: type, config: type
) -> None:
    """The end lies in the middle of an epoch, as it mostly does."""
    finished = run(kind, config, "whole", adapter=True)
    again = run(kind, config, "whole", adapter=True)
    assert_same_end(finished, again, read_metrics)


@pytest.mark.parametrize("part", ["denoiser", "vae"])
def test_finetuning_resumes_too(run: Callable[..., Any], read_metrics: Any, part: str) -> None:
    whole = run(SRFinetuneTrainer, SRFinetuneConfig, "whole", adapter=False, train_part=part)
    run(SRFinetuneTrainer, SRFinetuneConfig, "parts", adapter=False, stop=4, train_part=part)
    resumed = run(SRFinetuneTrainer, SRFinetuneConfig, "parts", adapter=False, train_part=part)
    assert_same_end(whole, resumed, read_metrics)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [(SRReFLTrainer, SRReFLConfig, {"gradient_accumulation_steps": 2}), (SRDDPOTrainer, SRDDPOConfig, DDPO)],
    ids=["refl", "ddpo"],
)
def test_stopping_at_every_step_changes_nothing(
    run: Callable[..., Any], read_metrics: Any, kind: type, config: type, changes: dict, adapter: bool
) -> None:
    whole = run(kind, config, "whole", adapter=adapter, **changes)
    for stop in range(1, STEPS):
        run(kind, config, "parts", adapter=adapter, stop=stop, **changes)
    resumed = run(kind, config, "parts", adapter=adapter, **changes)
    assert_same_end(whole, resumed, read_metrics)


class SignalAt(TrainerCallback):
    """Sends this process a signal, twice, in a step, in an evaluation or before the first step."""

    def __init__(self, step: int, event: str, number: int) -> None:
        self.step, self.number = step, number
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("event", "step", "kept"),
    [
        ("on_step_begin", 3, 4),  # stops in the middle of a rollout
        ("on_step_begin", 2, 3),  # stops where an evaluation is due
        ("on_step_end", 2, 2),
        ("on_prediction_step", 3, 3),
        ("on_prediction_step", 0, None),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_politely(
    run: Callable[..., Any], read_metrics: Any, tmp_path: Path, event: str, step: int, kept: int | None, number: int
) -> None:
    settings = DDPO | {"lr_scheduler_type": "linear"}
    whole = run(SRDDPOTrainer, SRDDPOConfig, "whole", adapter=True, **settings)
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="SIG") as stop:
        run(SRDDPOTrainer, SRDDPOConfig, "parts", adapter=True, extra=SignalAt(step, event, number), **settings)
    assert signal.getsignal(number) == before
    assert (tmp_path / "parts" / "stopped.json").exists() == (kept is not None)
    assert (f"checkpoint-{kept} is complete" in str(stop.value)) == (kept is not None)
    assert [folder.name for folder in list_checkpoints(tmp_path / "parts")] == ([f"checkpoint-{kept}"] if kept else [])
    resumed = run(SRDDPOTrainer, SRDDPOConfig, "parts", adapter=True, **settings)
    assert_same_end(whole, resumed, read_metrics)
    assert not (tmp_path / "parts" / "stopped.json").exists()


def test_an_epoch_that_a_signal_cuts_short_is_not_evaluated_as_a_whole(
    run: Callable[..., Any], read_metrics: Any
) -> None:
    """Seven samples, one a step: the signal comes in the middle of the first epoch, then at its end."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 9, "logging_steps": 1}
    make = functools.partial(run, SRReFLTrainer, SRReFLConfig, adapter=True, per_device_train_batch_size=1, **settings)
    whole = make(name="whole")
    for step in (3, 6):
        with pytest.raises(Preempted):
            make(name="parts", extra=SignalAt(step, "on_step_begin", signal.SIGTERM))
    assert_same_end(whole, make(name="parts"), read_metrics, steps=9)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to Ctrl-C, which tests that run in the background of a shell are started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_reach_python_again_after_training(run: Callable[..., Any], interruptible: None) -> None:
    run(SRReFLTrainer, SRReFLConfig, "whole", adapter=True)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_children_ignore_what_the_run_notes() -> None:
    with StopRequest() as request:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(request.signal)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM


@pytest.mark.parametrize(
    "change",
    [{"noise": "lowfreq"}, {"sigma": 0.2}, {"num_iterations": 2}, {"beta": 0.0}, {"log_prob_reduction": "mean"}],
)
def test_the_policy_of_a_rollout_cannot_change_inside_it(run: Callable[..., Any], change: dict[str, Any]) -> None:
    (name,) = change
    run(SRDDPOTrainer, SRDDPOConfig, "parts", adapter=True, stop=4, **DDPO)
    with pytest.raises(ConfigError, match=f"checkpoint-4 lies in the middle of a rollout.* {name}: "):
        run(SRDDPOTrainer, SRDDPOConfig, "parts", adapter=True, **DDPO | change)


def test_it_can_change_between_two_rollouts(run: Callable[..., Any]) -> None:
    run(SRDDPOTrainer, SRDDPOConfig, "parts", adapter=True, stop=3, **DDPO)
    resumed = run(SRDDPOTrainer, SRDDPOConfig, "parts", adapter=True, **DDPO | {"noise": "lowfreq", "sigma": 0.2})
    assert resumed.state.global_step == STEPS


def test_lines_after_the_checkpoint_are_written_once(run: Callable[..., Any], read_metrics: Any) -> None:
    """The run had gone on past its last checkpoint when it died; those steps are done and logged again."""
    changes = {"logging_steps": 1, "save_steps": 2}
    folder = Path(run(SRReFLTrainer, SRReFLConfig, "parts", adapter=True, **changes).args.output_dir)
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run(SRReFLTrainer, SRReFLConfig, "parts", adapter=True, **changes)
    steps = [line["step"] for line in read_metrics(folder) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
