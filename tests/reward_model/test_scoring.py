import copy
import pickle

import pytest
import torch
from tiny_judges import judge_inputs
from torch.nn import functional as F

from refreward_trl.errors import CheckpointError, DataError
from refreward_trl.reward_model.preprocess import split_tiles
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.reward_model.vision_attention import batched_vision_attention

Images = tuple[torch.Tensor, torch.Tensor]


def test_ratings_lie_in_the_range_and_differ(judge: RateJudge, images: Images) -> None:
    ratings = judge.rate(*images)
    assert ratings.shape == (5,)
    assert not ratings.requires_grad
    assert ((ratings > 1) & (ratings < 5)).all()
    assert ratings.std() > 1e-3


def test_rating_is_the_expectation_over_the_rating_tokens(judge: RateJudge, images: Images) -> None:
    ids = judge.tokenizer.convert_tokens_to_ids(["1", "2", "3", "4", "5"])
    inputs = {}

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.update(kwargs)

    with judge.model.register_forward_pre_hook(keep, with_kwargs=True):
        ratings = judge.rate(*images)
    logits = judge.model(**inputs | {"logits_to_keep": 0}).logits[:, -1]
    probabilities = logits[:, ids].softmax(-1)
    torch.testing.assert_close(ratings, probabilities @ torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))


@pytest.mark.parametrize("name", ["judge", "image_judge"])
def test_gradient_points_uphill(name: str, images: Images, request: pytest.FixtureRequest) -> None:
    judge = request.getfixturevalue(name)
    lr_image, sr_image = images[0], images[1].clone().requires_grad_()
    rating = judge.rate(lr_image, sr_image).sum()
    (gradient,) = torch.autograd.grad(rating, sr_image)
    assert (gradient != 0).float().mean() > 0.99
    step = 1e-2 * gradient / gradient.norm()
    up = judge.rate(lr_image, sr_image.detach() + step).sum()
    down = judge.rate(lr_image, sr_image.detach() - step).sum()
    torch.testing.assert_close((up - down) / 2e-2, gradient.norm(), rtol=2e-2, atol=1e-4)


def test_weights_get_no_gradient_from_a_reward(judge: RateJudge, images: Images) -> None:
    judge.rate(images[0], images[1].clone().requires_grad_()).sum().backward()
    assert all(weight.grad is None for weight in judge.model.parameters())


@pytest.mark.parametrize("name", ["judge", "image_judge"])
def test_the_lr_image_matters(name: str, images: Images, request: pytest.FixtureRequest) -> None:
    judge = request.getfixturevalue(name)
    lr_image, sr_image = images
    assert (judge.rate(lr_image, sr_image) - judge.rate(lr_image.roll(1, 0), sr_image)).abs().min() > 1e-4


@pytest.mark.parametrize("name", ["judge", "image_judge"])
def test_scores_do_not_depend_on_the_batch(name: str, images: Images, request: pytest.FixtureRequest) -> None:
    judge = request.getfixturevalue(name)
    alone = torch.cat([judge.rate(images[0][i : i + 1], images[1][i : i + 1]) for i in range(5)])
    torch.testing.assert_close(judge.rate(*images), alone, rtol=0, atol=1e-5)
    judge.batch_size = 2
    torch.testing.assert_close(judge.rate(*images), alone, rtol=0, atol=1e-5)


def test_no_graph_is_built_for_the_weights_of_a_judge_in_training(judge: RateJudge, images: Images) -> None:
    judge.model.requires_grad_(True)
    assert not judge.rate(*images).requires_grad


def test_more_clips_than_tokens_per_row(judge: RateJudge) -> None:
    # transformers 5.23 raises StopIteration here unless it is told the seconds per grid.
    lr_image, sr_image = torch.rand(40, 3, 4, 4), torch.rand(40, 3, 16, 16)
    inputs = judge_inputs(judge, lr_image, sr_image)
    assert inputs["input_ids"].shape[1] < 40
    assert judge.model(**inputs).logits.shape[0] == len(judge.rate(lr_image, sr_image)) == 40


