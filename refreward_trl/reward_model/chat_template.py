"""Renders a judge's question by the chat template of its tokenizer.

A template comes with a folder that may be anybody's. The sandbox of transformers keeps it from running code, but not
from `{{ 'a' * 10**10 }}` or from loops without end: templates other than our own are therefore rendered in a process
with little memory and time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from refreward_trl.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
"""The template of the tiny judges."""

MEMORY = 128 * 2**20
"""Bytes that a template may use, beyond what the libraries take (on Linux)."""
SECONDS = 5
"""Of computing time that a template may use."""
PATIENCE = 120.0
"""Seconds until the process counts as hanging: it imports transformers, perhaps from a slow disk."""
LONGEST = 100_000
"""Characters of a question."""

_RENDER = """
import json, sys
from contextlib import suppress
from pathlib import Path
from transformers.utils.chat_template_utils import render_jinja_template

request = json.load(sys.stdin)
with suppress(ImportError, OSError, ValueError):
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + request["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + request["memory"],) * 2)
try:
    rendered, _ = render_jinja_template(
        [request["messages"]], chat_template=request["template"], add_generation_prompt=True, **request["tokens"]
    )
    answer = {"text": rendered[0]} if len(rendered[0]) <= request["longest"] else {"problem": "the text is too long"}
except Exception as error:
    answer = {"problem": f"{type(error).__name__}: {error}"[:300]}
print("\\n" + json.dumps(answer))
"""


def render_question(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """Returns the text of a conversation with the beginning of an answer.

    Raises:
        CheckpointError: The template is wrong, or takes more memory or time than a question can need.
    """
    template = tokenizer.get_chat_template()
    if template == OWN_TEMPLATE:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    request = {
        "template": template,
        "messages": messages,
        "tokens": tokenizer.special_tokens_map,
        "memory": MEMORY,
        "seconds": SECONDS,
        "longest": LONGEST,
    }
    # -P: no module of the working directory may stand in for one of a library.
    command = [sys.executable, "-P", "-c", _RENDER]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise _unusable(f"it takes more than {PATIENCE:.0f} seconds") from error
    if done.returncode < 0:
        raise _unusable(f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MB")
    if done.returncode:
        raise _unusable((done.stderr.strip().splitlines() or ["the process failed"])[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    if "text" not in answer:
        raise _unusable(answer["problem"])
    return answer["text"]


def _unusable(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the chat template cannot be used ({reason})",
        where="chat template of the judge",
        fix="restore the template that the judge was trained with",
    )
