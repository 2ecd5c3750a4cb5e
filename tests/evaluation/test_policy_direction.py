"""The benchmark of noise on the shipped generator and judge, small: few directions point better than many."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "policy_direction.py"


@pytest.mark.slow
def test_residual_noise_points_along_the_gradient_of_the_reward() -> None:
    spec = importlib.util.spec_from_file_location("policy_direction", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    # As many crops as by default: with few, the gradient to compare with is itself mostly noise.
    rows = benchmark.measure(benchmark.lr_batches(10, 16, 0), 8, 0, [("residual", 8, 0.05), ("white", 1, 0.05)])
    residual, white = rows
    assert residual["coordinates"] == 16 and white["coordinates"] == 8 * 32 * 32
    assert residual["cosine"] > 0.15
    assert residual["cosine"] > white["cosine"] + 0.1
    assert all(row["group_std"] > 0 for row in rows)
