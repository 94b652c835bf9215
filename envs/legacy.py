"""Three older shapes of rollout functions, each run once per episode with a list of one prompt, in a thread.

    documented  (model, processing_class, prompts, generation_config=None) -> list[str]
    trl         (prompts, trainer) -> dict
    trl_0_25    (prompts, args, processing_class) -> dict

What they are handed is in `rlx.envs.facades`; everything that it samples is on the tape, and the tape alone is
trained. What they return is what the rewards see, and says whether the episode is exact: whether the samples stand
in it whole and in their order, with nothing else than white space and what the model was shown in its prompts. A
function that drops or edits samples, or adds text of its own making at the end, is not exact; one that never sampled
is refused, and so is a dict whose parts do not fit together.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlx.config import Config
from rlx.envs.chat import Chat
from rlx.envs.errors import EpisodeTruncated
from rlx.envs.facades import Arguments, Model, Trainer, for_threads, model_config
from rlx.envs.generate_server import GenerateServer
from rlx.envs.generation import Generator
from rlx.envs.rollout import Rollout
from rlx.envs.threads import Bridge, in_thread
from rlx.errors import UserCodeError

_DICT = 'return {"prompt_ids": [[...]], "completion_ids": [[...]], "logprobs": [[...]]}'
_REQUIRED = ("prompt_ids", "completion_ids", "logprobs")


class Legacy:
    """A native function around `function`, which has the shape called `shape`."""

    def __init__(self, function: Callable[..., Any], shape: str, config: Config, chat: Chat):
        self._function, self._shape, self._config = function, shape, config
        self._tokenizer = for_threads(chat.tokenizer)
        self._name = str(config.trl.rollout_func)

    async def __call__(self, ctx: Rollout) -> None:
        bridge = Bridge()
        generator = Generator(ctx, bridge, self._tokenizer)
        play = {"documented": self._documented, "trl": self._trl, "trl_0_25": self._trl_0_25}[self._shape]
        try:
            await in_thread(lambda: play(ctx, generator), f"{self._name} of {ctx.group_id}, episode {ctx.index}")
        finally:
            bridge.close()

    def _documented(self, ctx: Rollout, generator: Generator) -> None:
        model = Model(generator, model_config(self._tokenizer, self._config.max_model_len))
        try:
            returned = self._call(model=model, processing_class=self._tokenizer, prompts=[documented_prompt(ctx.task)])
        except EpisodeTruncated:
            ctx.completion = "\n".join(call.text for call in generator.calls)  # a string, as its rewards expect
            raise
        text = self._one_string(returned)
        self._must_have_sampled(generator, "model.generate(...)")
        ctx.completion = text
        ctx.exact = accounted_for(
            text,
            [call.text.strip() for call in generator.calls],
            [
                self._tokenizer.decode(call.prompt_ids, skip_special_tokens=s)
                for call in generator.calls
                for s in (True, False)
            ],
        )

    def _trl(self, ctx: Rollout, generator: Generator) -> None:
        trainer = Trainer(generator, Arguments(self._config, ctx.sampling, _no_server))
        returned = self._call(prompts=[ctx.task["prompt"]], trainer=trainer)
        self._take(ctx, generator, returned, "trainer.vllm_generation.generate(...)")

    def _trl_0_25(self, ctx: Rollout, generator: Generator) -> None:
        server = GenerateServer(generator)
        try:
            args = Arguments(self._config, ctx.sampling, lambda: server.port)
            prompt = self._as_text(ctx.task["prompt"])
            returned = self._call(prompts=[prompt], args=args, processing_class=self._tokenizer)
        finally:
            server.close()
        self._take(ctx, generator, returned, 'requests.post(f"{args.vllm_server_base_url}/generate/", json=...)')

    def _call(self, **arguments: Any) -> Any:
        returned = self._function(**arguments)
        return asyncio.run(_wait(returned)) if inspect.isawaitable(returned) else returned

    def _as_text(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        kwargs = self._config.trl.chat_template_kwargs
        return str(self._tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs))

    # --- what it returned

    def _error(self, message: str) -> UserCodeError:
        return UserCodeError(f"trl.rollout_func ({self._name}) {message}")

    def _must_have_sampled(self, generator: Generator, how: str) -> None:
        if not generator.calls:
            raise self._error(f"never generated through what it was given, so there is nothing to train. Use {how}.")

    def _one_string(self, returned: Any) -> str:
        if not isinstance(returned, list | tuple):
            raise self._error(
                f"returned {_describe(returned)}. Return a list with one string per prompt: `return completions`."
            )
        if len(returned) != 1:
            raise self._error(
                f"returned {len(returned)} completions for 1 prompt. It is called once per episode: append one string to "
                "the list for each of `prompts`."
            )
        if not isinstance(returned[0], str):
            raise self._error(
                f"returned a list that holds {_describe(returned[0])}. Its items must be strings: "
                "`completions.append(processing_class.decode(outputs[0][inputs.input_ids.shape[1]:]))`."
            )
        return returned[0]

    def _take(self, ctx: Rollout, generator: Generator, returned: Any, how: str) -> None:
        """Check a dict of TRL's form, and give the rewards what is in it."""
        if not isinstance(returned, Mapping):
            raise self._error(f"returned {_describe(returned)}. Write `{_DICT}`.")
        if missing := [name for name in _REQUIRED if name not in returned]:
            raise self._error(f"returned a dict without {', '.join(missing)}. Write `{_DICT}`.")
        self._must_have_sampled(generator, how)
        own = {name: self._single(name, value) for name, value in returned.items() if name != "logprob_token_ids"}
        ids = self._ids("completion_ids", own.pop("completion_ids"))
        self._ids("prompt_ids", own.pop("prompt_ids"))
        self._check_logprobs(own.pop("logprobs"), len(ids))
        mask = self._mask(own.pop("env_mask", None), len(ids))
        ctx.exact = self._exact(generator, ids, mask)
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        ctx.completion = text if isinstance(ctx.task["prompt"], str) else [{"role": "assistant", "content": text}]
        ctx.extra.update(own)

    def _single(self, name: str, value: Any) -> Any:
        values = _plain(value)
        if not isinstance(values, list):
            raise self._error(f"returned {_describe(value)} as {name!r}. Return a list with one item per prompt.")
        if len(values) != 1:
            raise self._error(
                f"returned {len(values)} items in {name!r} for 1 prompt. It is called once per episode: append one item "
                "for each of `prompts`."
            )
        try:
            return json.loads(json.dumps(values[0]))
        except (TypeError, ValueError) as error:
            raise self._error(
                f"returned {_describe(values[0])} in {name!r}. Return numbers, strings, lists or dicts."
            ) from error

    def _ids(self, name: str, ids: Any) -> list[int]:
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise self._error(f"returned {_describe(ids)} in {name!r}. Return a list of token ids for each prompt.")
        if not ids:
            raise self._error(
                f"returned no token ids in {name!r}. Return all that was sampled; an answer that ends at once is still "
                "its end-of-sequence token."
            )
        return ids

    def _check_logprobs(self, logprobs: Any, count: int) -> None:
        nested = isinstance(logprobs, list) and all(isinstance(one, list) and len(one) == 1 for one in logprobs)
        flat = [one[0] for one in logprobs] if nested else logprobs
        if not isinstance(flat, list) or not all(isinstance(one, int | float) for one in flat):
            raise self._error(
                f"returned {_describe(logprobs)} in 'logprobs'. Return one number per token: "
                "`[logprob for [logprob] in logprobs]` where generate gave [T][1]."
            )
        if len(flat) != count:
            raise self._error(
                f"returned {count} completion_ids with {len(flat)} logprobs. Return one for each token, 0.0 for those of "
                "the environment."
            )

    def _mask(self, mask: Any, count: int) -> list[bool] | None:
        if mask is None:
            return None
        if not isinstance(mask, list) or not all(value in (0, 1) for value in mask):
            raise self._error(f"returned {_describe(mask)} in 'env_mask'. Return 1 for sampled tokens, 0 for others.")
        if len(mask) != count:
            raise self._error(
                f"returned {count} completion_ids with {len(mask)} values of env_mask. Return one for each."
            )
        return [bool(value) for value in mask]

    def _exact(self, generator: Generator, ids: list[int], mask: list[bool] | None) -> bool:
        samples = [_as_text(call.ids) for call in generator.calls]
        spans = spans_of(samples, _as_text(ids))
        if not any(spans):
            raise self._error(
                "returned completion_ids with none of the tokens that it sampled. Return the completion_ids that "
                "generate gave."
            )
        if mask is not None:
            sampled = [any(span and span[0] <= i < span[1] for span in spans) for i in range(len(ids))]
            return all(spans) and mask == sampled
        return accounted_for(_as_text(ids), samples, [_as_text(call.prompt_ids) for call in generator.calls])


