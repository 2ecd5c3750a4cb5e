from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from refreward_trl.errors import ConfigError
from refreward_trl.generators.policies import NOISE_KINDS, REFUSED_FORMULATIONS, GaussianLatentPolicy
from refreward_trl.randomness import stateless_generator

SIGMA = 0.05


def mean_latent(batch: int = 2, channels: int = 3, height: int = 10, width: int = 7) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [stateless_generator(seed, "test", k) for k in range(count)]


def policy_of(mean: Tensor, noise: str, cell: int = 4, sigma: float = SIGMA, row: int = 0) -> GaussianLatentPolicy:
    """A policy of any kind; `row` is where the means stand among those of a larger batch."""
    directions = torch.randn(8, *mean.shape[1:], generator=torch.Generator().manual_seed(5))
    direction = directions[row : row + len(mean)] if noise == "residual" else None
    return GaussianLatentPolicy(mean, sigma, noise, cell, direction)


@pytest.mark.parametrize("noise", NOISE_KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ratio_is_exactly_one_when_recomputed(noise: str, reduction: str) -> None:
    mean = mean_latent()
    z = policy_of(mean, noise).sample(generators(8))
    stored = policy_of(mean, noise).log_prob(z, reduction)
    recomputed = policy_of(mean.clone().requires_grad_(), noise).log_prob(z, reduction)
    assert torch.equal((recomputed - stored).exp(), torch.ones(8))


def test_white_log_prob_is_that_of_a_normal_distribution() -> None:
    mean = mean_latent()
    policy = GaussianLatentPolicy(mean, SIGMA, "white")
    z = policy.sample(generators(2))
    expected = Independent(Normal(mean, SIGMA), 3).log_prob(z)
    torch.testing.assert_close(policy.log_prob(z, "sum"), expected)
    torch.testing.assert_close(policy.log_prob(z, "mean"), expected / mean[0].numel())


def test_lowfreq_log_prob_is_that_of_the_drawn_coordinates() -> None:
    mean = mean_latent(batch=1)
    policy = GaussianLatentPolicy(mean, SIGMA, "lowfreq", cell=3)
    z = policy.sample(generators(1))
    drawn = torch.randn(3, 4, 3, generator=generators(1)[0])
    assert policy.num_coordinates == drawn.numel()
    expected = Normal(0.0, SIGMA).log_prob(SIGMA * drawn).sum()
    torch.testing.assert_close(policy.log_prob(z, "sum")[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("noise", NOISE_KINDS)
def test_log_prob_gradient_equals_finite_differences(noise: str) -> None:
    mean = mean_latent(batch=1, height=6, width=5)
    z = policy_of(mean, noise, cell=2).sample(generators(1))

    def log_prob(at: Tensor) -> Tensor:
        return policy_of(at, noise, cell=2).log_prob(z, "mean").sum()

    at = (mean + 0.01).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(at), at)
    direction = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    slope = (log_prob(at + step * direction) - log_prob(at - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=1e-3)


def test_white_score_is_the_noise_over_sigma() -> None:
    mean = mean_latent(batch=1).requires_grad_()
    policy = GaussianLatentPolicy(mean, SIGMA, "white")
    z = policy.sample(generators(1))
    (gradient,) = torch.autograd.grad(policy.log_prob(z, "sum").sum(), mean)
    torch.testing.assert_close(gradient, (z - mean).detach() / SIGMA**2)


def test_lowfreq_samples_lie_in_a_smooth_subspace() -> None:
    mean = torch.zeros(1, 1, 12, 9)
    policy = GaussianLatentPolicy(mean, 1.0, "lowfreq", cell=3)
    samples = policy.sample(generators(60)).flatten(1)
    spectrum = torch.linalg.svdvals(samples)
    assert policy.num_coordinates == 12
    assert spectrum[11] > 1e-2
    assert spectrum[12] < 1e-4


@pytest.mark.parametrize("cell", [1, 2, 4, 50])
def test_lowfreq_marginal_standard_deviation_is_sigma_at_every_pixel(cell: int) -> None:
    policy = GaussianLatentPolicy(torch.zeros(1, 1, 8, 8), SIGMA, "lowfreq", cell)
    std = policy.sample(generators(3000)).std(0)
    assert std.sub(SIGMA).abs().max() < 0.1 * SIGMA


def test_residual_log_prob_is_that_of_the_drawn_coordinates() -> None:
    mean = mean_latent(batch=1)
    policy = policy_of(mean, "residual", cell=3)
    drawn = torch.randn(1, 4, 3, generator=generators(1)[0])
    assert policy.num_coordinates == drawn.numel()
    expected = Normal(0.0, SIGMA).log_prob(SIGMA * drawn).sum()
    torch.testing.assert_close(policy.log_prob(policy.sample(generators(1)), "sum")[0], expected, rtol=1e-4, atol=1e-3)


def test_residual_noise_scales_the_direction_square_by_square() -> None:
    direction = mean_latent(batch=1, height=8, width=8)
    policy = GaussianLatentPolicy(torch.zeros_like(direction), SIGMA, "residual", 4, direction)
    factors = policy.sample(generators(1))[0] / direction[0]
    for square in factors.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1):
        assert (square - square.median()).abs().median() < 1e-4 * square.abs().mean()
    assert factors.std() > 0


@pytest.mark.parametrize("cell", [1, 3, 50])
def test_residual_noise_has_the_standard_deviation_sigma_over_a_latent(cell: int) -> None:
    mean = mean_latent(batch=1)
    noise = policy_of(mean, "residual", cell).sample(generators(3000)) - mean
    assert noise.square().mean().sqrt() == pytest.approx(SIGMA, rel=0.05)


def test_residual_density_is_proper_where_the_generator_added_nothing() -> None:
    mean = mean_latent(batch=1)
    policy = GaussianLatentPolicy(mean, SIGMA, "residual", 2, torch.zeros_like(mean))
    log_prob = policy.log_prob(policy.sample(generators(4)))
    assert log_prob.isfinite().all() and log_prob.std() > 0


def test_a_direction_belongs_to_residual_noise_alone() -> None:
    mean = mean_latent()
    with pytest.raises(ConfigError, match="'residual' needs a direction"):
        GaussianLatentPolicy(mean, SIGMA, "residual")
    with pytest.raises(ConfigError, match="'white' takes no direction"):
        GaussianLatentPolicy(mean, SIGMA, "white", direction=mean)


def test_lowfreq_with_cells_of_one_pixel_is_white() -> None:
    mean = mean_latent()
    smooth, white = GaussianLatentPolicy(mean, SIGMA, "lowfreq", 1), GaussianLatentPolicy(mean, SIGMA, "white")
    z = white.sample(generators(4))
    assert torch.equal(smooth.sample(generators(4)), z)
    assert torch.equal(smooth.log_prob(z), white.log_prob(z))


@pytest.mark.parametrize("noise", NOISE_KINDS)
def test_a_sample_depends_on_its_own_generator_alone(noise: str) -> None:
    mean = mean_latent()
    together = policy_of(mean, noise).sample(generators(4))
    alone = policy_of(mean[1:], noise, row=1).sample(generators(4)[3:])
    assert torch.equal(together[3:], alone)


def test_sampling_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    GaussianLatentPolicy(mean_latent(), SIGMA).sample(generators(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("noise", NOISE_KINDS)
def test_antithetic_candidates_mirror_each_other_around_the_mean(noise: str) -> None:
    mean = mean_latent()
    z = policy_of(mean, noise).sample(generators(8), antithetic=True).unflatten(0, (2, 4))
    torch.testing.assert_close(z[:, :2] + z[:, 2:], (2 * mean[:, None]).expand(2, 2, *mean.shape[1:]))
    plain = policy_of(mean, noise).sample(generators(8)).unflatten(0, (2, 4))
    assert torch.equal(z[:, :2], plain[:, :2])


def test_rows_belong_to_groups_in_order() -> None:
    mean = torch.tensor([0.0, 10.0])[:, None, None, None].expand(2, 1, 4, 4)
    policy = GaussianLatentPolicy(mean, SIGMA)
    z = policy.sample(generators(6))
    assert torch.equal(z.mean(dim=(1, 2, 3)).round(), torch.tensor([0.0, 0, 0, 10, 10, 10]))
    assert policy.log_prob(z).min() > policy.log_prob(z.flip(0)).max()


@pytest.mark.parametrize("noise", NOISE_KINDS)
def test_kl_is_zero_at_the_reference_and_quadratic_away_from_it(noise: str) -> None:
    mean = mean_latent()
    policy = policy_of(mean, noise)
    assert torch.equal(policy.kl(mean), torch.zeros(2))
    near, far = policy.kl(mean + 0.01, "sum"), policy.kl(mean + 0.02, "sum")
    torch.testing.assert_close(far, 4 * near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", NOISE_KINDS)
def test_kl_is_the_expected_log_ratio(noise: str) -> None:
    mean = mean_latent(batch=1, channels=1)
    policy, reference = policy_of(mean, noise), policy_of(mean + 0.05, noise)
    z = policy.sample(generators(4000))
    log_ratio = policy.log_prob(z, "sum") - reference.log_prob(z, "sum")
    exact = policy.kl(mean + 0.05, "sum").item()
    assert abs(log_ratio.mean().item() - exact) < 4 * log_ratio.std().item() / math.sqrt(4000)


def test_log_prob_is_float32_for_a_bfloat16_mean() -> None:
    policy = GaussianLatentPolicy(mean_latent().bfloat16(), SIGMA)
    z = policy.sample(generators(2))
    assert z.dtype == policy.log_prob(z).dtype == torch.float32


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_deterministic_policy_is_refused_with_the_reason(sigma: float) -> None:
    with pytest.raises(ConfigError, match="no log-probability"):
        GaussianLatentPolicy(mean_latent(), sigma)


@pytest.mark.parametrize("name", REFUSED_FORMULATIONS)
def test_multi_step_formulations_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match="not valid with one step") as error:
        GaussianLatentPolicy(mean_latent(), SIGMA, name)
    assert REFUSED_FORMULATIONS[name] in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"noise": "pink"}, "unknown noise"), ({"cell": 0}, "noise_cell is 0")],
)
def test_unknown_noise_and_cells_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GaussianLatentPolicy(mean_latent(), SIGMA, **arguments)


def test_incomplete_groups_odd_pairs_and_unknown_reductions_are_refused() -> None:
    policy = GaussianLatentPolicy(mean_latent(), SIGMA)
    with pytest.raises(ConfigError, match="whole groups"):
        policy.sample(generators(3))
    with pytest.raises(ConfigError, match="even number"):
        policy.sample(generators(6), antithetic=True)
    with pytest.raises(ConfigError, match="unknown reduction"):
        policy.log_prob(policy.sample(generators(2)), "median")
