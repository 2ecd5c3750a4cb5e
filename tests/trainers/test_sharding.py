"""Weights in shards; what needs several processes is in `test_parallel.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.sharding import is_sharded, own_shards, whole


def test_weights_that_are_not_sharded_stay_as_they_are() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    with whole(layer.parameters(), write=True):
        assert torch.equal(layer.weight, before)
    assert own_shards(layer) == {}
    assert not any(map(is_sharded, layer.parameters()))


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_keeps_judges_whole(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    told = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    RefRewardConfig(output_dir=str(tmp_path), use_cpu=True)
    assert not is_deepspeed_zero3_enabled()
    del told
