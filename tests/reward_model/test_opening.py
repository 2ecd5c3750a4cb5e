"""Networks that are no judges yet, adapters, the hub's cache, and quantized weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_judges import FAMILY_NAMES, byte_tokenizer, family_judge, family_network, family_spec
from transformers import AutoModelForImageTextToText, BertConfig, BertModel

from refreward_trl.errors import CheckpointError, ConfigError, SetupError
from refreward_trl.reward_model.comparing import CompareJudge
from refreward_trl.reward_model.judge import SPEC_FILE
from refreward_trl.reward_model.loading import (
    find_spec_file,
    load_judge,
    load_judge_as,
    open_network,
    read_spec,
)
from refreward_trl.reward_model.scoring import RateJudge

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def pair() -> Pair:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)


def stock_folder(folder: Path, family: str = "qwen2_5_vl") -> Path:
    """What a model's authors publish: network, tokenizer, processor settings, and no spec."""
    tokenizer = byte_tokenizer(family)
    family_network(family, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def with_adapter(base: Path, folder: Path, **extra: Any) -> RateJudge:
    """Writes a LoRA adapter beside its base; returns the judge with both."""
    judge = family_judge("qwen2_5_vl")
    judge.save_pretrained(base)
    judge.model.requires_grad_(True)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted: Any = get_peft_model(judge.model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    adapted.eval()
    return judge


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_network_without_spec_is_asked_in_words(family: str, tmp_path: Path, pair: Pair) -> None:
    judge = load_judge(stock_folder(tmp_path, family))
    assert (judge.spec.patch, judge.spec.merge) == (8, 2)
    assert judge.spec.image_mean == (0.4, 0.5, 0.6)
    assert judge.spec.rating_tokens[0] == ("1" if family.startswith("qwen") else " 1")
    assert judge.rate(*pair).isfinite().all()
    assert load_judge_as(CompareJudge, tmp_path).compare(pair[0], pair[1], pair[1].flip(-1)).isfinite().all()


def test_another_spec_than_the_folders_own_is_refused(tmp_path: Path) -> None:
    family_judge("qwen2_5_vl").save_pretrained(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(family_spec("qwen2_5_vl", prompt="Is it blue?").to_json())
    with pytest.raises(CheckpointError, match="were trained with"):
        load_judge(tmp_path, spec=other)


def test_a_spec_can_be_given_as_a_file(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path / "model")
    spec = family_spec("qwen2_5_vl", prompt="Is it blue? {yes} {0}")
    (tmp_path / "spec.json").write_text(spec.to_json())
    assert load_judge(folder, spec=tmp_path / "spec.json").spec == spec
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_judge(folder, spec=tmp_path / "missing.json")


def test_the_packaged_spec_of_the_released_weights_is_read_and_marked(tmp_path: Path) -> None:
    spec = read_spec(find_spec_file("refreward_sr"))
    assert "not verified on the released weights" in spec.name
    assert spec.reason_prompt
    assert spec.compare_prompt
    # It is for Qwen2.5-VL's own patch grid, and says so where another network is given.
    with pytest.raises(CheckpointError, match="the spec says patch 14"):
        load_judge(stock_folder(tmp_path), spec="refreward_sr")


def test_settings_of_the_stock_processor_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers and `AutoProcessor` want them of a trained judge too."""
    stock = stock_folder(tmp_path / "stock")
    settings = (stock / "preprocessor_config.json").read_text()
    load_judge(stock).save_pretrained(tmp_path / "own")
    with_adapter(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "base" / "preprocessor_config.json").write_text(settings)
    load_judge(tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    for name in ("own", "merged"):
        assert (tmp_path / name / "preprocessor_config.json").read_text() == settings
    monkeypatch.chdir(stock)  # a network that was not loaded has no folder, and this is not its own
    family_judge("qwen2_5_vl").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "preprocessor_config.json").exists()


def test_an_adapter_is_merged_into_its_base(tmp_path: Path, pair: Pair) -> None:
    judge = with_adapter(tmp_path / "base", tmp_path / "adapter")
    adapted = judge.rate(*pair)
    again = load_judge(tmp_path / "adapter")
    torch.testing.assert_close(again.rate(*pair), adapted, rtol=0, atol=1e-5)
    assert (load_judge(tmp_path / "base").rate(*pair) - adapted).abs().max() > 1e-3
    again.save_pretrained(tmp_path / "merged")
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")) is type(again.model)
    assert torch.equal(load_judge(tmp_path / "merged").rate(*pair), again.rate(*pair))


def test_an_adapter_may_bring_its_own_question(tmp_path: Path) -> None:
    with_adapter(tmp_path / "base", tmp_path / "adapter")
    spec = family_spec("qwen2_5_vl", prompt="Is it sharp?")
    (tmp_path / "adapter" / SPEC_FILE).write_text(spec.to_json())
    assert load_judge(tmp_path / "adapter").spec == spec


def test_an_adapter_without_base_or_weights_is_refused(tmp_path: Path) -> None:
    with_adapter(tmp_path / "base", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"base_model_name_or_path": str(tmp_path / "nowhere")}))
    with pytest.raises(CheckpointError, match="nowhere"):
        load_judge(tmp_path / "adapter")
    path.write_text(json.dumps(content | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="does not say which network"):
        load_judge(tmp_path / "adapter")
    path.write_text(json.dumps(content))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model"):
        load_judge(tmp_path / "adapter")


def test_a_hub_name_is_found_in_the_cache(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "models--someone--judge"
    judge = family_judge("qwen3_vl")
    judge.save_pretrained(model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(load_judge("someone/judge").rate(*pair), judge.rate(*pair))


def test_a_hub_name_that_nobody_has_is_explained() -> None:
    with pytest.raises(SetupError, match=r"no folder 'someone/nothing' here, and the hub"):
        load_judge("someone/nothing")


def test_a_network_that_sees_nothing_is_no_judge(tmp_path: Path) -> None:
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    ).save_pretrained(tmp_path)
    byte_tokenizer("qwen2_5_vl").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot open the judge's network"):
        load_judge(tmp_path)


def test_int8_weights_rate_alike_and_pass_gradients(tmp_path: Path, pair: Pair) -> None:
    judge = family_judge("qwen2_5_vl", sharpness=3.0)
    judge.save_pretrained(tmp_path)
    small = load_judge(tmp_path, quantization="8bit")
    assert any(weight.dtype == torch.int8 for weight in small.model.parameters())
    torch.testing.assert_close(small.rate(*pair), judge.rate(*pair), rtol=0, atol=0.1)
    pixels = pair[1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(small.rate(pair[0], pixels).sum(), pixels)
    assert (gradient != 0).float().mean() > 0.99


def test_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'8bit' or '4bit'"):
        open_network(stock_folder(tmp_path), quantization="2bit")  # type: ignore[arg-type]


def test_bfloat16_weights_rate_in_fp32_numbers(tmp_path: Path, pair: Pair) -> None:
    judge = family_judge("idefics3", sharpness=3.0)
    judge.save_pretrained(tmp_path)
    half = load_judge(tmp_path, dtype=torch.bfloat16)
    ratings = half.rate(*pair)
    assert ratings.dtype == torch.float32
    torch.testing.assert_close(ratings, judge.rate(*pair), rtol=0, atol=0.1)
