"""Generation as functions in a thread see it: token ids in, token ids out, everything sampled on the episode's tape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlx.envs.rollout import Rollout
from rlx.envs.threads import Bridge
from rlx.errors import UserCodeError

_SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Sampled:
    """What one request sampled: `ids` [T] after `prompt_ids` [P], with a log-probability each; `text` is without special
    tokens."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str


class Generator:
    """`ctx.generate` for a thread. `calls` are all requests of the episode, in their order."""

    def __init__(self, ctx: Rollout, bridge: Bridge, tokenizer: Any):
        self.ctx = ctx
        self.tokenizer = tokenizer
        self.calls: list[Sampled] = []
        self._bridge = bridge

    def sample(self, ids: Sequence[int], **changes: Any) -> Sampled:
        """Continue `ids` by one completion; `changes` are fields of Sampling."""
        prompt_ids = [int(i) for i in ids]
        if not prompt_ids:
            raise UserCodeError("generate was given no token ids to continue. Give it a prompt of at least one token.")
        turn = self._bridge.wait(self.ctx.generate(prompt_ids, **changes), self.ctx.deadline)
        text = self.tokenizer.decode(turn.ids.tolist(), skip_special_tokens=True)
        sampled = Sampled(prompt_ids, turn.ids.tolist(), turn.logprobs.tolist(), text)
        self.calls.append(sampled)
        return sampled

    def ids_of(self, prompt: Any) -> list[int]:
        """Token ids of a prompt given as ids, as text or as messages."""
        if isinstance(prompt, str):
            ids = [int(i) for i in self.tokenizer(str(prompt))["input_ids"]]
            start = self.tokenizer.bos_token_id
            return ids[1:] if start is not None and ids[:2] == [start, start] else ids
        if len(prompt) and isinstance(prompt[0], Mapping):
            return [int(i) for i in self._bridge.wait(self._start(prompt), self.ctx.deadline)]
        return [int(i) for i in prompt]

    async def _start(self, messages: Sequence[Any]) -> np.ndarray:
        return self.ctx.chat.start(list(messages))


def sampling_changes(
    given: Mapping[str, Any], names: Mapping[str, str], neutral: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Fields of Sampling from the arguments `given` to a function called `what`.

    `names` says which arguments mean which field, beside those of the same name. Of the others only a value that
    changes nothing is taken: that of `neutral`, where `...` stands for any, or None, False or empty.
    """
    known = dict(names) | {name: name for name in _SAME_NAME}
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if name in known:
            if value is not None:
                changes[known[name]] = value
        elif not _changes_nothing(name, value, neutral):
            raise UserCodeError(
                f"{what} cannot honour {name}={value!r}. Leave it out. It understands: {', '.join(sorted(known))}."
            )
    if "temperature" in changes and not float(changes["temperature"]) > 0:
        raise UserCodeError(
            f"{what}: temperature={changes['temperature']!r} samples nothing to learn from. Use one above 0."
        )
    if "top_k" in changes:
        changes["top_k"] = max(int(changes["top_k"]), 0)
    if "stop" in changes:
        changes["stop"] = (changes["stop"],) if isinstance(changes["stop"], str) else tuple(changes["stop"])
    return changes


def _changes_nothing(name: str, value: Any, neutral: Mapping[str, Any]) -> bool:
    if name in neutral and value is not None:
        return neutral[name] is ... or bool(neutral[name] == value)
    return value is None or value is False or (isinstance(value, list | tuple | dict) and not value)
