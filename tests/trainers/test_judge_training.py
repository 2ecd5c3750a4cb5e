"""Training judges of every family from preferences: adapters, quantized weights, ties, weights and odd groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judges import FAMILY_NAMES, byte_tokenizer, family_judge, family_network
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText

from refreward_trl.errors import ConfigError, DataError
from refreward_trl.reward_model.judge import SPEC_FILE
from refreward_trl.reward_model.loading import load_judge
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.trainers.judge_adapter import ADAPTER_FOLDER
from refreward_trl.trainers.ref_reward_batches import collate_groups, labelled_pairs
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer


class DarkGroups(Dataset):
    """The darker a candidate, the worse; groups have 2 to 4 candidates."""

    def __init__(self, count: int = 24, **columns: Any) -> None:
        self.count, self.columns = count, columns

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        lr_image = torch.randint(100, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
        image = lr_image.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        count = 2 + index % 3
        candidates = torch.stack([(image * (1 - 0.3 * rank)).byte() for rank in range(count)])
        pairs = torch.triu_indices(count, count, offset=1).T
        kinds = ["hr", *["dark"] * (count - 1)]
        row = {"sample_id": f"g{index}", "lr_image": lr_image, "candidates": candidates, "kinds": kinds}
        return row | {"better_worse": pairs} | self.columns


def config(folder: Path, **changes: Any) -> RefRewardConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return RefRewardConfig(**settings | changes)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 8, 8, generator=generator), torch.rand(3, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("use_peft", [False, True])
def test_every_family_learns_an_order(family: str, use_peft: bool, tmp_path: Path) -> None:
    judge = family_judge(family, sharpness=2.0)
    rate = 1e-2 if use_peft else 3e-3
    run = RefRewardTrainer(
        judge,
        config(tmp_path, max_steps=40, use_peft=use_peft, learning_rate=rate),
        DarkGroups(),
        eval_dataset=DarkGroups(8),
    )
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before


def test_an_adapter_is_all_that_is_trained_and_saved_in_checkpoints(tmp_path: Path) -> None:
    judge = family_judge("qwen2_5_vl", sharpness=2.0)
    frozen = {name: weight.clone() for name, weight in judge.model.named_parameters()}
    run = RefRewardTrainer(judge, config(tmp_path, use_peft=True, save_strategy="steps", save_steps=2), DarkGroups())
    run.train()
    base = dict(run.judge.model.get_base_model().named_parameters())
    assert all(torch.equal(base[name.replace(".weight", ".weight")], frozen[name]) for name in frozen if name in base)
    weights = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
    assert weights < 0.5 * sum(4 * value.numel() for value in frozen.values())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_an_adapted_judge_is_saved_merged_and_as_an_adapter(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    family_judge(family, sharpness=2.0).save_pretrained(base)
    run = RefRewardTrainer(
        str(base), config(tmp_path / "run", use_peft=True, learning_rate=5e-2, max_steps=4), DarkGroups()
    )
    run.train()
    run.save_model(str(tmp_path / "judge"))
    trained = run.judge.rate(*images())
    assert (load_judge(base).rate(*images()) - trained).abs().max() > 1e-3
    torch.testing.assert_close(load_judge(tmp_path / "judge").rate(*images()), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        load_judge(tmp_path / "judge" / ADAPTER_FOLDER).rate(*images()), trained, rtol=0, atol=1e-5
    )
    AutoModelForImageTextToText.from_pretrained(tmp_path / "judge")


def test_int8_weights_are_trained_by_an_adapter(tmp_path: Path) -> None:
    base = tmp_path / "base"
    family_judge("qwen2_5_vl", sharpness=2.0).save_pretrained(base)
    settings = config(
        tmp_path / "run", use_peft=True, quantization="8bit", learning_rate=2e-2, max_steps=20, judge=str(base)
    )
    run = RefRewardTrainer(None, settings, DarkGroups(), eval_dataset=DarkGroups(8))
    assert any(weight.dtype == torch.int8 for weight in run.judge.model.parameters())
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.9 * before
    run.save_model(str(tmp_path / "judge"))
    assert (tmp_path / "judge" / SPEC_FILE).is_file()
    again = load_judge(tmp_path / "judge", quantization="8bit")
    torch.testing.assert_close(again.rate(*images()), run.judge.rate(*images()), rtol=0, atol=1e-3)


def test_nf4_weights_take_a_step_in_train_mode(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("qwen2_5_vl")
    network = family_network("qwen2_5_vl", tokenizer, width=64)
    judge = RateJudge(network, tokenizer, family_judge("qwen2_5_vl").spec)
    judge.save_pretrained(tmp_path / "base")
    settings = config(tmp_path / "run", use_peft=True, quantization="4bit", judge=str(tmp_path / "base"))
    run = RefRewardTrainer(None, settings, DarkGroups())
    run.train()
    changed = [weight for name, weight in run.judge.model.named_parameters() if "lora_B" in name]
    assert any(weight.abs().max() > 0 for weight in changed)


def test_quantized_weights_without_an_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be trained"):
        config(tmp_path, quantization="8bit")


def test_a_frozen_vision_tower_stays(tmp_path: Path) -> None:
    judge = family_judge("qwen3_vl", sharpness=2.0)
    before = {name: weight.clone() for name, weight in judge.model.named_parameters()}
    RefRewardTrainer(judge, config(tmp_path, freeze_vision=True), DarkGroups()).train()
    moved = {name for name, weight in judge.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert not any("visual" in name for name in moved)


@pytest.mark.parametrize("loss_type", ["pairwise", "fidelity", "listwise"])
def test_candidates_that_fill_up_a_group_teach_nothing(loss_type: str, tmp_path: Path) -> None:
    data = DarkGroups()
    run = RefRewardTrainer(family_judge("qwen2_5_vl"), config(tmp_path, loss_type=loss_type), data)
    run.preference_model.eval()
    alone = run.compute_loss(run.preference_model, collate_groups([data[0]]))
    with_more = run.compute_loss(run.preference_model, collate_groups([data[0], data[2]]))
    other = run.compute_loss(run.preference_model, collate_groups([data[2]]))
    torch.testing.assert_close(with_more, (alone + other) / 2, rtol=1e-4, atol=1e-5)


def test_ties_weights_and_margins_reach_the_loss() -> None:
    data = DarkGroups()
    extra = {"ties": [[0, 1]], "tie_weights": [2.0], "weights": [0.5, 1.0, 1.0], "margins": [0.1, 0.2, 0.3]}
    labels = labelled_pairs(collate_groups([data[1] | extra, data[0]]), 3)
    assert labels.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [3, 4], [0, 1]]
    assert labels.targets.tolist() == [1, 1, 1, 1, 0.5]
    assert labels.weights.tolist() == [0.5, 1, 1, 1, 2]
    torch.testing.assert_close(labels.margins, torch.tensor([0.1, 0.2, 0.3, 0, 0]))


def test_a_group_of_nothing_but_ties_trains(tmp_path: Path) -> None:
    data = DarkGroups(better_worse=torch.zeros(0, 2, dtype=torch.long), ties=torch.tensor([[0, 1]]))
    run = RefRewardTrainer(family_judge("qwen2_5_vl"), config(tmp_path), data)
    run.train()
    assert run.state.global_step == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": [1.0]}, "1 weights for 3 better_worse"),
        ({"weights": [1.0, float("nan"), 1.0]}, "weights must be numbers"),
        ({"ties": [[0, 7]]}, r"ties has the pair \(0, 7\)"),
        ({"ties": [[0, 1]], "tie_weights": []}, "0 tie_weights for 1 ties"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        collate_groups([DarkGroups()[1] | change])


def test_an_aspect_is_asked_for_alone(tmp_path: Path) -> None:
    judge = family_judge("qwen2_5_vl", prompt="How much {aspect}?")
    run = RefRewardTrainer(judge, config(tmp_path, aspect="naturalness"), DarkGroups())
    scores, _ = run.preference_model(*images())
    torch.testing.assert_close(scores, judge.expected_rating(*images(), aspect="naturalness"))
    other = family_judge("qwen2_5_vl", prompt="How much {aspect}?", aspects={"consistency": 1.0})
    with pytest.raises(ConfigError, match="not asked for naturalness"):
        RefRewardTrainer(other, config(tmp_path, aspect="naturalness"), DarkGroups())
