"""The readers of foreign networks, and the climb, on cases with known results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from refreward_trl.errors import ConfigError
from refreward_trl.resampling import downscale

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "judge_real_outputs.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("judge_real_outputs", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_tfjs_network_enlarges_each_colour(benchmark: ModuleType, tmp_path: Path) -> None:
    kernel = np.tile(np.eye(3, dtype="<f4"), (1, 1, 1, 16))  # depth_to_space: the colour is the fastest part
    (tmp_path / "weights.bin").write_bytes(kernel.tobytes())
    layers = [
        {"class_name": "InputLayer", "config": {"name": "LR"}, "inbound_nodes": []},
        {"class_name": "Conv2D", "config": {"name": "conv", "activation": "linear"}, "inbound_nodes": [[["LR", 0]]]},
        {"class_name": "PixelShuffle4x", "config": {"name": "SR", "scale": 4}, "inbound_nodes": [[["conv", 0]]]},
    ]
    config = {"layers": layers, "input_layers": [["LR", 0, 0]], "output_layers": [["SR", 0, 0]]}
    manifest = [{"paths": ["weights.bin"], "weights": [{"name": "conv/kernel", "shape": [1, 1, 3, 48]}]}]
    model = {"modelTopology": {"model_config": {"config": config}}, "weightsManifest": manifest}
    (tmp_path / "model.json").write_text(json.dumps(model))
    lr_image = torch.rand(2, 3, 5, 6)
    expected = lr_image.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(benchmark.read_tfjs(tmp_path).enlarge(lr_image), expected)


def test_ncnn_network_reads_half_precision_and_biases(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "net.param").write_text(
        "7767517\n3 3\nInput in 0 1 data\nConvolution c 1 1 data mid 0=3 1=1 4=0 5=1 6=9 9=2 -23310=1,2.0e-01\n"
        "Interp up 1 1 mid output 0=1 1=4.0 2=4.0\n"
    )
    kernel = -np.eye(3, dtype="<f2")
    flag = benchmark.NCNN_HALF.to_bytes(4, "little")
    bias = np.full(3, 0.5, dtype="<f4")
    data = flag + kernel.tobytes() + b"\0\0" + bias.tobytes()  # 18 bytes of kernel are padded to 20
    (tmp_path / "net.bin").write_bytes(data)
    lr_image = torch.rand(1, 3, 4, 4)
    expected = torch.nn.functional.leaky_relu(0.5 - lr_image, 0.2).clamp(0, 1)
    expected = expected.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(benchmark.read_ncnn(tmp_path / "net").enlarge(lr_image), expected)
    (tmp_path / "net.bin").write_bytes(data + b"\0\0\0\0")
    with pytest.raises(ConfigError, match="belong to no layer"):
        benchmark.read_ncnn(tmp_path / "net")


def test_missing_network_names_the_fix(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="esrgan-slim"):
        benchmark.read_upscalers(tmp_path, ["esrgan-slim"])


def test_steps_have_their_length_and_the_anchor_holds(benchmark: ModuleType) -> None:
    start = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25

    def brightness(lr_image: torch.Tensor, sr_image: torch.Tensor) -> torch.Tensor:
        return sr_image.mean(dim=(1, 2, 3))

    one = benchmark.Ascent(steps=1, step_size=2.0, lr_weight=0.0, pixel_weight=0.0, smooth=0.0)
    moved = (one.climb(brightness, start, start) - start).square().mean(dim=(1, 2, 3)).sqrt() * 255
    torch.testing.assert_close(moved, torch.full((2,), 2.0))
    drifts = []
    for weight in (0.0, 10.0):
        ascent = benchmark.Ascent(steps=10, step_size=2.0, lr_weight=weight, pixel_weight=0.0, smooth=0.0)
        end = ascent.climb(brightness, start, start)
        drifts.append(float((downscale(end, 4) - downscale(start, 4)).abs().mean()))
    assert drifts[1] < 0.2 * drifts[0]


def test_agreement_counts_pairs_within_a_crop(benchmark: ModuleType) -> None:
    oracle = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    found = benchmark._agreements({"score": np.array([[1.0, 2.0, 3.0]] * 2)}, {"oracle": oracle}, ["a", "b"])
    assert found["score"]["oracle"]["mean"] == 0.5
