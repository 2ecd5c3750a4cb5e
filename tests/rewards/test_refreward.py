"""The judges as rewards: every kind of input, graphs, gaps, laziness, pickling."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from refreward_trl.data.images import to_float, to_pil, write_png
from refreward_trl.errors import CheckpointError, ConfigError, DataError, RewardError
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.rewards import HeldOutJudge, RefReward, reward_name, score_all
from refreward_trl.types import RewardFunction

SIZES = [(32, 32), (48, 32), (32, 32), (32, 32)]


def uint8_images(seed: int, divisor: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, height // divisor, width // divisor) for height, width in SIZES]
    return [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]


SR, LR = uint8_images(0), uint8_images(1, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    judge = build_tiny_judge(vision_dim=32, vision_depth=1, vision_heads=2, text_dim=64, text_layers=1, text_heads=2)
    # An untrained head rates everything alike; a larger one tells images apart.
    judge.model.lm_head.weight.data.mul_(30)
    judge.save_pretrained(root / "rate")
    ConvJudge(widths=(8, 16), hidden=8).save_pretrained(root / "conv")
    return root


@pytest.fixture(params=[RefReward, HeldOutJudge])
def reward(request, folders):
    return request.param.from_pretrained(folders / ("rate" if request.param is RefReward else "conv"), device="cpu")


def call(reward, completions, lr_image, **columns):
    return reward(
        prompts=[""] * len(completions), completions=completions, lr_image=lr_image, completion_ids=None, **columns
    )


def test_score_reads_every_kind_of_image_alike(reward, tmp_path):
    expected = reward.score(LR, SR)
    assert [type(value) for value in expected] == [float] * 4
    assert len({round(value, 6) for value in expected}) == 4
    for row, (lr_image, sr_image) in enumerate(zip(LR, SR, strict=True)):
        write_png(tmp_path / f"lr{row}.png", lr_image)
        write_png(tmp_path / f"sr{row}.png", sr_image)
    paths = [tmp_path / f"lr{row}.png" for row in range(4)], [str(tmp_path / f"sr{row}.png") for row in range(4)]
    assert reward.score(*paths) == expected
    assert reward.score(list(map(to_pil, LR)), list(map(to_pil, SR))) == expected
    assert reward.score(list(map(to_float, LR)), tuple(map(to_float, SR))) == expected
    single = reward.score(paths[0][1], to_pil(SR[1]))
    assert isinstance(single, float)
    assert single == pytest.approx(expected[1], abs=1e-5)
    batch = reward.score(torch.stack([LR[0], LR[2], LR[3]]), to_float(torch.stack([SR[0], SR[2], SR[3]])))
    assert batch == pytest.approx([expected[0], expected[2], expected[3]], abs=1e-5)


def test_one_lr_image_serves_all_its_candidates(reward):
    candidates = [SR[0], SR[2], SR[3]]
    assert reward.score(LR[0], candidates) == reward.score([LR[0]] * 3, candidates)


def test_the_lr_image_matters(reward):
    assert reward.score(LR[2], SR[0]) != reward.score(LR[0], SR[0])


def test_micro_batches_change_nothing(reward):
    whole = reward.score(LR, SR)
    reward.batch_size = 1
    assert reward.score(LR, SR) == pytest.approx(whole, abs=1e-5)


def test_recomputing_the_judge_changes_neither_rewards_nor_gradients_and_keeps_less(reward):
    batch = torch.stack([to_float(image) for image in (SR[0], SR[2], SR[3])])
    targets = torch.stack([to_float(image) for image in (LR[0], LR[2], LR[3])])
    found = {}
    for checkpoint in (False, True):
        reward.checkpoint, reward.batch_size = checkpoint, 2
        images = batch.clone().requires_grad_()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            scores = call(reward, images, targets)
        scores.sum().backward()
        found[checkpoint] = scores.detach(), images.grad, sum(kept)
    assert torch.equal(found[True][0], found[False][0])
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-5, atol=0)
    assert found[False][1].abs().max() > 0
    assert found[True][2] < 0.2 * found[False][2]


def test_call_equals_score_and_is_plain_without_a_graph(reward):
    expected = reward.score(LR, SR)
    for completions in (SR, list(map(to_float, SR)), list(map(to_pil, SR))):
        for lr_image in (LR, list(map(to_pil, LR))):
            values = call(reward, completions, lr_image, hr_image=SR, trainer_state=None, log_metric=print)
            assert values == expected
            assert [type(value) for value in values] == [float] * 4


def test_call_returns_a_graph_to_the_pixels_and_leaves_the_judge_alone(reward):
    sr_image = to_float(torch.stack([SR[0], SR[2]])).requires_grad_()
    lr_image = torch.stack([LR[0], LR[2]])
    values = call(reward, sr_image, lr_image)
    assert values.shape == (2,) and values.requires_grad and values.dtype == torch.float32
    assert values.tolist() == pytest.approx(reward.score(lr_image, sr_image.detach()), abs=1e-5)
    (gradient,) = torch.autograd.grad(values[0], sr_image, retain_graph=True)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0
    values.sum().backward()
    network = reward.judge if isinstance(reward.judge, nn.Module) else reward.judge.model
    assert not network.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    step = 1e-3 * gradient[0].sign()
    assert reward.score(LR[0], (sr_image[0].detach() + step).clamp(0, 1)) > values[0].item()


def test_a_list_with_one_image_that_requires_grad_gives_a_graph(reward):
    completions = [to_float(SR[0]), to_float(SR[1]).requires_grad_(), None]
    values = call(reward, completions, LR[:3])
    assert values.requires_grad and math.isnan(values[2].item())
    values.nansum().backward()
    assert completions[1].grad.abs().sum() > 0


def test_no_graph_under_no_grad_and_none_from_autocast(reward):
    sr_image = to_float(torch.stack([SR[0], SR[2]])).requires_grad_()
    lr_image = to_float(torch.stack([LR[0], LR[2]]))
    expected = reward.score(lr_image, sr_image.detach())
    assert [type(value) for value in reward.score(lr_image, sr_image)] == [float, float]
    with torch.no_grad():
        assert call(reward, sr_image, lr_image) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reward.score(lr_image, sr_image.detach()) == expected


def test_a_completion_that_is_none_is_not_scored(reward):
    values = call(reward, [SR[0], None, SR[2]], LR[:3])
    assert values[1] is None
    assert [values[0], values[2]] == pytest.approx(reward.score([LR[0], LR[2]], [SR[0], SR[2]]), abs=1e-5)
    assert call(reward, [None, None], LR[:2]) == [None, None]


@pytest.mark.parametrize(
    ("lr_image", "sr_image", "message"),
    [
        (LR[0], SR[1][:, :30], "whole multiple"),
        (LR[1], SR[0], "whole multiple"),
        (SR[0], LR[0], "whole multiple"),
        (SR[0], SR[0], "whole multiple"),
        (LR[0], to_float(SR[0]) * 255, r"in \[0, 1\]"),
        (LR[0], to_float(SR[0]).fill_(math.nan), "nan"),
        (None, SR[0], "lr_image"),
        ("nowhere.png", SR[0], "nowhere.png"),
    ],
)
def test_pairs_that_make_no_sense_are_refused_by_name(reward, lr_image, sr_image, message):
    with pytest.raises(DataError, match=message):
        reward.score(lr_image, sr_image)
    if lr_image is not None:
        with pytest.raises(DataError, match="nowhere" if lr_image == "nowhere.png" else "sample 'fox@3'"):
            call(reward, [SR[0], sr_image], [LR[0], lr_image], sample_id=["elk@0", "fox@3"])


def test_score_refuses_a_missing_image(reward):
    with pytest.raises(DataError, match="sr_image"):
        reward.score(LR[:2], [SR[0], None])


def test_nothing_is_loaded_before_the_first_score():
    reward = RefReward.from_pretrained("no/such/folder", dtype="bfloat16")
    assert (reward_name(reward), reward_name(HeldOutJudge())) == ("refreward", "heldout_judge")
    with pytest.raises(CheckpointError, match="no/such/folder"):
        reward.score(LR[0], SR[0])


def test_it_pickles_and_copies_without_its_network(reward):
    expected = reward.score(LR[0], SR[0])
    packed = pickle.dumps(reward)
    assert len(packed) < 1000
    for clone in (pickle.loads(packed), copy.deepcopy(reward)):
        assert clone._judge is None
        assert clone.score(LR[0], SR[0]) == expected
    assert reward._judge is not None


def test_it_is_a_reward_and_no_module(reward):
    assert isinstance(reward, RewardFunction)
    assert not isinstance(reward, nn.Module)


def test_it_scores_in_lower_precision(folders):
    full, half = (RefReward.from_pretrained(folders / "rate", device="cpu", dtype=t) for t in (None, "bfloat16"))
    scores, rounded = full.score(LR, SR), half.score(LR, SR)
    assert next(half.judge.model.parameters()).dtype == torch.bfloat16
    assert rounded != scores
    assert rounded == pytest.approx(scores, abs=0.5)


def test_a_broken_judge_is_no_missing_score(folders, tmp_path):
    judge = ConvJudge.from_pretrained(folders / "conv")
    judge.head[0].weight.data[0, 0] = math.nan
    judge.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"reward 'heldout_judge': the judge .* not finite"):
        HeldOutJudge.from_pretrained(tmp_path, device="cpu").score(LR, SR)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"dtype": "float8"}, {"dtype": torch.int8}])
def test_bad_arguments_are_refused_at_once(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        RefReward.from_pretrained("default", **arguments)


def test_score_all_keeps_the_judges_graph(folders):
    reward = RefReward.from_pretrained(folders / "rate", device="cpu")
    sr_image = to_float(torch.stack([SR[0], SR[2]])).requires_grad_()
    table = score_all([reward], None, [2.0], completions=sr_image, lr_image=torch.stack([LR[0], LR[2]]))
    table.total.sum().backward()
    assert sr_image.grad.abs().sum() > 0
    assert list(table.per_reward) == ["refreward"]
