"""A judge of Qwen2.5-VL-3B's size: how fast it rates, what its gradient costs a generator, and what training it takes.

    python benchmarks/full_size_judge.py --out full_size_judge.json

The network has the released shapes and random weights, so its ratings mean nothing; what is shown is that each part
runs, that its numbers are finite, how long it takes, and how much memory. It is saved and loaded as a user's would be.
Three parts, each in a process of its own:

    rate     K candidates of one LR image in one group call, and as an ordinary batch
    pixels   the gradient of the rating on the pixels of one SR image, as in ReFL, for each `checkpoint` of the reward
    lora     training steps with LoRA on a group of K candidates; "qlora": the same on 4-bit weights
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SCALE = 4
TILE = 448
SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
        "tie_word_embeddings": True,
    },
    "7b": {
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
        "tie_word_embeddings": False,
    },
    "tiny": {
        "text": {
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
        },
        "vision": {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2},
        "tie_word_embeddings": True,
    },
}
PARTS = ("rate", "pixels", "lora", "qlora")


def main() -> None:
    """Runs the parts and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="tiny tries the benchmark itself out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=int, default=512, help="side of the SR image of `pixels`")
    parser.add_argument("--candidates", type=int, default=8, help="of `rate`")
    parser.add_argument("--group", type=int, default=4, help="candidates of a training group")
    parser.add_argument("--steps", type=int, default=6, help="of training; the first is not timed")
    parser.add_argument("--repeats", type=int, default=5, help="of `rate` and `pixels`")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    figures: dict[str, Any] = {"shape": arguments.shape}
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            ("build", build_judge),
            *((part, {"rate": rate, "pixels": pixels}.get(part, train)) for part in arguments.parts),
        ]
        for name, job in jobs:
            arguments.part = name
            with context.Pool(1) as pool:
                figures[name] = pool.apply(job, (arguments, folder))
            print(json.dumps({name: figures[name]}, indent=2), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def build_judge(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Saves a judge of the shape with random bfloat16 weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from refreward_trl.reward_model.families import IMAGE_TOKEN, VIDEO_TOKEN, single_token_id
    from refreward_trl.reward_model.scoring import RateJudge
    from refreward_trl.reward_model.spec import JudgeSpec
    from refreward_trl.reward_model.tiny import build_tiny_tokenizer

    shape = SHAPES[arguments.shape]
    tokenizer = build_tiny_tokenizer()
    ids = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config = Qwen2_5_VLConfig(
        text_config=shape["text"]
        | {
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            "tie_word_embeddings": shape["tie_word_embeddings"],
        },
        vision_config=shape["vision"]
        | {
            "out_hidden_size": shape["text"]["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=shape["tie_word_embeddings"],
        **{name: single_token_id(tokenizer, token) for name, token in ids.items()},
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device()):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    spec = JudgeSpec(layout="images", tile=TILE, patch=14, merge=2)
    RateJudge(model, tokenizer, spec).save_pretrained(folder)
    vision = sum(weight.numel() for weight in model.model.visual.parameters())
    return {"parameters": sum(weight.numel() for weight in model.parameters()), "of_them_vision": vision}


def rate(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Times a group call and an ordinary batch in turns."""
    import torch

    from refreward_trl.reward_model.loading import load_judge

    torch.manual_seed(0)
    judge = load_judge(folder, dtype=torch.bfloat16, device=device())
    lr_image = torch.rand(3, TILE // SCALE, TILE // SCALE, device=device())
    candidates = torch.rand(arguments.candidates, 3, TILE, TILE, device=device())
    repeated = lr_image.expand(arguments.candidates, -1, -1, -1)
    seconds: dict[str, list[float]] = {"batch": [], "group": []}
    with torch.no_grad():
        for turn in range(arguments.repeats + 1):
            for way, ask in {
                "batch": lambda: judge.rate(repeated, candidates),
                "group": lambda: judge.rate_group(lr_image, candidates),
            }.items():
                scores, elapsed = timed(ask)
                if turn:
                    seconds[way].append(elapsed)
        difference = (judge.rate(repeated, candidates) - judge.rate_group(lr_image, candidates)).abs().max()
    ratios = [batch / group for batch, group in zip(seconds["batch"], seconds["group"], strict=True)]
    return {
        "device": device_name(),
        "candidates": arguments.candidates,
        "size": TILE,
        "ratio": round(statistics.median(ratios), 3),
        "images_per_second": {
            way: round(arguments.candidates / statistics.median(times), 2) for way, times in seconds.items()
        },
        "largest_difference": float(difference),
        "finite": bool(scores.isfinite().all()),
        "peak_gib": peak_gib(),
    }


def pixels(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Takes the gradient of the rating of one SR image."""
    import torch

    from refreward_trl.rewards import RefReward

    torch.manual_seed(0)
    lr_image = torch.rand(1, 3, arguments.size // SCALE, arguments.size // SCALE, device=device())
    sr_image = torch.rand(1, 3, arguments.size, arguments.size, device=device(), requires_grad=True)
    figures: dict[str, Any] = {"device": device_name(), "size": arguments.size, "tile": TILE}
    for name, checkpoint in {"blocks": "blocks", "calls": True, "kept": False}.items():
        reward = RefReward(folder, device=device(), dtype="bfloat16", checkpoint=checkpoint)

        def backward(reward: Any = reward) -> Any:
            return torch.autograd.grad(reward(completions=sr_image, lr_image=lr_image).sum(), sr_image)[0]

        gradient, _ = timed(backward)
        reset_peak()
        seconds = [timed(backward)[1] for _ in range(arguments.repeats)]
        figures[name] = {
            "seconds": round(statistics.median(seconds), 3),
            "peak_gib": peak_gib(),
            "gradient_norm": float(gradient.norm()),
            "finite": bool(gradient.isfinite().all()),
        }
        del reward, backward
        release()
    return figures


def train(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Trains on random groups with the settings of `recipes/qwen2_5_vl_3b/rm_lora.yaml`, one group a step."""
    import torch
    from transformers import TrainerCallback

    from refreward_trl import RefRewardConfig, RefRewardTrainer

    class Clock(TrainerCallback):
        """Notes the time after each step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device() != "cpu":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    draw = torch.Generator().manual_seed(0)
    groups = [
        {
            "sample_id": f"group {index}",
            "lr_image": torch.randint(0, 256, (3, TILE // SCALE, TILE // SCALE), dtype=torch.uint8, generator=draw),
            "candidates": torch.randint(0, 256, (arguments.group, 3, TILE, TILE), dtype=torch.uint8, generator=draw),
            "better_worse": torch.tensor([[0, worse] for worse in range(1, arguments.group)]),
            "kinds": ["random"] * arguments.group,
        }
        for index in range(arguments.steps)
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = RefRewardTrainer(
            args=RefRewardConfig(
                output_dir=output,
                judge=folder,
                judge_dtype="bfloat16",
                quantization="4bit" if arguments.part == "qlora" else None,
                use_peft=True,
                lora_r=16,
                lora_alpha=32,
                freeze_vision=True,
                temperature=0.5,
                max_steps=arguments.steps,
                per_device_train_batch_size=1,
                learning_rate=1e-4,
                bf16=device() != "cpu",
                gradient_checkpointing=True,
                augment=False,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=groups,  # type: ignore[arg-type]
            callbacks=[clock],
        )
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    trained = [weight for weight in trainer.preference_model.parameters() if weight.requires_grad]
    steps = [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)]
    return {
        "device": device_name(),
        "candidates": arguments.group,
        "size": TILE,
        "trained_parameters": sum(weight.numel() for weight in trained),
        "seconds_per_step": round(statistics.median(steps), 3),
        "peak_gib": peak_gib(),
        "losses": [round(line["loss"], 4) for line in lines],
        "grad_norms": [round(line["grad_norm"], 4) for line in lines],
        "finite": all(bool(weight.isfinite().all()) for weight in trained),
    }


def timed(call: Any) -> tuple[Any, float]:
    """Returns what a call returns, and its seconds."""
    import torch

    start = time.perf_counter()
    value = call()
    if device() != "cpu":
        torch.cuda.synchronize()
    return value, time.perf_counter() - start


def device() -> str:
    """Returns where everything runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Returns the device's name for people."""
    import torch

    return torch.cuda.get_device_name() if device() != "cpu" else "cpu"


def peak_gib() -> float | None:
    """Returns the peak of the memory that tensors took on the GPU, in GiB; None on a CPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device() != "cpu" else None


def reset_peak() -> None:
    """Starts a new peak."""
    import torch

    if device() != "cpu":
        torch.cuda.reset_peak_memory_stats()


def release() -> None:
    """Gives memory of dropped networks back."""
    import gc

    import torch

    gc.collect()
    if device() != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
