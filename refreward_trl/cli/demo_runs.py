"""The parts of `refreward demo`: measure, train, measure again. Heavy modules are imported where they are used."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from refreward_trl.cli.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerCallback

    from refreward_trl.cli.demo import DemoSettings
    from refreward_trl.data.preferences import PreferencePair
    from refreward_trl.evaluation.demo_report import Alignment, Run
    from refreward_trl.evaluation.reward_benchmark import ColumnResult, JudgeReport
    from refreward_trl.evaluation.sr_benchmark import GeneratorReport, Row
    from refreward_trl.generators.base import Generator
    from refreward_trl.trainers.base import AlignmentTrainer
    from refreward_trl.types import RewardFunction

NAMES = {"refl": "ReFL", "ddpo": "DDPO"}
CONTROLS = {"refl": ("--reward_weight", "0"), "ddpo": ("--shuffle_advantages", "true")}
CONTROL_NOTES = {"refl": "the reward's weight at 0", "ddpo": "advantages shuffled inside each group"}


@dataclass(frozen=True)
class Training:
    """A finished run: its figures on the held-out photos, and what it cost.

    Attributes:
        run: Figures, images and history.
        images: LR images trained on.
        seconds: Time of the training alone.
    """

    run: Run
    images: int
    seconds: float


class DemoRuns:
    """Measures and trains on the same held-out photos with the same rewards.

    Args:
        settings: The demo's settings. Generator, photos, degradation and rewards come from its ReFL recipe.
    """

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.recipe = read_recipe(settings.refl_recipe, method="refl", flags=settings.flags)
        self._datasets: dict[Any, tuple[Any, list[Row]]] = {}

    @cached_property
    def photos(self) -> list[Row]:
        """Whole held-out photos with their LR images, degraded once."""
        from refreward_trl.cli.building import build_arguments, build_test_rows
        from refreward_trl.trainers.arguments import DataArguments

        values = {**self.recipe.values, "max_eval_images": self.settings.photos}
        return build_test_rows(build_arguments(DataArguments, values))

    @cached_property
    def generator(self) -> Generator:
        """The generator that every run starts from."""
        return self._load_generator(self.recipe)

    @cached_property
    def rewards(self) -> dict[str, RewardFunction]:
        """The optimised rewards first, then those that only watch, under the names that the trainers log."""
        from refreward_trl.cli.building import build_rewards

        optimised, watching = self._reward_entries
        functions, names, _ = build_rewards([*optimised, *watching])
        return dict(zip(names, functions, strict=True))

    @property
    def reward(self) -> str:
        """Name of the first optimised reward: the judge of the demo."""
        return next(iter(self.rewards))

    @property
    def heldout(self) -> str:
        """Name of the first reward that only watches; the judge itself where the recipe has none."""
        watching = list(self.rewards)[len(self._reward_entries[0]) :]
        return watching[0] if watching else self.reward

    def measure_judge(self) -> JudgeReport:
        """Asks the judge about constructed pairs, column by column, and prints each accuracy."""
        from refreward_trl.data.candidates import EVALUATION_COLUMNS
        from refreward_trl.evaluation.reward_benchmark import benchmark_judge

        print(f"judge: share of {self.settings.pairs} constructed pairs in the known order, per question")
        bar = tqdm(EVALUATION_COLUMNS, desc="judge", unit="column", leave=False)

        def show(result: ColumnResult) -> None:
            found = result.accuracy
            bar.write(f"  {result.column:<28} {found.mean:.2f}   95 % CI {found.low:.2f} to {found.high:.2f}")

        report = benchmark_judge(self._score, self._columns(bar), seed=self.settings.seed, watch=show)
        summary = report.summary()
        print(
            f"  all plain columns {summary['accuracy']:.2f}, with another photo's LR image "
            f"{summary['accuracy_lr_shuffled']:.2f}; back-projected {summary['projected_accuracy']:.2f}"
        )
        return report

    def measure_generator(self) -> tuple[GeneratorReport, Run]:
        """Measures the generator beside its baselines; its own images become the "before" of every run."""
        from refreward_trl.evaluation.demo_report import Run
        from refreward_trl.evaluation.sr_benchmark import benchmark_generator, mean_of

        images: dict[str, Tensor] = {}
        report = benchmark_generator(
            self.generator, self.photos, self.rewards, progress=photo_bar("generator"), keep=images.__setitem__
        )
        print(
            f"generator: HR-PSNR {mean_of(report.generator, 'hr_psnr'):.2f} dB, {report.margin:+.2f} dB over the "
            f"better bicubic, {report.detail:.2f} times its gradient energy; denoiser {report.denoiser_share:.2f} dB"
        )
        return report, Run("generator", report.generator, images)

    def align(self, method: str, steps: int, before: Run) -> Alignment:
        """Trains by one method and its control and compares both with the generator before."""
        from refreward_trl.evaluation.alignment_benchmark import AlignmentResult
        from refreward_trl.evaluation.demo_report import Alignment

        name = NAMES[method]
        trained = self._train(method, name, steps, method, watched=True)
        control = self._train(method, f"{name}, control", steps, f"{method}_control", CONTROLS[method])
        result = AlignmentResult(
            name=name,
            reward=self.reward,
            heldout=self.heldout,
            steps=steps,
            images=trained.images,
            seconds=trained.seconds,
            before=before.rows,
            after=trained.run.rows,
            control=control.run.rows,
        )
        gain, excess = result.change(result.reward_column), result.gain_minus_control()
        heldout = result.change(result.heldout_column)
        print(
            f"{name}: reward {gain.mean:+.3f}, minus control {excess.mean:+.3f} (95 % CI {excess.low:+.3f} to "
            f"{excess.high:+.3f}), {self.heldout} {heldout.mean:+.3f}, "
            f"LR-PSNR {result.change('lr_psnr').mean:+.2f} dB, HR-PSNR {result.change('hr_psnr').mean:+.2f} dB"
        )
        return Alignment(result, trained.run, control.run, CONTROL_NOTES[method])

    def without_anchor(self, steps: int) -> Run:
        """ReFL once more with nothing that holds it to the image: the example of reward hacking."""
        changes = ("--anchor", "none")
        return self._train("refl", "ReFL, no anchor", steps, "refl_no_anchor", changes, watched=True).run

    def _train(
        self, method: str, label: str, steps: int, folder: str, changes: Sequence[str] = (), *, watched: bool = False
    ) -> Training:
        """Trains and measures. A watched run is evaluated on the way, for its curves, and its generator is kept."""
        from refreward_trl.evaluation.demo_report import Run
        from refreward_trl.evaluation.sr_benchmark import evaluate_generator

        own = ("--max_steps", str(steps), "--seed", str(self.settings.seed), *changes, *self.settings.flags)
        output_dir = self.settings.output_dir / folder
        source = self.settings.recipes[method]
        flags = [*self._bookkeeping(steps, watched), "--output_dir", str(output_dir), *own]
        trainer = self._trainer(read_recipe(source, method=method, flags=flags))
        show_steps(trainer, label, steps)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        images: dict[str, Tensor] = {}
        with trainer.averaged_weights():
            rows = evaluate_generator(
                trainer.generator, self.photos, self.rewards, progress=photo_bar(label), keep=images.__setitem__
            )
        if watched:
            trainer.save_model(str(output_dir / "generator"))
        command = shlex.join(["refreward", method, "--config", source, *own])
        run = Run(label, rows, images, [dict(entry) for entry in trainer.state.log_history], command)
        return Training(run, trainer.summary()["images"], seconds)

    def _bookkeeping(self, steps: int, watched: bool) -> list[str]:
        """Flags that change what is written and shown, not what is learnt."""
        evaluations = self.settings.evaluations if watched else 0
        choices = {
            "resume": "never",
            "save_strategy": "no",
            "load_best_model_at_end": "false",
            "disable_tqdm": "true",
            "report_to": "none",
            "logging_steps": str(max(1, steps // 20)),
            "eval_strategy": "steps" if evaluations else "no",
            "eval_on_start": "true" if evaluations else "false",
            "eval_steps": str(max(1, steps // max(1, evaluations))),
            "max_eval_images": str(self.settings.eval_photos),
        }
        return [word for key, value in choices.items() for word in (f"--{key}", value)]

    def _trainer(self, recipe: Recipe) -> AlignmentTrainer:
        """Builds a recipe's trainer around a fresh generator, with the demo's own rewards."""
        from refreward_trl.cli.building import build_arguments, build_lora
        from refreward_trl.trainers.arguments import GeneratorArguments
        from refreward_trl.trainers.ddpo_config import SRDDPOConfig
        from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
        from refreward_trl.trainers.refl_config import SRReFLConfig
        from refreward_trl.trainers.refl_trainer import SRReFLTrainer

        config_class, trainer_class = {
            "refl": (SRReFLConfig, SRReFLTrainer),
            "ddpo": (SRDDPOConfig, SRDDPOTrainer),
        }[recipe.method]
        config = build_arguments(config_class, recipe.values)
        generator = self._load_generator(recipe)
        train_dataset, eval_rows = self._training_data(recipe, config.seed)
        functions, optimised = list(self.rewards.values()), self._reward_entries[0]
        return trainer_class(
            generator,
            functions[: len(optimised)],
            config,
            train_dataset=train_dataset,
            eval_dataset=eval_rows,
            peft_config=build_lora(build_arguments(GeneratorArguments, recipe.values), generator),
            heldout_rewards=functions[len(optimised) :],
            reward_weights=[entry.get("weight", 1.0) for entry in optimised],
        )

    def _load_generator(self, recipe: Recipe) -> Generator:
        from refreward_trl.cli.building import build_arguments, build_generator
        from refreward_trl.trainers.arguments import DataArguments, GeneratorArguments

        arguments = build_arguments(GeneratorArguments, recipe.values)
        scale = build_arguments(DataArguments, recipe.values).scale
        return build_generator(arguments, scale=scale, seed=self.settings.seed)

    def _training_data(self, recipe: Recipe, seed: int) -> tuple[Any, list[Row]]:
        """Training crops and validation photos; runs that ask for the same share them."""
        from refreward_trl.cli.building import build_arguments, build_eval_rows, build_train_dataset
        from refreward_trl.trainers.arguments import CropArguments, DataArguments

        data = build_arguments(DataArguments, recipe.values)
        crops = build_arguments(CropArguments, recipe.values)
        key = (astuple(data), astuple(crops), seed)
        if key not in self._datasets:
            self._datasets[key] = build_train_dataset(data, crops, seed), build_eval_rows(data)
        return self._datasets[key]

    @property
    def _reward_entries(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The recipe's optimised and held-out rewards; a bare name is an entry too."""
        lists = (self.recipe.values.get(key) or [] for key in ("rewards", "heldout_rewards"))
        optimised, watching = ([{"name": e} if isinstance(e, str) else dict(e) for e in entries] for entries in lists)
        return optimised, watching

    def _columns(self, names: Any) -> Iterator[list[PreferencePair]]:
        from refreward_trl.data.candidates import constructed_pairs

        photos = {row["sample_id"]: row["hr_image"] for row in self.photos}
        for name in names:
            yield constructed_pairs(
                photos,
                name,
                self.settings.pairs,
                seed=self.settings.seed,
                crop_size=self.settings.crop_size,
                scale=self.generator.scale,
            )

    def _score(self, lr_image: Tensor, sr_image: Tensor) -> Tensor:
        """The optimised reward as a judge of pairs."""
        from refreward_trl.rewards.calling import call_reward
        from refreward_trl.rewards.composite import read_rewards

        arguments: Mapping[str, Any] = {
            "prompts": [""] * len(sr_image),
            "completions": sr_image,
            "lr_image": lr_image,
        }
        labels = [f"pair {index}" for index in range(len(sr_image))]
        return read_rewards(
            call_reward(self.rewards[self.reward], self.reward, arguments), name=self.reward, labels=labels
        )


def photo_bar(label: str) -> Any:
    """A progress bar over photos, to wrap around dataset rows."""
    return partial(tqdm, desc=label, unit="photo", leave=False)


def show_steps(trainer: AlignmentTrainer, label: str, steps: int) -> None:
    """Replaces the Trainer's own printing by one bar with the remaining time and the latest reward."""
    from transformers import PrinterCallback, TrainerCallback

    class StepBar(TrainerCallback):
        """One tick per optimizer step."""

        def __init__(self) -> None:
            self.bar = tqdm(total=steps, desc=label, unit="step", leave=False)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "reward" in logs:
                self.bar.set_postfix(reward=f"{logs['reward']:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    trainer.remove_callback(PrinterCallback)
    bar: TrainerCallback = StepBar()
    trainer.add_callback(bar)
