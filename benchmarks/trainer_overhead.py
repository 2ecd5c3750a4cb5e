"""What a trainer costs over a bare PyTorch loop that does the same forward and backward.

    python benchmarks/trainer_overhead.py [--methods refl ddpo finetune rm] [--steps 20]

Each method runs its recipe of `recipes/tiny`. After every step of the trainer the bare loop does one step on the same
samples with its own copy of the weights, so both arms meet the same state of the machine. Timed is everything from the
end of one bare step to the end of the next step of the trainer: data, rollout, loss, checks, optimizer and logging.
The losses of both arms are compared too: only a loop that computes the same is a fair opponent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from refreward_trl.cli.building import (
    build_arguments,
    build_generator,
    build_lora,
    build_rewards,
    build_train_dataset,
    load_photos,
)
from refreward_trl.cli.recipe import Recipe, read_recipe
from refreward_trl.data.candidates import constructed_group
from refreward_trl.data.collators import collate_pairs
from refreward_trl.data.preferences import CachedGroups
from refreward_trl.errors import ConfigError
from refreward_trl.generators import straight_through_clamp
from refreward_trl.randomness import stateless_generator, stateless_seed
from refreward_trl.resampling import downscale
from refreward_trl.reward_model.vision_attention import batched_vision_attention
from refreward_trl.trainers.arguments import CropArguments, DataArguments, GeneratorArguments
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.finetune_config import SRFinetuneConfig
from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer
from refreward_trl.trainers.judge_setup import open_judge
from refreward_trl.trainers.ref_reward_batches import augment_groups, collate_groups, ends_of_order, flat_pairs
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer

ALIGNMENT = {
    "refl": (SRReFLConfig, SRReFLTrainer),
    "ddpo": (SRDDPOConfig, SRDDPOTrainer),
    "finetune": (SRFinetuneConfig, SRFinetuneTrainer),
}
JUDGE_GROUPS = 32
WARM_UP = 3


class BareLoop(ABC):
    """A training loop as one would write it by hand: no trainer, no checks, no metrics.

    Args:
        dataset: The trainer's training samples.
        config: The trainer's configuration.
        parameters: What is trained.
    """

    def __init__(self, dataset: Any, config: Any, parameters: Sequence[Tensor]) -> None:
        self.dataset = dataset
        self.config = config
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.done = 0

    def step(self, indices: Sequence[int]) -> float:
        """One update on those samples; returns the loss."""
        loss = self.loss([self.dataset[index] for index in indices])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step()
        self.done += 1
        return float(loss.detach())

    @abstractmethod
    def loss(self, rows: list[dict[str, Any]]) -> Tensor:
        """The method's forward."""

    def after_step(self) -> None:  # noqa: B027 (most loops do nothing here)
        """What follows an update."""


