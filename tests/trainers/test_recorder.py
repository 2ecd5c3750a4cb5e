"""Metrics are averaged over steps and ranks, without what is undefined, and survive a checkpoint."""

from __future__ import annotations

import json
import math

import torch

from refreward_trl.trainers.recorder import MetricRecorder


def alone(own: list) -> list:
    return own


def test_mean_leaves_out_nan_and_starts_anew() -> None:
    recorder = MetricRecorder()
    recorder.record({"reward": torch.tensor(1.0), "kl": math.nan})
    recorder.record({"reward": math.nan, "kl": math.nan})
    recorder.record({"reward": 3.0})
    means = recorder.flush(alone)
    assert means["reward"] == 2.0
    assert math.isnan(means["kl"])
    assert recorder.flush(alone) == {}


def test_ranks_count_by_their_number_of_values() -> None:
    one, two = MetricRecorder(), MetricRecorder()
    one.record({"reward": 1.0})
    one.record({"reward": 2.0})
    two.record({"reward": 6.0, "only_here": 5.0})
    sums: list = []
    two.flush(lambda own: sums.extend(own) or own)
    assert one.flush(lambda own: own + sums) == {"reward": 3.0, "only_here": 5.0}


def test_a_saved_state_gives_the_same_mean_to_the_last_bit() -> None:
    values = torch.rand(7, generator=torch.Generator().manual_seed(0)).tolist()
    whole, before, after = MetricRecorder(), MetricRecorder(), MetricRecorder()
    for value in values:
        whole.record({"loss": value})
    for value in values[:3]:
        before.record({"loss": value})
    after.load_state(json.loads(json.dumps(before.state())))
    for value in values[3:]:
        after.record({"loss": value})
    assert after.flush(alone) == whole.flush(alone)
