"""`refreward env`: what a bug report needs to know about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from refreward_trl.cli.parser import CommandParser

PACKAGES = (
    "refreward-trl",
    "torch",
    "transformers",
    "trl",
    "diffusers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "deepspeed",
    "bitsandbytes",
    "torchvision",
)


def main(argv: list[str]) -> None:
    """Prints one `- name: version` line per fact."""
    parser = CommandParser("env", "Print versions to paste into a bug report.", "refreward env")
    parser.parse_words(argv)
    for name, value in environment().items():
        print(f"- {name}: {value}")


def environment() -> dict[str, str]:
    """Returns the platform, the versions of what matters here, and the accelerators torch sees."""
    facts = {"platform": platform.platform(), "python": platform.python_version(), "cpu cores": str(os.cpu_count())}
    facts |= {name: _version(name) for name in PACKAGES}
    return facts | {"accelerators": _accelerators()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _accelerators() -> str:
    try:
        import torch
    except ImportError as error:
        return f"unknown, torch does not import: {error}"
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} ({', '.join(sorted(set(names)))}), CUDA {torch.version.cuda}"
