"""Our reward inside the installed TRL: two real steps of GRPO whose completions choose the image."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from refreward_trl.data.images import read_image, to_float, to_pil
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.rewards import RefReward, completion_text, from_pil, to_trl

CANDIDATES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("trl")
    generator = torch.Generator().manual_seed(0)
    for photo in range(2):
        lr_image = torch.rand(3, 8, 8, generator=generator)
        to_pil(lr_image).save(root / f"lr{photo}.png")
        for candidate in range(CANDIDATES):
            to_pil(torch.rand(3, 32, 32, generator=generator)).save(root / f"sr{photo}_{candidate}.png")
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "pick", *"0123456789"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(root / "tokenizer")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(words), num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **size)
    Qwen2ForCausalLM(config).save_pretrained(root / "policy")
    tiny = {"vision_dim": 32, "vision_depth": 1, "vision_heads": 2, "text_dim": 64, "text_layers": 1, "text_heads": 2}
    judge = build_tiny_judge(**tiny)
    judge.model.lm_head.weight.data.mul_(30)  # an untrained head rates all images nearly alike
    judge.save_pretrained(root / "judge")
    return root


def choice(completion) -> int | None:
    """The image that a text means: digits by their sum, a text without digits means none."""
    digits = [int(character) for character in completion_text(completion) if character.isdigit()]
    return sum(digits) % CANDIDATES if digits else None


def image_of_choice(completion, columns):
    index = choice(completion)
    return None if index is None else columns["candidates"][index]


class Recorder:
    """Stands between TRL and our reward to see what passes."""

    def __init__(self, reward):
        self.reward = reward
        self.__name__ = reward.__name__
        self.calls = []

    def __call__(self, **arguments):
        values = self.reward(**arguments)
        self.calls.append((arguments, values, torch.is_grad_enabled()))
        return values


def mean_red(sr_pils, lr_pils):
    return [sr_pil.resize((1, 1)).getpixel((0, 0))[0] / 255 for sr_pil in sr_pils]


@pytest.mark.parametrize("conversational", [False, True])
def test_grpo_trains_two_steps_on_our_reward(folder, tmp_path, conversational):
    judge = RefReward.from_pretrained(folder / "judge", device="cpu")
    reward = Recorder(to_trl(judge, image_of_choice, lr_column="low"))
    rows = [
        {
            "prompt": [{"role": "user", "content": "pick"}] if conversational else "pick",
            "low": str(folder / f"lr{photo}.png"),
            "candidates": [str(folder / f"sr{photo}_{candidate}.png") for candidate in range(CANDIDATES)],
            "sample_id": f"photo{photo}",
        }
        for photo in range(2)
    ]
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        temperature=2.0,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        seed=3,
    )
    trainer = GRPOTrainer(
        model=str(folder / "policy"),
        reward_funcs=[reward, to_trl(from_pil(mean_red, batched=True), image_of_choice, lr_column="low")],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()

    assert len(reward.calls) == 2
    varied = 0
    for arguments, values, grad_enabled in reward.calls:
        assert grad_enabled  # which is why our reward must see to having no graph itself
        for index, (completion, value) in enumerate(zip(arguments["completions"], values, strict=True)):
            chosen = choice(completion)
            if chosen is None:
                assert value is None
                continue
            assert type(value) is float
            lr_path, sr_path = arguments["low"][index], arguments["candidates"][index][chosen]
            assert value == pytest.approx(judge.score(lr_path, sr_path), abs=1e-6)
            assert value == pytest.approx(judge.score(to_float(read_image(lr_path)), read_image(sr_path)), abs=1e-6)
        groups = [set(values[:4]) - {None}, set(values[4:]) - {None}]
        varied += sum(len(group) > 1 for group in groups)
    assert varied >= 2, "rewards must differ inside groups, or nothing was tested"

    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    assert all(math.isfinite(entry["rewards/refreward/mean"]) for entry in logs), json.dumps(logs)
    assert all("rewards/mean_red/mean" in entry for entry in logs)
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
