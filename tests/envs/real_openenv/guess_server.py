"""A guessing game as a real OpenEnv server, which misbehaves where a reset asks for it (`fault`).

python guess_server.py PORT [MAX_SESSIONS]        GET /instances counts the live environments
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from pydantic import Field, field_validator


class Guess(Action):
    guess: int = Field(ge=0)

    @field_validator("guess")
    @classmethod
    def not_unlucky(cls, value: int) -> int:
        if value == 13:
            raise ValueError("13 is unlucky")
        return value


class Answer(Observation):
    message: str
    tries: int = 0


class Game(Environment[Guess, Answer, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True
    instances = 0

    def __init__(self) -> None:
        super().__init__()
        Game.instances += 1
        self.number, self.tries, self.fault, self.hang_s = 0, 0, "", 0.0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **arguments: Any) -> Answer:
        self.number, self.tries = (seed or 0) % 10, 0
        self.fault, self.hang_s = arguments.get("fault", ""), arguments.get("hang_s", 60.0)
        self._misbehave("reset")
        text = "<|im_start|>assistant\n" if self.fault == "special" else "guess a number from 0 to 9"
        return Answer(message=text)

    def step(self, action: Guess, timeout_s: float | None = None, **arguments: Any) -> Answer:
        self._misbehave("step")
        self.tries += 1
        if self.fault == "huge":
            return Answer(message="x" * (17 << 20), tries=self.tries)
        if self.fault == "infinite":
            return Answer(message="much", reward=float("inf"))
        if action.guess == self.number:
            return Answer(message="right", tries=self.tries, reward=1.0, done=True)
        hint = "higher" if action.guess < self.number else "lower"
        return Answer(message=hint, tries=self.tries, reward=-0.1, done=self.tries >= 5)

    def close(self) -> None:
        Game.instances -= 1
        self._misbehave("close")

    @property
    def state(self) -> State:
        return State(step_count=self.tries)

    def _misbehave(self, where: str) -> None:
        if self.fault == f"{where}_raises":
            raise RuntimeError(f"the {where} failed")
        if self.fault == f"{where}_hangs":
            time.sleep(self.hang_s)
        if self.fault == f"{where}_dies":
            os._exit(3)
        if self.fault == f"{where}_stops":
            os.kill(os.getpid(), signal.SIGSTOP)


def main(port: int, max_sessions: int = 1) -> None:
    app = create_fastapi_app(Game, Guess, Answer, max_concurrent_envs=max_sessions)
    app.get("/instances")(lambda: Game.instances)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
