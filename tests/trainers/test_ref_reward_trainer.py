import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, TrainerCallback

from refreward_trl.errors import ConfigError, DataError, Preempted, TrainingError
from refreward_trl.resampling import downscale
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.loading import load_judge
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.trainers.ref_reward_batches import (
    MISSING,
    augment_groups,
    collate_groups,
    ends_of_order,
    flat_pairs,
    ranks_from_pairs,
)
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer


class NoisyGroups(Dataset):
    """Smooth images; the more noise a candidate has, the worse it is."""

    def __init__(self, length: int = 16, seed: int = 0) -> None:
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        hr_image = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
        noise = torch.randn(3, 3, 32, 32, generator=generator) * torch.tensor([0.0, 0.2, 0.6]).view(3, 1, 1, 1)
        return {
            "sample_id": f"toy{index}",
            "lr_image": as_uint8(downscale(hr_image, 4)[0]),
            "candidates": as_uint8(hr_image + noise),
            "better_worse": torch.tensor([[0, 1], [0, 2], [1, 2]]),
            "kinds": ["hr", "mild", "severe"],
        }


class Broken(NoisyGroups):
    """Groups with a pair that names a candidate which is not there."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"better_worse": torch.tensor([[0, 3]])}


def as_uint8(image: torch.Tensor) -> torch.Tensor:
    return (image.clamp(0, 1) * 255).round().byte()


def small_judge(seed: int = 0) -> RateJudge:
    size = {"vision_dim": 32, "vision_depth": 1, "vision_heads": 4, "text_dim": 32, "text_layers": 1, "text_heads": 2}
    return build_tiny_judge(**size, seed=seed, spec=JudgeSpec(tile=32))


def config(folder: Path, **changes: Any) -> RefRewardConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "adam_beta2": 0.98,
        "max_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return RefRewardConfig(**settings | changes)


def trainer(folder: Path, judge: Any = None, **changes: Any) -> RefRewardTrainer:
    return RefRewardTrainer(
        judge or small_judge(), config(folder, **changes), NoisyGroups(), eval_dataset=NoisyGroups(6, seed=1)
    )


def lines(trained: RefRewardTrainer, name: str) -> list[float]:
    return [line[name] for line in trained.state.log_history if name in line]


@pytest.mark.parametrize("kind", ["rate", "conv"])
@pytest.mark.parametrize("loss_type", ["pairwise", "listwise", "fidelity"])
def test_training_learns_the_order(tmp_path: Path, kind: str, loss_type: str) -> None:
    judge = small_judge() if kind == "rate" else ConvJudge(widths=(16, 24), hidden=16)
    run = trainer(tmp_path, judge, max_steps=30, loss_type=loss_type)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_accuracy"] > max(0.9, before["eval_accuracy"])
    assert after["eval_margin"] > before["eval_margin"] + 0.1


def test_logged_metrics(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4, logging_steps=2)
    run.train()
    for name in ("loss", "accuracy", "margin", "mean_reward", "temperature", "grad_norm"):
        assert len(lines(run, name)) == 2, name
    metrics = run.evaluate()
    by_kind = [metrics["eval_accuracy/mild"], metrics["eval_accuracy/severe"]]
    assert metrics["eval_accuracy"] == pytest.approx((by_kind[0] + 2 * by_kind[1]) / 3)
    assert "eval_accuracy/hr" not in metrics  # never the worse one


def test_temperature_is_learned_only_when_asked(tmp_path: Path) -> None:
    learned = trainer(tmp_path, weight_decay=0.5)
    learned.train()
    fixed = trainer(tmp_path, learn_temperature=False)
    fixed.train()
    assert learned.preference_model.log_temperature.item() != pytest.approx(math.log(0.5), abs=1e-5)
    assert fixed.preference_model.log_temperature.item() == pytest.approx(math.log(0.5))
    assert "log_temperature" not in learned.get_decay_parameter_names(learned.preference_model)


def test_centering_pulls_the_ends_to_the_ends_of_the_scale(tmp_path: Path) -> None:
    run = trainer(tmp_path, center_rewards_coefficient=0.5)
    batch = collate_groups([NoisyGroups()[0]])
    temperature = torch.tensor(0.5)
    for scores, distance in (([5.0, 3.0, 1.0], 0.0), ([4.0, 3.0, 3.0], 1.0 + 4.0)):
        values = torch.tensor([scores])
        run.args.center_rewards_coefficient = 0.0
        plain = run._objective(values, temperature, batch).loss
        run.args.center_rewards_coefficient = 0.5
        assert run._objective(values, temperature, batch).loss.item() == pytest.approx(plain.item() + 0.5 * distance)


def test_saved_judge_opens_everywhere(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "judge"))
    pair = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    again = load_judge(tmp_path / "judge")
    for (name, saved), trained in zip(again.model.named_parameters(), run.judge.model.parameters(), strict=True):
        assert torch.equal(saved, trained), name
    torch.testing.assert_close(again.rate(*pair), run.judge.rate(*pair), rtol=0, atol=1e-6)
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "judge", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_saved_conv_judge_opens(tmp_path: Path) -> None:
    run = trainer(tmp_path, ConvJudge(widths=(8, 16), hidden=8))
    run.train()
    run.save_model(str(tmp_path / "judge"))
    pair = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    assert torch.equal(ConvJudge.from_pretrained(tmp_path / "judge").rate(*pair), run.judge.rate(*pair))


class StopAt(TrainerCallback):
    """Asks the run to stop, as a scheduler does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["rate", "conv"])
