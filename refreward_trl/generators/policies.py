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

NOISE_KINDS = ("lowfreq", "white")
REDUCTIONS = ("mean", "sum")

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
    """`z = mean + sigma * noise`, with noise of unit standard deviation at every latent pixel.

    With noise "white" every latent element is a coordinate. With "lowfreq" the coordinates are independent normal
    numbers on a coarse grid, linearly interpolated along height and width: `noise = U n V^T`, the rows of `U` and `V`
    scaled to unit length so that the marginal standard deviation is 1 everywhere. The density lives on the
    coordinates, recovered from a latent by least squares, and is exact there; the mean takes its gradient through the
    same projection. White noise reads as grain and spreads the reward's signal over thousands of directions; smooth
    noise at a small sigma learns several times faster per judged image.

    `mean` holds one latent per group. `sample` and `log_prob` work on whole groups: row `i * k + j` is candidate `j`
    of group `i`.

    Args:
        mean: `(b, c, h, w)`, in scaled latent units; kept in float32, with its graph.
        sigma: Standard deviation in scaled latent units, above 0.
        noise: "lowfreq" or "white".
        cell: Latent pixels per grid node for "lowfreq".

    Raises:
        ConfigError: For a sigma that is not above 0 and finite, an unknown noise, or a cell below 1.
    """

    def __init__(self, mean: Float[Tensor, "b c h w"], sigma: float, noise: str = "lowfreq", cell: int = 4) -> None:
        _check_policy(sigma, noise, cell)
        self.mean = mean.float()
        self.sigma = float(sigma)
        self.noise = noise
        self.cell = cell
        height, width = mean.shape[-2:]
        self._rows = _Axis(height, cell if noise == "lowfreq" else 1, mean.device)
        self._columns = _Axis(width, cell if noise == "lowfreq" else 1, mean.device)

    @property
    def num_coordinates(self) -> int:
        """Number of independent normal numbers behind one latent."""
        return self.mean.shape[1] * self._rows.nodes * self._columns.nodes

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
        shape = (self.mean.shape[1], self._rows.nodes, self._columns.nodes)
        chosen = [generator for j, generator in enumerate(generators) if j % count < drawn]
        # One by one and on the CPU, so that not even rounding depends on the batch or the device.
        noise = torch.stack([self._smooth(torch.randn(shape, generator=generator)) for generator in chosen])
        noise = noise.to(self.mean.device).unflatten(0, (len(self.mean), drawn))
        if antithetic:
            noise = torch.cat([noise, -noise], dim=1)
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

        With "lowfreq" it measures the coordinates only: a change of the mean that the coarse grid cannot express costs
        nothing here, which is why an anchor on the image belongs beside it.
        """
        shift = self.mean - reference_mean.detach().float()
        return _reduce(0.5 * self._coordinates(shift).square(), reduction)

    def _smooth(self, nodes: Tensor) -> Tensor:
        return self._rows.interpolate(self._columns.interpolate(nodes).mT).mT

    def _coordinates(self, difference: Tensor) -> Tensor:
        return self._rows.project(self._columns.project(difference).mT).mT / self.sigma

    def _group_size(self, rows: int) -> int:
        if rows == 0 or rows % len(self.mean):
            raise ConfigError(
                f"{rows} latents cannot be split into whole groups of {len(self.mean)} LR images",
                where="num_generations",
                fix="pass the same number of candidates for every LR image, group after group",
            )
        return rows // len(self.mean)


class _Axis:
    """One side of the separable basis: nodes -> latent pixels and its least-squares inverse. The identity for cell
    1."""

    def __init__(self, size: int, cell: int, device: torch.device) -> None:
        self.nodes = math.ceil(size / cell)
        self._basis: Tensor | None = None
        self._inverse: Tensor | None = None
        if self.nodes < size:
            hats = torch.eye(self.nodes, dtype=torch.float64)[None]
            basis = F.interpolate(hats, size=size, mode="linear", align_corners=False)[0].T
            basis = basis / basis.norm(dim=1, keepdim=True)
            self._basis = basis.float()
            self._inverse = torch.linalg.pinv(basis).float().to(device)

    def interpolate(self, nodes: Tensor) -> Tensor:
        """`(..., nodes)` -> `(..., size)`, on the CPU."""
        return nodes if self._basis is None else nodes @ self._basis.T

    def project(self, values: Tensor) -> Tensor:
        """`(..., size)` -> `(..., nodes)`, on the device of the mean."""
        return values if self._inverse is None else values @ self._inverse.T


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
