"""A counter as an OpenEnv server: it shows what to add, and goes on from the right reply.    python server.py PORT

Runs in an environment of its own, with `openenv` and without rlx.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

MAX_SESSIONS = 64
NUM_SUMS = 3


class Reply(Action):
    """An action of one text: the player sends what the policy says as it is."""

    reply: str


class Question(Observation):
    message: str


class Counter(Environment[Reply, Question, State]):
    """A number below 31, raised three times. Each right reply is worth 1; a wrong one ends the game."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **arguments: Any) -> Question:
        self._random = random.Random(seed)
        self._number, self._asked = self._random.randrange(11, 31), 0
        return Question(message=self._next_sum())

    def step(self, action: Reply, timeout_s: float | None = None, **arguments: Any) -> Question:
        self._number += self._raise
        if action.reply.strip() != str(self._number):
            return Question(message="wrong", reward=0.0, done=True)
        if self._asked == NUM_SUMS:
            return Question(message="done", reward=1.0, done=True)
        return Question(message=self._next_sum(), reward=1.0)

    @property
    def state(self) -> State:
        return State(step_count=self._asked)

    def _next_sum(self) -> str:
        """By a number that makes the ones carry, where there is one."""
        carrying = [n for n in range(11, 30) if self._number % 10 + n % 10 > 9]
        self._raise = self._random.choice(carrying or [20])
        self._asked += 1
        return f"{self._number}+{self._raise}="


if __name__ == "__main__":
    app = create_fastapi_app(Counter, Reply, Question, max_concurrent_envs=MAX_SESSIONS)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
