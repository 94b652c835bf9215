"""What a process needs to run episodes, put together from the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from rlx.config import Config
from rlx.envs.chat import Chat
from rlx.envs.load import load_rollout
from rlx.envs.openai_api import Endpoint
from rlx.envs.openenv import OpenEnvs
from rlx.envs.runner import EpisodeRunner
from rlx.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Parts:
    """`own_reward`: whether the episodes may bring a reward of their own."""

    runner: EpisodeRunner
    environments: OpenEnvs | None
    endpoint: Endpoint
    own_reward: bool

    async def close(self) -> None:
        await self.endpoint.close()
        if self.environments is not None:
            await self.environments.close()


async def set_up(config: Config, urls: Mapping[str, str]) -> Parts:
    """Import the user's function and check that the chat template serves it. `urls`: of the servers started by
    `rlx.envs.openenv_server`. Raises UserCodeError, ConfigError or ModelError with the key."""
    tokenizer = await asyncio.to_thread(load_tokenizer, config)
    chat = Chat(tokenizer, config.trl.chat_template_kwargs)
    rollout = load_rollout(config, chat)
    if rollout.many_turns:
        await asyncio.to_thread(chat.check, config)
    environments = OpenEnvs(config, urls) if config.envs else None
    endpoint = Endpoint(config.base_model)
    await endpoint.start()
    runner = EpisodeRunner(
        rollout.function,
        chat,
        config.episodes,
        max_model_len=config.max_model_len,
        environments=environments,
        endpoint=endpoint,
    )
    return Parts(runner, environments, endpoint, rollout.own_reward)
