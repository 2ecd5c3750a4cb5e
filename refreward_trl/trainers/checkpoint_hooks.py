"""The private methods of `transformers.Trainer` that the package overrides, all in one place.

They replace what is saved (a verified folder under one rename, see `refreward_trl.checkpointing`; trainable weights as
safetensors; no pickled arguments) and stop an update whose gradient is not finite. `OVERRIDDEN` lists them with the
parameters they must have; a test compares that with the installed transformers.
"""

from __future__ import annotations

import json
import platform
import shutil
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.utils import logging

from refreward_trl import checkpointing
from refreward_trl.checksums import digest
from refreward_trl.errors import CheckpointError, ConfigError, RefRewardError
from refreward_trl.model_folders import read_object
from refreward_trl.trainers import run_folder
from refreward_trl.trainers.preemption import PreemptibleTrainer
from refreward_trl.trainers.sharding import is_sharded, keep_new_networks_whole, own_shards
from refreward_trl.trainers.torch_files import FIX, check_torch_file, reading

OVERRIDDEN = {
    "_save_checkpoint": ("self", "model", "trial"),
    "_save": ("self", "output_dir", "state_dict"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_best_model": ("self",),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_load_scaler": ("self", "checkpoint"),
    "_load_rng_state": ("self", "checkpoint"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_prepare_inputs": ("self", "inputs"),
    "_run_epoch": (
        *("self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ),
    "_maybe_log_save_evaluate": (
        *("self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
        "learning_rate",
    ),
}
"""Private Trainer methods that this package overrides, with their parameters."""

CALLED = {
    "_save_optimizer_and_scheduler": ("self", "output_dir"),
    "_save_scaler": ("self", "output_dir"),
    "_save_rng_state": ("self", "output_dir"),
    "_get_output_dir": ("self", "trial"),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_prepare_input": ("self", "data"),
    "_evaluate": ("self", "trial", "ignore_keys_for_eval", "skip_scheduler"),
    "_determine_best_metric": ("self", "metrics", "trial"),
}
"""Private Trainer methods that this package calls."""

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"
EXTRA_STATE_FILE = "alignment_state-rank{rank}.json"
FREE_SETTINGS = (
    "output_dir",
    "resume",
    "logging_",
    "log_level",
    "log_on_each_node",
    "log_image_steps",
    "num_log_images",
    "report_to",
    "run_name",
    "disable_tqdm",
    "save_",
    "push_to_",
    "hub_",
)
"""Beginnings of the names of settings that may change between the parts of a run without a word."""
MOST_FAILED_SAVES = 3
"""So many saves in a row may fail before a run ends: a full disk may be someone else's, for a while."""
PACKAGES = ("refreward-trl", "torch", "transformers", "diffusers", "peft", "accelerate")

logger = logging.get_logger(__name__)


class VerifiedCheckpoints(PreemptibleTrainer):
    """A Trainer whose checkpoints are complete, verified and free of pickled code, wherever they hold our own state.

    Mix it in before anything else. A subclass adds its own state by `_write_extra_state` and `_read_extra_state`.
    """

    # Declared as optional or as unions by transformers, which no line here could use without a cast.
    model: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._failed_saves = 0
        self._save_problem: str | None = None
        super().__init__(*arguments, **keywords)
        # transformers has just been told of ZeRO-3 once more.
        keep_new_networks_whole()

    @property
    def _run_folder(self) -> Path:
        return Path(self.args.output_dir)

    def _write_extra_state(self, folder: Path) -> dict[str, Any]:
        """Writes this rank's further files into `folder` and returns this rank's further JSON state."""
        return {}

    def _read_extra_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Restores what `_write_extra_state` wrote on this rank."""

    def _read_further_weights(self, folder: Path) -> None:
        """Restores weights that are kept beside the model's, such as an average; also from the best checkpoint."""

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))
        final = checkpointing.checkpoint_folder(folder, self.state.global_step)
        token = self._from_rank_zero(lambda: uuid.uuid4().hex[:8])
        staged = checkpointing.staging_folder(folder, self.state.global_step, token)
        self.store_flos()
        best = self.state.best_model_checkpoint
        self._note_best_checkpoint(folder)
        # Each stage on all ranks, or on none any further.
        written = (
            self._write_together(lambda: staged.mkdir(parents=True), only_one=True)
            and self._write_together(lambda: self._write_parts(staged))
            and self._write_together(lambda: self._commit(staged, final), only_one=True)
        )
        if not written:
            self.state.best_model_checkpoint = best
            self._give_up_save(staged)
            return
        self._failed_saves = 0
        self._write_together(lambda: self._rotate(folder), only_one=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _write_together(self, write: Callable[[], None], *, only_one: bool = False) -> bool:
        """Runs `write` on all ranks, or on the one that saves, and returns whether all of them could."""
        problem = None
        if self.args.should_save or not only_one:
            try:
                write()
            except Exception as error:
                if not run_folder.is_write_error(error):
                    raise
                problem = run_folder.explain(error)
        problems = [problem] if self.args.world_size == 1 else gather_object([problem])
        self._save_problem = next((text for text in problems if text is not None), None)
        return self._save_problem is None

    def _commit(self, staged: Path, final: Path) -> None:
        checkpointing.seal(staged, self._checkpoint_facts())
        checkpointing.commit(staged, final)

    def _rotate(self, folder: Path) -> None:
        checkpointing.rotate(folder, self.args.save_total_limit, [self.state.best_model_checkpoint])

    def _give_up_save(self, staged: Path) -> None:
        """Deletes what was written of a checkpoint; a run that cannot save any more, or has to stop, ends.

        Raises:
            CheckpointError: At the third failure in a row, or when this was the last chance.
        """
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        self._failed_saves += 1
        last_chance = self.control.should_training_stop or self._stopped_by
        message = f"checkpoint-{self.state.global_step} could not be written: {self._save_problem}{self._room()}"
        if self._failed_saves >= MOST_FAILED_SAVES or last_chance:
            raise CheckpointError(
                f"{message}; the checkpoints before are intact",
                where=str(self._run_folder),
                fix="make room, then run the same command again: it goes on from the newest checkpoint",
            )
        logger.error(f"{message}; training goes on, and saves again after the next save_steps")

    def _room(self) -> str:
        """Returns what is free, and what the newest checkpoint takes, as a remark."""
        free = run_folder.readable(shutil.disk_usage(self._run_folder).free)
        earlier = checkpointing.list_checkpoints(self._run_folder)
        if not earlier:
            return f" ({free} free)"
        return f" ({free} free, a checkpoint takes {run_folder.readable(checkpointing.size(earlier[-1]))})"

    def _write_parts(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        extra = {**self._write_extra_state(folder), "evaluation_due": self._evaluation_due}
        if shards := own_shards(self.model):
            extra["shards_digest"] = digest(shards)
        name = EXTRA_STATE_FILE.format(rank=self.args.process_index)
        (folder / name).write_text(json.dumps(extra), encoding="utf-8")
        if self.args.should_save:
            self._refresh_callback_states()
            self.state.save_to_json(str(folder / STATE_FILE))

    def _note_best_checkpoint(self, folder: Path) -> None:
        """Records the best checkpoint under its final name, also when it is the one that is being written."""
        best = self.state.best_global_step
        if not best:
            return
        best_folder = checkpointing.checkpoint_folder(folder, best)
        if best == self.state.global_step or best_folder.exists():
            self.state.best_model_checkpoint = str(best_folder)

    def _refresh_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                known = self.state.stateful_callbacks.get(name)
                if isinstance(known, list):
                    known.append(state)
                else:
                    self.state.stateful_callbacks[name] = state

    def _checkpoint_facts(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "trainer": type(self).__name__,
            "world_size": self.args.world_size,
            "zero_stage": self._zero_stage(),
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
            "settings": self._settings(),
            "weights_digest": self._weights_digest(),
        }

    def _zero_stage(self) -> int:
        """Returns the stage of DeepSpeed's ZeRO; 0 without DeepSpeed."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return 0 if plugin is None else int(plugin.zero_stage)

    def _weights_digest(self) -> str | None:
        """Returns the digest of the weights that training changes; None where no rank holds them whole (ZeRO-3)."""
        weights = self._changing_weights(self.model.state_dict())
        return None if any(map(is_sharded, self.model.parameters())) else digest(weights)

    def _check_loaded_weights(self, folder: Path) -> None:
        """Makes sure that the weights of `folder` are really those in the model: loading could miss it silently.

        Raises:
            CheckpointError: They are not, on any rank.
        """
        if shards := own_shards(self.model):
            equal = self._read_own_state(folder).get("shards_digest") == digest(shards)
        else:
            saved = checkpointing.read_manifest(folder).get("weights_digest")
            equal = saved is None or saved == self._weights_digest()
        if not all([equal] if self.args.world_size == 1 else gather_object([equal])):
            raise CheckpointError(
                "the model does not hold the weights of the checkpoint after loading it",
                where=str(folder),
                fix="launch the run as before (DeepSpeed stage, adapter, precision)",
            )

    def _settings(self) -> dict[str, Any]:
        """Returns the arguments that a resumed run should share with its first part."""
        settings = {name: value for name, value in self.args.to_dict().items() if not name.startswith(FREE_SETTINGS)}
        # As they look after a round trip, so that a tuple equals the list it became.
        return json.loads(json.dumps(settings, default=str))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the weights that training changes, on the rank that saves."""
        if not self.args.should_save:
            return
        folder = self._run_folder if output_dir is None else Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self._changing_weights(self.model.state_dict() if state_dict is None else state_dict)
        # clone: safetensors refuses tensors that share memory, which tied weights do.
        weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def _changing_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out frozen parameters; buffers stay, since batch statistics change too."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in state_dict.items() if name not in frozen}

    # Loading

    def _resume_folder(self, requested: str | bool | None, policy: str) -> Path | None:
        """Returns the verified checkpoint to go on from, the same on all ranks, or None to start afresh.

        Args:
            requested: `resume_from_checkpoint` as given to `train`; None asks `policy`.
            policy: "auto", "never" or a folder.

        Raises:
            CheckpointError: If a folder that was named is damaged: an explicit choice never falls back.
            ConfigError: If a fresh start would mix with the checkpoints of an earlier run.
        """
        if requested is not None:
            policy = requested if isinstance(requested, str) else "auto" if requested else "never"
        folder = self._from_rank_zero(lambda: self._choose_checkpoint(policy))
        return None if folder is None else Path(folder)

    def _choose_checkpoint(self, policy: str) -> str | None:
        own = self._run_folder
        if policy not in ("auto", "never"):
            manifest = checkpointing.verify(policy)
            self._check_states(Path(policy))
            self._check_manifest(Path(policy), manifest)
            return policy
        if policy == "never":
            existing = checkpointing.list_checkpoints(own)
            if existing:
                raise ConfigError(
                    f"{own} already holds {existing[-1].name} of an earlier run",
                    where="resume",
                    fix="choose another output_dir, delete the old one, or go on from it with resume: auto",
                )
            return None
        checkpointing.remove_leftovers(own)
        newest = checkpointing.newest_intact(own)
        if newest is None:
            return None
        self._check_states(newest)
        self._check_manifest(newest, checkpointing.read_manifest(newest))
        logger.warning(f"resuming from {newest}")
        return str(newest)

    def _check_states(self, folder: Path) -> None:
        """Makes sure that what transformers will read of a checkpoint is data; what DeepSpeed keeps in a folder of
        its own is pickled code.

        Raises:
            CheckpointError: Naming the file that is not what a run writes.
        """
        for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
            check_torch_file(path)
        with reading(folder / checkpointing.MANIFEST):
            step = checkpointing.read_manifest(folder)["step"]
        with reading(folder / STATE_FILE):
            state = read_object(folder / STATE_FILE)
            if state["global_step"] != step:
                raise ValueError(f"global_step is {state['global_step']}, the manifest says {step}")
            TrainerState(**state)

    def _check_manifest(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest.get("trainer") != type(self).__name__:
            raise CheckpointError(
                f"it was written by {manifest.get('trainer')}, not by {type(self).__name__}",
                where=str(folder),
                fix="choose another output_dir for this run",
            )
        if manifest.get("world_size") != self.args.world_size:
            raise CheckpointError(
                f"it was written by {manifest.get('world_size')} processes, this run has {self.args.world_size}",
                where=str(folder),
                fix=f"launch it as before (accelerate launch --num_processes {manifest.get('world_size')} ...), "
                "or start afresh in another output_dir",
            )
        stage = manifest.get("zero_stage", self._zero_stage())
        if stage != self._zero_stage():
            raise CheckpointError(
                f"it was written {_with_zero(stage)}, this run is launched {_with_zero(self._zero_stage())}",
                where=str(folder),
                fix="use the launch file of the run that wrote it, or start afresh in another output_dir",
            )
        before = manifest.get("settings", {})
        now = self._settings()
        changed = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
        self._check_changes(folder, int(manifest["step"]), changed)

    def _check_changes(self, folder: Path, step: int, changed: Mapping[str, tuple[Any, Any]]) -> None:
        """Says which settings differ from those of the checkpoint; a subclass refuses those that it cannot change.

        Args:
            folder: The checkpoint that is resumed.
            step: Its step.
            changed: The values of the checkpoint and of this run, by the setting's name.
        """
        if changed:
            listed = ", ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in sorted(changed.items()))
            logger.warning(f"going on from {folder.name} with other settings than before: {listed}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        module = self.model if model is None else model
        path = Path(resume_from_checkpoint) / WEIGHTS_FILE
        try:
            weights = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(path), fix=FIX) from error
        expected = self._changing_weights(module.state_dict())
        for name in sorted(expected.keys() ^ weights.keys()):
            raise CheckpointError(
                f"{name} is only in the {'model' if name in expected else 'checkpoint'}",
                where=str(path),
                fix="use the generator and the adapter settings of the run that wrote it",
            )
        for name, tensor in weights.items():
            if tensor.shape != expected[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)}, the model's {tuple(expected[name].shape)}",
                    where=str(path),
                    fix="use the generator and the adapter settings of the run that wrote it",
                )
        module.load_state_dict(weights, strict=False)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if folder is None or self._stopped_by:
            return
        self._from_rank_zero(lambda: checkpointing.verify(folder) and None)
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(folder)
        self._read_further_weights(Path(folder))

    def _read_own_state(self, folder: Path) -> dict[str, Any]:
        path = folder / EXTRA_STATE_FILE.format(rank=self.args.process_index)
        return read_object(path)

    def _load_extra_state(self, folder: Path) -> None:
        state = self._read_own_state(folder)
        self._read_further_weights(folder)
        with reading(folder / EXTRA_STATE_FILE.format(rank=self.args.process_index)):
            self._evaluation_due = bool(state["evaluation_due"])
            self._read_extra_state(folder, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _from_rank_zero(self, make: Any) -> Any:
        """Returns `make()` of rank 0 on all ranks; an error of rank 0 is raised on all of them."""
        if self.args.world_size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.args.process_index == 0:
            try:
                box[0] = make()
            except RefRewardError as error:
                box[1] = (type(error), error.what, error.where, error.fix)
        broadcast_object_list(box)
        if box[1] is not None:
            kind, what, where, fix = box[1]
            raise kind(what, where=where, fix=fix)
        return box[0]

    # Stopping

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Returns the gradient norm, after making sure that it is a number: the optimizer steps right after this."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed has stepped already (inside backward), and a GradScaler looks for overflows itself.
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED and self.accelerator.scaler is None:
            self._require_finite_gradient(norm)
        return norm

    def _require_finite_gradient(self, norm: Any) -> None:
        """Raises `TrainingError` unless the gradient norm is finite."""


def _with_zero(stage: int) -> str:
    return f"with DeepSpeed ZeRO-{stage}" if stage else "without DeepSpeed"


def package_versions() -> dict[str, str]:
    """Returns the versions that decide whether a run can be repeated bit by bit."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree
        return "source"
