"""Parts for tests of rollout functions: a policy that says what a script tells it, and episodes run on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlx.config import Config, load_config
from rlx.config.sections import EpisodesSection
from rlx.envs.chat import Chat
from rlx.envs.load import load_rollout
from rlx.envs.runner import EpisodeRunner
from rlx.episode import Episode
from rlx.wire import Completion, GroupRequest, Sampling


class Policy:
    """Says `says(prompt)`, or with a list its next text, and ends its turn; `seconds` a request. `completions`,
    `prompts` (ids) and `samplings` are all that crossed, in order."""

    def __init__(self, chat: Chat, says: Callable[[str], str] | list[str], seconds: float = 0.0):
        self.chat, self.says, self.seconds = chat, says, seconds
        self.completions: list[Completion] = []
        self.prompts: list[np.ndarray] = []
        self.samplings: list[Sampling] = []

    async def __call__(self, request_id: str, prompt_ids: np.ndarray, sampling: Sampling) -> Completion:
        tokenizer = self.chat.tokenizer
        self.prompts.append(prompt_ids)
        self.samplings.append(sampling)
        text = self.says(tokenizer.decode(prompt_ids)) if callable(self.says) else self.says.pop(0)
        await asyncio.sleep(self.seconds)
        said = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = np.asarray(said[: sampling.max_tokens], np.int32)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 100
        finish = "stop" if len(said) <= sampling.max_tokens else "length"
        completion = Completion(ids, logprobs, ((7, len(ids)),), finish, text)
        self.completions.append(completion)
        return completion

    @property
    def sampled(self) -> list[int]:
        return [int(i) for completion in self.completions for i in completion.ids]


def config_of(folder: Path, **trl: Any) -> Config:
    """A configuration next to what is in `folder`."""
    lines = "\n".join(f"  {name}: {value!r}" for name, value in trl.items())
    path = folder / "cfg.yaml"
    path.write_text(
        "base_model: tiny\nrl: grpo\ndatasets:\n  - path: rows.jsonl\n    type: t.t\n"
        f"trl:\n  reward_funcs: ['r.r']\n  max_prompt_length: 4096\n{lines}\n"
    )
    return load_config(str(path))


async def episodes_of(
    config: Config,
    chat: Chat,
    policy: Any,
    prompt: Any,
    *,
    n: int = 1,
    seconds: float = 120.0,
    max_tokens: int = 512,
    max_model_len: int = 8192,
    **columns: Any,
) -> list[Episode]:
    """`n` episodes of what `config` names, on `policy`."""
    loaded = load_rollout(config, chat)
    ids = chat.start(prompt) if isinstance(prompt, list) else chat.tokenizer(prompt)["input_ids"]
    request = GroupRequest("group", prompt, np.asarray(ids, np.int32), n, Sampling(max_tokens=max_tokens), columns)
    runner = EpisodeRunner(loaded.function, chat, EpisodesSection(timeout=seconds), max_model_len=max_model_len)
    return await runner.run(policy, request)


def trained(episode: Episode) -> list[int]:
    return [int(i) for row in episode.rows for i in row.ids[row.mask]]
