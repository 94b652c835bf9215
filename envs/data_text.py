"""Text that stays data: a tokenizer in which no text of a message can become a special token.

A chat template writes special tokens such as `<|im_start|>` as text, and so may an observation. Here the special
tokens have another name, a secret of the process: the template's own are renamed after rendering, those of the
messages are not, so that the tokenizer takes them for plain text. Everything else is tokenised as ever, in one piece.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rlx.envs.messages import whole


class DataText:
    """Encodes rendered templates. Text goes through `escape` before it is rendered, the rendering through `encode`.

    `guarded` are the special tokens; `markup` are other added tokens (`<tool_response>`) that only observations must
    not forge: users and systems may well name them. `core` is not changed.
    """

    def __init__(self, core: Tokenizer, guarded: Iterable[str], markup: Iterable[str]):
        self.nonce = f"rlx{secrets.token_hex(8)}"
        names = sorted({*guarded, *markup}, key=lambda name: (-len(name), name))
        self._index = {name: index for index, name in enumerate(names)}
        self._names = names
        self._any = _one_of(names)
        self._guarded = _one_of([name for name in names if name in set(guarded)])
        self._escaped = re.compile(rf"{self.nonce}d(\d+)x")
        self._core, self._ids = _renamed(core, {name: self._secret(name) for name in names})

    def escape(self, value: Any, *, observation: bool = False) -> Any:
        """`value`, JSON of any shape, with the names of special tokens in its strings escaped; in the text of an
        `observation` also those of markup."""
        if isinstance(value, str):
            pattern = self._any if observation else self._guarded
            return pattern.sub(lambda found: f"{self.nonce}d{self._index[found[0]]}x", value)
        if isinstance(value, dict):
            return {
                self.escape(key, observation=observation): self.escape(item, observation=observation)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.escape(item, observation=observation) for item in value]
        return value

    def encode(self, rendered: str) -> np.ndarray:
        """Token ids int32 [T] of a rendering, in which only what the template wrote becomes special tokens."""
        text = self._any.sub(lambda found: self._secret(found[0]), rendered)
        text = self._escaped.sub(lambda found: self._names[int(found[1])], text)
        ids = self._core.encode(whole(text), add_special_tokens=False).ids
        return np.asarray([self._ids.get(i, i) for i in ids] if self._ids else ids, dtype=np.int32)

    def _secret(self, name: str) -> str:
        return f"{self.nonce}t{self._index[name]}x"


def _one_of(names: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _renamed(core: Tokenizer, names: dict[str, str]) -> tuple[Tokenizer, dict[int, int]]:
    """A copy of `core` whose added tokens have other names, and the ids of the copy that differ from those of `core`."""
    spec = json.loads(core.to_str())
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    spec["post_processor"] = None
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.no_truncation()
    copy.no_padding()
    ids = [(copy.token_to_id(new), core.token_to_id(old)) for old, new in names.items()]
    return copy, {new: old for new, old in ids if new is not None and old is not None and new != old}


def _touches(merge: str | list[str], names: dict[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
