import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_judges import judge_inputs
from transformers import AutoModelForImageTextToText, AutoTokenizer

from refreward_trl.errors import CheckpointError
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.judge import SPEC_FILE
from refreward_trl.reward_model.loading import load_judge
from refreward_trl.reward_model.scoring import RateJudge

Images = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def folder(judge: RateJudge, tmp_path: Path) -> Path:
    judge.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_reloaded_judge_is_the_same(judge: RateJudge, folder: Path, images: Images) -> None:
    again = load_judge(str(folder))
    assert again.spec == judge.spec
    assert torch.equal(again.rate(*images), judge.rate(*images))
    assert not again.model.training
    assert not any(weight.requires_grad for weight in again.model.parameters())


def test_stock_transformers_opens_it_with_identical_logits(judge: RateJudge, folder: Path, images: Images) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = judge_inputs(RateJudge(model, tokenizer, judge.spec), *images)
    for (name, stored), weight in zip(model.named_parameters(), judge.model.parameters(), strict=True):
        assert torch.equal(stored, weight), name
    # Not to the last bit: stock loading maps the file, and kernels round differently at unaligned addresses.
    torch.testing.assert_close(model(**inputs).logits, judge.model(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(
    judge: RateJudge, tmp_path: Path, images: Images, dtype: torch.dtype
) -> None:
    judge.save_pretrained(tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    again = load_judge(tmp_path)
    assert {weight.dtype for weight in again.model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in judge.model.parameters()} == {torch.float32}
    torch.testing.assert_close(again.rate(*images), judge.rate(*images), rtol=0, atol=0.1)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_judge(tmp_path / "nowhere")


def test_missing_spec_is_named(folder: Path) -> None:
    (folder / SPEC_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no {SPEC_FILE}"):
        load_judge(folder)


def test_changed_question_is_refused(folder: Path) -> None:
    spec = json.loads((folder / SPEC_FILE).read_text())
    (folder / SPEC_FILE).write_text(json.dumps(spec | {"prompt": "rate naturalness"}))
    with pytest.raises(CheckpointError, match="but the weights were saved with"):
        load_judge(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot open"):
        load_judge(folder)


def test_missing_weights_are_not_replaced_by_random_ones(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):
        load_judge(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(8, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot open"):
        load_judge(folder)


def test_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot open"):
        load_judge(folder)


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_judge(folder)


def test_missing_rating_token_is_named(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["FIVE"] = content["model"]["vocab"].pop("5")
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'5' is not one token"):
        load_judge(folder)


def test_a_conv_judge_is_sent_to_its_own_class(tmp_path: Path) -> None:
    ConvJudge(widths=(8, 8), hidden=8).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="ConvJudge"):
        load_judge(tmp_path)
