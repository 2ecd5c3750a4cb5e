"""Judges as `eval-rm` names them: a folder, a name on the Hub or a reward, and the way in which it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from refreward_trl.checksums import digest
from refreward_trl.errors import ConfigError
from refreward_trl.evaluation.metrics import source_digest
from refreward_trl.evaluation.model_inputs import label_models
from refreward_trl.evaluation.preference_scorers import CompareScorer, RewardScorer, Scorer
from refreward_trl.reward_model.comparing import CompareJudge
from refreward_trl.reward_model.conv import CONFIG_FILE
from refreward_trl.reward_model.judge import MLLMJudge
from refreward_trl.reward_model.reasoning import ReasonCompareJudge
from refreward_trl.rewards import REWARD_NAMES, load_reward
from refreward_trl.rewards.heldout import HeldOutJudge
from refreward_trl.rewards.refreward import DTYPES, JudgeReward, RefReward
from refreward_trl.types import RewardFunction

Ask: TypeAlias = Literal["rate", "compare", "reason", "reason_compare"]


@dataclass(frozen=True)
class JudgeWord:
    """A judge as it is named: what it is called, where it is, and how it is asked."""

    name: str
    source: str
    ask: Ask = "rate"


@dataclass(frozen=True)
class JudgeOptions:
    """How judges are opened; see `RefReward` for the fields. `specs` is by name of the judge."""

    device: str = "cpu"
    dtype: str = "float32"
    quantization: Literal["8bit", "4bit"] | None = None
    batch_size: int = 16
    cache: Path | None = None
    specs: Mapping[str, Path] | None = None

    def spec(self, name: str) -> Path | None:
        """The JSON file of a judge that brings no spec, if there is one."""
        return (self.specs or {}).get(name)


def read_judges(words: Sequence[str]) -> list[JudgeWord]:
    """Reads `[NAME=]JUDGE[:compare|:reason|:reason_compare]`; what is asked in another way than to rate is called so.

    Raises:
        ConfigError: Two are called alike.
    """
    judges = []
    for word in words:
        source, colon, ask = word.rpartition(":")
        source, ask = (source, ask) if colon and ask in get_args(Ask) else (word, "rate")
        model = label_models([source], where="--model")[0]
        is_named = model.source != source
        judges.append((model.label if is_named or ask == "rate" else f"{model.label}-{ask}", model.source, ask))
    label_models([f"{name}={source}" for name, source, _ in judges], where="--model")
    return [JudgeWord(*judge) for judge in judges]


def check_judge(word: JudgeWord, options: JudgeOptions) -> None:
    """Raises what `open_judge` would raise, as far as it can be known without loading weights; downloads them."""
    from refreward_trl.reward_model.loading import find_folder  # takes seconds: transformers

    reward = _reward(word, options)
    if reward is None or isinstance(reward, RefReward):
        find_folder(word.source)


def open_judge(word: JudgeWord, options: JudgeOptions) -> Scorer:
    """Opens what a word names: a judge in the way that it is asked, or a reward.

    Raises:
        ConfigError: There is no such reward, or it is asked in a way that it cannot answer.
        CheckpointError: A judge cannot be read, or was not made to be asked so.
        SetupError: A judge cannot be downloaded.
    """
    reward = _reward(word, options)
    if reward is None:
        return _comparing(word, options)
    if isinstance(reward, JudgeReward):
        return RewardScorer(word.name, reward, _judge_facts(word, reward.judge))
    return RewardScorer(word.name, reward, {"source": word.source, "ask": "rate", "code": source_digest(reward)})


def _reward(word: JudgeWord, options: JudgeOptions) -> RewardFunction | None:
    """The reward that answers for a judge; None where it is to compare."""
    is_conv = (Path(word.source) / CONFIG_FILE).is_file()
    is_reward = word.source in REWARD_NAMES or (_is_dotted(word.source) and not Path(word.source).exists())
    if (is_conv or is_reward) and word.ask != "rate":
        raise ConfigError(
            f"{word.source} only rates: it cannot {word.ask}", where="--model", fix=f"leave :{word.ask} out"
        )
    if is_conv:
        return HeldOutJudge(word.source, device=options.device, batch_size=options.batch_size)
    if is_reward:
        return load_reward(word.source)
    if word.ask == "compare" or word.ask == "reason_compare":
        return None
    return RefReward(
        word.source,
        ask=word.ask,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        batch_size=options.batch_size,
        cache=options.cache,
        spec=options.spec(word.name),
    )


def _comparing(word: JudgeWord, options: JudgeOptions) -> CompareScorer:
    from refreward_trl.reward_model.loading import load_judge_as  # takes seconds: transformers

    kind: Any = CompareJudge if word.ask == "compare" else ReasonCompareJudge
    judge: Any = load_judge_as(
        kind,
        word.source,
        spec=options.spec(word.name),
        dtype=DTYPES[options.dtype],
        quantization=options.quantization,
        device=options.device,
        batch_size=options.batch_size,
    )
    return CompareScorer(word.name, judge, _judge_facts(word, judge))


def _judge_facts(word: JudgeWord, judge: Any) -> dict[str, str]:
    facts: dict[str, str] = {"source": word.source, "ask": word.ask}
    if isinstance(judge, MLLMJudge):
        return facts | {"spec_hash": judge.spec.hash, "weights_digest": judge.weights_digest()}
    return facts | {"weights_digest": digest(judge.state_dict())}


def _is_dotted(source: str) -> bool:
    return "." in source and all(part.isidentifier() for part in source.split("."))
