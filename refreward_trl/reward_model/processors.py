"""Processors for libraries that want one, such as TRL: text and PIL images in, the network's inputs out.

Where torchvision is installed these are the stock ones. Without it the stock Qwen-VL and SmolVLM processors cannot
even be made, because of a video processor that no still image needs; then their image halves are put together here.
Either way nothing is resized: what a judge sees has the size that it was given.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, ProcessorMixin, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from refreward_trl.errors import CheckpointError
from refreward_trl.reward_model.families import FAMILIES, IMAGE_TOKEN, VIDEO_TOKEN
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class QwenImageProcessor(Qwen2_5_VLProcessor):
    """The image half of Qwen2.5-VL's processor."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **ignored: Any
    ) -> None:
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen3ImageProcessor(Qwen3VLProcessor):
    """The image half of Qwen3-VL's processor."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **ignored: Any
    ) -> None:
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        self.vision_start_token_id = tokenizer.convert_tokens_to_ids(self.vision_start_token)
        self.vision_end_token_id = tokenizer.convert_tokens_to_ids(self.vision_end_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec) -> ProcessorMixin:
    """Returns a processor that shows a network the pixels that `spec` says, in their own size.

    Args:
        config: The network's configuration.
        tokenizer: Its tokenizer.
        spec: The judge's spec: patch grid and pixel statistics.

    Raises:
        CheckpointError: No judge of this family, or one that is asked with clips.
    """
    if config.model_type not in FAMILIES or spec.layout != "images":
        raise CheckpointError(
            f"a {config.model_type} judge with layout {spec.layout!r} has no processor for images",
            where="judge_spec.json",
            fix=f"use layout 'images' and a network of type {', '.join(FAMILIES)}",
        )
    mean, std = list(spec.image_mean or (0.0,) * 3), list(spec.image_std or (1.0,) * 3)
    settings: dict[str, Any] = {"do_resize": False, "image_mean": mean, "image_std": std, "do_normalize": True}
    if config.model_type.startswith("qwen"):
        images: Any = Qwen2VLImageProcessorPil(patch_size=spec.patch, merge_size=spec.merge, **settings)
        kind: Any = QwenImageProcessor if config.model_type == "qwen2_5_vl" else Qwen3ImageProcessor
        return kind(images, tokenizer, chat_template=tokenizer.chat_template)
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, max_image_size={"longest_edge": spec.tile}, do_pad=False, **settings
    )
    tokens = (spec.tile // spec.pixel_multiple) ** 2
    template: Any = tokenizer.chat_template
    return Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=template)


def load_processor(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec) -> Any:
    """Returns the processor of a judge's folder: the stock one where it can be made, else `build_processor`'s.

    The stock one is told not to resize.

    Raises:
        CheckpointError: As `build_processor`.
    """
    # transformers before 5 wrote the first file, later ones the second.
    described = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    if find_spec("torchvision") is None or not described:
        return build_processor(config, tokenizer, spec)
    processor: Any = AutoProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, padding_side="left"
    )
    processor.image_processor.do_resize = False
    return processor
