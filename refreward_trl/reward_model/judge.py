"""What all judges share: a network, its tokenizer and spec, and answers as logits at the answer position."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.checksums import digest
from refreward_trl.errors import ConfigError
from refreward_trl.reward_model.families import judge_family
from refreward_trl.reward_model.question import JudgePrompt, sizes_of
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.vision_attention import batched_vision_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEC_FILE = "judge_spec.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class MLLMJudge:
    """A multimodal LLM that is asked about SR images and their LR image: the base of the ways to ask.

    A plain class and not a module on purpose: a trainer that owns it must not register the judge's weights.

    Args:
        model: Network of one of `families.FAMILIES`, for example `Qwen2_5_VLForConditionalGeneration`.
        tokenizer: Its tokenizer, with a chat template.
        spec: The question it was trained with.
        batch_size: The most rows (tiles, pairs of tiles) per forward.
        batch_tokens: The most tokens per forward, if that is fewer rows; None for no such limit.

    Raises:
        CheckpointError: Model, tokenizer and spec do not belong together.
        ConfigError: A limit under 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: JudgeSpec,
        *,
        batch_size: int = 32,
        batch_tokens: int | None = None,
    ) -> None:
        if batch_size < 1 or (batch_tokens is not None and batch_tokens < 1):
            raise ConfigError(
                f"batch_size {batch_size} and batch_tokens {batch_tokens} must be at least 1",
                where=type(self).__name__,
            )
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.family = judge_family(model.config, tokenizer, spec)
        self._positions: dict[tuple[Any, ...], Tensor | None] = {}

    @property
    def device(self) -> torch.device:
        """Where the judge computes."""
        return self.model.device

    def to(self, device: torch.device | str) -> Self:
        """Moves the judge; returns itself. A quantized network is left where its weights were loaded."""
        if not getattr(self.model, "is_quantized", False):
            self.model.to(device)  # pyright: ignore[reportArgumentType]  (transformers' decorated signature)
        return self

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes a folder that `AutoModelForImageTextToText` and `AutoTokenizer` open, plus `judge_spec.json`.

        The settings of the stock processor, for `AutoProcessor` and servers, come along from the folder that the
        network was loaded from, if it has them; we do not need them.

        Args:
            folder: Where to; made if needed.
            dtype: Precision of the stored weights, for example `torch.float16`; None keeps that of the model.
            state_dict: Weights to write in the place of the model's own, for example gathered from several ranks.
        """
        folder = Path(folder)
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        if dtype is not None:
            state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        # In the config the hash ties the weights to their question, whatever happens to the JSON beside them.
        self.model.config.judge_spec_hash = self.spec.hash
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        if source := getattr(self.model.config, "_name_or_path", ""):  # networks that were not loaded have none
            _copy_processor(Path(source), folder)
        (folder / SPEC_FILE).write_text(self.spec.to_json() + "\n")

    def weights_digest(self) -> str:
        """Returns a digest of names, shapes and bits of all weights."""
        return digest(self.model.state_dict())

    def rows_per_forward(self, prompt: JudgePrompt, visuals: Sequence[Tensor]) -> int:
        """Returns how many rows of this size the limits allow in one forward, at least 1."""
        if self.batch_tokens is None:
            return self.batch_size
        tokens = len(prompt.input_ids(sizes_of(visuals)))
        return max(1, min(self.batch_size, self.batch_tokens // tokens))

    def token_inputs(self, prompt: JudgePrompt, visuals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns the keyword arguments of a forward pass that have an entry per token, positions included."""
        inputs = prompt.token_inputs(visuals)
        positions = self._position_ids(prompt, visuals)
        if positions is not None:
            inputs["position_ids"] = positions.to(inputs["input_ids"].device).expand(-1, len(inputs["input_ids"]), -1)
        return inputs

    def answer_logits(
        self, prompt: JudgePrompt, visuals: Sequence[Tensor], answers: Tensor, *, model: nn.Module | None = None
    ) -> Float[Tensor, "b a"]:
        """Returns the logits of some tokens at the answer position, in at least fp32, one forward for the whole batch.

        Args:
            prompt: The question.
            visuals: What it is about, see `question.shown_visuals`.
            answers: Ids of the tokens `(a,)`.
            model: The module to call instead of `self.model`, for example the one a trainer prepared.
        """
        module = self.model if model is None else model
        inputs = self.token_inputs(prompt, visuals) | self.family.pixel_inputs(visuals)
        output = module(**inputs, logits_to_keep=1, use_cache=False)
        logits = output.logits[:, -1, answers.to(output.logits.device)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def write(
        self,
        prompt: JudgePrompt,
        visuals: Sequence[Tensor],
        *,
        num_samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Lets the network answer in words, up to `spec.max_new_tokens`.

        Args:
            prompt: The question.
            visuals: What it is about, see `question.shown_visuals`; b rows.
            num_samples: Answers per row.
            temperature: Of sampling; 0 takes the most likely token.
            seed: Of the samples; the global random state is left alone.

        Returns:
            b times `num_samples` texts, those of one row next to each other.
        """
        visuals = [visual.repeat_interleave(num_samples, dim=0) for visual in visuals]
        inputs: dict[str, Any] = prompt.token_inputs(visuals) | self.family.pixel_inputs(visuals)
        options: dict[str, Any] = {
            "max_new_tokens": self.spec.max_new_tokens,
            "do_sample": temperature > 0,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), batched_vision_attention(self.model):
            torch.manual_seed(seed)
            output = self.model.generate(**inputs, **options)  # pyright: ignore[reportCallIssue]
        new = output[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def _position_ids(self, prompt: JudgePrompt, visuals: Sequence[Tensor]) -> Tensor | None:
        """Rotary positions `(3, 1, tokens)`: the same for every row, so they are computed for one row and kept."""
        key = (id(prompt), *sizes_of(visuals))
        if key not in self._positions:
            row = [visual[:1].detach() for visual in visuals]
            positions = self.family.positions(self.model, prompt.token_inputs(row) | self.family.pixel_inputs(row))
            self._positions[key] = None if positions is None else positions.cpu()
        return self._positions[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_positions": {}}  # keyed by the identity of prompts


def _copy_processor(source: Path, folder: Path) -> None:
    for name in PROCESSOR_FILES:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
