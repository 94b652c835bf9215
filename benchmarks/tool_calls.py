"""Wall time of tool calls: 8 episodes × 3 turns × one tool of 0.2 s, sampled by a policy that answers at once.

Three ways in one run, A/B/C repeated: rlx's tool loop (`rlx.envs.tool_loop`), with a tool that sleeps in its thread
and with one that is awaited, and the baseline: a loop over the same episodes that executes one call after the other,
turn by turn, which is how TRL's GRPOTrainer executes synchronous tools. The ideal is 3 × 0.2 s: every episode waits
for its own tools only. Equal work: each way makes 24 calls, and each call is counted by the tool itself.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from rlx.config import Config, load_config
from rlx.dotted import resolve
from rlx.envs.chat import Chat
from rlx.envs.load import load_rollout
from rlx.envs.runner import EpisodeRunner
from rlx.tokenizer import template_folder
from rlx.wire import Completion, GroupRequest, Sampling

EPISODES, TURNS, TOOL_S, REPEATS = 8, 3, 0.2, 5
TOOLS = f'''
import asyncio, itertools, time
calls = itertools.count()

def look(place: str) -> str:
    """Looks somewhere.

    Args:
        place: Where.
    """
    next(calls)
    time.sleep({TOOL_S})
    return "nothing"

async def alook(place: str) -> str:
    """Looks somewhere.

    Args:
        place: Where.
    """
    next(calls)
    await asyncio.sleep({TOOL_S})
    return "nothing"
'''


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with Qwen3's template and the tokens of its tool calls."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", additional_special_tokens=["<|im_start|>"]
    )
    names = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    made.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    made.chat_template = (template_folder() / "qwen3_training.jinja").read_text()
    return made


class Policy:
    """Calls `tool` for three turns, then ends."""

    def __init__(self, chat: Chat, tool: str):
        said = f"<tool_call>\n{json.dumps({'name': tool, 'arguments': {'place': 'here'}})}\n</tool_call>"
        self._call, self._end = (
            np.asarray(chat.tokenizer(f"{text}<|im_end|>")["input_ids"], np.int32) for text in (said, "end")
        )
        self._answer = chat.tokenizer("</tool_response>")["input_ids"][0]

    async def __call__(self, request_id: str, prompt_ids: np.ndarray, sampling: Sampling) -> Completion:
        answered = int((prompt_ids == self._answer).sum())
        ids = self._call if answered < TURNS else self._end
        return Completion(ids, np.full(len(ids), -0.1, np.float32), ((0, len(ids)),), "stop", "")


def configuration(folder: Path, tool: str) -> Config:
    path = folder / f"{tool}.yaml"
    path.write_text(
        "base_model: tiny\nrl: grpo\ndatasets: [{path: rows.jsonl, type: t.t}]\n"
        f"trl: {{tools: [tools.{tool}], reward_funcs: [r.r], max_completion_length: 2000}}\n"
    )
    return load_config(str(path))


def rlx_way(folder: Path, chat: Chat, tool: str) -> Callable[[], float]:
    config = configuration(folder, tool)
    loaded = load_rollout(config, chat)
    policy = Policy(chat, tool)
    prompt = [{"role": "user", "content": "Where is it?"}]

    def run() -> float:
        request = GroupRequest("g", prompt, chat.start(prompt), EPISODES, Sampling(max_tokens=2000))
        runner = EpisodeRunner(loaded.function, chat, config.episodes, max_model_len=8000)
        began = time.perf_counter()
        episodes = asyncio.run(runner.run(policy, request))
        seconds = time.perf_counter() - began
        assert all(e.status == "ok" and e.metrics["tools/failure"] == 0 and e.turns == TURNS + 1 for e in episodes)
        return seconds

    return run


def serial_way(folder: Path) -> Callable[[], float]:
    look = resolve("tools.look", base_dir=folder, key="tools")

    def run() -> float:
        began = time.perf_counter()
        for _turn in range(TURNS):
            for _episode in range(EPISODES):
                look(place="here")
        return time.perf_counter() - began

    return run


def main() -> None:
    print(
        "  ".join(f"{name} {version(name)}" for name in ("transformers", "trl", "numpy")),
        f"python {sys.version.split()[0]}",
    )
    chat = Chat(tokenizer())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tools.py").write_text(TOOLS)
        ways = {
            "one after the other, as TRL's loop": serial_way(folder),
            "rlx, synchronous tool": rlx_way(folder, chat, "look"),
            "rlx, asynchronous tool": rlx_way(folder, chat, "alook"),
        }
        calls = resolve("tools.calls.__next__", base_dir=folder, key="tools")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(REPEATS + 1):
            for way, run in ways.items():
                before = calls()
                took = run()
                assert calls() - before - 1 == EPISODES * TURNS
                if repeat:
                    seconds[way].append(took)
    serial = statistics.median(next(iter(seconds.values())))
    ideal = TURNS * TOOL_S
    print(
        f"{EPISODES} episodes × {TURNS} turns × {TOOL_S} s, {REPEATS} repeats, seconds, median (min to max); ideal {ideal:.2f}"
    )
    for way, took in seconds.items():
        median = statistics.median(took)
        print(
            f"  {way:36} {median:5.2f}  ({min(took):.2f} to {max(took):.2f})  {serial / median:4.1f} × as fast  {median / ideal:4.2f} of the ideal time"
        )


if __name__ == "__main__":
    main()
