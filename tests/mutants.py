"""Breaks the code in two dozen ways, one at a time, and checks that a test notices each.

    python tests/mutants.py [name ...]

Not collected by pytest: run it by hand after changing a test or one of the places below. Every mutant is made in a
copy of the working tree, so the tree itself is never touched. Exits with 1 if a mutant survives, or if its place has
moved.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from launching import MARK, kill_all

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".venv", ".git", ".cache", "runs", "__pycache__", "*.egg-info")
TESTS_FAILED = 1
"""Exit code of pytest; 2 and above mean that it did not get to run them."""
HANGS = 600
"""Seconds after which a mutant is caught by not coming to an end: ranks that do not agree wait for each other."""


@dataclass(frozen=True)
class Mutant:
    """One mistake: `wrong` in the place of `right`, which stands exactly once in `file`; `tests` must notice it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


MUTANTS = (
    Mutant(
        "no gradient sync",
        "refreward_trl/trainers/base.py",
        "self.objective(model, inputs)",
        'self.objective(getattr(model, "module", model), inputs)',
        "tests/trainers/test_parallel.py::test_ddp_equals_one_process",
    ),
    Mutant(
        "LR ignored by the judge",
        "refreward_trl/reward_model/scoring.py",
        "shown_visuals(lr_image, [sr_image], self.spec)",
        "shown_visuals(0 * lr_image, [sr_image], self.spec)",
        "tests/reward_model/test_scoring.py",
    ),
    Mutant(
        "0.0 for NaN",
        "refreward_trl/rewards/composite.py",
        "    return values\n\n\ndef nan_std",
        "    return values.nan_to_num(0.0)\n\n\ndef nan_std",
        "tests/rewards/test_composite.py",
    ),
    Mutant(
        "advantages not centred",
        "refreward_trl/objectives/policy_gradient.py",
        "centred = _masked(rewards - mean, scored)",
        "centred = _masked(rewards, scored)",
        "tests/objectives/test_policy_gradient.py",
    ),
    Mutant(
        "adapter not switched off in the reference",
        "refreward_trl/generators/base.py",
        "with _scaled_to_zero(list(self._policy_layers())):",
        "with _scaled_to_zero([]):",
        "tests/generators/test_base.py",
    ),
    Mutant(
        "global RNG used",
        "refreward_trl/generators/policies.py",
        "torch.randn(self._shape, generator=generator)",
        "torch.randn(self._shape)",
        "tests/generators/test_policies.py",
    ),
    Mutant(
        "decode clamped",
        "refreward_trl/generators/latent.py",
        ".sample.float() / 2 + 0.5",
        ".sample.float().clamp(-1, 1) / 2 + 0.5",
        "tests/generators/test_epsilon.py",
    ),
    Mutant(
        "hash check skipped",
        "refreward_trl/checkpointing.py",
        'if _sha256(path) != expected["sha256"]:',
        "if False:",
        "tests/test_checkpointing.py",
    ),
    Mutant(
        "wrong group key",
        "refreward_trl/trainers/ddpo_trainer.py",
        "table.total.unflatten(0, (-1, self.args.num_generations))",
        "table.total.unflatten(0, (self.args.num_generations, -1)).T",
        "tests/trainers/test_ddpo_trainer.py",
    ),
    Mutant(
        "wrong sign",
        "refreward_trl/objectives/policy_gradient.py",
        "loss=-(weights * objective).mean()",
        "loss=(weights * objective).mean()",
        "tests/objectives/test_policy_gradient.py",
    ),
    Mutant(
        "stale old log-probs",
        "refreward_trl/trainers/ddpo_trainer.py",
        'batch["old_log_prob"] = policy.log_prob(batch["candidates"], self.args.log_prob_reduction)',
        'batch["old_log_prob"] = self.__dict__.setdefault(\n'
        '            "stale", policy.log_prob(batch["candidates"], self.args.log_prob_reduction)\n'
        "        )",
        "tests/trainers/test_ddpo_trainer.py",
    ),
    Mutant(
        "EMA not restored",
        "refreward_trl/trainers/base.py",
        "self.average.load_state_dict(weights, where=str(path))",
        "pass",
        "tests/trainers/test_base.py",
    ),
    Mutant(
        "files not flushed before the manifest",
        "refreward_trl/checkpointing.py",
        "        _flush(path)\n        files[",
        "        files[",
        "tests/test_checkpointing.py",
    ),
    Mutant(
        "manifest's own digest skipped",
        "refreward_trl/checkpointing.py",
        "    if own_digest != _sha256_of(text.replace(own_digest, NO_DIGEST, 1)):",
        "    if False:",
        "tests/faults/test_damage.py",
    ),
    Mutant(
        "ranks do not agree on a stop",
        "refreward_trl/trainers/preemption.py",
        "number = int(self.accelerator.gather(own).max())",
        "number = int(own)",
        "tests/trainers/test_parallel.py::test_all_ranks_stop_at_the_signal_of_one",
    ),
    Mutant(
        "evaluation not made up for",
        "refreward_trl/trainers/preemption.py",
        "trainer._evaluation_due = control.should_evaluate\n",
        "trainer._evaluation_due = False\n",
        "tests/trainers/test_resume.py::test_a_signal_stops_politely",
    ),
    Mutant(
        "finite check skipped",
        "refreward_trl/trainers/resumable.py",
        "bad = ~torch.isfinite(values.detach()).all()",
        "bad = torch.tensor(False)",
        "tests/trainers/test_base.py",
    ),
    Mutant(
        "loaded weights not compared",
        "refreward_trl/trainers/checkpoint_hooks.py",
        "if not all([equal] if self.args.world_size == 1 else gather_object([equal])):",
        "if False:",
        "tests/trainers/test_checkpoint_hooks.py",
    ),
    Mutant(
        "ranks never compared",
        "refreward_trl/trainers/resumable.py",
        "if every and args.world_size > 1 and state.global_step % every == 0:",
        "if False:",
        "tests/trainers/test_parallel.py::test_ranks_that_have_drifted_apart_stop",
    ),
    Mutant(
        "failed reward counted as 0",
        "refreward_trl/rewards/composite.py",
        "total=_weighted_sum(combined, weights).masked_fill(incomplete, torch.nan)",
        "total=_weighted_sum(combined, weights)",
        "tests/rewards/test_composite.py",
    ),
    Mutant(
        "deadline not kept",
        "refreward_trl/rewards/deadline.py",
        "signal.setitimer(signal.ITIMER_REAL, seconds, RINGS_AGAIN)",
        "signal.setitimer(signal.ITIMER_REAL, 0)",
        "tests/rewards/test_composite.py::test_a_reward_that_raises_or_hangs_is_dropped_too",
    ),
    Mutant(
        "folder not locked",
        "refreward_trl/trainers/resumable.py",
        "locks.append(lock_run_folder(self._run_folder))",
        "self._run_folder.mkdir(parents=True, exist_ok=True)",
        "tests/trainers/test_run_folder.py",
    ),
    Mutant(
        "failed saves never end a run",
        "refreward_trl/trainers/checkpoint_hooks.py",
        "if self._failed_saves >= MOST_FAILED_SAVES or last_chance:",
        "if False:",
        "tests/trainers/test_run_folder.py",
    ),
    Mutant(
        "policy changed inside a rollout",
        "refreward_trl/trainers/ddpo_trainer.py",
        "if step % iterations and fixed:",
        "if False:",
        "tests/trainers/test_resume.py",
    ),
    Mutant(
        "another ZeRO stage accepted",
        "refreward_trl/trainers/checkpoint_hooks.py",
        "if stage != self._zero_stage():",
        "if False:",
        "tests/trainers/test_checkpoint_hooks.py",
    ),
    Mutant(
        "judges sharded under ZeRO-3",
        "refreward_trl/trainers/sharding.py",
        "    unset_hf_deepspeed_config()\n",
        "    pass\n",
        "tests/trainers/test_sharding.py",
    ),
)


