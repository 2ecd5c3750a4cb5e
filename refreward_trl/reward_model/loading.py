"""Opening saved judges: everything that can be wrong with a folder is found here and said plainly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from refreward_trl.errors import CheckpointError, ConfigError, SetupError
from refreward_trl.model_folders import check_index, check_size, read_object
from refreward_trl.reward_model.conv import CONFIG_FILE as CONV_CONFIG_FILE
from refreward_trl.reward_model.default_specs import default_spec
from refreward_trl.reward_model.judge import SPEC_FILE, MLLMJudge
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec

DEFAULT_JUDGE = "assets/judge"
SPECS = "assets/specs"
ADAPTER_FILE = "adapter_config.json"
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files of a judge on the hub that hold no weights."""
PATTERNS = ("*.safetensors", *SETTINGS)
"""What is downloaded: no code and no pickles."""

Quantization: TypeAlias = Literal["8bit", "4bit"]
J = TypeVar("J", bound=MLLMJudge)

_FROM_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""No download, and no code from the folder: left alone, transformers asks on the terminal whether to run it."""

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)
"""What transformers raises where a configuration or weights are wrong."""


def load_judge(source: str | Path, **options: Any) -> RateJudge:
    """Opens a judge that rates; see `load_judge_as` for the arguments and errors."""
    return load_judge_as(RateJudge, source, **options)


def load_judge_as(
    kind: type[J],
    source: str | Path,
    *,
    spec: JudgeSpec | str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> J:
    """Opens a judge for scoring: eval mode, frozen weights.

    Args:
        kind: `RateJudge`, `CompareJudge`, `ReasonJudge` or `ReasonCompareJudge`.
        source: `"default"` for the shipped judge; a folder with a network of one of `families.FAMILIES`, written by
            `MLLMJudge.save_pretrained` or by stock transformers; a folder with a LoRA adapter for such a network,
            which is merged into it (not if it is quantized); or a name on the Hugging Face Hub.
        spec: How the network is asked, where the folder has no `judge_spec.json`: a spec, its JSON file, or the name
            of a packaged one, such as `"refreward_sr"`. None takes the folder's own, or else `default_spec` of the
            network's family.
        dtype: Precision of the weights.
        quantization: `"8bit"` or `"4bit"` (nf4) by bitsandbytes; needs the extra `bnb`.
        device: Where the judge computes.
        **options: Further arguments of `kind`, such as `batch_size`.

    Raises:
        CheckpointError: No such folder, missing, damaged or mismatched files in it, or a spec beside the folder's own.
        SetupError: The hub cannot be reached or does not have it, or bitsandbytes is missing.
    """
    model, tokenizer, spec = open_network(source, spec=spec, dtype=dtype, quantization=quantization, device=device)
    judge = kind(model, tokenizer, spec, **options)
    judge.model.eval().requires_grad_(False)
    return judge.to(device)


def open_network(
    source: str | Path,
    *,
    spec: JudgeSpec | str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, PreTrainedTokenizerBase, JudgeSpec]:
    """Opens network (a `PreTrainedModel`, or a `PeftModel` that could not be merged), tokenizer and spec of a judge.

    See `load_judge_as` for the arguments and errors.
    """
    folder = find_folder(source)
    if (folder / CONV_CONFIG_FILE).is_file():
        raise CheckpointError(
            "the folder holds a ConvJudge, which answers no questions",
            where=str(folder),
            fix="open it with ConvJudge.from_pretrained, or name it as a held-out reward",
        )
    adapter = folder if (folder / ADAPTER_FILE).is_file() else None
    if adapter is not None:
        folder = find_folder(base_of(adapter))
        if not (adapter / "adapter_model.safetensors").is_file():
            raise CheckpointError("no adapter_model.safetensors", where=str(adapter), fix="copy the folder again")
    _check_json_files(folder)
    model = _read_model(folder, dtype, quantization, device)
    tokenizer = _read_tokenizer(folder)
    used = choose_spec(spec, [part for part in (adapter, folder) if part is not None], model, tokenizer)
    _check_hash(model, used, folder, adapter)
    if adapter is not None:
        model = _with_adapter(model, adapter, merge=quantization is None)
    return model, tokenizer, used


def locate_folder(source: str | Path) -> Path | None:
    """Returns the folder of a judge on this disk; None where `source` is a name on the hub. Downloads nothing.

    Raises:
        CheckpointError: It is neither a folder nor a name.
    """
    if source == "default":
        return Path(str(files("refreward_trl") / DEFAULT_JUDGE))
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise CheckpointError(
            f"no judge at {str(source)!r}",
            where=str(folder),
            fix="give 'default', the folder of a saved judge, or a hub name such as Qwen/Qwen2.5-VL-3B-Instruct",
        )
    return None


def find_folder(source: str | Path, patterns: Sequence[str] = PATTERNS) -> Path:
    """Returns the folder of a judge on this disk, after downloading it from the hub if it is a name there.

    Args:
        source: A folder or a name.
        patterns: Which files to download.

    Raises:
        CheckpointError: It is neither a folder nor a name.
        SetupError: The hub cannot be reached or does not have it.
    """
    folder = locate_folder(source)
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise SetupError(
            f"no folder {str(source)!r} here, and the hub did not give it: {reason}",
            where="judge",
            fix="check the name and the connection, or give the folder of a local copy",
        ) from error


def base_of(adapter: Path) -> str:
    """Returns folder or name of the network that a LoRA adapter belongs to.

    Raises:
        CheckpointError: It does not say.
    """
    base = read_object(adapter / ADAPTER_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            "the adapter does not say which network it belongs to",
            where=str(adapter / ADAPTER_FILE),
            fix="set base_model_name_or_path there",
        )
    return base


def _with_adapter(model: PreTrainedModel, adapter: Path, *, merge: bool) -> Any:
    from peft import PeftModel  # takes seconds

    try:
        adapted: Any = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    except (*_LOADING_ERRORS, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"peft cannot put the adapter onto its base network ({reason})",
            where=str(adapter),
            fix="check that base_model_name_or_path names the network it was trained on",
        ) from error
    return adapted.merge_and_unload() if merge else adapted


def choose_spec(
    given: JudgeSpec | str | Path | None,
    folders: Sequence[Path],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> JudgeSpec:
    """Returns how a judge is asked: the spec that lies in the first of its folders that has one, else the given one,
    else that of its family.

    Raises:
        CheckpointError: A spec is missing or unreadable, or another one than the judge's own was given.
    """
    own = next((path for folder in folders if (path := folder / SPEC_FILE).is_file()), None)
    if isinstance(given, (str, Path)):
        given = read_spec(find_spec_file(given))
    if own is None:
        if "judge_spec_hash" in model.config.to_dict():
            raise CheckpointError(
                f"no {SPEC_FILE}: without it nobody knows what this judge was asked",
                where=str(folders[0]),
                fix="restore the judge_spec.json that came with the weights",
            )
        return given or default_spec(model.config, tokenizer, folders[-1])
    spec = read_spec(own)
    if given is not None and given != spec:
        raise CheckpointError(
            "a spec was given, and the judge has another one: its weights were trained with that",
            where=str(own),
            fix="leave the spec out",
        )
    return spec


def find_spec_file(name: str | Path) -> Path:
    """Returns the JSON file of a spec: a path, or the name of one that comes with the package (`assets/specs`)."""
    packaged = Path(str(files("refreward_trl") / SPECS)) / f"{name}.json"
    return packaged if not Path(name).is_file() and packaged.is_file() else Path(name)


def read_spec(path: Path) -> JudgeSpec:
    """Reads the JSON file of a spec.

    Raises:
        CheckpointError: It cannot be read, or is no spec.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the judge spec cannot be read ({error})", where=str(path)) from error
    return JudgeSpec.from_json(text, where=str(path))


