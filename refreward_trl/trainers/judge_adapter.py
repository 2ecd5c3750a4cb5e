"""A LoRA adapter on a judge's network: putting it on, and taking it home merged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refreward_trl.reward_model.judge import SPEC_FILE, MLLMJudge

if TYPE_CHECKING:
    from peft import PeftConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of the language models of all families."""
VISION_PARTS = r"(.*\.)?(visual|vision_model|connector)\..*"
"""Where the vision towers of all families stand in their networks."""
ADAPTER_FOLDER = "adapter"


def train_weights(network: nn.Module, *, freeze_vision: bool) -> None:
    """Makes all weights of a judge's network trainable, or all but the vision tower's."""
    for name, weight in network.named_parameters():
        weight.requires_grad_(not (freeze_vision and re.fullmatch(VISION_PARTS, name)))


def add_adapter(judge: MLLMJudge, config: PeftConfig) -> None:
    """Puts an adapter on a judge's network, and freezes everything else.

    Args:
        judge: Its network becomes a `peft.PeftModel`.
        config: What to train.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    model: Any = judge.model
    if getattr(model, "is_quantized", False):
        # Norms in fp32 and inputs that pass gradients; checkpointing is the Trainer's to switch on.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    name = config.base_model_name_or_path or model.config._name_or_path or None
    adapted: Any = get_peft_model(model, config)
    # A relative path would mean another folder wherever the adapter is opened.
    adapted.active_peft_config.base_model_name_or_path = (
        str(Path(name).resolve()) if name and Path(name).is_dir() else name
    )
    judge.model = adapted


def has_adapter(judge: MLLMJudge) -> bool:
    """Says whether `add_adapter` was called."""
    return hasattr(judge.model, "peft_config")


def save_adapted(judge: MLLMJudge, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes a judge with an adapter.

    The adapter goes to `adapter/` with the judge's spec, and `folder` itself becomes a judge with the adapter merged
    in, which stock transformers opens. A quantized network cannot take an adapter in without loss: then `folder` is
    the adapter, and `load_judge` puts it on its base again.

    Args:
        judge: The judge.
        folder: Where to; made if needed.
        state: The weights of the whole adapted network, gathered from all ranks.
    """
    adapted: Any = judge.model
    quantized = getattr(adapted.get_base_model(), "is_quantized", False)
    own = folder if quantized else folder / ADAPTER_FOLDER
    adapted.save_pretrained(own, state_dict=dict(state))
    (own / SPEC_FILE).write_text(judge.spec.to_json() + "\n")
    if quantized:
        judge.tokenizer.save_pretrained(own)
        return
    merged = type(judge)(_merged(adapted, state), judge.tokenizer, judge.spec)
    merged.save_pretrained(folder)


def _merged(adapted: Any, state: Mapping[str, Tensor]) -> Any:
    """The network with the adapter inside, on the CPU, whatever shares of it this process holds."""
    from peft import get_peft_model

    base = adapted.get_base_model()
    with torch.random.fork_rng(devices=[]):
        whole = get_peft_model(type(base)(base.config), adapted.peft_config["default"])
    whole.load_state_dict({name: value.detach().cpu() for name, value in state.items()})
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    return whole.to(dtype).merge_and_unload()
