"""Parts of episodes for tests: tiny tokenizers of several families, a policy that says what it is told, environments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from rlx.config.sections import EpisodesSection
from rlx.envs.chat import Chat
from rlx.envs.errors import EnvLost
from rlx.envs.runner import EpisodeRunner, Native
from rlx.envs.session import Environments
from rlx.tokenizer import template_folder
from rlx.wire import Completion, GroupRequest, Sampling

_QWEN = ("<|im_end|>", ["<|im_start|>"], ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])  # fmt: skip
_LLAMA = ("<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"], [])
FAMILIES = {
    "qwen3": _QWEN,
    "qwen2_5": _QWEN,
    "qwen3_5": _QWEN,
    "llama3": _LLAMA,
    "phi3": ("<|endoftext|>", ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], []),
    "gemma": ("<end_of_turn>", ["<start_of_turn>", "<bos>"], []),
    "glm4moe": ("<|endoftext|>", ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "deepseekv3": ("<｜end▁of▁sentence｜>", ["<｜begin▁of▁sentence｜>"], ["<｜User｜>", "<｜Assistant｜>"]),
}  # fmt: skip
"""Family: its end of a turn, its other special tokens, its added tokens that are not special."""
ENDS = {"phi3": "<|end|>", "glm4moe": "<|user|>"}
"""Where another token than the end of sequence ends a turn."""
USER = {"role": "user", "content": "hi"}


def tiny_tokenizer(family: str = "qwen3", template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, plus the added tokens of `family`; `template` is the name of one that TRL ships."""
    eos, special, added = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token="<pad>",
        bos_token=next((name for name in special if ("b" in name[:4] and "egin" in name) or name == "<bos>"), None),
        additional_special_tokens=special,
    )
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in added])
    if template is not None:
        tokenizer.chat_template = (template_folder() / f"{template}.jinja").read_text()
    return tokenizer


@cache
def chat_of(family: str = "qwen3", template: str | None = "qwen3_training") -> Chat:
    return Chat(tiny_tokenizer(family, template))


@dataclass
class Request:
    """What the policy was asked for, and what it said."""

    request_id: str
    prompt_ids: np.ndarray
    sampling: Sampling
    completion: Completion | None = None


class Policy:
    """A `Sampler` that says `says(number of the request, prompt_ids, sampling)`: text, token ids, or an error to raise.

    Text may hold special tokens. It is cut at `max_tokens`; each log-probability differs from all others.
    """

    def __init__(
        self,
        chat: Chat,
        says: Callable[[int, np.ndarray, Sampling], str | Sequence[int] | BaseException] | Iterable[str] = (),
    ):
        script = says if callable(says) else iter(says)
        self.says = script if callable(script) else lambda *_: next(script)
        self.chat = chat
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()
        """Nothing is said before it is set; it is set at the start."""
        self.gate.set()
        self._news = asyncio.Event()
        self._logprob = 0

    async def asked(self, times: int) -> None:
        """Wait until it was asked so many times."""
        async with asyncio.timeout(60):
            while len(self.requests) < times:
                self._news.clear()
                await self._news.wait()

    async def __call__(self, request_id: str, prompt_ids: np.ndarray, sampling: Sampling) -> Completion:
        number = len(self.requests)
        request = Request(request_id, np.array(prompt_ids), sampling)
        self.requests.append(request)
        self._news.set()
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        said = self.says(number, prompt_ids, sampling)
        if isinstance(said, BaseException):
            raise said
        encoded = self.chat.tokenizer.encode(said, add_special_tokens=False) if isinstance(said, str) else said
        ids = np.asarray(encoded[: sampling.max_tokens], np.int32)
        count = len(ids)
        logprobs = -np.arange(self._logprob + 1, self._logprob + 1 + count, dtype=np.float32) / 1024
        self._logprob += count
        versions = ((3, count // 2), (4, count - count // 2)) if count > 1 else ((3, count),)
        text = self.chat.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        reason = "length" if count < len(encoded) or count == sampling.max_tokens else "stop"
        request.completion = Completion(ids, logprobs, versions, reason, text)
        return request.completion


def group(
    prompt: Any = None, *, n: int = 1, max_tokens: int = 500, chat: Chat | None = None, **fields: Any
) -> GroupRequest:
    """A request whose prompt ids are those that the learner would make."""
    chat = chat or chat_of()
    prompt = [USER] if prompt is None else prompt
    if isinstance(prompt, str):
        ids = chat.tokenizer.encode(prompt)
    else:
        ids = chat.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    sampling = Sampling(max_tokens=max_tokens)
    return GroupRequest("g", prompt, np.asarray(ids, np.int32), n, sampling, seed=7, **fields)


def runner_of(
    function: Native,
    *,
    chat: Chat | None = None,
    max_model_len: int = 4096,
    environments: Environments | None = None,
    endpoint: Any = None,
    **settings: Any,
) -> EpisodeRunner:
    return EpisodeRunner(
        function,
        chat or chat_of(),
        EpisodesSection(**{"timeout": 120.0, **settings}),
        max_model_len=max_model_len,
        environments=environments,
        endpoint=endpoint,
    )


@dataclass
class Step:
    observation: Any
    reward: float | None
    done: bool = False


@dataclass
class FakeSession:
    """An environment that counts; an exception in `steps` is raised in place of a step."""

    name: str
    seed: int
    steps: list[float | BaseException | None]
    observation: Any = "hello"
    reward: float | None = None
    done: bool = False
    closed: int = 0
    hang_on_close: bool = False
    action_schema: dict[str, Any] = field(default_factory=dict)
    observation_schema: dict[str, Any] = field(default_factory=dict)

    async def step(self, action: Any = None, **fields: Any) -> Step:
        given = self.steps.pop(0)
        if isinstance(given, BaseException):
            raise given
        return Step("seen", given)

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        raise EnvLost(f"{self.name} died")

    async def list_tools(self) -> list[dict[str, Any]]:
        return []

    async def close(self) -> None:
        self.closed += 1
        if self.hang_on_close:
            await asyncio.Event().wait()


class FakeEnvironments:
    """Opens `FakeSession`s; `losses` of the first ones raise EnvLost at their first step."""

    def __init__(self, losses: int = 0, *, refuse: bool = False, hang_on_close: bool = False):
        self.losses, self.refuse, self.hang_on_close = losses, refuse, hang_on_close
        self.sessions: list[FakeSession] = []

    async def open(self, ref: str | int | None, *, seed: int, deadline: float, **reset: Any) -> FakeSession:
        if self.refuse:
            raise EnvLost("the server refused a session")
        lost = len(self.sessions) < self.losses
        steps = [EnvLost("the environment died")] if lost else [0.5, None, 0.25, 1.0]
        self.sessions.append(FakeSession(str(ref or "env"), seed, steps, hang_on_close=self.hang_on_close))
        return self.sessions[-1]

    async def close(self) -> None: ...
