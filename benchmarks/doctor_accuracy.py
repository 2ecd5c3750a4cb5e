"""How near `refreward doctor` comes: its prediction beside the measured peak of the same run.

    OMP_NUM_THREADS=1 python benchmarks/doctor_accuracy.py [--only refl] [--give-back] [--json figures.json]

Each run is the whole command in a process of its own, with as many updates as show its peak: images read, evaluated
before, trained, evaluated, saved, opened again and measured. Its peak is that of the process above what it holds when
everything is imported. How much glibc's heap holds beyond what is in use differs from run to run by some 15 %; with
`--give-back` it holds nothing beyond, and what is compared is what is in use. Exits with 1 where a prediction is off
by more than 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MOST_OFF = 0.2
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}
"""What glibc reads at the start of a process."""
RUNS = {
    "refl": ["refl", "--config", "tiny/refl", "--max_steps", "3", "--max_eval_images", "3"],
    "ddpo": ["ddpo", "--config", "tiny/ddpo", "--max_steps", "2", "--max_eval_images", "2"],
    "finetune": [
        *("finetune", "--config", "tiny/finetune", "--generator", "default"),
        *("--max_steps", "3", "--max_eval_images", "3"),
    ],
    "refl, crops of 128": [
        *("refl", "--config", "tiny/refl", "--crop_size", "128"),
        *("--max_steps", "3", "--max_eval_images", "3"),
    ],
    "ddpo, groups of 4": [
        *("ddpo", "--config", "tiny/ddpo", "--num_generations", "4", "--per_device_train_batch_size", "24"),
        *("--crop_size", "96", "--max_steps", "2", "--max_eval_images", "4"),
    ],
    "vae": ["finetune", "--config", "tiny/vae", "--crop_size", "128", "--max_steps", "3", "--max_eval_images", "4"],
    "refl, checkpointed": [
        *("refl", "--config", "tiny/refl", "--crop_size", "128", "--activation_checkpointing", "true"),
        *("--max_steps", "3", "--max_eval_images", "3"),
    ],
}
IMPORTS = (
    *("torch", "diffusers", "peft", "transformers", "datasets", "accelerate", "safetensors.torch"),
    *("refreward_trl.trainers.refl_trainer", "refreward_trl.trainers.ddpo_trainer"),
    *("refreward_trl.trainers.finetune_trainer", "refreward_trl.generators.epsilon"),
    *("refreward_trl.reward_model.loading", "refreward_trl.rewards.refreward", "refreward_trl.rewards.heldout"),
    *("refreward_trl.evaluation.sr_benchmark", "refreward_trl.evaluation.alignment_benchmark"),
    *("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "refreward_trl.cli.training"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--give-back", action="store_true", help="measure what is in use, without the allocator's gaps"
    )
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=sorted(RUNS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker)))
        return 0
    figures = [compare(name, RUNS[name], arguments.give_back) for name in arguments.only]
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(abs(row["off"]) <= MOST_OFF for row in figures) else 1


def compare(name: str, words: list[str], give_back: bool) -> dict[str, Any]:
    """Predicts and measures one run."""
    predicted = _output([sys.executable, "-m", "refreward_trl", "doctor", *words[1:], "--quick", "--json"])
    worker = [sys.executable, __file__, "--worker", *words]
    measured = json.loads(_output(worker, GIVE_BACK if give_back else {}).splitlines()[-1])
    report = json.loads(predicted)
    size = report["in_use_bytes"] + report["parts"]["libraries"] if give_back else report["peak_bytes"]
    mb = size / 2**20
    row = {"run": name, "predicted_mb": round(mb, 1), **measured, "off": round(mb / measured["measured_mb"] - 1, 3)}
    row["predicted_step_seconds"] = round(report["step_seconds"], 2)
    print(row, flush=True)
    return row


def measure(words: list[str]) -> dict[str, float]:
    """Runs a command in this process and returns what it took."""
    import importlib
    import time

    for module in IMPORTS:
        importlib.import_module(module)
    from refreward_trl.cli import app
    from refreward_trl.trainers.base import AlignmentTrainer

    seconds: list[float] = []
    step = AlignmentTrainer.training_step

    def timed(self: Any, *arguments: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        result = step(self, *arguments, **keywords)
        seconds.append(time.perf_counter() - began)
        return result

    AlignmentTrainer.training_step = timed  # type: ignore[method-assign]
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        code = app.main([*words, "--output_dir", folder])
    if code:
        raise SystemExit(code)
    return {"measured_mb": round(_peak() - before, 1), "imports_mb": round(before, 1), "step_seconds": min(seconds)}


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    environment = os.environ | (environment or {})
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
