"""Policies that are valid at one step: Gaussians on the predicted latent.

A one-step generator maps an LR image to a latent without chance, so it has no log-probability of its own. A Gaussian
of fixed, small standard deviation around the prediction gives it one, exactly, for any generator and any black-box
reward; the deployed output is the mean. Sampling by an SDE with noise between steps is no alternative here, see
`REFUSED_FORMULATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import ConfigError

NOISE_KINDS = ("residual", "lowfreq", "white")
REDUCTIONS = ("mean", "sum")

DIRECTION_FLOOR = 1e-3
"""Least weight of a latent element in "residual" noise, in units of the root mean square: keeps the density proper."""

REFUSED_FORMULATIONS = {
    "sde": "the DDPM posterior of the step that ends at the clean image has standard deviation 0, so the"
    " log-probability is infinite",
    "flow_sde": "one flow-SDE step returns (1 - eta^2 / 2) x - v + eta n while the deployed output is x - v, so the"
    " mean that is trained is not the output",
    "ddim_eta": "the standard deviation of the last DDIM step is whatever the scheduler's final alpha leaves, 0 for a"
    " final alpha of 1",
}
"""Why the multi-step formulations cannot be used with a single step."""


class GaussianLatentPolicy:
    """`z = mean + sigma * noise`, with noise whose standard deviation, over the elements of a latent, is 1.

    - "white": every latent element is a coordinate. It reads as grain and spreads the reward's signal over thousands
      of directions.
    - "lowfreq": the coordinates are independent normal numbers on a coarse grid, linearly interpolated along height
      and width: `noise = U n V^T`, the rows of `U` and `V` scaled to unit length so that the marginal standard
      deviation is 1 everywhere.
    - "residual": one normal number per square of `cell` latent pixels moves it along what the generator added there to
      the upsampled LR image: `noise = n * direction / rms(direction)`. The size of a move is `sigma`, not a share of
      the correction: where that is small, a candidate overshoots or reverses it. These are directions that a generator
      can learn, and so few of them that with cells of 8 the policy gradient of 128 candidates has a cosine of about
      0.45 to the reward's own gradient, the other kinds -0.02 to 0.04 (shipped generator and judge, before training;
      `benchmarks/policy_direction.py`).

    The density lives on the coordinates, recovered from a latent by least squares, and is exact there; the mean takes
    its gradient through the same projection.

    `mean` holds one latent per group. `sample` and `log_prob` work on whole groups: row `i * k + j` is candidate `j`
    of group `i`.

    Args:
        mean: `(b, c, h, w)`, in scaled latent units; kept in float32, with its graph.
        sigma: Standard deviation in scaled latent units, above 0.
        noise: "residual", "lowfreq" or "white".
        cell: Latent pixels per grid node; without effect on "white".
        direction: For "residual" only, `(b, c, h, w)`: the mean at the rollout minus the encoded LR image. Must stay
            the same while the density is compared, so keep it with the candidates.

    Raises:
        ConfigError: For a sigma that is not above 0 and finite, an unknown noise, a cell below 1, or a direction that
            is missing or not asked for.
    """

    def __init__(
        self,
        mean: Float[Tensor, "b c h w"],
        sigma: float,
        noise: str = "lowfreq",
        cell: int = 4,
        direction: Float[Tensor, "b c h w"] | None = None,
    ) -> None:
        _check_policy(sigma, noise, cell)
        if (direction is not None) != (noise == "residual"):
            raise ConfigError(
                f"noise {noise!r} {'needs a' if direction is None else 'takes no'} direction",
                where="direction",
                fix='pass the mean minus the encoded LR image with noise "residual", and nothing otherwise',
            )
        self.mean = mean.float()
        self.sigma = float(sigma)
        self.noise = noise
        self.cell = cell
        height, width = mean.shape[-2:]
        spread = _Axis.constant if noise == "residual" else _Axis.linear
        cell = 1 if noise == "white" else cell
        self._rows, self._columns = (spread(side, cell, mean.device) for side in (height, width))
        self._direction = None if direction is None else _unit_rms(direction.detach().float())
        channels = mean.shape[1] if direction is None else 1
        self._shape = (channels, self._rows.nodes, self._columns.nodes)

    @property
    def num_coordinates(self) -> int:
        """Number of independent normal numbers behind one latent."""
        return math.prod(self._shape)

    @torch.no_grad()
    def sample(
        self, generators: Sequence[torch.Generator], antithetic: bool = False
    ) -> Float[Tensor, "candidates c h w"]:
        """Draws latents, one per generator.

        Args:
            generators: One CPU generator per latent, group after group; a multiple of the number of means. Each latent
                depends on its own generator alone, so it is the same in any batch and on any device.
            antithetic: Mirror the noise of candidate `j` to candidate `j + k / 2` (whose generator is then left
                untouched).

        Returns:
            `(len(generators), c, h, w)`, float32, no graph.

        Raises:
            ConfigError: If the generators do not form whole groups, or antithetic pairs are asked of an odd group.
        """
        count = self._group_size(len(generators))
        if antithetic and count % 2:
            raise ConfigError(
                f"antithetic pairs need an even number of candidates, not {count}",
                where="num_generations",
                fix="use an even num_generations, or set antithetic to false",
            )
        drawn = count // 2 if antithetic else count
        chosen = [generator for j, generator in enumerate(generators) if j % count < drawn]
        # One by one and on the CPU, so that not even rounding depends on the batch or the device.
        noise = torch.stack([self._smooth(torch.randn(self._shape, generator=generator)) for generator in chosen])
        noise = noise.to(self.mean.device).unflatten(0, (len(self.mean), drawn))
        if antithetic:
            noise = torch.cat([noise, -noise], dim=1)
        if self._direction is not None:
            noise = noise * self._direction[:, None]
        return (self.mean.detach()[:, None] + self.sigma * noise).flatten(0, 1)

    def log_prob(self, z: Float[Tensor, "candidates c h w"], reduction: str = "mean") -> Float[Tensor, " candidates"]:
        """Returns the exact log-density of latents on the coordinates, `(candidates,)`, float32, differentiable in the
        mean.

        Args:
            z: Latents, group after group; a multiple of the number of means. Their graph is not used.
            reduction: "mean" or "sum" over the coordinates. A clip range only means something together with it; see
                `objectives.policy_gradient.default_clip_range`.
        """
        grouped = z.detach().float().unflatten(0, (len(self.mean), self._group_size(len(z))))
        coordinates = self._coordinates(grouped - self.mean[:, None])
        log_density = -0.5 * coordinates.square() - math.log(self.sigma * math.sqrt(2 * math.pi))
        return _reduce(log_density, reduction).flatten()

    def kl(self, reference_mean: Float[Tensor, "b c h w"], reduction: str = "mean") -> Float[Tensor, " b"]:
        """Returns the exact KL divergence from the policy around `reference_mean` (same sigma), `(b,)`, differentiable
        in the mean.

        It measures the coordinates only, unless the noise is "white": a change of the mean that they cannot express
        costs nothing here, which is why an anchor on the image belongs beside it.
        """
        shift = self.mean - reference_mean.detach().float()
        return _reduce(0.5 * self._coordinates(shift[:, None]).square(), reduction).squeeze(1)

    def _smooth(self, nodes: Tensor) -> Tensor:
        return self._rows.interpolate(self._columns.interpolate(nodes).mT).mT

    def _coordinates(self, difference: Float[Tensor, "b k c h w"]) -> Float[Tensor, "b k n rows columns"]:
        if self._direction is None:
            return self._project(difference) / self.sigma
        # Squares share no pixel, so that least squares is one division per square.
        direction = self._direction[:, None]
        along = (difference * direction).sum(2, keepdim=True)
        return self._project(along) / self._project(direction.square().sum(2, keepdim=True)) / self.sigma

    def _project(self, values: Tensor) -> Tensor:
        return self._rows.project(self._columns.project(values).mT).mT

    def _group_size(self, rows: int) -> int:
        if rows == 0 or rows % len(self.mean):
            raise ConfigError(
                f"{rows} latents cannot be split into whole groups of {len(self.mean)} LR images",
                where="num_generations",
                fix="pass the same number of candidates for every LR image, group after group",
            )
        return rows // len(self.mean)


class _Axis:
    """One side of a separable basis: nodes -> latent pixels, and back. The identity for cell 1."""

    def __init__(self, basis: Tensor, inverse: Tensor, device: torch.device) -> None:
        self.nodes = basis.shape[1]
        self._is_identity = basis.shape[0] == self.nodes
        self._basis = basis.float()
        self._inverse = inverse.float().to(device)

    @classmethod
    def linear(cls, size: int, cell: int, device: torch.device) -> _Axis:
        """Hats around the nodes, scaled so that every pixel has unit variance; back by least squares."""
        if cell == 1:
            return cls.constant(size, cell, device)
        hats = torch.eye(math.ceil(size / cell), dtype=torch.float64)[None]
        basis = F.interpolate(hats, size=size, mode="linear", align_corners=False)[0].T
        basis = basis / basis.norm(dim=1, keepdim=True)
        return cls(basis, torch.linalg.pinv(basis), device)

    @classmethod
    def constant(cls, size: int, cell: int, device: torch.device) -> _Axis:
        """Intervals of one node each; back by summing over the interval."""
        basis = F.one_hot(torch.arange(size) // cell)
        return cls(basis, basis.T, device)

    def interpolate(self, nodes: Tensor) -> Tensor:
        """`(..., nodes)` -> `(..., size)`, on the CPU."""
        return nodes if self._is_identity else nodes @ self._basis.T

    def project(self, values: Tensor) -> Tensor:
        """`(..., size)` -> `(..., nodes)`, on the device of the mean."""
        return values if self._is_identity else values @ self._inverse.T


def _unit_rms(direction: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    rms = direction.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    scaled = direction / rms
    return torch.where(scaled.abs() < DIRECTION_FLOOR, DIRECTION_FLOOR, scaled)


def _reduce(per_coordinate: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return per_coordinate.mean(dim=(-3, -2, -1))
    if reduction == "sum":
        return per_coordinate.sum(dim=(-3, -2, -1))
    raise ConfigError(
        f"unknown reduction {reduction!r}", where="log_prob_reduction", fix=f"use one of {', '.join(REDUCTIONS)}"
    )


def _check_policy(sigma: float, noise: str, cell: int) -> None:
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(
            f"sigma is {sigma}: a deterministic policy has no log-probability, so there is no policy gradient",
            where="sigma",
            fix="use a small sigma above 0, such as 0.05, or align by reward gradients (refl)",
        )
    if noise in REFUSED_FORMULATIONS:
        raise ConfigError(
            f"noise {noise!r} is not valid with one step: {REFUSED_FORMULATIONS[noise]}",
            where="noise",
            fix=f"use one of {', '.join(NOISE_KINDS)}: Gaussians on the latent whose mean is the deployed output",
        )
    if noise not in NOISE_KINDS:
        raise ConfigError(f"unknown noise {noise!r}", where="noise", fix=f"use one of {', '.join(NOISE_KINDS)}")
    if cell < 1:
        raise ConfigError(
            f"noise_cell is {cell}", where="noise_cell", fix="use a whole number of latent pixels, 1 or more"
        )
