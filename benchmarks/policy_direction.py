"""Where does a policy gradient point? Its cosine to the reward's own gradient, by kind of noise.

    python benchmarks/policy_direction.py [--batches 10] [--json results.json]

The shipped generator with a fresh LoRA adapter and the shipped judge, on degraded crops of the training photos. The
gradient of the mean reward of the deployed images, which DDPO never sees, is computed through the judge, over all
batches; beside it stands what each kind of noise makes of K candidates per LR image. 0 is a random direction, 1 the
steepest one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from refreward_trl import RefReward
from refreward_trl.cli.building import LORA_TARGETS, load_photos
from refreward_trl.data.candidates import textured_crop
from refreward_trl.data.degradations import degrade
from refreward_trl.generators import load_generator
from refreward_trl.generators.base import Condition, Generator
from refreward_trl.generators.policies import GaussianLatentPolicy
from refreward_trl.objectives.policy_gradient import group_advantages
from refreward_trl.randomness import stateless_generator

CROP = 64
SCALE = 4
POLICIES = (
    ("residual", 8, 0.1),
    ("residual", 8, 0.05),
    ("residual", 4, 0.05),
    ("lowfreq", 4, 0.05),
    ("lowfreq", 2, 0.05),
    ("white", 1, 0.05),
)


class Measurement:
    """The generator, its trainable weights and the judge."""

    def __init__(self, candidates: int, seed: int) -> None:
        self.candidates = candidates
        self.seed = seed
        self.reward = RefReward.from_pretrained("default")
        self.generator: Generator = load_generator("default")
        torch.manual_seed(seed)
        self.generator.add_policy_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(LORA_TARGETS)))
        # The up-projections start at zero, so that no other weight has a gradient yet.
        weights = self.generator.trainable_parameters()
        self.weights: list[nn.Parameter] = [weight for weight in weights if not weight.any()]

    def image(self, latent: Tensor, cond: Condition) -> Tensor:
        """The deployed path from a latent on."""
        return self.generator.postprocess(self.generator.decode(latent, cond), cond).clamp(0, 1)

    def score(self, image: Tensor, lr_image: Tensor) -> Tensor:
        """One reward per image."""
        return torch.as_tensor(self.reward(completions=image, lr_image=lr_image))

    def gradient(self, value: Tensor) -> Tensor:
        """The gradient in the trained weights, flat; keeps the graph."""
        parts = torch.autograd.grad(value, self.weights, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def candidate_gradient(
        self, policy: GaussianLatentPolicy, cond: Condition, lr_image: Tensor, name: str
    ) -> tuple[Tensor, float]:
        """The policy gradient of K candidates per LR image, and the deviation of rewards within a group."""
        count = len(lr_image) * self.candidates
        sources = [stateless_generator(self.seed, "candidates", name, index) for index in range(count)]
        latents = policy.sample(sources, antithetic=True)
        with torch.no_grad():
            rewards = self.score(
                self.image(latents, cond.repeat(self.candidates)), lr_image.repeat_interleave(self.candidates, 0)
            ).view(len(lr_image), self.candidates)
        advantages, metrics = group_advantages(rewards)
        log_prob = policy.log_prob(latents, "sum").view_as(advantages)
        return self.gradient((advantages * log_prob).mean()), float(metrics["reward_std"])


def lr_batches(count: int, size: int, seed: int) -> Sequence[Tensor]:
    """Degraded crops of the training photos, `(size, 3, h, w)` each."""
    photos = list(load_photos("default", "train").values())
    draws = [stateless_generator(seed, "crop", index) for index in range(count * size)]
    crops = [textured_crop(photos[index % len(photos)], CROP, draw) for index, draw in enumerate(draws)]
    lr_images = [degrade(crop, "seesr", generator=draw, scale=SCALE) for crop, draw in zip(crops, draws, strict=True)]
    return torch.stack(lr_images).split(size)


def measure(
    batches: Sequence[Tensor], candidates: int, seed: int, policies: Sequence[tuple[str, int, float]] = POLICIES
) -> list[dict[str, Any]]:
    """Returns one row per kind of noise: its name, cell and sigma."""
    measurement = Measurement(candidates, seed)
    generator = measurement.generator
    own: list[Tensor] = []
    found: dict[tuple[str, int, float], list[tuple[Tensor, float]]] = {key: [] for key in policies}
    coordinates: dict[tuple[str, int, float], int] = {}
    for number, lr_image in enumerate(batches):
        cond = generator.prepare(lr_image)
        encoded = generator.encode(cond)
        mean = generator.predict(encoded, cond)
        own.append(measurement.gradient(measurement.score(measurement.image(mean, cond), lr_image).mean()))
        for noise, cell, sigma in policies:
            direction = mean - encoded if noise == "residual" else None
            policy = generator.policy(mean, sigma=sigma, noise=noise, cell=cell, direction=direction)
            name = f"{noise}/{cell}/{sigma}/{number}"
            found[noise, cell, sigma].append(measurement.candidate_gradient(policy, cond, lr_image, name))
            coordinates[noise, cell, sigma] = policy.num_coordinates
        print(f"batch {number + 1} of {len(batches)}", flush=True)
    steepest = torch.stack(own).mean(0)
    rows = []
    for (noise, cell, sigma), results in found.items():
        gradients = torch.stack([gradient for gradient, _ in results])
        cosines = torch.cosine_similarity(gradients, steepest[None])
        rows.append(
            {
                "noise": noise,
                "cell": cell,
                "sigma": sigma,
                "coordinates": coordinates[noise, cell, sigma],
                "group_std": sum(std for _, std in results) / len(results),
                "cosine": float(cosines.mean()),
                "cosine_se": float(cosines.std()) / math.sqrt(len(cosines)),
                "cosine_of_mean": float(torch.cosine_similarity(gradients.mean(0), steepest, dim=0)),
            }
        )
    return rows


def main() -> None:
    """Prints a table, and writes JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10, help="batches of LR crops")
    parser.add_argument("--batch-size", type=int, default=16, help="LR crops in a batch")
    parser.add_argument("--candidates", type=int, default=8, help="candidates of each LR crop; even")
    parser.add_argument("--seed", type=int, default=0, help="of crops, degradations, adapter and noise")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; torch's default otherwise")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    if arguments.batches < 2:
        parser.error("--batches must be at least 2: the standard error is taken over batches")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    batches = lr_batches(arguments.batches, arguments.batch_size, arguments.seed)
    rows = measure(batches, arguments.candidates, arguments.seed)
    print(f"{'noise':10}{'cell':>6}{'sigma':>7}{'coords':>8}{'std':>8}{'cosine, one batch':>22}{'of their mean':>15}")
    for row in rows:
        cosine = f"{row['cosine']:.3f} +- {row['cosine_se']:.3f}"
        print(
            f"{row['noise']:10}{row['cell']:>6}{row['sigma']:>7}{row['coordinates']:>8}{row['group_std']:>8.4f}"
            f"{cosine:>22}{row['cosine_of_mean']:>15.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"settings": {**vars(arguments), "json": None}, "rows": cast(Any, rows)}))


if __name__ == "__main__":
    main()
