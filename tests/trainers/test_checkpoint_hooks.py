"""The installed transformers has the private methods that we override or call; saves go through our protocol."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from refreward_trl import checkpointing
from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.checkpoint_hooks import CALLED, OVERRIDDEN, VerifiedCheckpoints
from refreward_trl.trainers.preemption import PreemptibleTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer


@pytest.mark.parametrize(("name", "parameters"), [*OVERRIDDEN.items(), *CALLED.items()])
def test_the_private_methods_exist_with_their_parameters(name: str, parameters: tuple[str, ...]) -> None:
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters) == parameters


def test_no_other_private_method_is_overridden() -> None:
    private = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    ours = {*vars(PreemptibleTrainer), *vars(VerifiedCheckpoints), *vars(AlignmentTrainer)}
    assert private & ours == {*OVERRIDDEN, *(() if "_abc_impl" not in private else ("_abc_impl",))}


def test_what_the_trainer_promises_about_the_gradient_norm() -> None:
    """`_get_grad_norm` is called after clipping and before the optimizer step, so that it can stop the step."""
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("_clip_grad_norm") < source.index("_get_grad_norm") < source.index("self.optimizer.step()")


@pytest.fixture
def trained(make_generator: Any, reward: Any, pairs: Any, settings: Any) -> SRReFLTrainer:
    args = SRReFLConfig(**settings(save_strategy="steps", save_steps=1, max_steps=4, save_total_limit=1))
    trainer = SRReFLTrainer(make_generator(), reward, args=args, train_dataset=pairs(4))
    trainer.train()
    return trainer


def test_checkpoints_are_sealed_and_two_are_kept(trained: SRReFLTrainer) -> None:
    run = Path(trained.args.output_dir)
    folders = checkpointing.list_checkpoints(run)
    assert [folder.name for folder in folders] == ["checkpoint-3", "checkpoint-4"]
    manifest = checkpointing.verify(folders[-1])
    assert (manifest["step"], manifest["world_size"], manifest["trainer"]) == (4, 1, "SRReFLTrainer")
    assert not list(run.glob(".tmp*"))


def again(trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any, **changes: Any) -> SRReFLTrainer:
    args = SRReFLConfig(
        output_dir=trained.args.output_dir, use_cpu=True, disable_tqdm=True, max_steps=5, save_strategy="no", **changes
    )
    return SRReFLTrainer(make_generator(), reward, args=args, train_dataset=pairs(4))


def test_auto_skips_a_damaged_checkpoint(trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any) -> None:
    run = Path(trained.args.output_dir)
    (run / "checkpoint-4" / "model.safetensors").write_bytes(b"broken")
    trainer = again(trained, make_generator, reward, pairs)
    assert trainer._resume_folder(None, "auto") == run / "checkpoint-3"


def test_an_explicit_checkpoint_never_falls_back(
    trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any
) -> None:
    folder = Path(trained.args.output_dir) / "checkpoint-4"
    (folder / "optimizer.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        again(trained, make_generator, reward, pairs, resume=str(folder)).train()


def test_weights_that_did_not_arrive_are_noticed(
    trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading that does nothing, silently, is a known mistake of wrappers."""
    trainer = again(trained, make_generator, reward, pairs)
    monkeypatch.setattr(type(trainer.model), "load_state_dict", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match="does not hold the weights of the checkpoint"):
        trainer.train()


def test_other_settings_are_named(
    trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = checkpointing.read_manifest(Path(trained.args.output_dir) / "checkpoint-4")
    trainer = again(trained, make_generator, reward, pairs, anchor_weight=2.5, **as_written(manifest, "learning_rate"))
    with caplog.at_level("WARNING", logger="refreward_trl.trainers.checkpoint_hooks"):
        trainer._resume_folder(None, "auto")
    (line,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert "anchor_weight 1.0 -> 2.5" in line and "max_steps 4 -> 5" in line
    assert "learning_rate" not in line and "output_dir" not in line and "save_" not in line


def as_written(manifest: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: manifest["settings"][name] for name in names}


def test_another_launch_cannot_go_on_from_it(
    trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without DeepSpeed its state of the optimizer would be left out without a word."""
    trainer = again(trained, make_generator, reward, pairs)
    monkeypatch.setattr(trainer, "_zero_stage", lambda: 2)
    with pytest.raises(CheckpointError, match=r"without DeepSpeed, this run .* with DeepSpeed ZeRO-2") as caught:
        trainer.train()
    assert caught.value.exit_code == 5
    monkeypatch.undo()
    monkeypatch.setattr(trainer.args.__class__, "world_size", 2)
    with pytest.raises(CheckpointError, match="written by 1 processes, this run has 2") as caught:
        trainer._check_manifest(Path(trained.args.output_dir), checkpointing.read_manifest(newest(trained)))
    assert "--num_processes 1" in str(caught.value)


def newest(trained: SRReFLTrainer) -> Path:
    return checkpointing.list_checkpoints(trained.args.output_dir)[-1]


def test_never_refuses_to_mix_with_an_earlier_run(
    trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any
) -> None:
    with pytest.raises(ConfigError, match="checkpoint-4"):
        again(trained, make_generator, reward, pairs, resume="never").train()


def test_another_trainer_cannot_go_on_from_it(trained: SRReFLTrainer, make_generator: Any, pairs: Any) -> None:
    from refreward_trl.trainers.finetune_config import SRFinetuneConfig
    from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer

    args = SRFinetuneConfig(output_dir=trained.args.output_dir, use_cpu=True, disable_tqdm=True, max_steps=5)
    with pytest.raises(CheckpointError, match="SRReFLTrainer"):
        SRFinetuneTrainer(make_generator(), args=args, train_dataset=pairs(4)).train()


def test_weights_of_another_network_are_refused(
    trained: SRReFLTrainer, make_generator: Any, reward: Any, pairs: Any, lora: Any
) -> None:
    args = SRReFLConfig(output_dir=trained.args.output_dir, use_cpu=True, disable_tqdm=True, max_steps=5)
    trainer = SRReFLTrainer(make_generator(), reward, args=args, train_dataset=pairs(4), peft_config=lora())
    with pytest.raises(CheckpointError, match="only in the"):
        trainer.train()
