"""One training row while it is written: every token once, in order, sampled or context. Nothing is re-tokenised."""

from __future__ import annotations

import numpy as np

from rlx.episode import CONTEXT, Row
from rlx.wire import Completion


class Tape:
    """A prompt of P tokens and the T tokens after it.

    `prompt_ids` int32 [P]; `group_prompt` says that it is the prompt of the group, which a row need not repeat.
    """

    def __init__(self, prompt_ids: np.ndarray, *, group_prompt: bool):
        self.prompt_ids = np.asarray(prompt_ids, dtype=np.int32)
        self._group_prompt = group_prompt
        self._ids = [self.prompt_ids]
        self._logprobs: list[np.ndarray] = []
        self._versions: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """T, the tokens after the prompt, context included."""
        return sum(count for _, count in self._versions)

    @property
    def num_sampled(self) -> int:
        return sum(count for version, count in self._versions if version != CONTEXT)

    def ids(self) -> np.ndarray:
        """int32 [P + T]: what the policy continues."""
        self._ids = [np.concatenate(self._ids)]
        return self._ids[0]

    def context(self, ids: np.ndarray) -> None:
        """Append tokens that nobody sampled; they are not trained. `ids` int32 [N]."""
        self._append(ids, np.full(len(ids), np.nan, np.float32), ((CONTEXT, len(ids)),))

    def sampled(self, completion: Completion) -> None:
        """Append what the policy sampled, exactly as it was sampled."""
        self._append(completion.ids, completion.logprobs, completion.versions)

    def extended_by(self, ids: np.ndarray) -> bool:
        """Whether `ids` int32 [N] begin with all of this row, its prompt included."""
        own = self.ids()
        return len(own) <= len(ids) and np.array_equal(own, ids[: len(own)])

    def row(self) -> Row:
        """The training row. Context after the last sampled token is left out: nothing follows from it."""
        versions = list(self._versions)
        while versions and versions[-1][0] == CONTEXT:
            versions.pop()
        length = sum(count for _, count in versions)
        start = len(self.prompt_ids)
        logprobs = np.concatenate([*self._logprobs, np.empty(0, np.float32)])
        return Row(
            ids=self.ids()[start : start + length].copy(),
            logprobs=logprobs[:length],
            versions=tuple(versions),
            prompt_ids=None if self._group_prompt else self.prompt_ids,
        )

    def _append(self, ids: np.ndarray, logprobs: np.ndarray, versions: tuple[tuple[int, int], ...]) -> None:
        self._ids.append(np.asarray(ids, dtype=np.int32))
        self._logprobs.append(np.asarray(logprobs, dtype=np.float32))
        for version, count in versions:
            if count and self._versions and self._versions[-1][0] == version:
                self._versions[-1] = (version, self._versions[-1][1] + count)
            elif count:
                self._versions.append((version, count))
