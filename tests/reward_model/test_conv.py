import json
from pathlib import Path

import pytest
import torch

from refreward_trl.errors import CheckpointError, DataError
from refreward_trl.reward_model.conv import CONFIG_FILE, WEIGHTS_FILE, ConvJudge


@pytest.fixture
def judge() -> ConvJudge:
    return ConvJudge(widths=(8, 16), hidden=8).eval()


def test_default_size() -> None:
    assert sum(weight.numel() for weight in ConvJudge().parameters()) == 292_065


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, 4), (28, 44, 4), (36, 30, 3), (16, 16, 1)])
def test_any_size_is_scored(judge: ConvJudge, height: int, width: int, scale: int) -> None:
    scores = judge(torch.rand(2, 3, height // scale, width // scale), torch.rand(2, 3, height, width))
    assert scores.shape == (2,)
    assert scores.isfinite().all()


def test_lr_image_and_pixels_matter(judge: ConvJudge) -> None:
    lr_image, sr_image = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 32, 32, requires_grad=True)
    scores = judge.rate(lr_image, sr_image)
    scores.sum().backward()
    assert sr_image.grad is not None
    assert (sr_image.grad != 0).float().mean() > 0.99
    assert (scores - judge.rate(lr_image.roll(1, 0), sr_image)).abs().min() > 1e-5


def test_rate_builds_no_graph_without_need(judge: ConvJudge) -> None:
    assert not judge.rate(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 32, 32)).requires_grad


def test_one_bad_spot_is_not_averaged_away(judge: ConvJudge) -> None:
    pooled = []
    judge.head.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    lr_image, clean = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 128, 128), 0.5)
    spot = clean.clone()
    spot[..., 60:68, 60:68] = 1.0
    judge.rate(lr_image, clean)
    judge.rate(lr_image, spot)
    change = (pooled[1] - pooled[0]).abs()[0]
    mean, strongest = change[:8], change[8:16]  # of the stem's 8 channels
    assert strongest.max() > 5 * mean.max()


def test_save_and_load(judge: ConvJudge, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path)
    again = ConvJudge.from_pretrained(tmp_path)
    pair = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    assert torch.equal(again(*pair), judge(*pair))
    assert not any(weight.requires_grad for weight in again.parameters())


def test_half_precision_file_loads_as_float32(judge: ConvJudge, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path, dtype=torch.float16)
    again = ConvJudge.from_pretrained(tmp_path)
    assert {weight.dtype for weight in again.parameters()} == {torch.float32}


def test_seed_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(ConvJudge(seed=2).stem.weight, ConvJudge(seed=2).stem.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_damaged_folders_are_refused(judge: ConvJudge, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=CONFIG_FILE):
        ConvJudge.from_pretrained(tmp_path)
    judge.save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content | {"widths": [8, 24]}))
    with pytest.raises(CheckpointError, match="do not fit"):
        ConvJudge.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="version 9"):
        ConvJudge.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        ConvJudge.from_pretrained(tmp_path)


def test_sizes_that_do_not_fit_are_refused(judge: ConvJudge) -> None:
    with pytest.raises(DataError, match="33x32"):
        judge(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 33, 32))
