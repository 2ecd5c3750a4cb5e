"""What recomputing saves in ReFL: peak memory with and without checkpointing, and whether the gradients stay the same.

    OMP_NUM_THREADS=1 python benchmarks/refl_memory.py [--crop 128] [--batch 16] [--json figures.json]

Both ways run in a process of their own, on the shipped generator and judge, one update without evaluation. Memory is
the peak above what the process holds when everything is imported and loaded, with an allocator that gives back what is
freed (its own gaps would measure the allocator). Exits with 1 beyond a bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MOST_MEMORY = 0.6
MOST_DIFFERENCE = 1e-5
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}
"""What glibc reads at the start of a process."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=128, help="side of the crops in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, target = arguments.worker
        print(json.dumps(one_update(way == "with", Path(target), arguments.crop, arguments.batch)))
        return 0
    figures = compare(arguments)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["within_bounds"] else 1


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both ways and compares memory, gradients and time."""
    figures: dict[str, Any] = {"crop": arguments.crop, "batch": arguments.batch}
    gradients = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("without", "with"):
            target = Path(folder, f"{way}.pt")
            command = [sys.executable, __file__, "--worker", way, str(target)]
            command += ["--crop", str(arguments.crop), "--batch", str(arguments.batch)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | GIVE_BACK)
            figures[way] = json.loads(done.stdout.splitlines()[-1])
            gradients[way] = torch.load(target, weights_only=True)
    ratio = figures["with"]["peak_mb"] / figures["without"]["peak_mb"]
    error = (gradients["with"] - gradients["without"]).norm() / gradients["without"].norm()
    norm = float(gradients["without"].norm())
    figures |= {"memory_ratio": round(ratio, 3), "gradient_difference": float(error), "gradient_norm": norm}
    figures["time_ratio"] = round(figures["with"]["seconds"] / figures["without"]["seconds"], 2)
    figures["within_bounds"] = norm > 0 and ratio <= MOST_MEMORY and float(error) <= MOST_DIFFERENCE
    return figures


def one_update(checkpointing: bool, target: Path, crop: int, batch: int) -> dict[str, float]:
    """Computes one gradient in this process, writes it and returns what it took."""
    from peft import LoraConfig

    from refreward_trl.cli.building import LORA_TARGETS
    from refreward_trl.data.pairs import load_pairs
    from refreward_trl.rewards import RefReward
    from refreward_trl.trainers.refl_config import SRReFLConfig
    from refreward_trl.trainers.refl_trainer import SRReFLTrainer

    reward = RefReward(batch_size=1 if checkpointing else batch, checkpoint=checkpointing)
    with tempfile.TemporaryDirectory() as folder:
        config = SRReFLConfig(
            output_dir=folder,
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=batch,
            activation_checkpointing=checkpointing,
            checkpoint_decode=checkpointing,
        )
        pairs = load_pairs("default", crop_size=crop, split="train")
        lora = LoraConfig(r=8, target_modules=list(LORA_TARGETS))
        trainer = SRReFLTrainer("default", [reward], config, pairs, peft_config=lora)
        # The adapter starts as nothing: give its second half a gradient to pass on.
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        run = gradient_of(trainer)
        run(trainer.data_collator([load_pairs("default", crop_size=64, split="train")[0]]))  # compiles, loads
        trainer.model.zero_grad()
        rows = trainer.data_collator([pairs[index] for index in range(batch)])
        before, began = resident(), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        run(rows)
        seconds, most = time.perf_counter() - began, peak()
        torch.save(torch.cat([p.grad.flatten() for p in trainer.generator_parameters()]), target)
    return {"peak_mb": round(most - before, 1), "held_mb": round(before, 1), "seconds": round(seconds, 2)}


def gradient_of(trainer: Any) -> Any:
    """Returns what computes the gradient of a batch, as a training step does."""
    trainer.model.train()
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()

    def run(rows: dict[str, Any]) -> None:
        inputs = trainer._prepare_inputs(dict(rows))
        trainer.objective(trainer.model, inputs).loss.backward()

    return run


def resident() -> float:
    """Returns the megabytes that this process holds now."""
    return _status("VmRSS")


def peak() -> float:
    """Returns the most megabytes that it held since its peak was last reset."""
    try:
        return _status("VmHWM")
    except StopIteration:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
