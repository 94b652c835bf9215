"""The example of the documented rollout function, on a policy that says what it is told."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np

from rlx.config import load_config
from rlx.dotted import resolve
from rlx.envs.chat import Chat
from rlx.envs.load import load_rollout
from rlx.envs.runner import EpisodeRunner
from rlx.rewards.scoring import ScoreRequest, load_reward, score_group
from rlx.wire import Completion, GroupRequest, Sampling

EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_the_documented_rollout_example_makes_rows_and_rewards():
    config = load_config(str(EXAMPLES / "documented_rollout" / "documented_rollout.yaml"))
    tokenizer = runpy.run_path(str(EXAMPLES / "quickstart" / "characters.py"))["build_tokenizer"]()
    chat = Chat(tokenizer)
    loaded = load_rollout(config, chat)
    says = iter(["well", "42"])

    async def sample(request_id: str, prompt_ids: np.ndarray, sampling: Sampling) -> Completion:
        ids = np.asarray([*tokenizer(next(says))["input_ids"], tokenizer.eos_token_id], np.int32)
        assert len(ids) <= sampling.max_tokens
        return Completion(ids, np.full(len(ids), -0.5, np.float32), ((0, len(ids)),), "stop", "")

    [section] = config.datasets
    transform, _ = resolve(str(section.type), base_dir=config.base_dir, key="datasets[0].type")(config)
    row = transform({"question": "12+30=", "answer": 42})
    prompt_ids = chat.start(row["prompt"])
    sampling = Sampling(config.trl.max_completion_length)
    request = GroupRequest("g", row["prompt"], prompt_ids, 1, sampling, {"answer": row["answer"]})
    runner = EpisodeRunner(loaded.function, chat, config.episodes, max_model_len=config.max_model_len)
    [episode] = await runner.run(sample, request)

    assert (episode.status, episode.error, episode.exact) == ("ok", "", True)
    assert episode.completion == "well\n42"
    first, second = episode.rows
    assert first.prompt_ids is None
    assert second.prompt_ids is not None
    assert tokenizer.decode(second.prompt_ids).endswith("assistant\nwell\n")
    reward = load_reward(config.trl.reward_funcs[0], config.base_dir, "trl.reward_funcs[0]")
    assert score_group(reward, ScoreRequest.of(request, [episode])).tolist() == [1.0]
