import pytest
import torch

from refreward_trl.errors import ConfigError
from refreward_trl.reward_model.tiny import build_tiny_judge, build_tiny_tokenizer, dct_basis, dct_initialize


def test_default_size() -> None:
    judge = build_tiny_judge()
    assert sum(weight.numel() for weight in judge.model.parameters()) == 1_613_920
    assert judge.model.training


def test_seed_decides_and_leaves_the_global_state_alone() -> None:
    size = {"vision_dim": 32, "vision_depth": 1, "vision_heads": 4, "text_dim": 32, "text_layers": 1, "text_heads": 2}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = (build_tiny_judge(**size, seed=seed).model.lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_dct_basis_is_orthonormal() -> None:
    basis = dct_basis(8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), rtol=0, atol=1e-6)


def test_patch_embedding_starts_from_differences() -> None:
    weight = torch.empty(128, 3, 2, 8, 8)
    dct_initialize(weight)
    same = torch.rand(3, 1, 8, 8).expand(-1, 2, -1, -1)
    response = torch.einsum("dctyx,ctyx->d", weight, same)
    difference_rows = [*range(51), *range(102, 118)]
    assert response[difference_rows].abs().max() < 1e-5
    sr_rows = weight[51:102]
    assert sr_rows[:, :, 0].abs().max() == 0
    assert sr_rows[:, :, 1].abs().amax((1, 2, 3)).min() > 0


def test_patch_embedding_of_single_images_starts_from_their_frequencies() -> None:
    weight = torch.empty(64, 3, 2, 8, 8)
    dct_initialize(weight, clip=False)
    frames = torch.rand(5, 3, 2, 8, 8)
    response = torch.einsum("dctyx,bctyx->bd", weight[:64], frames)
    swapped = torch.einsum("dctyx,bctyx->bd", weight[:64], frames.flip(2))
    torch.testing.assert_close(response, swapped, rtol=0, atol=1e-5)
    flat = torch.einsum("dctyx,ctyx->d", weight, torch.full((3, 2, 8, 8), 0.5)).abs()
    assert flat[0] > 0.1 and flat[1:].max() < 1e-3, "but for the mean, a grey patch has nothing to show"


@pytest.mark.parametrize("rows", [8, 32, 200])
@pytest.mark.parametrize("clip", [True, False])
def test_any_width_can_be_initialised(rows: int, clip: bool) -> None:
    weight = torch.full((rows, 3, 2, 8, 8), torch.nan)
    dct_initialize(weight, clip=clip)
    assert weight.isfinite().all()


def test_tokenizer_knows_single_digits() -> None:
    tokenizer = build_tiny_tokenizer()
    assert len(tokenizer) == 32
    assert len({tuple(tokenizer(digit).input_ids) for digit in "12345"}) == 5
    assert all(len(tokenizer(digit).input_ids) == 1 for digit in "12345")


@pytest.mark.parametrize("size", [{"vision_dim": 36}, {"text_dim": 161}, {"text_heads": 20}])
def test_heads_that_do_not_divide_are_refused(size: dict) -> None:
    with pytest.raises(ConfigError, match="heads"):
        build_tiny_judge(**size)
