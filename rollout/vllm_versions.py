"""Which weight version sampled each token, exactly.

vLLM cannot say, so tokens are counted at each swap. `mark` is called when nothing can change the counts: generation
is paused and everything that was sampled has been booked (see `VllmEngine.commit`). What a sequence holds then came
from the old weights, what it gets later from the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TokenVersions:
    """The versions of one request's `n` sequences. `start` is the version when it was admitted."""

    start: int
    cuts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """sequence index → (tokens it had, version from there on) for each swap that it lived through"""

    def mark(self, index: int, num_tokens: int, new_version: int) -> None:
        self.cuts.setdefault(index, []).append((num_tokens, new_version))

    def runs(self, index: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Run-length encoded `(version, count)` of the sequence's `num_tokens` tokens."""
        runs, version, begin = [], self.start, 0
        for end, next_version in [*self.cuts.get(index, []), (num_tokens, -1)]:
            if end > begin:
                runs.append((version, end - begin))
            version, begin = next_version, end
        return tuple(runs)
