"""How fast a judge scores the K candidates of an LR image: together, sharing the work on the LR image, or as a batch.

    OMP_NUM_THREADS=1 python benchmarks/judge_throughput.py [--candidates 8] [--size 128] [--json figures.json]

Both ways take turns, on an untrained judge of the Qwen2.5-VL class that looks at LR and SR as two images. Beside the
measured ratio stands the one that the token counts lead to expect. The same for `compare`, asked about all ordered
pairs. A last table compares `rate`, which reads one answer position, with `reason`, which writes its answer token by
token. Exits with 1 if sharing is not faster by `LEAST_RATIO`, or changes a score by more than `MOST_DIFFERENCE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refreward_trl.reward_model.comparing import CompareJudge
from refreward_trl.reward_model.question import shown_visuals
from refreward_trl.reward_model.reasoning import ReasonJudge
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge

LEAST_RATIO = 1.2
MOST_DIFFERENCE = 1e-4
SCALE = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="side of the SR images in pixels")
    parser.add_argument("--width", type=int, default=320, help="of the vision tower and the language model")
    parser.add_argument("--layers", type=int, default=4, help="of each")
    parser.add_argument("--answer", type=int, default=64, help="tokens of a reasoned answer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures = measure(arguments)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["within_bounds"] else 1


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both tables and compares the scores."""
    judge = build_judge(arguments)
    lr_image, candidates = images(arguments)
    repeated = lr_image.expand(len(candidates), -1, -1, -1)
    with torch.no_grad():
        difference = (judge.rate(repeated, candidates) - judge.rate_group(lr_image, candidates)).abs().max()
        seconds = take_turns(
            {
                "batch": lambda: judge.rate(repeated, candidates),
                "group": lambda: judge.rate_group(lr_image, candidates),
            },
            arguments.repeats,
            arguments.device,
        )
        comparing = CompareJudge(judge.model, judge.tokenizer, replace(judge.spec, compare_prompt="A better B"))
        left, right = torch.triu_indices(len(candidates), len(candidates), offset=1)
        pairs = lr_image.expand(len(left), -1, -1, -1), candidates[left], candidates[right]
        table = comparing.choose_group(lr_image, candidates)
        orders = torch.stack([table[left, right], table[right, left]])
        compare_difference = (torch.stack(comparing.compare_orders(*pairs)) - orders).abs().max()
        compared = take_turns(
            {
                "batch": lambda: comparing.compare_orders(*pairs),
                "group": lambda: comparing.choose_group(lr_image, candidates),
            },
            arguments.repeats,
            arguments.device,
        )
        reasoned = take_turns(
            {
                "rate": lambda: judge.rate(repeated[:1], candidates[:1]),
                "reason": lambda: reason_judge(judge, arguments.answer).reason(repeated[:1], candidates[:1]),
            },
            max(2, arguments.repeats // 2),
            arguments.device,
        )
    ratios = [batch / group for batch, group in zip(seconds["batch"], seconds["group"], strict=True)]
    counts = token_counts(judge, lr_image, candidates)
    figures: dict[str, Any] = {
        "candidates": len(candidates),
        "size": arguments.size,
        "parameters": sum(weight.numel() for weight in judge.model.parameters()),
        "tokens": counts,
        "expected_ratio": round(counts["batch"] / counts["group"], 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "images_per_second": {way: round(len(candidates) / min(times), 2) for way, times in seconds.items()},
        "largest_difference": float(difference),
        "seconds_per_image": {way: round(statistics.median(times), 4) for way, times in reasoned.items()},
        "answer_tokens": arguments.answer,
    }
    figures["compare"] = {
        "ratio": round(statistics.median(b / g for b, g in zip(compared["batch"], compared["group"], strict=True)), 3),
        "pairs_per_second": {way: round(2 * len(left) / min(times), 2) for way, times in compared.items()},
        "largest_difference": float(compare_difference),
    }
    figures["within_bounds"] = (
        min(figures["ratio"], figures["compare"]["ratio"]) >= LEAST_RATIO
        and max(float(difference), float(compare_difference)) <= MOST_DIFFERENCE
    )
    return figures


def token_counts(judge: RateJudge, lr_image: Tensor, candidates: Tensor) -> dict[str, int]:
    """Returns how many tokens the language model reads for all candidates, either way."""
    prompt = next(iter(judge.prompts.values()))
    visuals = shown_visuals(lr_image[None], [candidates[:1]], judge.spec)
    sizes = [(visual.shape[-2], visual.shape[-1]) for visual in visuals]
    row, shared = len(prompt.input_ids(sizes)), prompt.shared_length(sizes[0])
    return {"batch": len(candidates) * row, "group": shared + len(candidates) * (row - shared), "shared": shared}


def take_turns(ways: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Runs every way in turn, once to warm up and then `repeats` times; returns the seconds of each run."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def build_judge(arguments: argparse.Namespace) -> RateJudge:
    """Returns an untrained judge with one tile for the whole image."""
    heads = arguments.width // 32
    judge = build_tiny_judge(
        vision_dim=arguments.width,
        vision_depth=arguments.layers,
        vision_heads=heads,
        text_dim=arguments.width,
        text_layers=arguments.layers,
        text_heads=heads,
        spec=JudgeSpec(layout="images", tile=arguments.size, reason_prompt="rate consistency and naturalness"),
    )
    judge.model.eval().requires_grad_(False)
    return judge.to(arguments.device)


def reason_judge(judge: RateJudge, answer: int) -> ReasonJudge:
    """Returns the same network, asked for an answer of exactly so many tokens."""
    reasoning = ReasonJudge(judge.model, judge.tokenizer, replace(judge.spec, max_new_tokens=answer))
    judge.model.generation_config.min_new_tokens = answer
    return reasoning


def images(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Returns one LR image and its candidates, of random pixels."""
    generator = torch.Generator().manual_seed(0)
    sides: Sequence[int] = (arguments.size // SCALE, arguments.size)
    lr_image, candidates = (
        torch.rand(count, 3, side, side, generator=generator)
        for count, side in zip((1, arguments.candidates), sides, strict=True)
    )
    return lr_image[0].to(arguments.device), candidates.to(arguments.device)


if __name__ == "__main__":
    raise SystemExit(main())
