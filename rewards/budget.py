"""How much of what the user's code was given may fail before the run stops."""

from __future__ import annotations

from collections import Counter, deque

from rlx.errors import UserCodeError

ALL_FAILED = 16
"""As many failures without a single success are not a share of anything: the code does not work."""


class FailureBudget:
    """Counts successes and failures in order; `check` raises when there are more failures than `share` allows.

    Too many are: over `share` × `window` failures among the last `window` items, so that short runs are stopped as
    early as long ones; or ALL_FAILED and more items of which none succeeded. A share of 0 allows none, 1 never stops.
    `key` is the configuration key of the share, `items` what is counted; both are for the message.
    """

    def __init__(self, share: float, window: int = 200, *, key: str = "the failure budget", items: str = "samples"):
        self._share, self._key, self._items = share, key, items
        self._recent: deque[str] = deque(maxlen=window)  # the kind of the failure, "" for a success
        self._begin()

    def _begin(self) -> None:
        self._recent.clear()
        self.counts: Counter[str] = Counter()
        """Failures of this run, by kind."""
        self.first_cause = ""
        self._succeeded = 0

    def record(self, ok: int, failed: int, cause: str = "", kind: str = "failed") -> None:
        """Count `ok` successes and `failed` failures of one `kind`; the first cause ever given is kept."""
        self.first_cause = self.first_cause or (cause if failed else "")
        self._succeeded += ok
        self._recent.extend([""] * ok + [kind] * failed)
        if failed:
            self.counts[kind] += failed

    def check(self, who: str) -> None:
        """UserCodeError about `who`, with the counts and the first cause, when too many have failed.

        That ends a run; counting begins anew for the next one, as the service goes on.
        """
        recent = Counter(kind for kind in self._recent if kind)
        failed, num_recent = recent.total(), len(self._recent)
        allowed = round(self._share * (self._recent.maxlen or 0), 6)
        never = not self._succeeded and self.counts.total() >= ALL_FAILED
        if self._share >= 1 or (failed <= allowed and not never):
            return
        kinds = ", ".join(f"{count} {kind}" for kind, count in recent.most_common())
        rule = f"{self._key} = {self._share:g} allows {allowed:g} of {self._recent.maxlen}"
        first_cause = self.first_cause
        self._begin()
        raise UserCodeError(
            f"{who} failed for {failed} of the last {num_recent} {self._items} ({kinds}); "
            f"{'not one has succeeded' if never else rule}. The first failure:\n{first_cause}"
        )