class _Prompt:
    """Makes the prompt a mapping as well: `prompt["messages"]`, `prompt.get("answer")`, `"messages" in prompt`."""

    row: dict[str, Any]

    def __getitem__(self, key: Any) -> Any:
        return self.row[key] if isinstance(key, str) else super().__getitem__(key)  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return key in self.row if isinstance(key, str) and key in self.row else super().__contains__(key)  # type: ignore[misc]

    def get(self, key: str, default: Any = None) -> Any:
        return self.row.get(key, default)

    def keys(self) -> Iterable[str]:
        return self.row.keys()


class _ChatPrompt(_Prompt, list[Any]): ...


class _TextPrompt(_Prompt, str): ...


def documented_prompt(task: Mapping[str, Any]) -> Any:
    """The prompt of a row as the documented shape has it: the messages, or the string, and the row as a mapping with
    one more key, `messages`. A plain string is one message of the user there."""
    prompt = task["prompt"]
    plain = isinstance(prompt, str)
    both = _TextPrompt(prompt) if plain else _ChatPrompt(dict(message) for message in prompt)
    messages = [{"role": "user", "content": prompt}] if plain else [dict(message) for message in prompt]
    both.row = {"messages": messages, **task}
    return both


def spans_of(samples: Sequence[str], claim: str) -> list[tuple[int, int] | None]:
    """Where each sample stands in `claim`, in their order and without overlap; None where it does not."""
    spans: list[tuple[int, int] | None] = []
    position = 0
    for sample in samples:
        start = claim.find(sample, position)
        spans.append(None if start < 0 else (start, start + len(sample)))
        position = position if start < 0 else start + len(sample)
    return spans


def accounted_for(claim: str, samples: Sequence[str], shown: Sequence[str]) -> bool:
    """Whether `claim` is the samples in their order, and between them white space or text that is in `shown`."""
    spans = spans_of(samples, claim)
    position, others = 0, []
    for span in spans:
        if span is None:
            return False
        others.append(claim[position : span[0]].strip())
        position = span[1]
    others.append(claim[position:].strip())
    return all(any(other in text for text in shown) for other in others if other)


def _as_text(ids: Sequence[int]) -> str:
    """One character a token, none of them white space, so that token ids can be searched like text."""
    return "".join(chr(0x3400 + i) for i in ids)


def _plain(value: Any) -> Any:
    """Tensors and arrays, also inside a list, as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a value of type {type(value).__name__})"


def _no_server() -> int:
    raise UserCodeError("there is no server to call here. Use trainer.vllm_generation.generate(prompts=...).")


async def _wait(returned: Any) -> Any:
    return await returned
