"""What a run's guards cost: the share of the training time that is spent inside them.

    python benchmarks/guard_overhead.py [--methods refl ddpo rm] [--steps 40]

Each method runs its recipe of `recipes/tiny`, saves included. Every guard is timed where it is called, in the same
steps as the work that it guards, so that a machine that becomes slower makes both slower. Time that a guard spends in
what it guards (the reward itself, say) or in another guard counts there. The rest of a step is what a trainer without
guards would do as well: transformers writes checkpoints and logs, too.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refreward_trl import checkpointing
from refreward_trl.cli import app
from refreward_trl.rewards import calling, composite
from refreward_trl.trainers import base, checkpoint_hooks, ddpo_trainer, resumable
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.preemption import PreemptibleTrainer
from refreward_trl.trainers.resumable import ResumableTrainer

GUARDED = "what is guarded"

GUARDS: dict[str, Sequence[tuple[Any, str]]] = {
    "signals": [(PreemptibleTrainer, "_asked_to_stop"), (PreemptibleTrainer, "_mark_stopped")],
    "rewards: deadline, length, finite values": [
        (calling, "call_reward"),
        (composite, "call_reward"),
        (composite, "read_rewards"),
    ],
    "rewards: failures counted, all ranks told": [
        (AlignmentTrainer, "_count_failures"),
        (AlignmentTrainer, "_raise_together"),
    ],
    "loss and gradient are finite": [
        (ResumableTrainer, "_require_finite"),
        (ResumableTrainer, "_require_finite_gradient"),
    ],
    "model is prepared": [(AlignmentTrainer, "_check_prepared")],
    "self-check of the first batch": [
        (AlignmentTrainer, "_check_first_batch"),
        (ddpo_trainer.SRDDPOTrainer, "_check_first_batch"),
        (AlignmentTrainer, "_check_first_gradient"),
        (base, "largest_gradient"),
    ],
    "run folder: lock, room": [(resumable, "lock_run_folder"), (resumable, "check_space")],
    "checkpoints: hashes, flushes, manifest": [
        (checkpointing, "seal"),
        (checkpointing, "commit"),
        (checkpoint_hooks, "digest"),
    ],
    "weights across ranks": [(ResumableTrainer, "_require_equal_ranks")],
    GUARDED: [(calling, "run_to_end")],
}
"""What is timed: owner and name of the functions, by what they are for."""


class Stopwatch:
    """Seconds by name, each moment counted once: for the function that was called last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._names: list[str] = []
        self._since = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the time inside for `name`; what is called outside of training counts for nothing."""
        if not self._names and name != GUARDED:
            yield
            return
        self._switch()
        self._names.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._switch()
            self._names.pop()

    def timing(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Returns the function, timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.timed(name):
                return function(*arguments, **keywords)

        return timed

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now


@contextmanager
def watched(stopwatch: Stopwatch) -> Iterator[None]:
    """Inside, guards, rewards and training are timed."""
    places = [(owner, name, guard) for guard, functions in GUARDS.items() for owner, name in functions]
    before = [vars(owner)[name] for owner, name, _ in places]
    train, score_all = ResumableTrainer.train, composite.score_all
    try:
        for (owner, name, guard), function in zip(places, before, strict=True):
            setattr(owner, name, stopwatch.timing(function, guard))
        ResumableTrainer.train = stopwatch.timing(train, GUARDED)  # type: ignore[method-assign]

        def score_all_timed(reward_funcs: Sequence[Any], *others: Any, **keywords: Any) -> Any:
            return score_all([stopwatch.timing(func, GUARDED) for func in reward_funcs], *others, **keywords)

        base.score_all = score_all_timed
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)
        ResumableTrainer.train, base.score_all = train, score_all  # type: ignore[method-assign]


def measure(method: str, steps: int, folder: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Runs one method's recipe.

    Args:
        method: refl, ddpo, finetune or rm.
        steps: Updates.
        folder: Where the run writes.
        flags: Further words of the command line.

    Returns:
        `share` of the training time inside guards, `train_s`, `guards_ms` per call and `guards_share` by guard.

    Raises:
        SystemExit: The run failed.
    """
    stopwatch = Stopwatch()
    words = [method, "--config", f"tiny/{method}", "--output_dir", str(folder / method), "--max_steps", str(steps)]
    # Neither guarded nor part of a step.
    words += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--disable_tqdm", "true"]
    if method in ("refl", "ddpo"):
        words += ["--eval_on_start", "false", "--max_eval_images", "1"]
    with watched(stopwatch):
        if code := app.main([*words, *flags]):
            raise SystemExit(code)
    total = sum(stopwatch.seconds.values())
    guards = [name for name in GUARDS if name != GUARDED and stopwatch.calls[name]]
    return {
        "share": sum(stopwatch.seconds[name] for name in guards) / total,
        "train_s": total,
        "steps": steps,
        "guards_share": {name: stopwatch.seconds[name] / total for name in guards},
        "guards_ms": {name: 1000 * stopwatch.seconds[name] / stopwatch.calls[name] for name in guards},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["refl", "ddpo"], choices=["refl", "ddpo", "finetune", "rm"])
    parser.add_argument("--steps", type=int, default=40, help="updates of each method")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    results = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            results[method] = measure(method, options.steps, Path(folder))
        result = results[method]
        print(f"\n{method}: {result['share']:.2%} of {result['train_s']:.0f} s of training in guards")
        for name, share in result["guards_share"].items():
            print(f"  {share:8.3%}  {result['guards_ms'][name]:9.3f} ms a call  {name}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
