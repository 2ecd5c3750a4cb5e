"""A student learns its teacher's scores, whatever their unit, and the teacher stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from refreward_trl.errors import CheckpointError, ConfigError, SetupError
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.trainers.distillation import Teachers
from refreward_trl.trainers.ref_reward_batches import collate_groups
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer

CPU = torch.device("cpu")


class Unordered(Dataset):
    """Groups of random images whose stated order is a coin toss: only a teacher can be learned from them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        brightness = torch.rand(4, 1, 1, 1, generator=generator)
        images = (brightness + 0.1 * torch.rand(4, 3, 32, 32, generator=generator)).clamp(0, 1)
        return {
            "sample_id": f"toy{index}",
            "lr_image": torch.full((3, 8, 8), 128, dtype=torch.uint8),
            "candidates": (images * 255).byte(),
            "better_worse": torch.tensor([[0, 1], [2, 3]]),
            "kinds": ["a", "b", "c", "d"],
        }


def conv(seed: int = 0) -> ConvJudge:
    return ConvJudge(widths=(8, 16), hidden=8, seed=seed)


def rate() -> RateJudge:
    size = {"vision_dim": 32, "vision_depth": 1, "vision_heads": 2, "text_dim": 32, "text_layers": 1, "text_heads": 2}
    return build_tiny_judge(**size, spec=JudgeSpec(tile=32))


def run(folder: Path, student: RateJudge | ConvJudge, teacher: Path, **changes: Any) -> RefRewardTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
        "max_steps": 150,
        "augment": False,
        "center_rewards_coefficient": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "teachers": [str(teacher)],
    }
    return RefRewardTrainer(student, RefRewardConfig(**settings | changes), Unordered())


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    conv(seed=7).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("make", [conv, rate])
def test_the_student_comes_to_score_like_its_teacher(
    tmp_path: Path, teacher: Path, make: Callable[[], RateJudge | ConvJudge]
) -> None:
    trained = run(tmp_path, make(), teacher)
    trained.train()
    assert trained.teachers is not None
    groups = collate_groups([Unordered()[index] for index in range(12)])
    lr_image = groups["lr_image"].repeat_interleave(4, 0).float() / 255
    own = trained.judge.rate(lr_image, groups["candidates"].flatten(0, 1).float() / 255)
    wanted = trained.teachers.targets(groups).flatten()
    assert torch.corrcoef(torch.stack([own, wanted]))[0, 1] > 0.8
    distances = [line["distillation_loss"] for line in trained.state.log_history if "distillation_loss" in line]
    assert sum(distances[-9:]) < 0.5 * sum(distances[:9])


def test_the_unit_of_the_teacher_does_not_matter() -> None:
    plain, loud = conv(), conv()
    last = loud.head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(1000)
        last.bias.mul_(1000).add_(50)
    inputs = collate_groups([Unordered()[0]])
    student = rate()
    first, second = (
        Teachers([judge], Unordered(), student=student, device=CPU).targets(inputs) for judge in (plain, loud)
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_targets_lie_inside_of_the_rating_range_and_have_no_graph() -> None:
    student = rate()
    taught = Teachers([conv()], Unordered(), student=student, device=CPU)
    outlier = Unordered()[0]
    outlier["candidates"] = torch.zeros_like(outlier["candidates"])
    targets = torch.cat([taught.targets(collate_groups([row])) for row in (Unordered()[0], outlier)])
    low, high = student.spec.rating_range
    assert low < targets.min() and targets.max() < high
    assert not targets.requires_grad and targets.std() > 0


def test_scores_far_out_teach_no_more_than_the_ends_of_the_range() -> None:
    student = rate()
    taught = Teachers([conv()], Unordered(), student=student, device=CPU)
    taught._calibration = [(0.0, 1e-9)]
    targets = taught.targets(collate_groups([Unordered()[0]]))
    low, high = student.spec.rating_range
    assert ((targets > low) & (targets < high)).all()


def test_the_loss_is_zero_at_the_targets_and_moves_no_teacher(tmp_path: Path, teacher: Path) -> None:
    trained = run(tmp_path, conv(), teacher, max_steps=2)
    assert trained.teachers is not None
    inputs = collate_groups([Unordered()[0]])
    before = trained.teachers.targets(inputs)
    assert float(trained.teachers.loss(before, inputs)) == pytest.approx(0.0, abs=1e-6)
    assert float(trained.teachers.loss(before + 1, inputs)) > 0
    trained.train()
    assert torch.equal(trained.teachers.targets(inputs), before)


def test_the_weight_of_the_teacher_counts(tmp_path: Path, teacher: Path) -> None:
    losses = []
    for weight in (0.0, 2.0):
        trained = run(tmp_path, conv(), teacher, max_steps=1, distillation_weight=weight)
        trained.train()
        losses.append(next(line for line in trained.state.log_history if "distillation_loss" in line))
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"] + 2 * losses[0]["distillation_loss"], rel=1e-4)


def test_several_teachers_teach_their_weighted_mean() -> None:
    first, second = conv(1), conv(2)
    inputs = collate_groups([Unordered()[0]])

    def targets(judges: list[ConvJudge], weights: list[float] | None = None) -> torch.Tensor:
        return Teachers(judges, Unordered(), weights=weights, student=conv(), device=CPU).targets(inputs)

    alone = [targets([judge]) for judge in (first, second)]
    torch.testing.assert_close(targets([first, second]), (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(targets([first, second], [3.0, 1.0]), 0.75 * alone[0] + 0.25 * alone[1])
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_a_teacher_that_teaches_nothing_is_refused(tmp_path: Path, teacher: Path) -> None:
    flat = conv()
    for weight in flat.head.parameters():
        nn.init.zeros_(weight)
    flat.save_pretrained(tmp_path / "flat")
    with pytest.raises(SetupError, match=r"teachers: .*standard deviation 0"):
        run(tmp_path, conv(), tmp_path / "flat")
    with pytest.raises(ConfigError, match="untrained"):
        run(tmp_path, conv(), Path("conv"))
    with pytest.raises(CheckpointError, match=r"teachers: a teacher cannot be read: .*nowhere"):
        run(tmp_path, conv(), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="distillation_weight"):
        run(tmp_path, conv(), teacher, distillation_weight=-1.0)
    for weights in ([1.0, 1.0], [-1.0], [0.0]):
        with pytest.raises(ConfigError, match="teacher_weights"):
            run(tmp_path, conv(), teacher, teacher_weights=weights)
    with pytest.raises(SetupError, match="training groups"):
        RefRewardTrainer(
            conv(), RefRewardConfig(output_dir=str(tmp_path / "run"), teachers=[str(teacher)], use_cpu=True)
        )
