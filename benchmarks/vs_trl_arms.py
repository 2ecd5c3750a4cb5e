"""The arms of `vs_trl.py`: one trainer in a process of its own, which does updates when it is told to.

    python benchmarks/vs_trl_arms.py ours-ddpo --images 16 --candidates 8 --updates 2 --warm-up 2 < commands > reports

Every line on the standard input asks for one round of updates, whose seconds come back as a line of JSON; the end of
the input ends the run, with a last line about memory and work. Only the standard library is imported at the top: TRL's
arms run where this package is not installed.

Both sides train the same LoRA adapter (what TRL hard-codes: rank 4 on the attention layers) of a U-Net beside a VAE,
an eighth as wide as those of Stable Diffusion 1.5 and as deep, with the same reward, at 128 pixels and one denoising
step. One step means:

- TRL: DDIM from pure noise at timestep 999 to timestep 0, since `scheduler_step` clamps a step that would leave the
  schedule; the noise that `sample_eta=1` adds there, of standard deviation 0.03, is the policy. That takes
  `timestep_spacing="trailing"`: with "leading" the only timestep is `steps_offset`, which is 0 by default, and from 0
  to 0 there is no noise, so that the log-probability is not a number. One prompt per image, no guidance.
- Ours: one call on the encoded LR image, and for DDPO a Gaussian around the prediction: the candidates of an LR image
  share their prediction, so the denoiser sees one latent per group where TRL's sees one per image.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE, SCALE, SAMPLES = 128, 4, 64
UNET: dict[str, Any] = {
    "sample_size": SIZE // 8,
    "block_out_channels": (40, 80, 160, 160),
    "cross_attention_dim": 96,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "sample_size": SIZE,
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,  # of 12, so that a text encoder, which SR does not need, costs TRL little
    "num_attention_heads": 8,
}
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 4,
    "init_lora_weights": "gaussian",
    "target_modules": ["to_k", "to_q", "to_v", "to_out.0"],
}
LEARNING_RATE = 1e-4
UNANCHORED: dict[str, Any] = {"anchor": "none"}
AS_ALIGNPROP: dict[str, Any] = {"activation_checkpointing": True, "checkpoint_decode": False}
"""AlignProp computes the denoiser again in the backward pass, and the decoder not."""
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}
PACKAGES = ("torch", "trl", "transformers", "diffusers", "accelerate", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=sorted(ARMS))
    parser.add_argument("--images", type=int, default=16, help="images that are scored per update")
    parser.add_argument("--candidates", type=int, default=8, help="of one LR image, in our DDPO")
    parser.add_argument("--updates", type=int, default=2, help="updates of a round")
    parser.add_argument("--warm-up", type=int, default=2, help="updates before the first round")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print would be taken for a report
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ARMS[options.arm](Rounds(options, reports), options, Path(folder))


class Stopwatch:
    """CPU seconds by part of an update, each counted once: for the part that was entered first.

    So what is computed again in the backward pass is backward. CPU time, since a part is not dear because another
    process had the core meanwhile.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.rows: dict[str, int] = defaultdict(int)
        self._inside = False

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Times the method `name` of an object."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            return self._timed(part, function, arguments, keywords)

        setattr(owner, name, timed)

    def watch_network(self, owner: Any, name: str, part: str) -> None:
        """Times a network whose first argument is a batch, with and without a gradient, and counts its rows."""
        import torch

        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            key = f"{part}, {'with' if torch.is_grad_enabled() else 'without'} gradient"
            if not self._inside:
                self.rows[key] += len(arguments[0])
            return self._timed(key, function, arguments, keywords)

        setattr(owner, name, timed)

    def watch_networks(self, unet: Any, vae: Any) -> None:
        """Times the networks that both sides have."""
        self.watch_network(unet, "forward", "denoiser")
        self.watch_network(vae, "decode", "decoder")

    def watch_update(self, accelerator: Any, optimizer: Any) -> None:
        """Times what follows the loss."""
        self.watch(accelerator, "backward", "backward")
        self.watch(accelerator, "clip_grad_norm_", "optimizer")
        self.watch(optimizer, "step", "optimizer")

    def _timed(self, part: str, function: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        if self._inside:
            return function(*arguments, **keywords)
        self._inside, since = True, time.process_time()
        try:
            return function(*arguments, **keywords)
        finally:
            self._inside = False
            self.seconds[part] += time.process_time() - since


class Rounds:
    """Says when an arm may go on, and reports what it did.

    Args:
        options: The command line.
        reports: Where lines of JSON go.
    """

    def __init__(self, options: argparse.Namespace, reports: Any) -> None:
        self.stopwatch = Stopwatch()
        self._options, self._reports = options, reports
        self._done = 0
        self._held, self._parameters, self._before = 0.0, [], []
        self._since = (0.0, 0.0)

    def built(self, parameters: Any) -> None:
        """The arm is built: its memory is counted from here on."""
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._before = [parameter.detach().clone() for parameter in self._parameters]
        self._held = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here

    def updated(self) -> bool:
        """To be called after each update; whether there is to be another one."""
        self._done += 1
        counted = self._done - self._options.warm_up
        if counted < 0 or counted % self._options.updates:
            return True
        if counted:
            seconds, cpu_seconds = (now - since for now, since in zip(_clocks(), self._since, strict=True))
            parts = {**self.stopwatch.seconds, "bookkeeping": cpu_seconds - sum(self.stopwatch.seconds.values())}
            self._report({"seconds": seconds, "cpu_seconds": cpu_seconds, "parts": parts, "rows": self._rows()})
        else:
            self._report({"ready": True})
        if not sys.stdin.readline():
            self._report(self._summary())
            return False
        self.stopwatch.seconds.clear()
        self.stopwatch.rows.clear()
        self._since = _clocks()
        return True

    def _rows(self) -> dict[str, float]:
        return {name: rows / self._options.updates for name, rows in self.stopwatch.rows.items()}

    def _summary(self) -> dict[str, Any]:
        pairs = list(zip(self._parameters, self._before, strict=True))
        return {
            "held_mb": self._held,
            "peak_mb": _status("VmHWM") - self._held,
            "trained_parameters": sum(parameter.numel() for parameter in self._parameters),
            "moved_tensors": sum(not parameter.equal(before) for parameter, before in pairs),
            "finite": all(bool(parameter.isfinite().all()) for parameter in self._parameters),
            "updates": self._done,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    def _report(self, report: dict[str, Any]) -> None:
        self._reports.write(json.dumps(report) + "\n")


def brightness_without_variation(images: Any) -> Any:
    """Mean brightness minus total variation, `(B,)`: a reward with a gradient that costs next to nothing."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return images.mean(dim=(1, 2, 3)) - across - down


def ours(kind: str, changed: dict[str, Any], rounds: Rounds, options: argparse.Namespace, folder: Path) -> None:
    """Runs one of our trainers with its defaults, but for the settings that are changed."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from refreward_trl import SRDDPOConfig, SRDDPOTrainer, SRReFLConfig, SRReFLTrainer

    class Reward:
        """In our contract."""

        def score(self, images: Any) -> Any:
            return brightness_without_variation(images)

        def __call__(self, *, completions: Any, **columns: Any) -> Any:
            return self.score(completions)

    class Told(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rounds.stopwatch.watch_update(trainer.accelerator, kwargs["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not rounds.updated()

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 10**6,
        "per_device_train_batch_size": options.images // (options.candidates if kind == "ddpo" else 1),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changed,
    }
    if kind == "ddpo":
        settings["num_generations"] = options.candidates
    config: Any = SRDDPOConfig if kind == "ddpo" else SRReFLConfig
    trainer_class: Any = SRDDPOTrainer if kind == "ddpo" else SRReFLTrainer
    generator, reward = our_generator(), Reward()
    trainer = trainer_class(
        generator,
        reward_funcs=reward,
        args=config(**settings),
        train_dataset=lr_images(),
        peft_config=LoraConfig(**LORA),
        callbacks=[Told()],
    )
    rounds.stopwatch.watch_networks(generator.denoiser, generator.vae)
    rounds.stopwatch.watch(generator, "encode", "image or text encoder")
    rounds.stopwatch.watch(reward, "score", "reward")
    rounds.built(trainer.model.parameters())
    trainer.train()


def our_generator() -> Any:
    """Returns the networks in OSEDiff's formula: one call at timestep 999 on the encoded LR image."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from refreward_trl import EpsLatentConfig, EpsLatentGenerator

    config = EpsLatentConfig(latent_scale=0.18215, scale=SCALE, t_net=999, t_coeff=999, input_scaling="none")
    prompt = torch.randn(1, 77, TEXT["hidden_size"])
    return EpsLatentGenerator(UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), config, prompt)


def lr_images() -> list[dict[str, Any]]:
    """Returns smooth LR images in memory."""
    import torch
    import torch.nn.functional as F

    coarse = torch.rand(SAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=SIZE // SCALE, mode="bilinear").mul(255).to(torch.uint8)
    return [{"sample_id": f"photo{number}", "lr_image": image} for number, image in enumerate(images)]


def trl(kind: str, rounds: Rounds, options: argparse.Namespace, folder: Path) -> None:
    """Runs one of TRL's trainers, step by step, as its `train` does."""
    from accelerate import PartialState

    old_trl: Any = importlib.import_module("trl")
    PartialState()  # the trainers warn before they have made one, and accelerate's logger refuses

    class Reward:
        """In TRL's old contract."""

        def score(self, images: Any) -> Any:
            return brightness_without_variation(images)

        def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
            return self.score(images), {}

    numbers = itertools.count()
    prompts = lambda: (f"photo {next(numbers) % SAMPLES}", {})  # noqa: E731
    common: dict[str, Any] = {
        "mixed_precision": "no",
        "save_freq": 10**9,
        "sample_num_steps": 1,
        "sample_eta": 1.0,
        "sample_guidance_scale": 1.0,
        "train_batch_size": options.images,
        "train_learning_rate": LEARNING_RATE,
    }
    if kind == "ddpo":
        own = {"sample_batch_size": options.images, "sample_num_batches_per_epoch": 1, "train_cfg": False}
        config, trainer_class = old_trl.DDPOConfig(**common, **own), old_trl.DDPOTrainer
    else:
        own = {"truncated_backprop_rand": False, "truncated_backprop_timestep": 0}
        config, trainer_class = old_trl.AlignPropConfig(**common, **own), old_trl.AlignPropTrainer
    pipeline, reward = trl_pipeline(folder), Reward()
    trainer: Any = trainer_class(config, reward, prompts, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    rounds.stopwatch.watch_networks(pipeline.unet, pipeline.vae)
    rounds.stopwatch.watch(pipeline.text_encoder, "forward", "image or text encoder")
    rounds.stopwatch.watch(reward, "score", "reward")
    rounds.stopwatch.watch_update(trainer.accelerator, trainer.optimizer)
    rounds.built(pipeline.unet.parameters())
    step = 0
    for epoch in itertools.count():
        step = trainer.step(epoch, step)
        if not rounds.updated():
            return


def trl_pipeline(folder: Path) -> Any:
    """Returns TRL's own pipeline around networks of the same shapes, read from a folder as it insists."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = small_tokenizer(folder)
    text = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **TEXT)
    parts: dict[str, Any] = dict(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
    )
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "pipeline")

    class Unguided(StableDiffusionPipeline):
        """Without guidance: TRL hands over the embeddings of the empty prompt all the same, and what diffusers has
        kept of `_encode_prompt` would put them before the others, twice as many as there are latents."""

        def _encode_prompt(self, *arguments: Any, prompt_embeds: torch.Tensor, **keywords: Any) -> torch.Tensor:
            return prompt_embeds

    old_trl: Any = importlib.import_module("trl")
    pipeline = old_trl.DefaultDDPOStableDiffusionPipeline(str(folder / "pipeline"))
    pipeline.sd_pipeline.__class__ = Unguided
    return pipeline


def small_tokenizer(folder: Path) -> Any:
    """Returns a CLIP tokenizer of letters and digits."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _status(name: str) -> float:
    """Returns a number of this process in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


ARMS: dict[str, Callable[[Rounds, argparse.Namespace, Path], None]] = {
    "trl-ddpo": functools.partial(trl, "ddpo"),
    "trl-refl": functools.partial(trl, "refl"),
    "ours-ddpo": functools.partial(ours, "ddpo", UNANCHORED),
    "ours-ddpo-anchored": functools.partial(ours, "ddpo", {}),
    "ours-refl": functools.partial(ours, "refl", UNANCHORED | AS_ALIGNPROP),
    "ours-refl-kept": functools.partial(ours, "refl", UNANCHORED | {"checkpoint_decode": False}),
    "ours-refl-anchored": functools.partial(ours, "refl", {}),
}

if __name__ == "__main__":
    main()
