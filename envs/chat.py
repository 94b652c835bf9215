"""Chat templates without re-tokenising: how a conversation starts, what stands between two turns, what a turn says.

    start(messages)  <|im_start|>user ⏎ … <|im_end|> ⏎ <|im_start|>assistant ⏎
    the policy                                              … <|im_end|>           sampled; never rendered
    bridge(messages)                                        ⏎ <|im_start|>user ⏎ … <|im_end|> ⏎ <|im_start|>assistant ⏎

A bridge is cut out of the rendering of a made-up conversation, so it costs the same at every turn. Text of messages
is data (`rlx.envs.data_text`). Without a chat template there are no turns: text is appended as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from rlx.config import Config
from rlx.envs import template_check
from rlx.envs.data_text import DataText
from rlx.envs.messages import Message, Tool, made_up_call, normalised, with_string_arguments
from rlx.envs.tool_calls import Parsed, parse_calls
from rlx.errors import ConfigError, UserCodeError
from rlx.tokenizer import template_folder

_PREFIX_TOKENS = 256
"""So many tokens before a turn are shown to the parser: enough for the header of the turn."""


class TemplateRefused(UserCodeError):
    """The chat template does not render these messages; the message says in its words why."""


@dataclass(frozen=True)
class _Ending:
    """What a template writes from the end of an assistant's content on. `text` starts with the end-of-turn token
    where `closes`, and with what follows the turn otherwise."""

    text: str
    closes: bool


class Chat:
    """The chat template of a tokenizer. `tokenizer` is a fast one; `template_kwargs` are given to the template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None):
        if not tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer_config: {type(tokenizer).__name__} is not a fast tokenizer, and rollout functions need one. "
                "Name a tokenizer that has a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values() if token.content}
        special = {name for name, is_special in added.items() if is_special}
        self._special = sorted(special, key=len, reverse=True)
        self._special_ids = set(tokenizer.convert_tokens_to_ids(self._special))
        headers = {name for name in added if any(part.startswith(name) for part in self._headers())}
        markup = {name for name in added if name in (self.template or "")}
        self._data = DataText(tokenizer.backend_tokenizer, special | headers, markup)
        self._rendered_roles: set[str] = set()

    @property
    def template(self) -> str | None:
        """The text of the chat template; None without one."""
        template = self.tokenizer.chat_template
        return template["default"] if isinstance(template, dict) else template

    @cached_property
    def can_parse_tools(self) -> bool:
        """Whether the template renders tool calls and their results, and its tool calls can be parsed. The first time
        takes seconds: ask before the episodes begin."""
        return self.template is not None and template_check.renders_tools(self) and self._parser is not None

    def check(self, config: Config | None = None) -> None:
        """ConfigError unless every turn is rendered the same wherever it stands, which bridges rely on; it names the
        template that works. Without a template there is nothing to check."""
        if self.template is None or (fault := self.fault) is None:
            return
        where = f"{config.path}: " if config else ""
        raise ConfigError(f"{where}chat_template: {fault} {self._advice}")

    @staticmethod
    def tool_schema(function: Callable[..., Any]) -> Message:
        """The JSON schema of a tool, from its type hints and docstring; ValueError says what they lack."""
        try:
            return dict(get_json_schema(function))
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ValueError(str(error)) from error

    def start(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> np.ndarray:
        """Token ids int32 [P] of a conversation up to where the assistant speaks. UserCodeError when the template
        does not render it, ConfigError without a template or when it does not serve the tools."""
        schemas = self._tools(tools)
        if self.template is None:
            raise ConfigError(
                "chat_template: the tokenizer has none, so messages cannot be rendered. Set chat_template or "
                "chat_template_jinja, or continue token ids with ctx.generate(ids)."
            )
        return self._data.encode(self.render(self._escaped(messages), schemas))

    def bridge(
        self,
        messages: Sequence[Message],
        last_ids: np.ndarray,
        *,
        calls: Sequence[Message] = (),
        tools: Sequence[Tool] | None = None,
    ) -> np.ndarray:
        """Token ids int32 [N] between a sampled turn that ends with `last_ids` int32 and the next: the end of the turn
        as far as it was not sampled, `messages`, and the header of the assistant.

        `calls` are the tool calls of that turn, as in its message. UserCodeError when the template does not render
        `messages` there.
        """
        self.check()
        ending = self._ending(self._escaped(messages), calls, self._tools(tools))
        ids = self._after_turn(ending.text)
        last = int(last_ids[-1]) if len(last_ids) else -1
        sampled_end = last in self._special_ids if ending.closes else last == ids[0]
        return ids[1:] if sampled_end else ids

    def text(self, *messages: Message) -> np.ndarray:
        """Token ids int32 [N] of the contents alone, one after the other: for rows that are not chats."""
        contents = "".join(message["content"] for message in self._escaped(messages))
        return self._after_turn(contents)

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids` int32 [T] without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def ends_turn(self, ids: np.ndarray) -> bool:
        """Whether `ids` int32 [T] end with a special token: the policy has ended its turn by itself."""
        return bool(len(ids)) and int(ids[-1]) in self._special_ids

    def parse(self, ids: np.ndarray, prompt_ids: np.ndarray, tools: Sequence[Tool] | None, number: int = 0) -> Parsed:
        """What the turn `ids` int32 [T] says after `prompt_ids` int32 [P]: its message and its tool calls, of which
        the first has the id of `number`."""
        if not tools or self._parser is None:
            return Parsed({"role": "assistant", "content": self.decode(ids)}, ())
        said = self.tokenizer.decode(ids.tolist())
        before = self.tokenizer.decode(prompt_ids[-_PREFIX_TOKENS:].tolist())
        schemas = self._tools(tools)
        parsed = parse_calls(lambda text, form: self._parse(text, form, before, schemas), said, self._parser, number)
        return parsed or Parsed({"role": "assistant", "content": self.decode(ids)}, ())

    def render(
        self, messages: Sequence[Message], tools: list[Message] | None = None, generation_prompt: bool = True
    ) -> str:
        """The text of the template for `messages`; TemplateRefused when it raises."""

        def rendered(some: Sequence[Message]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    list(some),
                    tools=tools,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                    **self._template_kwargs,
                )
            )

        try:
            try:
                return rendered(messages)
            except TypeError:  # some templates (DeepSeek-V3's) add the arguments of a call to a string
                return rendered([with_string_arguments(message) for message in messages])
        except (TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateRefused(f"the chat template does not render messages of {roles}: {error}") from error

    # --- the parts of a bridge

    def _headers(self) -> list[str]:
        """What the template begins a user's and the assistant's turn with; in some families no special token."""
        if self.template is None:
            return []
        try:
            user = self.render([_QUESTION], generation_prompt=False)
            assistant = self.render([_QUESTION])
        except TemplateRefused:  # said again, with the messages, when it is asked to render some
            return []
        return [user.removeprefix(self.tokenizer.bos_token or ""), assistant.removeprefix(user)]

    def _ending(self, messages: list[Message], calls: Sequence[Message], tools: list[Message] | None) -> _Ending:
        mark = f"{self._data.nonce}a"
        answers = [message for message in messages if message["role"] == "tool"]
        if not answers:
            return self._cut([_QUESTION, {"role": "assistant", "content": mark}], messages, tools, mark)
        made_up = [made_up_call(answer, index, mark, calls) for index, answer in enumerate(answers)]
        try:
            turn = {"role": "assistant", "content": "", "tool_calls": made_up}
            return self._cut([_QUESTION, turn], messages, tools, mark)
        except TemplateRefused:  # Llama's renders one call a turn
            turn = {"role": "assistant", "content": "", "tool_calls": made_up[:1]}
            return self._cut([_QUESTION, turn], messages, tools, mark)

    def _cut(self, opening: list[Message], messages: list[Message], tools: list[Message] | None, mark: str) -> _Ending:
        self._nothing_dropped(messages, tools)
        alone = self.render(opening, tools, generation_prompt=False).rpartition(mark)[2]
        whole = self.render([*opening, *messages], tools)
        if mark not in whole:
            raise TemplateRefused("the chat template leaves out the assistant's turn")
        after = whole.rpartition(mark)[2]
        of_turn = _common_prefix(alone, after)
        calls = bool(opening[-1].get("tool_calls"))
        ends = [found for name in self._special if (found := of_turn.rfind(name)) >= 0]
        if ends:
            return _Ending(after[max(ends) :], closes=True)
        return _Ending(after[len(of_turn) :] if calls else after, closes=False)

    def _after_turn(self, text: str) -> np.ndarray:
        """`text` as it is encoded behind a turn: some tokenizers put a space before the first word of a text."""
        end = self.tokenizer.eos_token
        return self._data.encode(end + text)[1:] if end in self._special else self._data.encode(text)

    def _nothing_dropped(self, messages: list[Message], tools: list[Message] | None) -> None:
        for role in {str(message["role"]) for message in messages} - self._rendered_roles:
            mark = f"{self._data.nonce}m"
            message = {"role": role, "content": mark, "name": "tool"}
            turn: Message = {"role": "assistant", "content": "x"}
            if role == "tool":
                turn = {**turn, "content": "", "tool_calls": [made_up_call(message, 0, "x", ())]}
            if mark not in self.render([_QUESTION, turn, message], tools):
                raise TemplateRefused(f"the chat template leaves out messages of the role {role!r}")
            self._rendered_roles.add(role)

    # --- messages and tools as templates take them

    def _escaped(self, messages: Sequence[Message]) -> list[Message]:
        return [
            {**self._data.escape(message, observation=message["role"] == "tool"), "role": message["role"]}
            for message in map(normalised, messages)
        ]

    def _tools(self, tools: Sequence[Tool] | None) -> list[Message] | None:
        if not tools:
            return None
        if not self.can_parse_tools:
            raise ConfigError(
                "chat_template: tools are used, but this template does not render them, or its tool calls are of a "
                "family that is not known here. Set chat_template to one of a known family, for example "
                "qwen3_training, or a response_template on the tokenizer."
            )
        schemas = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
        return list(self._data.escape(schemas))

    @cached_property
    def _parser(self) -> dict[str, Any] | None:
        """transformers' response template of the model's family: the tokenizer's own, or that which TRL knows."""
        if own := self.tokenizer.response_template:
            return dict(own)
        name = _shipped_name(self.template)
        if name is None:
            return None
        from trl.chat_template_utils import add_response_schema  # takes seconds

        holder = SimpleNamespace(chat_template=_shipped(name.removesuffix("_training")))
        try:
            add_response_schema(holder)
        except ValueError:  # a family without tool calls
            return None
        return dict(holder.response_template)

    def _parse(self, text: str, form: Mapping[str, Any], before: str, tools: list[Message] | None) -> dict[str, Any]:
        message = dict(self.tokenizer.parse_response(text, schema=dict(form), prefix=before, tools=tools))
        content = message.get("content")
        if isinstance(content, str):  # parsers leave the end of a turn where they do not expect one
            message["content"] = content.removesuffix(self.tokenizer.eos_token)
        return message

    @cached_property
    def fault(self) -> str | None:
        """What is wrong with the template for more than one turn; None when nothing."""
        try:
            return template_check.fault(self)
        except TemplateRefused as error:
            return f"{error}."

    @property
    def _advice(self) -> str:
        name = f"{_shipped_name(self.template)}_training"
        if (template_folder() / f"{name}.jinja").is_file():
            other = copy.copy(self.tokenizer)
            other.chat_template = _shipped(name)
            if Chat(other, self._template_kwargs).fault is None:
                return f"Set `chat_template: {name}`, which keeps it as it is."
        return (
            "No template that TRL ships is a variant of it that works: write your own in chat_template_jinja, one that renders every turn "
            "the same wherever it stands, thinking and tool calls included."
        )


_QUESTION = {"role": "user", "content": "x"}


def _common_prefix(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _shipped(name: str) -> str:
    return (template_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def _shipped_name(template: str | None) -> str | None:
    """The name under which TRL ships this very text."""
    names = sorted(path.stem for path in template_folder().glob("*.jinja"))
    return next((name for name in names if _shipped(name) == template), None)