class GeneratorLoop(BareLoop):
    """What the loops around a generator share."""

    def __init__(self, dataset: Any, config: Any, generator: Any, reward: Any) -> None:
        super().__init__(dataset, config, generator.trainable_parameters())
        self.generator = generator
        self.reward = reward

    def images(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """LR and HR images, float."""
        batch = collate_pairs(rows)
        return batch["lr_image"].float() / 255, batch["hr_image"].float() / 255

    def start(self, lr_image: Tensor) -> tuple[Any, Tensor]:
        """Condition and latent."""
        cond = self.generator.prepare(lr_image)
        return cond, self.generator.encode(cond)

    def reference_image(self, z: Tensor, cond: Any) -> Tensor:
        """The frozen policy's image."""
        image = self.generator.decode(self.generator.reference_mean(z, cond), cond)
        return self.generator.postprocess(image, cond).clamp(0, 1)

    def anchor(self, image: Tensor, reference: Tensor, lr_image: Tensor) -> Tensor:
        """Distance to the reference's image: of all pixels, or the drift at LR resolution in units of its LR error."""
        if self.config.anchor == "reference":
            return self.config.anchor_weight * F.l1_loss(image, reference)
        now, target = (downscale(each, self.generator.scale) for each in (image, reference))
        allowed = (target - lr_image).square().mean(dim=(1, 2, 3)).clamp(min=1e-5)
        drift = (now - target).square().mean(dim=(1, 2, 3)) / allowed
        growth = (now - lr_image).square().mean(dim=(1, 2, 3)).clamp(min=1e-5) / allowed
        return self.config.anchor_weight * (drift + 0.25 * growth.log().abs()).mean()

    def image_of(self, mean: Tensor, cond: Any) -> Tensor:
        """The image of a predicted latent, clamped, with its graph."""
        image = self.generator.postprocess(self.generator.decode(mean, cond, checkpoint=True), cond)
        return straight_through_clamp(image)

    def score(self, image: Tensor, lr_image: Tensor) -> Tensor:
        """The judge's call, as the trainer makes it."""
        return torch.as_tensor(self.reward(prompts=[""] * len(image), completions=image, lr_image=lr_image))


class ReFLLoop(GeneratorLoop):
    """Reward gradient with an anchor to the reference's image."""

    def loss(self, rows: list[dict[str, Any]]) -> Tensor:
        lr_image, _ = self.images(rows)
        with torch.no_grad():
            cond, z = self.start(lr_image)
            reference = self.reference_image(z, cond)
        image = self.image_of(self.generator.predict(z, cond), cond)
        return -self.config.reward_weight * self.score(image, lr_image).mean() + self.anchor(
            image, reference, lr_image
        )


class DDPOLoop(GeneratorLoop):
    """Group-relative policy gradient with an anchor to the reference's image."""

    def loss(self, rows: list[dict[str, Any]]) -> Tensor:
        lr_image, _ = self.images(rows)
        config, size = self.config, self.config.num_generations
        with torch.no_grad():
            cond, z = self.start(lr_image)
            before = self.generator.predict(z, cond)
            direction = before - z if config.noise == "residual" else None
            policy = self._policy(before, direction)
            sources = [
                stateless_generator(config.seed, "rollout", self.done, row["sample_id"], k)
                for row in rows
                for k in range(size)
            ]
            candidates = policy.sample(sources, antithetic=config.antithetic)
            old = policy.log_prob(candidates, config.log_prob_reduction)
            rewards = self._rewards(candidates, cond, lr_image).view(len(rows), size)
            centred = rewards - rewards.mean(1, keepdim=True)
            advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
            reference = self.reference_image(z, cond)
        mean = self.generator.predict(z, cond)
        ratio = (self._policy(mean, direction).log_prob(candidates, config.log_prob_reduction) - old).exp()
        clip = config.effective_clip_range
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        return -gain.mean() + self.anchor(self.image_of(mean, cond), reference, lr_image)

    def _policy(self, mean: Tensor, direction: Tensor | None) -> Any:
        config = self.config
        return self.generator.policy(
            mean, sigma=config.sigma, noise=config.noise, cell=config.noise_cell, direction=direction
        )

    def _rewards(self, candidates: Tensor, cond: Any, lr_image: Tensor) -> Tensor:
        size, some = self.config.num_generations, max(1, self.config.reward_batch_size // self.config.num_generations)
        rewards = []
        for start in range(0, len(lr_image), some):
            part = cond.select(slice(start, start + some)).repeat(size)
            image = self.generator.decode(candidates[start * size : (start + some) * size], part)
            rewards.append(self.score(self.generator.postprocess(image, part).clamp(0, 1), part.lr_image))
        return torch.cat(rewards)


class FinetuneLoop(GeneratorLoop):
    """Distance to the HR image through the frozen decoder, with averaged weights."""

    def __init__(self, dataset: Any, config: Any, generator: Any, reward: Any) -> None:
        super().__init__(dataset, config, generator, reward)
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def loss(self, rows: list[dict[str, Any]]) -> Tensor:
        lr_image, hr_image = self.images(rows)
        with torch.no_grad():
            cond, z = self.start(lr_image)
        image = self.generator.postprocess(self.generator.decode(self.generator.predict(z, cond), cond), cond)
        if self.config.pixel_loss == "l1":
            return self.config.pixel_weight * F.l1_loss(image, hr_image)
        squares = (image - hr_image).square().mean(dim=(1, 2, 3))
        return self.config.pixel_weight * 0.1 * (squares + 2e-3).log().mean()

    def after_step(self) -> None:
        if self.config.ema_decay is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.ema_decay)


class JudgeLoop(BareLoop):
    """Pairwise preference loss on the candidates of each LR image."""

    def __init__(self, dataset: Any, config: Any, judge: Any) -> None:
        judge.model.requires_grad_(True)
        self.judge = judge
        self.log_temperature = torch.nn.Parameter(torch.tensor(config.temperature).log())
        super().__init__(dataset, config, [*judge.model.parameters(), self.log_temperature])

    def loss(self, rows: list[dict[str, Any]]) -> Tensor:
        batch = collate_groups(rows)
        epoch = self.done * len(rows) // len(self.dataset)
        lr_image, candidates = augment_groups(
            batch["lr_image"],
            batch["candidates"],
            sample_ids=batch["sample_id"],
            seed=self.config.seed,
            epoch=epoch,
        )
        count = candidates.shape[1]
        lr_float = (lr_image.float() / 255).repeat_interleave(count, 0)
        scores = self.judge.expected_rating(lr_float, candidates.flatten(0, 1).float() / 255)
        pairs = flat_pairs(batch["better_worse"], count)
        margins = (scores[pairs[:, 0]] - scores[pairs[:, 1]]) / self.log_temperature.exp()
        losses = F.softplus(-margins)
        # Every group of a recipe has the same number of pairs, so the mean over pairs is the mean over groups.
        best, worst = ends_of_order(batch["better_worse"], count)
        low, high = self.judge.spec.rating_range
        ends = (scores[best] - high).square().mean() + (scores[worst] - low).square().mean()
        return losses.mean() + self.config.center_rewards_coefficient * ends


class Recorded(Dataset):
    """A dataset that notes which samples were asked for, so that the bare loop can ask for the same.

    Args:
        dataset: Samples.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.asked.append(int(index))
        return self.dataset[index]


class Interleave(TrainerCallback):
    """Lets the bare loop do a step after each of the trainer's, and times both.

    Args:
        loop: The bare loop.
        samples: The trainer's samples.
        batch_size: Samples per step.
    """

    def __init__(self, loop: BareLoop, samples: Recorded, batch_size: int) -> None:
        self.loop, self.samples, self.batch_size = loop, samples, batch_size
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.bare_losses: list[float] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer_seconds.append(time.perf_counter() - self._since)
        first = self.loop.done * self.batch_size
        indices = self.samples.asked[first : first + self.batch_size]
        started = time.perf_counter()
        self.bare_losses.append(self.loop.step(indices))
        self._since = time.perf_counter()
        self.bare_seconds.append(self._since - started)


def measure(method: str, steps: int, folder: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Runs both arms of one method.

    Args:
        method: refl, ddpo, finetune or rm.
        steps: Steps that count, after the warm-up.
        folder: Where the trainer writes.
        flags: Further settings of the recipe.

    Returns:
        Median milliseconds of both arms, the median ratio of neighbouring steps, and how far the losses differ.
    """
    own = {
        "output_dir": str(folder / method),
        "max_steps": str(steps + WARM_UP),
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": "false",
        "lr_scheduler_type": "constant",
        "warmup_steps": "0",
        "disable_tqdm": "true",
    }
    words = [word for key, value in own.items() for word in (f"--{key}", value)]
    if method == "finetune":  # its recipe starts from the autoencoder that another recipe trains
        words += ["--generator", "default"]
    if method in ("refl", "ddpo", "finetune"):
        words += ["--eval_on_start", "false"]
    recipe = read_recipe(f"tiny/{method}", method=method, flags=[*words, *flags])
    if method == "finetune" and recipe.values["pixel_loss"] not in ("l1", "log_mse"):
        raise ConfigError(
            f"the bare loop has no pixel loss {recipe.values['pixel_loss']!r}",
            where="pixel_loss",
            fix="use l1 or log_mse",
        )
    if method in ("refl", "ddpo") and recipe.values["anchor"] not in ("reference", "reference_lr"):
        raise ConfigError(
            f"the bare loop has no anchor {recipe.values['anchor']!r}",
            where=method,
            fix="use reference or reference_lr",
        )
    trainer, loop, samples = judge_arms(recipe) if method == "rm" else generator_arms(recipe)
    pair = Interleave(loop, samples, trainer.args.per_device_train_batch_size)
    losses = record_losses(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(pair)
    with batched_vision_attention(loop.judge.model if isinstance(loop, JudgeLoop) else None):
        trainer.train()
    ratios = [a / b for a, b in zip(pair.trainer_seconds, pair.bare_seconds, strict=True)][WARM_UP:]
    differences = [abs(a - b) / max(abs(b), 1e-3) for a, b in zip(losses, pair.bare_losses, strict=True)]
    return {
        "trainer_ms": 1000 * statistics.median(pair.trainer_seconds[WARM_UP:]),
        "bare_ms": 1000 * statistics.median(pair.bare_seconds[WARM_UP:]),
        "median_ratio": statistics.median(ratios),
        "first_loss_difference": differences[0],
        "largest_loss_difference": max(differences),
        "steps": len(ratios),
    }


def generator_arms(recipe: Recipe) -> tuple[Any, BareLoop, Recorded]:
    """The trainer and the bare loop of an alignment or fine-tuning recipe, each with weights of its own."""
    config_class, trainer_class = ALIGNMENT[recipe.method]
    config = build_arguments(config_class, recipe.values)
    data = build_arguments(DataArguments, recipe.values)
    source = build_arguments(GeneratorArguments, recipe.values)
    samples = Recorded(build_train_dataset(data, build_arguments(CropArguments, recipe.values), config.seed))
    rewards = {} if recipe.method == "finetune" else {"reward_funcs": build_rewards(recipe.values["rewards"])[0]}
    generators = [build_generator(source, scale=data.scale, seed=config.seed) for _ in range(2)]
    lora = build_lora(source, generators[0])
    trainer = trainer_class(generators[0], args=config, train_dataset=samples, peft_config=lora, **rewards)
    if lora is None:
        generators[1].denoiser.requires_grad_(True)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(stateless_seed(config.seed, "adapter"))
            generators[1].add_policy_adapter(lora)
    loops = {"refl": ReFLLoop, "ddpo": DDPOLoop, "finetune": FinetuneLoop}
    reward = rewards["reward_funcs"][0] if rewards else None
    return trainer, loops[recipe.method](samples.dataset, config, generators[1], reward), samples


def judge_arms(recipe: Recipe) -> tuple[Any, BareLoop, Recorded]:
    """Trainer and bare loop of the judge's recipe without its teachers, on groups that are built beforehand."""
    config = build_arguments(RefRewardConfig, {**recipe.values, "teachers": None, "teacher_weights": None})
    data = build_arguments(DataArguments, recipe.values)
    photos = load_photos(data.dataset, data.dataset_split)
    groups = [
        constructed_group(photos, index, seed=config.seed, crop_size=data.crop_size, scale=data.scale)
        for index in range(JUDGE_GROUPS)
    ]
    samples = Recorded(CachedGroups(groups))
    trainer = RefRewardTrainer(args=config, train_dataset=samples)
    return trainer, JudgeLoop(samples.dataset, config, open_judge(config.judge, seed=config.seed)), samples


def record_losses(trainer: Any) -> list[float]:
    """Returns a list that grows by the loss of each of the trainer's steps."""
    losses: list[float] = []
    step = trainer.training_step

    def recorded(*arguments: Any, **keywords: Any) -> Tensor:
        loss = step(*arguments, **keywords)
        losses.append(float(loss))
        return loss

    trainer.training_step = recorded
    return losses


def main() -> None:
    """Prints a table, and JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["refl", "ddpo", "finetune", "rm"], metavar="METHOD")
    parser.add_argument("--steps", type=int, default=20, help="steps that count, after a warm-up of three")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; torch's default otherwise")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments, flags = parser.parse_known_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            results[method] = measure(method, arguments.steps, Path(folder), flags)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{'method':<10}{'trainer':>12}{'bare loop':>12}{'ratio':>9}   first and largest difference of losses")
    for method, found in results.items():
        print(
            f"{method:<10}{found['trainer_ms']:>9.0f} ms{found['bare_ms']:>9.0f} ms{found['median_ratio']:>9.3f}   "
            f"{found['first_loss_difference']:.1e}, {found['largest_loss_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
