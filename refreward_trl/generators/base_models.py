"""Finds the base model of a published generator: a local folder, or the first hub mirror that has it, and checks that
it is the one that the checkpoint was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refreward_trl.errors import CheckpointError, SetupError
from refreward_trl.generators.families import BaseModel, family_of
from refreward_trl.generators.folders import read_json

if TYPE_CHECKING:
    from refreward_trl.generators.origin import Origin

PARTS = ("unet", "transformer", "vae", "scheduler", "tokenizer", "text_encoder")
PATTERNS = [f"{part}/*.{ending}" for part in PARTS for ending in ("json", "safetensors", "txt")]
OTHER_PRECISIONS = ["*.fp16.safetensors", "*.non_ema.safetensors"]


def find_base_model(base: BaseModel, wanted: str | None) -> Path:
    """Returns the folder of a base model.

    Args:
        base: What is needed.
        wanted: A local folder or a hub id; None tries the known mirrors, first on this disk and then on the hub.

    Raises:
        CheckpointError: A local folder is no diffusers model.
        SetupError: No source has it; the message lists what each answered.
    """
    found = locate_base_model(base, wanted)
    if found is not None:
        return found
    answers = []
    for source in _sources(base, wanted):
        folder, answer = _download(source)
        if folder is not None:
            return folder
        answers.append(f"{source}: {answer}")
    raise SetupError(
        f"there is no base model {base.title}: {'; '.join(answers)}",
        where="base_model",
        fix=f"give base_model: a folder with unet/ (or transformer/), vae/ and scheduler/. {base.note}",
    )


def locate_base_model(base: BaseModel, wanted: str | None) -> Path | None:
    """Returns the folder of a base model if it is on this disk, as `find_base_model` would; downloads nothing."""
    if wanted is not None and Path(wanted).is_dir():
        return Path(wanted)
    return next((folder for source in _sources(base, wanted) if (folder := _cached(source)) is not None), None)


def _sources(base: BaseModel, wanted: str | None) -> tuple[str, ...]:
    return base.sources if wanted is None else (wanted,)


def base_model_of(origin: Origin) -> Path:
    """Returns the folder of the base model that a generator was made on. Raises as `find_base_model`."""
    return find_base_model(family_of(origin.family).base, origin.base_model)


def check_base_model(base: BaseModel, folder: Path) -> None:
    """Checks by the scheduler's configuration that a folder holds the base model, and not one that predicts otherwise.

    Raises:
        CheckpointError: It is another model, or no diffusers model.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    prediction = config.get("prediction_type", "epsilon")
    if base.prediction is not None and prediction != base.prediction:
        raise CheckpointError(
            f"the base model predicts {prediction}, the checkpoint was trained on one that predicts {base.prediction}",
            where=str(path),
            fix=f"use {base.title}: {base.sources[0]}"
            + (" (the 768 px version predicts v)" if prediction == "v_prediction" else ""),
        )
    name = config.get("_class_name")
    if name not in base.scheduler:
        raise CheckpointError(
            f"the base model has a {name}, {base.title} has not",
            where=str(path),
            fix=f"use {base.title}: {base.sources[0]}",
        )


def _cached(source: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, local_files_only=True, allow_patterns=PATTERNS))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return folder if (folder / "vae").is_dir() else None


def _download(source: str) -> tuple[Path | None, str]:
    """Returns the folder, or None and why not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=PATTERNS, ignore_patterns=OTHER_PRECISIONS)), ""
    except HFValidationError:
        return None, "neither a folder nor a name on the hub"
    except (HfHubHTTPError, OSError, ValueError) as error:
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
