"""The counter of examples/openenv_counter, played by policies that add: rightly, or without carrying."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from env_parts import Policy, group, runner_of

from rlx.config import load_config, parse_overrides
from rlx.envs.chat import Chat
from rlx.envs.load import load_rollout
from rlx.envs.openenv import OpenEnvs
from rlx.envs.openenv_server import EnvServers

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
async def test_the_counter_example_rewards_every_right_sum_of_a_whole_episode(tmp_path: Path) -> None:
    path = EXAMPLES / "openenv_counter" / "openenv_counter.yaml"
    config = load_config(path, parse_overrides(["--output_dir", str(tmp_path)]))
    chat = Chat(runpy.run_path(str(EXAMPLES / "quickstart" / "characters.py"))["build_tokenizer"]())
    chat.check(config)
    servers = EnvServers(config)
    await servers.start()
    try:
        environments = OpenEnvs(config, servers.urls)
        runner = runner_of(load_rollout(config, chat).function, chat=chat, environments=environments)

        def adds(number: int, prompt_ids: object, sampling: object) -> str:
            question = chat.tokenizer.decode(prompt_ids).split("\n")[-3].removesuffix("<|im_end|>")
            left, right = question.removesuffix("=").split("+")
            return f"{int(left) + int(right)}<|im_end|>"

        prompt = [{"role": "user", "content": ""}]
        request = group(prompt, n=4, chat=chat, max_tokens=config.trl.max_completion_length)
        episodes = await runner.run(Policy(chat, adds), request)
        assert [(e.status, e.turns, e.reward) for e in episodes] == [("ok", 3, 3.0)] * 4, [e.error for e in episodes]
        assert len({e.text for e in episodes}) == 1, "the seed is the group's"
        assert [(r.value, r.name, r.turn) for r in episodes[0].step_rewards] == [(1.0, "counter", t) for t in range(3)]
        (wrong,) = await runner.run(Policy(chat, ["1<|im_end|>"]), group(prompt, chat=chat, max_tokens=64))
        assert (wrong.status, wrong.turns, wrong.reward) == ("ok", 1, 0.0)
        await environments.close()
    finally:
        await servers.close()
