"""The overhead benchmark is only fair if its bare loops compute what the trainers compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "trainer_overhead.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("refl", ("--per_device_train_batch_size", "1", "--crop_size", "64")),
        ("ddpo", ("--per_device_train_batch_size", "1", "--crop_size", "64", "--num_generations", "4")),
        ("finetune", ("--per_device_train_batch_size", "1", "--crop_size", "64")),
        ("rm", ("--per_device_train_batch_size", "1")),
    ],
)
def test_bare_loop_and_trainer_follow_the_same_losses(method: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("trainer_overhead", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure(method, 1, tmp_path, flags)
    assert found["first_loss_difference"] < 1e-3
    assert found["largest_loss_difference"] < 5e-2
    assert found["median_ratio"] > 0.5
