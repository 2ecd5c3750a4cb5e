"""One ReFL and one DDPO step of a generator of Stable Diffusion 2.1's size, in OSEDiff's formula, at 512 px.

    python benchmarks/full_size_step.py --out full_size.json

The modules have the released shapes and random weights, so the images mean nothing; what is shown is that a step runs,
that its numbers are finite, that the policy's ratio is 1 and its gradient is not zero, how long it takes, and how much
memory.
Each method runs in a process of its own; the peak is that above what the imports take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

RANK = 4
UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def main() -> None:
    """Runs both methods and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the SR image in pixels")
    parser.add_argument("--methods", nargs="+", default=["refl", "ddpo"], choices=["refl", "ddpo"])
    parser.add_argument("--candidates", type=int, default=2, help="of DDPO")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    figures = {}
    for method in arguments.methods:
        with context.Pool(1) as pool:
            figures[method] = pool.apply(measure, (method, arguments.size, arguments.candidates))
        print(json.dumps({method: figures[method]}, indent=2), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(method: str, size: int, candidates: int) -> dict[str, Any]:
    """Takes one step and returns its figures."""
    import torch
    from peft import LoraConfig

    from refreward_trl import SRDDPOConfig, SRDDPOTrainer, SRReFLConfig, SRReFLTrainer

    on_gpu = torch.cuda.is_available()
    baseline = _peak(on_gpu)
    generator = build_generator()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "learning_rate": 5e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "activation_checkpointing": True,
            "disable_tqdm": True,
        }
        trainer_class: Any = SRReFLTrainer if method == "refl" else SRDDPOTrainer
        config: Any = SRReFLConfig if method == "refl" else SRDDPOConfig
        own = {} if method == "refl" else {"num_generations": candidates, "noise": "residual", "noise_cell": 8}
        trainer = trainer_class(
            generator,
            reward_funcs="refreward",
            args=config(**common, **own),
            train_dataset=photos(size),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS),
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        after = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        # The first step of LoRA moves the "up" halves alone.
        moved = sum(not torch.equal(before[name], after[name]) for name in after)
        line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    shown = ("loss", "grad_norm", "reward", "reward_std", "policy/ratio", "kl", "anchor")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "size": size,
        "denoiser_parameters": sum(p.numel() for p in generator.denoiser.parameters()),
        "trained_parameters": sum(p.numel() for p in after.values()),
        "moved_tensors": moved,
        "finite": all(bool(p.isfinite().all()) for p in after.values()),
        "seconds": round(seconds, 1),
        "peak_gib_above_imports": round((_peak(on_gpu) - baseline) / 2**30, 2),
        **{name: line[name] for name in shown if name in line},
    }


def build_generator() -> Any:
    """Returns an `EpsLatentGenerator` with OSEDiff's numbers and random weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from refreward_trl import EpsLatentConfig, EpsLatentGenerator

    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    config = EpsLatentConfig(latent_scale=0.18215, t_net=999, t_coeff=999, input_scaling="none", color_fix="adain")
    return EpsLatentGenerator(unet, vae, config, torch.randn(1, 77, 1024))


def photos(size: int) -> list[dict[str, Any]]:
    """Returns one training pair."""
    from refreward_trl import load_pairs

    row = load_pairs("default", split="train", degradation="realesrgan")[0]
    height, width = (side - side % 4 for side in row["hr_image"].shape[1:])
    repeats = [-(-size // side) for side in (height, width)]
    return [
        {
            "sample_id": row["sample_id"],
            "hr_image": row["hr_image"].repeat(1, *repeats)[:, :size, :size],
            "lr_image": row["lr_image"].repeat(1, *repeats)[:, : size // 4, : size // 4],
        }
    ]


def _peak(on_gpu: bool) -> int:
    """Returns the peak of this process in bytes so far."""
    import torch

    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
