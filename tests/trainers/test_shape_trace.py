from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from refreward_trl.trainers.shape_trace import BLOCK, ShapeTrace, empty, without_content


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake(mode: FakeTensorMode, *shape: int) -> torch.Tensor:
    return empty(torch.empty(shape, device="meta"), mode)


def test_what_is_freed_is_given_back_and_the_peak_is_the_most_at_a_time(mode):
    x = fake(mode, 1024)
    with ShapeTrace() as trace:
        y = x * 2
        for _ in range(3):
            y = y * 2  # the old one is freed when the new one is there
        assert trace.live == 4096
        del y
        assert trace.live == 0
    assert trace.peak.size == 2 * 4096


def test_views_take_nothing(mode):
    x = fake(mode, 64, 64)
    with ShapeTrace() as trace:
        views = [x.view(-1), x[3:], x.transpose(0, 1), x.expand(2, 64, 64)]
    assert len(views) == 4 and trace.peak.size == 0 and trace.work.traffic == 0


def test_a_graph_keeps_its_activations_until_the_backward_pass_and_checkpointing_does_not(mode):
    layers = [nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh()))) for _ in range(8)]
    network = without_content(nn.Sequential(*layers), mode)
    sizes = {}
    for way in ("kept", "recomputed"):
        x = fake(mode, 256, 64)
        with ShapeTrace() as trace:
            for layer in network:
                x = layer(x) if way == "kept" else checkpoint(layer, x, use_reentrant=False)
            sizes[way] = trace.live
            x.sum().backward()
        network.zero_grad()
    image = 256 * 64 * 4
    assert sizes["kept"] == pytest.approx(24 * image, rel=0.05)
    assert sizes["recomputed"] == pytest.approx(8 * image, rel=0.05)


def test_operations_are_those_of_the_formulas(mode):
    linear = without_content(nn.Linear(32, 16, bias=False), mode)
    conv = without_content(nn.Conv2d(4, 8, 3, padding=1, bias=False), mode)
    with ShapeTrace() as trace, torch.no_grad():
        linear(fake(mode, 10, 32))
        conv(fake(mode, 2, 4, 16, 16))
    assert trace.work.matrix == 2 * 10 * 32 * 16
    assert trace.work.convolution == 2 * 2 * 8 * 16 * 16 * 4 * 9


def test_convolutions_fill_up_their_channels_on_a_cpu_alone(mode):
    conv = without_content(nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), mode)
    sizes = {}
    for cpu in (True, False):
        image = fake(mode, 1, 3, 32, 32)
        with ShapeTrace(conv_buffers=cpu) as trace, torch.no_grad():
            conv(image)
        sizes[cpu] = trace.peak.size
    assert sizes[False] == 3 * 32 * 32 * 4
    assert sizes[True] == 2 * BLOCK * 32 * 32 * 4


def test_code_that_looks_at_numbers_gets_neutral_ones(mode):
    x = fake(mode, 5)
    with ShapeTrace():
        assert bool(x.isfinite().all()) and x.sum().item() == 0.5
        assert x.isinf().nonzero().flatten().tolist() == []
        assert x[x > 0].shape == (5,)


def test_parts_are_named_by_the_module_that_took_them(mode):
    first, second = (without_content(nn.Linear(64, 64), mode) for _ in range(2))
    x = fake(mode, 128, 64).requires_grad_()
    with ShapeTrace() as trace, trace.naming({"first": first, "second": second}):
        y = second(first(x)) * 1
    assert y.shape == (128, 64)
    assert {name: size for name, size in trace.peak.parts.items() if size} == dict.fromkeys(
        ("first", "second", "other"), 128 * 64 * 4
    )


def test_networks_stay_where_they_are_and_keep_ties(mode):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    assert without_content(network, mode).to("meta") is network
    assert network[0].weight is network[1].weight and len(list(network.parameters())) == 3
