"""A rank that dies, fails or hangs ends the job on all ranks, and somebody says which one, where and when."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faulty_reward import Faulty
from launching import PATIENCE, ended, furnish, left_over, needs_deepspeed, started

from refreward_trl.errors import RewardError, TrainingError

pytestmark = pytest.mark.faults

TIMEOUT = 2.0
FAULTS = ("killed", "raises", "sleeps", "stuck")


def train(harness: SimpleNamespace, kind: str, folder: Path, faulty: Faulty) -> None:
    changes = {"num_iterations": 1} if kind.startswith("ddpo") else {}
    trainer = harness.make_trainer(
        kind, folder, self_check=False, reward_timeout=TIMEOUT, eval_strategy="no", **changes
    )
    trainer.reward_funcs, trainer.reward_names = [faulty], ["server"]
    trainer.train()


@pytest.mark.parametrize("kind", ["refl-lora", "ddpo-lora"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_rank_ends_both(
    harness: SimpleNamespace, tally: Callable[[str], Any], tmp_path: Path, fault: str, rank: int, kind: str
) -> None:
    """Without a launcher, so that nobody but the ranks themselves can notice."""
    log = tmp_path / "run.log"
    with tally("lost-rank").trial():
        codes = harness.in_ranks(functools.partial(train, harness, kind, tmp_path / "run", Faulty(fault, rank)), log)
        codes = [code for code, _ in codes]
        faulty, other = (harness.rank_log(log, number).read_text() for number in (rank, 1 - rank))
        if fault in ("raises", "sleeps"):
            reason = "raised ConnectionError: the server" if fault == "raises" else "did not return within 2 seconds"
            assert codes == [RewardError.exit_code] * 2, faulty + other
            assert "RewardError: step 3, samples photo" in faulty
            assert f": reward 'server': {reason}" in faulty
            assert f": reward 'server': rank {rank} stopped: {reason}" in other
        else:
            assert codes[rank] == (-signal.SIGKILL if fault == "killed" else RewardError.exit_code), faulty
            assert codes[1 - rank] == TrainingError.exit_code, other
            lost = f"rank {1 - rank} has lost rank {rank}, which died or does not answer (own samples: photo"
            assert f"TrainingError: step 3: {lost}" in other
        if fault == "stuck":
            assert f"[rank {rank}] error: step 3, samples photo" in faulty
            assert "reward 'server': did not return within 2 seconds, and cannot be interrupted" in faulty


LAUNCHED = [
    ("killed", 0, "ddp_cpu.yaml", "rank 1 has lost rank 0"),
    ("raises", 1, "ddp_cpu.yaml", "reward 'server': raised ConnectionError: the server is gone"),
    ("stopped", 1, "ddp_cpu.yaml", "rank 0 has lost rank 1"),
    pytest.param("killed", 1, "zero2.yaml", "rank 0 has lost rank 1", marks=needs_deepspeed),
    pytest.param("stuck", 0, "zero2.yaml", "did not return within 5 seconds", marks=needs_deepspeed),
]


def launched(place: Path, launch_file: str | None, fault: str, rank: int) -> Any:
    recipe = furnish(place) / "recipe.yaml"
    entry = f"{{name: faulty_reward.Faulty, kwargs: {{fault: {fault}, rank: {rank}}}}}"
    recipe.write_text(recipe.read_text().replace("{name: psnr}", entry))
    # The ranks load at different speeds, for which a rank has to wait as well; DeepSpeed may compile.
    timeouts = ("--reward_timeout", "5", "--ddp_timeout", "120" if launch_file == "zero2.yaml" else "30")
    return started(place, launch_file, "--max_steps", "100", "--save_steps", "100", *timeouts)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rank", "launch_file", "message"), LAUNCHED)
def test_one_rank_ends_the_launch(
    tally: Callable[[str], Any], tmp_path: Path, fault: str, rank: int, launch_file: str, message: str
) -> None:
    with tally("lost-rank-launched").trial():
        process = launched(tmp_path, launch_file, fault, rank)
        done = ended(process, timeout=PATIENCE)
        assert done.returncode == 1
        told = [line for line in done.stderr.splitlines() if message in line]
        assert len(told) == 1, done.stderr[-4000:]
        assert "error: step 3" in told[0] and "@" in told[0], "it names the samples"
        assert left_over(process) == []


@pytest.mark.slow
def test_a_thread_that_a_reward_leaves_behind_does_not_keep_the_process(tmp_path: Path) -> None:
    """The interpreter would wait an hour for it."""
    process = launched(tmp_path, None, "threads", 0)
    done = ended(process, timeout=PATIENCE)
    assert done.returncode == RewardError.exit_code
    assert "reward 'server': did not return within 5 seconds" in done.stderr
    assert left_over(process) == []
