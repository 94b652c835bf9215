"""What a worker is charged with while it works, and what its answers say of it; for `with`."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rlx.errors import ServiceUnavailable

if TYPE_CHECKING:
    from rlx.rollout.fleet import Fleet, Member


class Marking:
    """`with`: a worker that says it is gone is down from then on; one that answers has survived its restarts.

    A class, as is `Charge`: generators would take longer than all else that is done to charge a worker."""

    __slots__ = ("_fleet", "_incarnation", "member")

    def __init__(self, fleet: Fleet, member: Member):
        self._fleet, self.member, self._incarnation = fleet, member, member.incarnation

    def __enter__(self) -> Member:
        return self.member

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.member.incarnation != self._incarnation:
            return
        if isinstance(error, ServiceUnavailable):
            self._fleet.mark_down(self.member, str(error))
        elif error is None:
            self.member.restarts = 0


class Charge(Marking):
    """Charges a worker from now on until the end of `with`, or `close`; then `ended` hears of it, once."""

    __slots__ = ("_completions", "_ended", "_tokens")

    def __init__(self, fleet: Fleet, member: Member, completions: int, tokens: int, ended: Callable[[Member], None]):
        super().__init__(fleet, member)
        self._completions, self._tokens = completions, tokens
        self._ended: Callable[[Member], None] | None = ended
        member.worked = True
        member.in_flight += completions
        member.tokens_in_flight += tokens

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended, self._ended = self._ended, None
        if ended is None:
            return
        super().__exit__(kind, error, traceback)
        self.member.in_flight -= self._completions
        self.member.tokens_in_flight -= self._tokens
        if self.member.state == "draining":
            self.member.changed.set()
        ended(self.member)

    def close(self) -> None:
        self.__exit__(None, None, None)
