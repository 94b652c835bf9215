"""The environment of an episode as reward functions see it: they run in another process, after the episode."""

from __future__ import annotations

from typing import Any

COLUMN = "environments"
"""What TRL calls it among the arguments of a reward function."""


class EnvironmentState(dict[str, Any]):
    """The public attributes that the environment had at the end, as far as they are JSON: `environment.total`, and
    `environment["total"]`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(
            f"environments: {name!r} is not here. A reward function runs in another process than the environment, and gets "
            f"its public attributes that are JSON: {', '.join(sorted(self)) or 'none'}. Set one in a method of the "
            "environment, or let its get_reward() give the reward."
        )
