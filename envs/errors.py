"""What ends an episode before its function returns; and an action that does not."""

from __future__ import annotations

from rlx.errors import RlxError


class EnvLost(RlxError):
    """An environment died, hung, broke its protocol or gave no session. The message names it and what it did.

    The episode ends as `env_lost`, also where the user's function catches this.
    """


class EpisodeTruncated(RlxError):
    """The token budget of the episode is used up: nothing more can be sampled. The episode ends as `truncated` and
    keeps its rows and the rewards given so far."""


class ActionError(RlxError, ValueError):
    """An action that the environment does not take: it does not fit its schema. The session goes on; the message says
    what to send instead, so that a policy can be told."""
