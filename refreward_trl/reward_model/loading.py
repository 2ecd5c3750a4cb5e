"""Opening saved judges: everything that can be wrong with a folder is found here and said plainly."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from refreward_trl.errors import CheckpointError
from refreward_trl.model_folders import check_index, check_size, read_object
from refreward_trl.reward_model.conv import CONFIG_FILE as CONV_CONFIG_FILE
from refreward_trl.reward_model.scoring import SPEC_FILE, RateJudge
from refreward_trl.reward_model.spec import JudgeSpec

DEFAULT_JUDGE = "assets/judge"

_FROM_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""No download, and no code from the folder: left alone, transformers asks on the terminal whether to run it."""

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)
"""What transformers raises where a configuration or weights are wrong."""


def load_judge(source: str | Path, *, device: torch.device | str = "cpu", batch_size: int = 32) -> RateJudge:
    """Opens a judge for scoring: eval mode, fp32, frozen weights.

    Args:
        source: `"default"` for the shipped judge, or a folder written by `RateJudge.save_pretrained`.
        device: Where the judge computes.
        batch_size: Tiles per forward.

    Raises:
        CheckpointError: No such folder, or missing, damaged or mismatched files in it.
    """
    folder = Path(str(files("refreward_trl") / DEFAULT_JUDGE)) if source == "default" else Path(source)
    if not folder.is_dir():
        raise CheckpointError(
            f"no judge at {str(source)!r}", where=str(folder), fix="give 'default' or the folder of a saved judge"
        )
    if (folder / CONV_CONFIG_FILE).is_file():
        raise CheckpointError(
            "the folder holds a ConvJudge, which answers no questions",
            where=str(folder),
            fix="open it with ConvJudge.from_pretrained, or name it as a held-out reward",
        )
    _check_json_files(folder)
    spec = _read_spec(folder)
    model = _read_model(folder)
    _check_hash(model, spec, folder)
    tokenizer = _read_tokenizer(folder)
    judge = RateJudge(model, tokenizer, spec, batch_size=batch_size)
    judge.model.eval().requires_grad_(False)
    return judge.to(device)


def _read_spec(folder: Path) -> JudgeSpec:
    path = folder / SPEC_FILE
    if not path.is_file():
        raise CheckpointError(
            f"no {SPEC_FILE}: without it nobody knows what this judge was asked",
            where=str(folder),
            fix="save the judge with RateJudge.save_pretrained, or write the JSON of its JudgeSpec there",
        )
    return JudgeSpec.from_json(path.read_text(encoding="utf-8"), where=str(path))


def _check_json_files(folder: Path) -> None:
    """Refuses by name what transformers would stumble over, and what leads out of the folder."""
    for path in sorted(folder.glob("*.json")):
        read_object(path)
        if path.name.endswith(".index.json"):
            check_index(path)
        if path.name == "config.json":
            check_size(path)


def _read_model(folder: Path) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **_FROM_HERE}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **options)
    except (*_LOADING_ERRORS, SafetensorError, StrictDataclassError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"transformers cannot open the judge's network ({reason})",
            where=str(folder),
            fix="copy the folder again; it needs config.json and undamaged *.safetensors files",
        ) from error
    model, info = loaded
    # transformers only warns when it fills missing weights with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{len(missing)} weights are missing, for example {missing[0]!r}",
            where=str(folder),
            fix="copy the folder again; its weights do not belong to its config.json",
        )
    # Weights mapped from a file may lie at addresses where the CPU's matrix kernels round differently: copied, a saved
    # judge scores bit by bit as it did before.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError("no tokenizer files", where=str(folder), fix="save the tokenizer beside the model")
    try:
        return AutoTokenizer.from_pretrained(folder, **_FROM_HERE)
    except Exception as error:  # the tokenizers written in Rust raise just that
        raise CheckpointError(
            f"transformers cannot open the tokenizer ({type(error).__name__}: {error})",
            where=str(folder),
            fix="copy the folder again; it needs undamaged tokenizer files",
        ) from error


def _check_hash(model: PreTrainedModel, spec: JudgeSpec, folder: Path) -> None:
    stored = model.config.to_dict().get("judge_spec_hash")
    if stored is not None and stored != spec.hash:
        raise CheckpointError(
            f"{SPEC_FILE} has hash {spec.hash}, but the weights were saved with {stored}",
            where=str(folder),
            fix="restore the judge_spec.json that came with the weights",
        )