@pytest.mark.parametrize("name", ["judge", "image_judge"])
def test_positions_are_those_that_transformers_computes(
    name: str, images: Images, request: pytest.FixtureRequest
) -> None:
    judge = request.getfixturevalue(name)
    ours = judge.rating_logits(*images)
    judge._position_ids = lambda prompt, visuals: None  # type: ignore[method-assign,return-value]
    torch.testing.assert_close(ours, judge.rating_logits(*images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["judge", "image_judge"])
def test_batched_attention_equals_the_stock_path(name: str, images: Images, request: pytest.FixtureRequest) -> None:
    judge = request.getfixturevalue(name)
    stock = judge.rating_logits(*images)
    with batched_vision_attention(judge.model):
        assert judge.model.config.vision_config._attn_implementation != "sdpa"
        assert judge.model.config.text_config._attn_implementation == "sdpa"
        fast = judge.rating_logits(*images)
    assert judge.model.config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(fast, stock, rtol=0, atol=1e-6)


def test_batched_attention_calls_sdpa_once_per_layer(
    judge: RateJudge, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = F.scaled_dot_product_attention

    def count(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    judge.rate(*images)
    assert len(calls) == 2  # one vision layer, one text layer


def test_batched_attention_handles_windows_of_different_sizes() -> None:
    judge = build_tiny_judge(vision_dim=32, vision_depth=2, vision_heads=4, text_dim=32, text_layers=1, text_heads=2)
    visual = judge.model.model.visual
    visual.fullatt_block_indexes = [1]  # the other layer attends inside windows of 64 px, cut at the border
    patches = torch.rand(2 * 6 * 10, 384)
    grid = torch.tensor([[1, 6, 10], [1, 6, 10]])
    with torch.no_grad():
        stock = visual(patches, grid_thw=grid).pooler_output
        with batched_vision_attention(judge.model):
            fast = visual(patches, grid_thw=grid).pooler_output
    torch.testing.assert_close(fast, stock, rtol=0, atol=1e-6)


def test_batched_attention_leaves_other_implementations_alone(judge: RateJudge) -> None:
    judge.model.set_attn_implementation("eager")
    with batched_vision_attention(judge.model):
        assert judge.model.config.vision_config._attn_implementation == "eager"


def test_large_images_get_the_mean_of_their_tiles(judge: RateJudge) -> None:
    lr_image, sr_image = torch.rand(2, 3, 12, 20), torch.rand(2, 3, 48, 80)
    expected = torch.stack(
        [
            judge.rate(lr_image[..., y : y + 8, x : x + 8], sr_image[..., 4 * y : 4 * y + 32, 4 * x : 4 * x + 32])
            for y in (0, 4)
            for x in (0, 8, 12)
        ]
    ).mean(0)
    torch.testing.assert_close(judge.rate(lr_image, sr_image), expected, rtol=0, atol=1e-5)


def test_gradient_reaches_every_tile(judge: RateJudge) -> None:
    sr_image = torch.rand(1, 3, 48, 80, requires_grad=True)
    judge.rate(torch.rand(1, 3, 12, 20), sr_image).sum().backward()
    assert sr_image.grad is not None
    assert (sr_image.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("height", "width", "scale", "tile", "sides"),
    [
        (16, 16, 4, 32, (16, 16)),  # smaller than a tile, on the patch grid: whole
        (20, 24, 4, 32, (32, 32)),  # smaller than a tile, off the patch grid: padded
        (20, 80, 4, 32, (32, 32)),
        (96, 96, 3, 64, (48, 48)),  # 64 is no multiple of scale 3: the largest fitting tile
        (128, 128, 1, 32, (32, 32)),
    ],
)
def test_tiles_are_aligned_and_cover(height: int, width: int, scale: int, tile: int, sides: tuple) -> None:
    # Every SR pixel carries the index of its LR pixel.
    rows, columns = height // scale, width // scale
    lr_image = torch.arange(rows * columns, dtype=torch.float32).view(1, 1, rows, columns).expand(1, 3, -1, -1)
    sr_image = lr_image.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    lr_tiles, sr_tiles, count = split_tiles(lr_image, sr_image, JudgeSpec(tile=tile))
    assert sr_tiles.shape == (count, 3, *sides)
    assert torch.equal(lr_tiles.repeat_interleave(scale, -1).repeat_interleave(scale, -2), sr_tiles)
    assert set(sr_tiles.unique().tolist()) == set(sr_image.unique().tolist())


def test_tiles_of_one_image_stay_together() -> None:
    sr_image = torch.stack([torch.zeros(3, 32, 64), torch.ones(3, 32, 64)])
    lr_tiles, sr_tiles, count = split_tiles(sr_image[..., ::4, ::4], sr_image, JudgeSpec(tile=32))
    assert count == 2
    assert sr_tiles.mean((1, 2, 3)).tolist() == lr_tiles.mean((1, 2, 3)).tolist() == [0, 0, 1, 1]


def test_sizes_that_do_not_fit_are_refused(judge: RateJudge) -> None:
    with pytest.raises(DataError, match="30x32 is not an integer multiple of LR size 8x8"):
        judge.rate(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 30, 32))


def test_parts_that_do_not_belong_together_are_refused(judge: RateJudge) -> None:
    with pytest.raises(CheckpointError, match="patch 16"):
        RateJudge(judge.model, judge.tokenizer, JudgeSpec(patch=16, merge=2))
    model = copy.deepcopy(judge.model)
    model.config.video_token_id = 5
    with pytest.raises(CheckpointError, match="id 6 in the tokenizer and 5"):
        RateJudge(model, judge.tokenizer, judge.spec)


def test_judge_pickles(judge: RateJudge, images: Images) -> None:
    again = pickle.loads(pickle.dumps(judge))
    assert torch.equal(again.rate(*images), judge.rate(*images))
