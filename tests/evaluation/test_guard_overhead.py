"""The overhead of the guards is only right if all of them are timed, and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "guard_overhead.py"


@pytest.mark.slow
def test_guards_are_timed_and_what_they_guard_is_not(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("guard_overhead", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    flags = ("--per_device_train_batch_size", "1", "--crop_size", "64", "--num_generations", "4", "--save_steps", "1")
    found = benchmark.measure("ddpo", 2, tmp_path, flags)
    alone = {"weights across ranks", benchmark.GUARDED}  # one process has nothing to compare
    assert found["guards_share"].keys() == benchmark.GUARDS.keys() - alone
    assert all(share > 0 for share in found["guards_share"].values())
    # Two steps of one image, each of them saved; a reward that counted as its guard would be most of a step.
    assert found["share"] < 0.2