def is_caught(mutant: Mutant, tree: Path) -> tuple[bool, str]:
    """Whether a test fails on the mutant in `tree`, which is mended again, and the line that says so."""
    path = tree / mutant.file
    source = path.read_text()
    if source.count(mutant.right) != 1:
        return False, f"{mutant.right!r} stands {source.count(mutant.right)} times in {mutant.file}, not once"
    path.write_text(source.replace(mutant.right, mutant.wrong))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests]
        mark = uuid.uuid4().hex
        environment = os.environ | {MARK: mark}
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
        process.mark = mark  # type: ignore[attr-defined]
        try:
            lines = process.communicate(timeout=HANGS)[0].strip().splitlines() or ["no output"]
        except subprocess.TimeoutExpired:
            kill_all(process)
            return True, f"its tests hang for {HANGS} seconds"
    finally:
        path.write_text(source)
    failed = [line for line in lines if line.startswith("FAILED")]
    return process.returncode == TESTS_FAILED, (failed or lines)[-1]


def main(names: list[str]) -> int:
    """Runs the named mutants, or all; returns the exit code."""
    unknown = sorted(set(names) - {mutant.name for mutant in MUTANTS})
    if unknown:
        print(f"error: no mutant {unknown[0]!r}; fix: use one of {', '.join(mutant.name for mutant in MUTANTS)}")
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        for mutant in chosen:
            caught, line = is_caught(mutant, tree)
            survived += not caught
            print(f"{'caught  ' if caught else 'SURVIVED'}  {mutant.name}: {line}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