def _check_json_files(folder: Path) -> None:
    """Refuses by name what transformers would stumble over, and what leads out of the folder."""
    for path in sorted(folder.glob("*.json")):
        read_object(path)
        if path.name.endswith(".index.json"):
            check_index(path)
        if path.name == "config.json":
            check_size(path)


def _read_model(
    folder: Path, dtype: torch.dtype, quantization: Quantization | None, device: torch.device | str
) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **_FROM_HERE}
    if quantization is not None:
        options |= quantized(quantization, dtype, device)
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
    if quantization is None:
        for weight in model.parameters():
            weight.data = weight.data.clone()
    return model


def quantized(quantization: Quantization, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Returns what `from_pretrained` needs to load 8-bit or 4-bit weights.

    Raises:
        ConfigError: Another name.
        SetupError: bitsandbytes is missing.
    """
    if quantization not in ("8bit", "4bit"):
        raise ConfigError(f"quantization must be '8bit' or '4bit', not {quantization!r}", where="quantization")
    if find_spec("bitsandbytes") is None:
        raise SetupError(
            f"{quantization} weights need bitsandbytes",
            where="quantization",
            fix="pip install 'refreward_trl[bnb]'",
        )
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    return {"quantization_config": config, **placed}


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


def _check_hash(model: PreTrainedModel, spec: JudgeSpec, folder: Path, adapter: Path | None) -> None:
    if adapter is not None and (adapter / SPEC_FILE).is_file():
        return  # the adapter brings its own question
    stored = model.config.to_dict().get("judge_spec_hash")
    if stored is not None and stored != spec.hash:
        raise CheckpointError(
            f"{SPEC_FILE} has hash {spec.hash}, but the weights were saved with {stored}",
            where=str(folder),
            fix="restore the judge_spec.json that came with the weights",
        )