def test_stopping_at_every_step_changes_nothing(tmp_path: Path, kind: str, read_metrics: Any) -> None:
    """Epochs have four steps: evaluations, log lines and ends of epochs lie between the stops."""

    def run(name: str, stop: int | None = None) -> RefRewardTrainer:
        judge = small_judge() if kind == "rate" else ConvJudge(widths=(8, 16), hidden=8)
        made = trainer(
            *(tmp_path / name, judge),
            max_steps=7,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=3,
            lr_scheduler_type="cosine",
        )
        if stop is not None:
            made.add_callback(StopAt(stop))
            with pytest.raises(Preempted, match=f"after step {stop + 1}; checkpoint-{stop + 1} is complete"):
                made.train()
        else:
            made.train()
        return made

    whole = run("whole")
    for stop in range(6):
        run("parts", stop)
    resumed = run("parts")
    for (name, first), second in zip(
        whole.preference_model.state_dict().items(), resumed.preference_model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name
    moments = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    for key, state in moments[0].items():
        assert all(torch.equal(tensor, moments[1][key][name]) for name, tensor in state.items())
    timing = {"time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    kept = [
        [{name: value for name, value in line.items() if name not in timing} for line in read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert kept[0] == kept[1]
    assert [line["step"] for line in kept[0]] == [2, 3, 4, 6, 6, 7]


def test_the_best_judge_is_kept(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        learning_rate=1.0,  # destroys the judge after the first evaluation
        warmup_steps=2,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        max_grad_norm=0.0,
    )
    run.train()
    assert run.evaluate()["eval_loss"] == pytest.approx(min(lines(run, "eval_loss")), abs=1e-6)


def test_checkpoints_survive_tied_embeddings(tmp_path: Path) -> None:
    judge = small_judge()
    judge.model.lm_head.weight = judge.model.model.language_model.embed_tokens.weight
    run = trainer(tmp_path, judge, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_weights_that_are_not_finite_stop_the_run_before_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=10)
    with torch.no_grad():
        run.judge.model.lm_head.weight.fill_(torch.nan)
    frozen = {name: value.clone() for name, value in run.preference_model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 1: the score or loss is not finite \(samples: (toy\d+(, )?){4}\)"):
        run.train()
    for name, value in run.preference_model.state_dict().items():
        assert torch.equal(value.nan_to_num(9), frozen[name].nan_to_num(9)), name


def test_gradients_that_are_not_finite_stop_the_run_before_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, gradient_accumulation_steps=2)
    run.judge.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
    frozen = {name: value.clone() for name, value in run.preference_model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite \(samples: (toy\d+(, )?){8}\)"):
        run.train()
    for name, value in run.preference_model.state_dict().items():
        assert torch.equal(value, frozen[name]), name


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    def gradients(**split: int) -> list[torch.Tensor]:
        run = trainer(tmp_path, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **split)
        found: list[torch.Tensor] = []
        original = run._require_finite_gradient

        def keep(norm: Any) -> None:
            found.extend(p.grad.clone() for p in run.preference_model.parameters() if p.grad is not None)
            original(norm)

        run._require_finite_gradient = keep  # type: ignore[method-assign]
        run.train()
        return found

    whole = gradients(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    parts = gradients(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert len(whole) == len(parts) > 10
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, checkpointed = trainer(tmp_path), trainer(tmp_path, activation_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert checkpointed.judge.model.is_activation_checkpointing
    assert lines(plain, "loss") == pytest.approx(lines(checkpointed, "loss"), abs=1e-5)


def test_unusable_rows_are_refused_by_name(tmp_path: Path) -> None:
    run = RefRewardTrainer(small_judge(), config(tmp_path), Broken())
    with pytest.raises(DataError, match=r"sample toy\d+: better_worse has the pair \(0, 3\)"):
        run.train()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidates": torch.zeros(3, 3, 32, 48, dtype=torch.uint8)}, "candidates has shape"),
        ({"kinds": ["hr"]}, "1 kinds for 3"),
        ({"better_worse": torch.zeros(0, 2, dtype=torch.long)}, "compares no two"),
        ({"better_worse": torch.tensor([[1, 1]])}, r"pair \(1, 1\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict, says: str) -> None:
    data = NoisyGroups()
    with pytest.raises(DataError, match=says):
        collate_groups([data[0], data[1] | change])


def test_missing_column_is_named() -> None:
    row = NoisyGroups()[0]
    del row["kinds"]
    with pytest.raises(DataError, match="no column kinds"):
        collate_groups([row])


def test_pairs_are_padded_and_unpadded() -> None:
    data = NoisyGroups()
    batch = collate_groups([data[0], data[1] | {"better_worse": torch.tensor([[2, 0]])}])
    assert batch["better_worse"].shape == (2, 3, 2)
    assert flat_pairs(batch["better_worse"], 3).tolist() == [[0, 1], [0, 2], [1, 2], [5, 3]]


def test_ends_of_a_partial_order() -> None:
    pairs = torch.tensor([[[0, 1], [0, 2], [0, 3], [1, 3], [4, 3]], [[1, 0], [2, 0]] + [[MISSING, MISSING]] * 3])
    best, worst = ends_of_order(pairs, 5)
    assert best.tolist() == [0, 5 + 1, 5 + 2]  # 4 never loses either, but 0 wins more often
    assert worst.tolist() == [3, 5 + 0]


def test_ends_are_never_candidates_in_between() -> None:
    best, worst = ends_of_order(torch.tensor([[[0, 1], [1, 2], [1, 3], [1, 4]]]), 5)
    assert best.tolist() == [0]  # 1 wins more often, but loses to 0
    assert worst.tolist() == [2, 3, 4]


def test_ranks_of_a_complete_order_with_ties() -> None:
    pairs = torch.tensor([[[2, 0], [2, 1], [0, 3], [1, 3]]])
    assert ranks_from_pairs(pairs, 5, sample_ids=["a"]).tolist() == [[1, 1, 0, 3, MISSING]]


@pytest.mark.parametrize(
    ("pairs", "says"), [([[0, 1], [1, 2], [2, 0]], "circle"), ([[0, 1], [1, 2], [0, 3]], "do not rank")]
)
def test_pairs_that_are_no_ranking_are_refused(pairs: list, says: str) -> None:
    with pytest.raises(DataError, match=f"sample a: .*{says}"):
        ranks_from_pairs(torch.tensor([pairs]), 4, sample_ids=["a"])


def test_augmentation_depends_on_seed_epoch_and_sample_alone() -> None:
    batch = collate_groups([NoisyGroups()[i] for i in range(8)])

    def moved(order: list[int], seed: int = 0, epoch: int = 0) -> torch.Tensor:
        _, candidates = augment_groups(
            batch["lr_image"][order],
            batch["candidates"][order],
            sample_ids=[batch["sample_id"][i] for i in order],
            seed=seed,
            epoch=epoch,
        )
        return candidates

    forward, backward = moved(list(range(8))), moved(list(range(8))[::-1])
    assert torch.equal(forward, backward.flip(0))
    assert not torch.equal(forward, moved(list(range(8)), epoch=1))
    assert not torch.equal(forward, moved(list(range(8)), seed=1))
    assert not torch.equal(forward, batch["candidates"])


@pytest.mark.parametrize("width", [8, 16])
def test_augmentation_moves_lr_and_candidates_alike(width: int) -> None:
    lr_image = torch.randint(0, 255, (6, 3, 8, width), dtype=torch.uint8)
    candidates = lr_image.repeat_interleave(4, -1).repeat_interleave(4, -2)[:, None].repeat(1, 2, 1, 1, 1)
    ids = [f"s{i}" for i in range(6)]
    lr_moved, moved = augment_groups(lr_image, candidates, sample_ids=ids, seed=0, epoch=0)
    assert torch.equal(moved[:, 1, :, ::4, ::4], lr_moved)
    assert not torch.equal(lr_moved, lr_image)


@pytest.mark.parametrize(
    "change",
    [{"loss_type": "hinge"}, {"temperature": 0.0}, {"remove_unused_columns": True}, {"max_groups": 0}],
)
def test_impossible_settings_are_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        config(tmp_path, **change)


def test_a_saved_judge_can_be_trained_on(tmp_path: Path) -> None:
    small_judge(seed=3).save_pretrained(tmp_path / "judge")
    run = trainer(tmp_path, str(tmp_path / "judge"))
    before = run.judge.model.lm_head.weight.clone()
    run.train()
    assert not torch.equal(run.judge.model.lm_head.weight, before)
