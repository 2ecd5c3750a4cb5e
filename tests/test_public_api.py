"""What users and subclasses may rely on: exported names, constructor keywords, and the signatures of the hooks."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest

import refreward_trl

NAMES = {
    "AlignmentConfig",
    "AlignmentTrainer",
    "Batch",
    "EpsLatentConfig",
    "EpsLatentGenerator",
    "Generator",
    "JudgeSpec",
    "LossOutput",
    "ModuleGenerator",
    "PairDataset",
    "RefReward",
    "RefRewardConfig",
    "RefRewardError",
    "RefRewardTrainer",
    "RewardFunction",
    "RewardSpec",
    "SRDDPOConfig",
    "SRDDPOTrainer",
    "SRFinetuneConfig",
    "SRFinetuneTrainer",
    "SRReFLConfig",
    "SRReFLTrainer",
    "degrade",
    "from_ddpo",
    "from_metric",
    "from_pil",
    "load_generator",
    "load_pairs",
    "load_reward",
    "to_trl",
}

HOOKS = {
    "rollout": ["self", "batch"],
    "objective": ["self", "model", "batch"],
    "evaluate_batch": ["self", "model", "batch"],
    "reference": ["self"],
    "record": ["self", "metrics"],
}

GENERATOR_METHODS = {
    "prepare": ["self", "lr_image", "prompts"],
    "encode": ["self", "cond"],
    "predict": ["self", "z", "cond", "noise", "model"],
    "decode": ["self", "z", "cond", "checkpoint"],
    "postprocess": ["self", "image", "cond"],
    "generate": ["self", "lr_image", "prompts", "model"],
    "add_policy_adapter": ["self", "lora_config"],
    "reference": ["self"],
    "reference_model": ["self"],
    "trainable_parameters": ["self"],
}

CONSTRUCTOR = [
    "model",
    "reward_funcs",
    "args",
    "train_dataset",
    "eval_dataset",
    "peft_config",
    "callbacks",
    "reward_weights",
    "heldout_rewards",
]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_exported_names_are_pinned():
    assert set(refreward_trl.__all__) == NAMES
    assert refreward_trl.__version__ == "0.1.0"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_exported_name_is_there(name):
    assert getattr(refreward_trl, name) is not None
    assert name in dir(refreward_trl)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="SRGDPOTrainer"):
        refreward_trl.SRGDPOTrainer  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import json, sys, refreward_trl; print(json.dumps(sorted(m.partition('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "trl", "diffusers", "peft", "numpy"} & set(json.loads(done.stdout))


@pytest.mark.parametrize(("name", "expected"), HOOKS.items())
def test_hook_signatures_are_pinned(name, expected):
    assert parameters(getattr(refreward_trl.AlignmentTrainer, name)) == expected


@pytest.mark.parametrize(("name", "expected"), GENERATOR_METHODS.items())
def test_generator_signatures_are_pinned(name, expected):
    assert parameters(getattr(refreward_trl.Generator, name)) == expected


def test_the_constructor_keywords_are_pinned():
    assert parameters(refreward_trl.AlignmentTrainer.__init__)[1:10] == CONSTRUCTOR


@pytest.mark.parametrize("name", ["SRFinetuneTrainer", "SRReFLTrainer", "SRDDPOTrainer"])
def test_concrete_trainers_take_the_same_keywords(name):
    accepted = inspect.signature(getattr(refreward_trl, name).__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    assert takes_any or set(CONSTRUCTOR) <= set(accepted)
    assert issubclass(getattr(refreward_trl, name), refreward_trl.AlignmentTrainer)


def test_only_objective_must_be_written():
    assert refreward_trl.AlignmentTrainer.__abstractmethods__ == {"objective"}


def test_a_reward_is_called_by_trls_keywords():
    keywords = inspect.signature(refreward_trl.RefReward.__call__).parameters
    assert {"completions", "lr_image"} <= set(keywords)
    assert any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in keywords.values())
    assert parameters(refreward_trl.RefReward.score) == ["self", "lr_image", "sr_image"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("LossOutput", ["loss", "metrics"]),
        ("RewardSpec", ["name", "weight", "kwargs"]),
    ],
)
def test_the_fields_of_records_are_pinned(name, fields):
    assert [field.name for field in dataclasses.fields(getattr(refreward_trl, name))] == fields
